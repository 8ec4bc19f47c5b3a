"""Is this way of decoding lossless, and if not, where? Any two `generate` set-ups, side by side."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pertoken.errors import PertokenError, nearest
from pertoken.prompts import Prompt, encode_prompt
from pertoken.testing.distribution import check_distribution
from pertoken.testing.divergence import Verdict
from pertoken.testing.laws import LawBroken, judge
from pertoken.testing.models import tiny_model
from pertoken.testing.report import VerifyReport, VerifyRow
from pertoken.testing.setups import Setup, decode, drafted_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HF_SETUPS: dict[str, Setup] = {"hf": None, "hf-prompt-lookup": {"prompt_lookup_num_tokens": 10}}
"""transformers' own ways of decoding, by name."""

# Random models with 8 tokens on which sampling is tested, with the settings of each run.
SAMPLED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {}),
    ("phi", {"temperature": 0.7, "top_k": 5}),
    ("gpt-neox", {"top_p": 0.8}),
    ("qwen3", {"repetition_penalty": 1.5}),
)
SAMPLE_PROMPT = (1, 5, 2, 7, 1, 5, 2)  # repeats itself, so that copying drafters draft
_SINGLE_ROW = ("assistant_model", "prompt_lookup_num_tokens")


def verify(
    model: PreTrainedModel | None,
    tokenizer: Any,
    prompts: Iterable[Prompt | str | Sequence[int] | torch.Tensor],
    a: Setup | str,
    b: Setup | str = None,
    *,
    max_new_tokens: int = 64,
    chat: bool = True,
    sample: bool = False,
    draws: int = 20_000,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    names: tuple[str, str] | None = None,
    **options: Any,
) -> VerifyReport:
    """Decode each prompt with `a` and with `b` and judge where they part.

    a, b: a drafter of ours or its slug ("goose"), a mapping of `generate` arguments
        (`{"prompt_lookup_num_tokens": 10}`, `{"assistant_model": small}`), a callable
        `f(model, input_ids, **arguments)` as `custom_generate` takes it, or "hf" / `None` for
        transformers' plain `generate`.
    prompts: texts, `Prompt`s, or rows of ids (then the tokenizer may be `None`).
    options: further `generate` arguments for both (`repetition_penalty=1.2`).
    sample: instead of prompts, draw from random models of 8 tokens and test the draws of `a`
        against the exact distribution (chi-square, alpha 0.001 over all models together).
    progress: called with (what, done, total). names: what the table calls `a` and `b`.

    >>> report = verify(tiny_model("gpt2"), None, [[5, 6, 7]], {"prompt_lookup_num_tokens": 3})
    >>> report.outcome
    'identical'
    """
    titles = names or (setup_name(a), setup_name(b))
    if max_new_tokens < 1:
        raise PertokenError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    first, second = as_setup(a), as_setup(b)
    if not getattr(first, "lossless", True):
        raise PertokenError(
            f"{titles[0]} is not lossless: its text need not be that of {titles[1]}; "
            "`pertoken compare` shows how good it is"
        )
    drafted: list[int | None] = []
    if sample:
        rows = [
            _sample_row(first, architecture, run, draws, seed, titles[0], drafted)
            for architecture, run in _told(SAMPLED, progress)
        ]
        return VerifyReport(
            titles[0],
            "the model's distribution",
            rows,
            {"sample": True, "draws": draws, "seed": seed},
            _total(drafted),
        )
    if model is None:
        raise PertokenError("verify needs a model (only with sample=True it brings its own)")
    run = {"max_new_tokens": max_new_tokens, **options}
    rows = []
    # All prompts become ids first, so that one that does not fit is named before any work.
    ready = [_named_ids(model, tokenizer, p, max_new_tokens, chat) for p in prompts]
    for index, (prompt, ids) in enumerate(_told(ready, progress)):
        expected = _run(titles[1], model, second, ids, run)
        actual = _run(titles[0], model, first, ids, run)
        drafted.append(drafted_tokens(first))
        verdict = judge(model, ids[0], expected, actual, second, run)
        rows.append(_prompt_row(prompt.id or str(index + 1), prompt.category, verdict, tokenizer))
    if not rows:
        raise PertokenError("there is no prompt to verify on")
    settings = {"sample": False, "dtype": str(model.dtype).removeprefix("torch."), **run}
    settings = {k: v for k, v in settings.items() if isinstance(v, str | int | float | bool)}
    return VerifyReport(*titles, rows, settings, _total(drafted))


def _told(items: Sequence[Any], progress: Callable[[str, int, int], None] | None) -> Iterator[Any]:
    """The items, and before each of them where we are."""
    for place, item in enumerate(items):
        if progress is not None:
            progress("verifying", place, len(items))
        yield item


def as_setup(setup: Setup | str, **options: Any) -> Setup:
    """A set-up from its name: "hf", "hf-prompt-lookup" or a slug; options go to its constructor
    (for transformers' own: to `generate`)."""
    if not isinstance(setup, str):
        if not options:
            return setup
        if setup is None or isinstance(setup, Mapping):
            return {**(setup or {}), **options}
        return functools.partial(setup, **options)
    if setup in HF_SETUPS:
        own = HF_SETUPS[setup]
        return {**own, **options} if isinstance(own, Mapping) else (options or None)
    from pertoken.catalog import baselines, card, methods

    cards = [c for c in (*methods(), *baselines()) if c.family == "decode" or c.plug == "generate"]
    known = [*HF_SETUPS, *(c.slug for c in cards)]
    if setup not in known:
        raise PertokenError(
            f"unknown way of decoding {setup!r}{nearest(setup, known)}: "
            f"hf, hf-prompt-lookup or a slug of `pertoken list --family decode`"
        )
    make = card(setup).load()
    needed = [
        name
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in options
    ]
    if needed:
        raise PertokenError(
            f"{setup} does not run by its name alone: it needs a {' and a '.join(needed)}; "
            f"see `pertoken show {setup}`"
        )
    try:
        return make(**options)
    except TypeError as error:
        raise PertokenError(f"{setup}: {error}") from error


def takes(slug: str, option: str) -> bool:
    """Whether the constructor of a method has an option; transformers' own ways take any.

    >>> takes("goose", "budget"), takes("plain", "budget")
    (True, False)
    """
    from pertoken.catalog import card

    if slug in HF_SETUPS:
        return True
    parameters = inspect.signature(card(slug).load()).parameters.values()
    return any(p.name == option or p.kind == p.VAR_KEYWORD for p in parameters)


def setup_name(setup: Setup | str) -> str:
    """What a set-up is called in tables.

    >>> setup_name(None), setup_name({"prompt_lookup_num_tokens": 10})
    ('hf', 'generate(prompt_lookup_num_tokens=10)')
    """
    if setup is None or isinstance(setup, str):
        return setup or "hf"
    if isinstance(setup, Mapping):
        shown = (
            f"{key}={value if isinstance(value, str | int | float | bool) else '…'}"
            for key, value in setup.items()
        )
        return f"generate({', '.join(shown)})"
    for attribute in ("slug", "__name__"):
        if isinstance(name := getattr(setup, attribute, None), str):
            return name
    return type(setup).__name__


def _named_ids(
    model: PreTrainedModel, tokenizer: Any, prompt: Any, max_new_tokens: int, chat: bool
) -> tuple[Prompt, torch.Tensor]:
    if not isinstance(prompt, str | Prompt):
        ids = torch.as_tensor(prompt, dtype=torch.long, device=model.device)
        return Prompt(""), ids.reshape(1, -1)
    if tokenizer is None:
        raise PertokenError("verify needs a tokenizer for prompts that are text")
    named = Prompt(prompt) if isinstance(prompt, str) else prompt
    return named, encode_prompt(tokenizer, model, named.text, max_new_tokens, chat)


def _run(
    name: str, model: PreTrainedModel, setup: Setup, ids: torch.Tensor, run: dict[str, Any]
) -> list[int]:
    """New ids; what a set-up raises is the caller's affair and named as such."""
    try:
        return decode(model, setup, ids, **run)[0]
    except (PertokenError, OSError, MemoryError):
        raise
    except Exception as error:
        raise PertokenError(f"{name} raised {type(error).__name__}: {error}") from error


def _total(counts: Iterable[int | None]) -> int | None:
    """The sum of the counts there are; `None` if there is none."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _prompt_row(name: str, category: str, verdict: Verdict, tokenizer: Any) -> VerifyRow:
    parted = verdict.divergence

    def text(token: int | None) -> str:
        return "" if token is None or tokenizer is None else str(tokenizer.decode([token]))

    return VerifyRow(
        name,
        verdict.outcome,
        verdict.new_tokens,
        parted,
        text(parted.expected) if parted else "",
        text(parted.actual) if parted else "",
        category,
    )


def _sample_row(
    setup: Setup,
    architecture: str,
    options: dict[str, Any],
    draws: int,
    seed: int,
    title: str,
    drafted: list[int | None],
) -> VerifyRow:
    model = tiny_model(architecture, vocab_size=8)
    single = False
    if isinstance(setup, Mapping):
        single = any(key in setup for key in _SINGLE_ROW)
        if setup.get("assistant_model") is not None:
            setup = {**setup, "assistant_model": tiny_model(architecture, vocab_size=8, seed=1)}
    draws = min(draws, 1_000) if single else draws
    name = architecture + "".join(f" {key}={value}" for key, value in options.items())
    try:
        result = check_distribution(
            setup,
            model,
            SAMPLE_PROMPT,
            draws=draws,
            seed=seed,
            alpha=0.001 / len(SAMPLED),
            batch_size=1 if single else 2_000,
            **options,
        )
    except LawBroken as broken:
        return VerifyRow(name, "different", draws, p_value=0.0, note=str(broken))
    except PertokenError:
        raise
    except Exception as error:
        raise PertokenError(f"{title} raised {type(error).__name__}: {error}") from error
    drafted.append(result.drafted)
    return VerifyRow(name, "identical", draws, p_value=result.p_value)
