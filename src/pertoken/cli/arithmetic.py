"""`pertoken arithmetic`: can a model add, and does it depend on how digits are grouped?"""

from __future__ import annotations

from typing import Annotated

import typer

from pertoken.cli import options as shared
from pertoken.errors import PertokenError

_Formats = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated: nosep, or comma, space, dec, hashtag, dollar, foo with _r2l or "
        "_l2r; question/answer or question/repeat/answer for several in one.",
        show_default="nosep, R2L and L2R commas, and a repetition with R2L commas",
    ),
]
_Lengths = Annotated[
    list[str] | None,
    typer.Option(
        metavar="A,B[,SUM]",
        help="Digits of both addends, and perhaps of the sum. Repeatable.",
        show_default="7 to 9 digits each",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("arithmetic")(arithmetic)


def arithmetic(
    model: shared.ModelArgument = "smollm2",
    formats: _Formats = None,
    shots: Annotated[int, typer.Option(help="Solved examples in front of each problem.")] = 8,
    lengths: _Lengths = None,
    each: Annotated[int, typer.Option(help="Problems of each lengths.")] = 10,
    batch: Annotated[int, typer.Option(help="Problems at once.")] = 16,
    dtype: shared.Dtype = None,
    seed: shared.Seed = 0,
    limit: shared.Limit = None,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Ask a model additions in several number formats (Tokenization counts)."""
    from pertoken.cli.progress import progress_bar
    from pertoken.probe._addition import PAIRS, check_lengths
    from pertoken.probe._addition import Format as NumberFormat
    from pertoken.probe.arithmetic import FORMATS, check_counts
    from pertoken.probe.arithmetic import arithmetic as run

    output = shared.Output(as_json, html)
    names = [name.strip() for name in formats.split(",")] if formats is not None else list(FORMATS)
    # What can be wrong with the options is said before a model is loaded.
    for name in names:
        NumberFormat.parse(name)
    asked = [_lengths(text) for text in lengths] if lengths else list(PAIRS)
    check_lengths(asked)
    check_counts(shots, each, batch, limit)
    with progress_bar() as tell:
        tell(f"loading {model}", 0, 0)
        loaded, tokenizer = shared.load(model, dtype)
        report = run(
            loaded,
            tokenizer,
            names,
            shots,
            lengths=asked,
            each=each,
            limit=limit,
            batch=batch,
            seed=seed,
            progress=tell,
        )
    report.settings = {"model": model, **report.settings}
    if not output.write(report):
        print(report.table())


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise PertokenError(f"--lengths {text!r}: give digits such as 7,8 or 7,8,9") from None
