"""The same prompts decoded by several methods: identical text, and what each method brought.

The methods take turns, each prompt once per method and with a fresh drafter; ids are held against
our plain loop, and where they part the place is judged as a numerical tie or as different. `hf`
and `hf-prompt-lookup` are transformers' own `generate`, as references from outside. A method with
`lossless = False` is not held against the plain text; where there is one, texts are judged by their
quality.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pertoken._answers import answers
from pertoken._pieces import pieces
from pertoken._replies import drawing
from pertoken.compare_report import REFERENCE, Comparison, Decoded
from pertoken.errors import PertokenError
from pertoken.prompts import Prompt, encode_prompt, read_prompts

if TYPE_CHECKING:
    import torch

    from pertoken.testing.setups import Setup

__all__ = ["DEFAULT_METHODS", "Comparison", "compare"]

DEFAULT_METHODS = (
    REFERENCE,
    "goose",
    "token-recycling",
    "prompt-lookup",
    "suffix",
    "hf",
    "hf-prompt-lookup",
)
"""What `compare` takes where no method is named, the reference first."""

DEFAULT_NEW_TOKENS = 40  # with these methods and the sample: under three minutes on two slow cores
_WARM_UP_TOKENS = 8  # enough for each method to draft once or twice

Budget = int | Literal["auto"] | None
Progress = Callable[[str, int, int], None]
"""Called with (what goes on now, calls done, calls in all)."""


def compare(
    methods: Sequence[str] | None = None,
    *,
    prompts: Sequence[Prompt | str] | str | Path | None = None,
    model: str | Path | tuple[Any, Any] = "smollm2",
    dtype: str | torch.dtype | None = None,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    budget: Budget = None,
    limit: int | None = None,
    keep: bool = False,
    chat: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Decode prompts greedily with each method in turn and return what they did, with a table.

    methods: slugs of `pertoken list --family decode`, "hf", "hf-prompt-lookup"; the reference
        "plain" is added where it is missing. None means `DEFAULT_METHODS`.
    prompts: texts, `Prompt`s, or a .txt or .jsonl file; None means the built-in sample.
    model: what `pertoken.load` takes, or a pair (model, tokenizer).
    budget: nodes drafted per step, "auto" for the drafter's own choice, None for the published
        default of each method.
    keep: one drafter per method for all prompts, which keeps what it learned.
    seed: of what a method draws; torch's generator is left as it was.

    Raises `PertokenError`, before anything is decoded, for what the caller can mend.

        result = pertoken.compare(["goose", "hf"], limit=2)
        print(result.table())
    """
    names = method_names(methods)
    check_numbers(max_new_tokens, budget)
    chosen = _prompts(prompts, limit)
    tell = progress or (lambda what, done, total: None)
    for name in names:
        _maker(name, budget, keep)()  # a wrong name is said before a model is loaded
    loaded, tokenizer = _loaded(model, dtype, tell)
    makers = {name: _maker(name, budget, keep, tokenizer) for name in names}
    lossy = frozenset(name for name in names if not getattr(makers[name](), "lossless", True))
    ids = [_encoded(tokenizer, loaded, p, max_new_tokens, chat) for p in chosen]
    settings = {
        "model": str(model) if isinstance(model, str | Path) else type(loaded).__name__,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "max_new_tokens": max_new_tokens,
        "budget": budget,
        "keep": keep,
        "chat": bool(chat and getattr(tokenizer, "chat_template", None)),
        "greedy": True,
        "seed": seed,
    }
    with drawing(loaded, seed):
        results, foreign = _decode_all(loaded, ids, makers, max_new_tokens, keep, tell)
    _judge_all(loaded, ids, results, lossy, max_new_tokens, tell)
    if lossy:
        _rate_all(loaded, tokenizer, chosen, ids, results)
    settings |= {"foreign_share_max": foreign, **_versions()}
    return Comparison(
        methods=tuple(names),
        prompts=chosen,
        prompt_tokens=[int(row.shape[1]) for row in ids],
        results=results,
        settings=settings,
        pieces=partial(pieces, tokenizer),
        lossy=lossy,
    )


def method_names(methods: Sequence[str] | None) -> list[str]:
    """The methods without repeats, the reference first where it was not named."""
    if isinstance(methods, str):
        methods = [methods]
    names = list(dict.fromkeys(methods or DEFAULT_METHODS))
    return names if REFERENCE in names else [REFERENCE, *names]


def check_numbers(max_new_tokens: int, budget: Budget) -> None:
    """Refuse a length or a budget that says nothing."""
    if max_new_tokens < 1:
        raise PertokenError(f"--max-new-tokens must be 1 or more, got {max_new_tokens}")
    if budget is None or budget == "auto":
        return
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise PertokenError(f'the budget must be "auto" or a number from 1 on, got {budget!r}')


def method_options(name: str, budget: Budget, **others: Any) -> dict[str, Any]:
    """What goes to the constructor of a method; for transformers' own ways: to `generate`.

    A method that drafts nothing is given no budget, one of another package only a number.
    """
    from pertoken.catalog import methods
    from pertoken.testing.verify import takes

    if name == "hf":
        return {}
    if name == "hf-prompt-lookup":
        return {"prompt_lookup_num_tokens": budget} if isinstance(budget, int) else {}
    ours = {card.slug for card in methods() if card.package == "pertoken"}
    if budget == "auto" or name in ours:
        budget = budget if takes(name, "budget") else None
    return others if budget is None or name == REFERENCE else {"budget": budget, **others}


def _maker(name: str, budget: Budget, keep: bool, tokenizer: Any = None) -> Callable[[], Setup]:
    def make() -> Setup:
        from pertoken.testing.verify import HF_SETUPS, as_setup, takes

        own: dict[str, Any] = {}
        if name not in (*HF_SETUPS, REFERENCE):
            own |= {"keep": True} if keep and takes(name, "keep") else {}
            own |= (
                {"tokenizer": tokenizer}
                if tokenizer is not None and takes(name, "tokenizer")
                else {}
            )
        return as_setup(name, **method_options(name, budget, **own))

    return make


def _prompts(
    prompts: Sequence[Prompt | str] | str | Path | None, limit: int | None
) -> list[Prompt]:
    if prompts is None or isinstance(prompts, str | Path):
        return read_prompts(prompts, limit)
    if limit is not None and limit < 1:
        raise PertokenError(f"the limit of prompts must be 1 or more, got {limit}")
    named = [
        p if isinstance(p, Prompt) else Prompt(p, id=str(number))
        for number, p in enumerate(prompts, 1)
    ][:limit]
    if not named:
        raise PertokenError("there is no prompt to compare on")
    return named


def _loaded(
    model: str | Path | tuple[Any, Any], dtype: str | torch.dtype | None, tell: Progress
) -> tuple[Any, Any]:
    if isinstance(model, tuple):
        if dtype is not None:
            raise PertokenError("a dtype is for a model given by name; this one is loaded already")
        return model
    import pertoken

    tell(f"loading {model}", 0, 0)
    return pertoken.load(model, dtype=dtype, kind="decoder")


def _encoded(
    tokenizer: Any, model: Any, prompt: Prompt, max_new_tokens: int, chat: bool
) -> torch.Tensor:
    try:
        return encode_prompt(tokenizer, model, prompt.text, max_new_tokens, chat)
    except PertokenError as error:
        raise PertokenError(f"prompt {prompt.id or prompt.text[:20]!r}: {error}") from None


def _decode_all(
    model: Any,
    ids: Sequence[torch.Tensor],
    makers: dict[str, Callable[[], Setup]],
    max_new_tokens: int,
    keep: bool,
    tell: Progress,
) -> tuple[list[dict[str, Decoded]], float | None]:
    """Results per prompt and method, and the greatest share of the machine others used."""
    from pertoken.timing import alternate

    total = len(ids) * len(makers)
    done = 0
    kept = {name: make() for name, make in makers.items()} if keep else {}

    def contender(name: str) -> Callable[[int], Decoded]:
        def run(index: int) -> Decoded:
            nonlocal done
            tell(name, done, total)
            setup = kept[name] if keep else makers[name]()
            result = _decode(name, model, setup, ids[index], max_new_tokens)
            done += 1
            return result

        return run

    for name, make in makers.items():  # threads start, buffers grow, costs are measured once
        tell(f"warming up {name}", 0, total)
        _decode(name, model, make(), ids[0], min(_WARM_UP_TOKENS, max_new_tokens))
    # Nothing is dropped: every prompt is shown, and the load of others is said beside the table.
    turns = alternate(
        {name: contender(name) for name in makers}, len(ids), retries=0, watch=0, limit=1.0
    )
    tell("checking", total, total)
    return [{name: turn.calls[name].value for name in makers} for turn in turns.kept], turns.foreign


def _decode(name: str, model: Any, setup: Setup, ids: torch.Tensor, max_new_tokens: int) -> Decoded:
    """One call; what a method raises is named as its own."""
    from pertoken.decode.stats import DecodeStats
    from pertoken.testing.setups import decode

    try:
        with _counted_forwards(model) as count:
            began = time.perf_counter()
            new = decode(model, setup, ids, max_new_tokens=max_new_tokens)[0]
            seconds = time.perf_counter() - began
    except (PertokenError, OSError, MemoryError):
        raise
    except Exception as error:
        raise PertokenError(f"{name} raised {type(error).__name__}: {error}") from error
    stats = getattr(setup, "stats", None)
    if not isinstance(stats, DecodeStats):
        # Ways of decoding that do not draft: one forward reads the prompt, the others decode.
        return Decoded(ids=new, seconds=seconds, forwards=count[0] - 1, committed=len(new) - 1)
    trace = setup.rows[0]  # type: ignore[union-attr]  # whoever has stats has rows
    return Decoded(
        ids=new,
        seconds=seconds,
        forwards=stats.forwards,
        committed=stats.new_tokens - stats.first_tokens,
        seconds_draft=stats.seconds_draft,
        seconds_verify=stats.seconds_verify,
        sources=list(trace.sources),
        step_lengths=list(trace.step_lengths),
        drafted=dict(stats.drafted),
        accepted=dict(stats.accepted),
    )


@contextlib.contextmanager
def _counted_forwards(model: Any) -> Iterator[list[int]]:
    """Counts the model's forward calls in a list of one number while it is open."""
    count = [0]

    def hook(module: Any, arguments: Any) -> None:
        count[0] += 1

    handle = model.register_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


def _judge_all(
    model: Any,
    ids: Sequence[torch.Tensor],
    results: list[dict[str, Decoded]],
    lossy: frozenset[str],
    max_new_tokens: int,
    tell: Progress,
) -> None:
    from pertoken.testing.laws import judge

    run = {"max_new_tokens": max_new_tokens}
    total = sum(map(len, results))
    for prompt, by_method in zip(ids, results, strict=True):
        expected = by_method[REFERENCE].ids
        for name, result in by_method.items():
            if name in lossy:
                continue
            if result.ids != expected:
                tell(f"checking {name}", total, total)
            result.verdict = judge(model, prompt[0], expected, result.ids, None, run)


def _rate_all(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    ids: Sequence[torch.Tensor],
    results: list[dict[str, Decoded]],
) -> None:
    """What the model thinks of every text, and whether it gives the prompt's answer."""
    for prompt, row, by_method in zip(prompts, ids, results, strict=True):
        known: dict[tuple[int, ...], float] = {}
        for result in by_method.values():
            text = tuple(result.ids)
            if text not in known:
                known[text] = _loss(model, row, result.ids)
            result.loss = known[text]
            if prompt.answer:
                written = tokenizer.decode(result.ids, skip_special_tokens=True)
                result.right = answers(written, prompt.answer)


def _loss(model: Any, prompt: torch.Tensor, new: Sequence[int]) -> float:
    """Minus the log-probability of new ids behind a prompt [1, time], nats."""
    import torch

    text = torch.cat((prompt, prompt.new_tensor([list(new)])), -1)
    with torch.no_grad():
        logits = model(input_ids=text, use_cache=False).logits[0, prompt.shape[1] - 1 : -1]
    chances = logits.float().log_softmax(-1)
    return -float(chances.gather(-1, text[0, prompt.shape[1] :, None]).sum())


def _versions() -> dict[str, str]:
    import torch
    import transformers

    import pertoken

    return {
        "pertoken": pertoken.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
    }
