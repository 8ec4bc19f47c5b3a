"""`pertoken compare`: the same prompts, decoded several ways, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pertoken.cli import options as shared
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from pertoken.compare_report import Comparison


_Methods = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="METHODS...",
        help="Slugs, hf, hf-prompt-lookup; a choice of them if none is given.",
    ),
]
_Keep = Annotated[
    bool, typer.Option("--keep", help="Let drafters keep what they learned from prompts.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare")(compare)


def compare(
    methods: _Methods = None,
    prompts: shared.Prompts = None,
    budget: shared.Budget = "auto",
    keep: _Keep = False,
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    seed: shared.Seed = 0,
    limit: shared.Limit = None,
    max_new_tokens: shared.MaxNewTokens = 40,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Decode the same prompts with each method in turn; check the text, show what each brought.

    A method that is not lossless is marked, and columns of quality stand beside it; prompts that
    have an "answer" are also counted right or wrong.
    """
    from pertoken.cli.progress import progress_bar
    from pertoken.compare import compare as run

    number = parse_budget(budget)
    output = shared.Output(as_json, html)
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
            seed=seed,
            progress=progress,
        )
    if not output.write(result):
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


def _say(result: Comparison, html: str | None) -> None:
    """Two lines on what to try next; on stderr, since they are not the result."""
    lossless = [row for row in result.method_rows if row.lossless]
    best = max(lossless, key=lambda row: row.speed_up).method
    first = (
        f"open {html}  to see which token came from where"
        if html
        else "pertoken compare --html compare.html  shows which token came from where"
    )
    second = f'pertoken generate --method {best} --stats "Tell me about the sea."'
    if best.startswith(("hf", "plain")):
        second = "pertoken compare --prompts YOURS.txt --model YOUR_MODEL  runs on your own text"
    typer.echo(f"\nnext: {first}\nnext: {second}", err=True)
