"""`pertoken generate`: one prompt, one method or constraint, text as it comes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.cli.compare import parse_budget
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pertoken.testing.setups import Setup


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("generate")(generate)


def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - or nothing reads it from a pipe.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="A slug of `pertoken list --family decode`, hf, hf-prompt-lookup.",
            show_default="goose, with a constraint awrs",
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file or short name.")] = (
        "smollm2"
    ),
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float64; the device's default.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 256,
    budget: Annotated[
        str, typer.Option(metavar="auto|published|N", help="Tokens drafted per step.")
    ] = "auto",
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens instead of taking the best.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Above 0; implies --sample. 1 is the model's own.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes --sample repeatable.")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="STRING", help="End behind this text; repeatable."),
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Only JSON of this schema. Any constraint: sampled."),
    ] = None,
    regex: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Only text that matches, as Python's regex says."),
    ] = None,
    grammar: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Only text of this Lark-like grammar of llguidance."),
    ] = None,
    constraint: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:NAME",
            help="Only what your Python accepts: a function, may a text begin like this -> bool "
            "(its attribute `complete`, if it has one: is it whole), or an object with "
            "accepts(ids) and complete(ids), or a class that makes one from the tokenizer.",
        ),
    ] = None,
    particles: Annotated[
        int | None,
        typer.Option(help="With a constraint: N weighted texts and their probabilities."),
    ] = None,
    as_json: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE|-", help="With a constraint: write the result."),
    ] = None,
    no_chat: Annotated[
        bool, typer.Option("--no-chat", help="The bare prompt, without the chat template.")
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Say on standard error how it went.")
    ] = False,
    as_bytes: Annotated[
        bool,
        typer.Option(
            "--bytes",
            help="Decode byte by byte: the prompt, raw text without chat template, may end inside "
            "a word or a character.",
        ),
    ] = False,
    max_new_bytes: Annotated[
        int | None, typer.Option(help="With --bytes: new bytes at most; 256 if not given.")
    ] = None,
) -> None:
    """Continue a prompt and stream the text."""
    from pertoken.compare import check_numbers

    number = parse_budget(budget)
    check_numbers(max_new_tokens, number)
    if temperature is not None and not 0 < temperature < float("inf"):
        raise PertokenError(
            f"--temperature must be above 0, got {temperature:g}; leave it out for the best tokens"
        )
    if any(not one for one in stop or []):
        raise PertokenError("--stop needs some text to stop at")
    if as_bytes or max_new_bytes is not None:
        from pertoken.cli.bytes import check_options, generate_bytes

        check_options(context)
        generate_bytes(context)
        return
    sources = {
        "--json-schema": json_schema,
        "--regex": regex,
        "--grammar": grammar,
        "--constraint": constraint,
    }
    given = {name: value for name, value in sources.items() if value is not None}
    others = {"--method": method, "--particles": particles, "--json": as_json, "--stop": stop}
    _check_constraint(given, others, budget)
    text = _prompt(prompt)
    if given:
        from pertoken.cli.constrained import run

        allowed = run(
            text,
            *given.items(),
            model=model,
            dtype=dtype,
            particles=particles,
            max_new_tokens=max_new_tokens,
            temperature=temperature or 1.0,
            seed=seed,
            chat=not no_chat,
            as_json=as_json,
            stats=stats,
        )
        if not allowed:
            raise typer.Exit(1)
        return

    from pertoken.compare import method_options
    from pertoken.testing.verify import HF_SETUPS, as_setup, takes

    method = method or "goose"
    options = method_options(method, number)
    as_setup(method, **options)  # a wrong name is said before the model is loaded

    import pertoken

    loaded, tokenizer = pertoken.load(model, dtype=dtype, kind="decoder")
    streamer = Streamer(tokenizer)
    if method in HF_SETUPS:
        setup: Setup = {**_mapping(as_setup(method, **options)), "streamer": streamer}
    else:
        ours = {"streamer": streamer, "tokenizer": tokenizer}
        ours = {name: value for name, value in ours.items() if takes(method, name)}
        setup = as_setup(method, **options, **ours)
    if sample or temperature is not None:
        arguments: dict[str, Any] = {"do_sample": True, "temperature": temperature or 1.0}
    else:
        arguments = {"do_sample": False}
    new_ids, seconds = decode_prompt(
        loaded,
        tokenizer,
        setup,
        text,
        max_new_tokens=max_new_tokens,
        stop=stop or (),
        seed=seed,
        chat=not no_chat,
        **arguments,
    )
    if not streamer.used:  # a method of another package that does not stream
        streamer.whole(new_ids)
    if stats:
        for line in stats_lines(streamer.tokens, seconds, getattr(setup, "stats", None)):
            typer.echo(line, err=True)


def _check_constraint(given: Mapping[str, Any], others: Mapping[str, Any], budget: str) -> None:
    """Refuse two constraints, none where an option needs one, and what does not go with one."""
    kinds = "--regex, --json-schema, --grammar or --constraint"
    method = others["--method"]
    if not given:
        for name in ("--particles", "--json"):
            if others[name] is not None:
                raise PertokenError(f"{name} goes with a constraint: {kinds}")
        if method == "awrs":
            raise PertokenError(f"--method awrs needs a constraint: {kinds}")
        return
    name = next(iter(given))
    if len(given) > 1:
        raise PertokenError(f"give one constraint, not {' and '.join(given)}")
    if method not in (None, "awrs"):
        raise PertokenError(f"{name} is sampled by awrs; leave out --method {method}")
    if others["--stop"]:
        raise PertokenError(f"{name} says where the text ends; leave out --stop")
    if budget != "auto":
        raise PertokenError(f"nothing is drafted under {name}; leave out --budget")
    if others["--particles"] is not None and others["--particles"] < 1:
        raise PertokenError(f"--particles must be 1 or more, got {others['--particles']}")


def _prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise PertokenError('give a prompt: pertoken generate "Once upon a time"')
    if prompt in (None, "-"):
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError:
            raise PertokenError("the prompt on standard input is not UTF-8") from None
    if not prompt or not prompt.strip():
        raise PertokenError("the prompt is empty")
    return prompt


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

    Unlike transformers' `TextStreamer` it does not hold a word back until the next one begins.
    """

    def __init__(self, tokenizer: Any) -> None:
        from pertoken._pieces import Detokenizer

        self.tokens = 0
        self._reader = Detokenizer(tokenizer, skip_special_tokens=True)
        self.used = False

    def whole(self, ids: Sequence[int]) -> None:
        """Print the new ids of a text that was not streamed."""
        self.tokens += len(ids)
        print("".join(self._reader.push(token) for token in ids), end="")
        self.end()

    def put(self, value: Any) -> None:
        """Take in token ids, [time] or [1, time]; the first call brings the prompt."""
        if not self.used:
            self.used = True
            return
        new = value.reshape(-1).tolist()
        self.tokens += len(new)
        print("".join(self._reader.push(token) for token in new), end="", flush=True)

    def end(self) -> None:
        """Print what is left, and end the line."""
        print(self._reader.flush(), flush=True)


def stats_lines(tokens: int, seconds: float, stats: Any) -> list[str]:
    """How it went; `stats` are a drafter's, None for transformers' own ways of decoding.

    >>> stats_lines(50, 2.0, None)
    ['50 new tokens in 2.00 s, 25.0 tokens/s']
    """
    speed = tokens / seconds if seconds else 0.0
    lines = [f"{tokens} new tokens in {seconds:.2f} s, {speed:.1f} tokens/s"]
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
