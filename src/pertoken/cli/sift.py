"""`pertoken sift`: answer the questions of a file through stickers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.errors import PertokenError

_KEYS = ("question", "prompt", "text")

_File = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help='Questions, one a line, or .jsonl with {"question": "…"} and, to count what is '
        'right, "answer".',
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Where each question goes when it is done, a JSON line with all its calls; questions "
        "that are there are not asked again. FILE.sifted.jsonl if not given.",
    ),
]
_Batch = Annotated[
    int,
    typer.Option(
        metavar="N", callback=shared.positive, help="Questions that go through the stages together."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("sift")(sift)


def sift(
    file: _File,
    out: _Out = None,
    batch: _Batch = 8,
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    timeout: shared.Timeout = None,
    limit: shared.Limit = None,
    max_new_tokens: shared.MaxNewTokens = 1024,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Answer questions by notes of their facts, made better until two answers agree.

    --model may also be an OpenAI-compatible endpoint: http://localhost:8000/v1#NAME.
    """
    from pertoken.cli.progress import progress_bar
    from pertoken.decode._sift_file import sift_into, sifted_in
    from pertoken.decode.sift import SiftedAll

    target = out or file.with_name(f"{file.name}.sifted.jsonl")
    output = shared.Output(as_json, html, out=target)
    questions = _questions(file)[:limit]
    about = {"model": model, "max_new_tokens": max_new_tokens}
    done = sifted_in(target, about)
    asked = [text for text in dict.fromkeys(text for text, _ in questions) if text not in done]
    chat, options = _chat(model, dtype, timeout) if asked else (None, {})
    with progress_bar() as tell:
        try:
            sift_into(target, asked, chat, done, about, batch=batch, progress=tell, **options)
        except (PertokenError, KeyboardInterrupt) as error:
            typer.echo(f"{len(done)} questions are in {target}; run it again to go on", err=True)
            raise error from None
    result = SiftedAll(
        tuple(done[text] for text, _ in questions), tuple(answer for _, answer in questions)
    )
    if not output.write(result):
        typer.echo(result.table())


def _questions(file: Path) -> list[tuple[str, str | None]]:
    """Questions of a file and their right answers, None where the file has none."""
    from pertoken.prompts import read_utf8

    # JSON may hold U+2028 and its like, at which splitlines cuts.
    lines = enumerate(read_utf8(file, "question file").split("\n"), 1)
    rows = [(number, line.strip()) for number, line in lines if line.strip()]
    if not rows:
        raise PertokenError(f"question file {file} is empty")
    if file.suffix.lower() != ".jsonl":
        return [(line, None) for _, line in rows]
    return [_question(line, f"{file}, line {number}") for number, line in rows]


def _question(line: str, place: str) -> tuple[str, str | None]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PertokenError(f"{place}: not JSON ({error.msg}, column {error.colno})") from None
    key = next((key for key in _KEYS if isinstance(row, dict) and key in row), None)
    if key is None or not isinstance(row[key], str) or not row[key].strip():
        raise PertokenError(f'{place}: {{"question": "…"}} with some text is wanted')
    answer = row.get("answer")
    if answer is not None:
        answer = str(answer).rpartition("####")[2].strip()  # as GSM8K writes it
    return row[key], answer


def _chat(model: str, dtype: str | None, timeout: float | None) -> tuple[Any, dict[str, Any]]:
    """The model to ask, local or behind an address, and what belongs to it."""
    if (found := shared.endpoint(model, timeout)) is not None:
        return found, {}
    loaded, tokenizer = shared.load(model, dtype)
    return loaded, {"tokenizer": tokenizer}
