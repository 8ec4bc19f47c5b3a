"""`pertoken compress`: the same prompt in fewer tokens."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.cli import options as shared

if TYPE_CHECKING:
    from pertoken.prune.compressed import Compressed


_Salience = Annotated[
    str,
    typer.Option(help="globenc, decompx, self-information, stop-words or random."),
]
_Protect = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX", help="Also by name: code, urls, numbers. Repeatable."),
]
_NoDefaults = Annotated[
    bool,
    typer.Option(
        "--no-protect-defaults",
        help="Do not protect how to answer and the last message of the user.",
    ),
]
_TargetTokenizer = Annotated[
    str | None, typer.Option(help="Model whose tokenizer counts the tokens.")
]
_Chat = Annotated[bool, typer.Option("--chat", help='The file holds {"role", "content"} messages.')]
_Lowest = Annotated[
    bool, typer.Option("--lowest", help="Keep the least salient words, as a control.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compress")(compress)


def compress(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="The prompt; - reads a pipe.")],
    keep: Annotated[float, typer.Option(help="Share of the words that stays, in (0, 1].")] = 0.8,
    salience: _Salience = "globenc",
    protect: _Protect = None,
    no_defaults: _NoDefaults = False,
    target_tokenizer: _TargetTokenizer = None,
    chat: _Chat = False,
    lowest: _Lowest = False,
    model: shared.OptionalModel = None,
    seed: shared.Seed = 0,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Drop the words that a prompt can do without: the rest to standard output.

    Words are rated by --model: for globenc and decompx an encoder such as minilm (the default) or a
    decoder; for self-information a decoder such as smollm2.
    """
    output = shared.Output(as_json, html)
    prompt = _prompt(file, chat)

    from pertoken.loading import load_tokenizer
    from pertoken.prune.frugalprompt import compress as run
    from pertoken.prune.frugalprompt import reader

    options: dict[str, Any] = {
        "salience": salience,
        "protect": protect or [],
        "protect_defaults": not no_defaults,
        "lowest": lowest,
        "seed": seed,
    }
    if target_tokenizer is not None:
        options["target_tokenizer"] = load_tokenizer(target_tokenizer)
    # What can be wrong with the prompt and the options is said before a model is loaded.
    run(prompt, 1.0, **options)
    loaded = reader(salience, model) if 0 < keep < 1 else None
    began = time.perf_counter()
    if loaded is not None and loaded.model is not None:
        options |= {"model": loaded.model, "tokenizer": loaded.tokenizer}
    result = run(prompt, keep, **options)
    seconds = time.perf_counter() - began
    if not output.write(result):
        _write(result)
    for line in report(result, seconds):
        typer.echo(line, err=True)


def report(result: Compressed, seconds: float) -> list[str]:
    """What a compression did, a line each.

    >>> from pertoken.prune import compress
    >>> report(compress("The cat sat.", 0.7, salience="stop-words"), 0.5)
    ['2 of 3 words kept; 0.50 s', 'note: the stop words are English ones']
    """
    parts = [part for _, part in result.titled()]
    words = sum(len(part.words) for part in parts)
    left = words - sum(len(part.dropped) for part in parts)
    line = f"{left} of {words} words kept"
    speed = ""
    if result.tokens_before is not None:
        line = f"{result.tokens_after} of {result.tokens_before} tokens, {line}"
        speed = f", {result.tokens_before / max(seconds, 1e-9):,.0f} tokens/s"
    lines = [f"{line}; {seconds:.2f} s{speed}"]
    counts: dict[str, int] = {}
    for part in parts:
        for word in part.protected:
            name = word.why.removeprefix("protected: ")
            counts[name] = counts.get(name, 0) + 1
    if counts:
        listed = ", ".join(f"{name} ({number})" for name, number in counts.items())
        lines.append(f"words protected: {listed}")
    return lines + [f"note: {note}" for note in result.notes]


def _prompt(file: str, chat: bool) -> Any:
    """The text of the file or the pipe, or the messages it holds."""
    from pertoken.conversation import parse_conversation
    from pertoken.prompts import read_utf8

    if file == "-":
        text = shared.read_prompt(file, "pertoken compress prompt.txt")
        name = "the conversation"
    else:
        text, name = read_utf8(Path(file), "prompt file", exact=True), f"conversation file {file}"
    return parse_conversation(text, name) if chat else text


def _write(result: Compressed) -> None:
    """The text as it is, byte for byte; a chat as JSON lines."""
    from pertoken.conversation import as_jsonl
    from pertoken.prune.compressed import CompressedChat

    text = as_jsonl(result.messages) if isinstance(result, CompressedChat) else str(result)
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.buffer.flush()
