"""`pertoken generate`: one prompt, one method or constraint, text as it comes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.cli._attached import (
    Held,
    Memory,
    Styled,
    cache_of,
    check_cache,
    check_memory,
    check_style,
    memory_of,
    style_of,
)
from pertoken.cli.compare import parse_budget
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pertoken.compare import Budget
    from pertoken.testing.setups import Setup

_CONSTRAINTS = ("json_schema", "regex", "grammar", "constraint")


def _some(stop: list[str] | None) -> list[str] | None:
    if any(not one for one in stop or []):
        raise PertokenError("--stop needs some text to stop at")
    return stop


_Prompt = Annotated[
    str | None, typer.Argument(help="The prompt; - or nothing reads it from a pipe.")
]
_Method = Annotated[
    str | None,
    typer.Option(
        help="A slug of `pertoken list --family decode`, hf, hf-prompt-lookup.",
        show_default="goose, with a constraint awrs",
    ),
]
_Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="STRING", callback=_some, help="End behind this text; repeatable."),
]
_JsonSchema = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Only JSON of this schema. Any constraint: sampled."),
]
_Regex = Annotated[
    str | None,
    typer.Option(metavar="PATTERN", help="Only text that matches, as Python's regex says."),
]
_Grammar = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Only text of this Lark-like grammar of llguidance."),
]
_Constraint = Annotated[
    str | None,
    typer.Option(
        metavar="MODULE:NAME",
        help="Only what your Python accepts: a function, may a text begin like this -> bool "
        "(its attribute `complete`, if it has one: is it whole), or an object with "
        "accepts(ids) and complete(ids), or a class that makes one from the tokenizer.",
    ),
]
_Particles = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        callback=shared.positive,
        help="With a constraint: N weighted texts and their probabilities.",
    ),
]
_Bytes = Annotated[
    bool,
    typer.Option(
        "--bytes",
        help="Decode byte by byte: the prompt, raw text without chat template, may end inside "
        "a word or a character.",
    ),
]
_Knn = Annotated[
    Path | None,
    typer.Option(
        metavar="STORE",
        help="Look each token up in a store of `pertoken knn build`; --method is hf then.",
    ),
]
_KnnK = Annotated[
    int | None,
    typer.Option(
        "--knn-k", callback=shared.positive, help="With --knn: neighbours that vote; 64, or all."
    ),
]
_KnnWeight = Annotated[float | None, typer.Option(help="With --knn: of the retrieval; 0.25.")]
_KnnTemperature = Annotated[
    float | None, typer.Option(help="With --knn: of the vote; `pertoken knn eval --fit` finds it.")
]
_Cache = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A KV cache of `pertoken chat`, such as kv-direct or snapkv; the full one if not "
        "given.",
    ),
]
_CacheBudget = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        callback=shared.positive,
        help="With --cache: tokens whose keys and values are kept; 256 if not given.",
    ),
]
_Style = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Pull the text towards this style of `style train`."),
]
_Strength = Annotated[
    float | None, typer.Option(help="With --style: 0 to 1; 0.1 if not given. Little is enough.")
]
_MaxNewBytes = Annotated[
    int | None,
    typer.Option(
        callback=shared.positive, help="With --bytes: new bytes at most; 256 if not given."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("generate")(generate)


def generate(
    context: typer.Context,
    prompt: _Prompt = None,
    method: _Method = None,
    budget: shared.Budget = "auto",
    sample: shared.Sample = False,
    temperature: shared.Temperature = None,
    top_p: shared.TopP = None,
    stop: _Stop = None,
    cache: _Cache = None,
    cache_budget: _CacheBudget = None,
    style: _Style = None,
    strength: _Strength = None,
    knn: _Knn = None,
    knn_k: _KnnK = None,
    knn_weight: _KnnWeight = None,
    knn_temperature: _KnnTemperature = None,
    json_schema: _JsonSchema = None,
    regex: _Regex = None,
    grammar: _Grammar = None,
    constraint: _Constraint = None,
    particles: _Particles = None,
    as_bytes: _Bytes = False,
    max_new_bytes: _MaxNewBytes = None,
    stats: shared.Stats = False,
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    seed: shared.OptionalSeed = None,
    max_new_tokens: shared.MaxNewTokens = 256,
    no_chat: shared.NoChat = False,
    as_json: shared.Json = None,
) -> None:
    """Continue a prompt and stream the text."""
    drafted = parse_budget(budget)
    if as_bytes or max_new_bytes is not None:
        return _bytes(context)
    given = _constraint(context.params)
    run: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "output": shared.Output(as_json),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "chat": not no_chat,
        "stats": stats,
        "style": check_style(style, strength),
    }
    held = check_cache(cache, cache_budget, particles)
    memory = check_memory(knn, knn_k, knn_weight, knn_temperature, method, given)
    text = shared.read_prompt(prompt, 'pertoken generate "Once upon a time"')
    if given:
        from pertoken.cli.constrained import run as constrained

        heat = temperature or 1.0
        if not constrained(text, given, held, particles=particles, temperature=heat, **run):
            raise typer.Exit(1)
        return
    arguments = shared.sampling(sample, temperature, top_p)
    method = method or ("hf" if memory else "goose")
    _decode(text, method, drafted, held, memory=memory, stop=stop or (), **run, **arguments)


def _bytes(context: typer.Context) -> None:
    """--bytes: its own loop, with the options that it has."""
    from pertoken.cli.bytes import check_options, generate_bytes

    check_options(context)
    generate_bytes(context)


def _constraint(options: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The constraint's option and its value; refuses two, and what does not go with one."""
    given = {
        "--" + name.replace("_", "-"): options[name]
        for name in _CONSTRAINTS
        if options[name] is not None
    }
    kinds = "--regex, --json-schema, --grammar or --constraint"
    method = options["method"]
    if not given:
        if options["particles"] is not None:
            raise PertokenError(f"--particles goes with a constraint: {kinds}")
        if method == "awrs":
            raise PertokenError(f"--method awrs needs a constraint: {kinds}")
        return None
    ((name, value), *others) = given.items()
    if others:
        raise PertokenError(f"give one constraint, not {' and '.join(given)}")
    if method not in (None, "awrs"):
        raise PertokenError(f"{name} is sampled by awrs; leave out --method {method}")
    if options["stop"]:
        raise PertokenError(f"{name} says where the text ends; leave out --stop")
    if options["top_p"] is not None:
        raise PertokenError(f"{name} is weighted by the model's whole law; leave out --top-p")
    if options["budget"] != "auto":
        raise PertokenError(f"nothing is drafted under {name}; leave out --budget")
    return name, value


def _decode(
    text: str,
    method: str,
    budget: Budget,
    held: Held,
    *,
    memory: Memory,
    model: str,
    dtype: str | None,
    output: shared.Output,
    stats: bool,
    style: Styled,
    **run: Any,
) -> None:
    """Decode with a method, stream the text or write it, and say how it went."""
    from pertoken.compare import method_options
    from pertoken.testing.verify import HF_SETUPS, as_setup, takes

    options = method_options(method, budget)
    if budget not in ("auto", None) and not options:
        raise PertokenError(f"{method} drafts nothing: leave out --budget")
    as_setup(method, **options)  # a wrong name is said before the model is loaded
    loaded, tokenizer = shared.load(model, dtype)
    styled = style_of(style, tokenizer)
    streamer = Streamer(tokenizer, silent=output.quiet)
    if method in HF_SETUPS:
        setup: Setup = {**_mapping(as_setup(method, **options)), "streamer": streamer}
    else:
        ours = {"streamer": streamer, "tokenizer": tokenizer}
        ours = {name: value for name, value in ours.items() if takes(method, name)}
        setup = as_setup(method, **options, **ours)
    with (
        cache_of(held, loaded) as cache,
        memory_of(memory, loaded, tokenizer) as looked_up,
    ):
        # The memory mixes with what the model says; the style pulls on the mixture.
        processors = {"logits_processor": [*looked_up, *styled]} if looked_up or styled else {}
        given = cache | processors
        ids, seconds = decode_prompt(loaded, tokenizer, setup, text, **given, **run)
    if not streamer.used:  # a method of another package that does not stream
        streamer.whole(ids)
    found = {"text": tokenizer.decode(ids, skip_special_tokens=True), "ids": ids}
    output.write({"method": method, **found, "seconds": seconds})
    if stats:
        for line in stats_lines(streamer.tokens, seconds, getattr(setup, "stats", None)):
            typer.echo(line, err=True)


def _mapping(setup: Setup) -> dict[str, Any]:
    return dict(setup) if isinstance(setup, dict) else {}


def decode_prompt(
    model: Any,
    tokenizer: Any,
    setup: Setup,
    text: str,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    seed: int | None,
    chat: bool,
    **arguments: Any,
) -> tuple[list[int], float]:
    """Decode while the set-up's streamer prints; the new ids, and seconds it took."""
    import torch

    from pertoken.prompts import encode_prompt
    from pertoken.testing.setups import setup_options

    ids = encode_prompt(tokenizer, model, text, max_new_tokens, chat)
    if stop:
        from transformers import StoppingCriteriaList, StopStringCriteria

        arguments["stopping_criteria"] = StoppingCriteriaList(
            [StopStringCriteria(tokenizer, list(stop))]
        )
    if seed is not None:
        torch.manual_seed(seed)
    began = time.perf_counter()
    try:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            **arguments,
            **setup_options(setup),
        )
    except KeyboardInterrupt:
        print(flush=True)  # so that the shell's prompt starts on a line of its own
        raise
    return output[0, ids.shape[1] :].tolist(), time.perf_counter() - began


class Streamer:
    """Prints new text as soon as its characters are whole; the prompt comes first and is left out.

    silent: only count tokens. Unlike transformers' `TextStreamer` it does not hold a word back
    until the next one begins.
    """

    def __init__(self, tokenizer: Any, *, silent: bool = False) -> None:
        from pertoken._pieces import Detokenizer

        self.tokens = 0
        self._silent = silent
        self._reader = Detokenizer(tokenizer, skip_special_tokens=True)
        self.used = False

    def whole(self, ids: Sequence[int]) -> None:
        """Print the new ids of a text that was not streamed."""
        self.tokens += len(ids)
        if not self._silent:
            print("".join(self._reader.push(token) for token in ids), end="")
        self.end()

    def put(self, value: Any) -> None:
        """Take in token ids, [time] or [1, time]; the first call brings the prompt."""
        if not self.used:
            self.used = True
            return
        new = value.reshape(-1).tolist()
        self.tokens += len(new)
        text = "".join(self._reader.push(token) for token in new)
        if not self._silent:
            print(text, end="", flush=True)

    def end(self) -> None:
        """Print what is left, and end the line."""
        if not self._silent:
            print(self._reader.flush(), flush=True)


def stats_lines(tokens: int, seconds: float, stats: Any) -> list[str]:
    """How it went; `stats` are a drafter's, or tell it themselves, or None (transformers' own).

    >>> stats_lines(50, 2.0, None)
    ['50 new tokens in 2.00 s, 25.0 tokens/s']
    """
    speed = tokens / seconds if seconds else 0.0
    lines = [f"{tokens} new tokens in {seconds:.2f} s, {speed:.1f} tokens/s"]
    if hasattr(stats, "lines"):
        return [*lines, *stats.lines()]
    if stats is not None and stats.forwards:
        lines.append(
            f"{stats.forwards} forward passes behind the prompt, "
            f"{stats.accepted_per_forward:.2f} tokens each; drafting took {stats.draft_share:.1%}"
        )
        parts = [
            f"{source} {stats.accepted.get(source, 0)} of {drafted}"
            for source, drafted in stats.drafted.items()
        ]
        if parts:
            lines.append(f"accepted of drafted: {', '.join(parts)}")
    return lines
