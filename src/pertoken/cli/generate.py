"""`pertoken generate`: one prompt, one method, text as it comes."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.cli.compare import parse_budget
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        str, typer.Option(help="A slug of `pertoken list --family decode`, hf, hf-prompt-lookup.")
    ] = "goose",
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
    text = _prompt(prompt)

    from pertoken.compare import method_options
    from pertoken.testing.verify import HF_SETUPS, as_setup

    options = method_options(method, number)
    as_setup(method, **options)  # a wrong name is said before the model is loaded

    import pertoken

    loaded, tokenizer = pertoken.load(model, dtype=dtype)
    streamer = Streamer(tokenizer)
    if method in HF_SETUPS:
        setup: Setup = {**_mapping(as_setup(method, **options)), "streamer": streamer}
    else:
        setup = as_setup(method, **options, streamer=streamer, tokenizer=tokenizer)
    if sample or temperature is not None:
        arguments: dict[str, Any] = {"do_sample": True, "temperature": temperature or 1.0}
    else:
        arguments = {"do_sample": False}
    seconds = _run(
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
    if stats:
        for line in stats_lines(streamer.tokens, seconds, getattr(setup, "stats", None)):
            typer.echo(line, err=True)


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


def _run(
    model: Any,
    tokenizer: Any,
    setup: Setup,
    text: str,
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    seed: int | None,
    chat: bool,
    **arguments: Any,
) -> float:
    """Decode while the set-up's streamer prints; seconds it took."""
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
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            **arguments,
            **setup_options(setup),
        )
    except KeyboardInterrupt:
        print(flush=True)  # so that the shell's prompt starts on a line of its own
        raise
    return time.perf_counter() - began


class Streamer:
    """Prints new text as soon as its characters are whole; the prompt comes first and is left out.

    Unlike transformers' `TextStreamer` it does not hold a word back until the next one begins.
    """

    def __init__(self, tokenizer: Any) -> None:
        from pertoken._pieces import Detokenizer

        self.tokens = 0
        self._reader = Detokenizer(tokenizer, skip_special_tokens=True)
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Take in token ids, [time] or [1, time]; the first call brings the prompt."""
        if not self._prompt_seen:
            self._prompt_seen = True
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
