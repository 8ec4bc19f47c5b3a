"""`pertoken compare`: the same prompts, decoded several ways, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from pertoken.compare_report import Comparison


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare")(compare)


def compare(
    methods: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="METHODS...",
            help="Slugs, hf, hf-prompt-lookup; a choice of them if none is given.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help=".jsonl or .txt; a built-in sample if not given.")
    ] = None,
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file or short name.")] = (
        "smollm2"
    ),
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float64; the device's default.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens per prompt.")] = 40,
    budget: Annotated[
        str, typer.Option(metavar="auto|published|N", help="Tokens drafted per step.")
    ] = "auto",
    limit: Annotated[int | None, typer.Option(help="Only the first N prompts.")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Let drafters keep what they learned from prompts.")
    ] = False,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write all results as JSON.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page that shows where each token came from.")
    ] = None,
) -> None:
    """Decode the same prompts with each method in turn; check the text, show what each brought."""
    from pertoken._files import check_target, write_whole
    from pertoken.cli.progress import progress_bar
    from pertoken.compare import compare as run

    number = parse_budget(budget)
    targets = [Path(as_json)] if as_json not in (None, "-") else []
    for target in [*targets, *([html] if html else [])]:
        check_target(target)
    if html and html in targets:
        raise PertokenError(f"--json and --html both want to write {html}")
    with progress_bar() as progress:
        result = run(
            methods or None,
            prompts=prompts,
            model=model,
            dtype=dtype,
            max_new_tokens=max_new_tokens,
            budget=number,
            limit=limit,
            keep=keep,
            progress=progress,
        )
    if as_json is not None:
        text = json.dumps(result.to_dict(), ensure_ascii=False, indent=1, allow_nan=False)
        if as_json == "-":
            print(text)
        else:
            write_whole(Path(as_json), text + "\n")
    if html:
        write_whole(html, result.to_html())
    if as_json != "-":
        print(result.table())
        _say(result, html)


def parse_budget(text: str) -> int | Literal["auto"] | None:
    """The budget of an option: "auto" measures what pays here, "published" is each paper's own.

    >>> parse_budget("auto"), parse_budget("16"), parse_budget("published")
    ('auto', 16, None)
    """
    word = text.strip().lower()
    if word == "auto":
        return "auto"
    if word == "published":
        return None
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise PertokenError(
            f"--budget is auto or a number from 1 on, not {text!r} (or published: the papers' own)"
        )
    return number


def _say(result: Comparison, html: Path | None) -> None:
    """Two lines on what to try next; on stderr, since they are not the result."""
    best = max(result.method_rows, key=lambda row: row.speed_up).method
    first = (
        f"open {html}  to see which token came from where"
        if html
        else "pertoken compare --html compare.html  shows which token came from where"
    )
    second = f'pertoken generate --method {best} --stats "Tell me about the sea."'
    if best.startswith(("hf", "plain")):
        second = "pertoken compare --prompts YOURS.txt --model YOUR_MODEL  runs on your own text"
    typer.echo(f"\nnext: {first}\nnext: {second}", err=True)
