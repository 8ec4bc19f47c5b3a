"""`pertoken turkish`: do tokens meet morphemes; `turkish-sweep`: over vocabularies and families."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pertoken.cli import options as shared

_Tokenizers = Annotated[
    list[str],
    typer.Argument(metavar="TOKENIZER...", help="Public names, files, folders or Hub ids."),
]
_Text = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A text to measure on.",
        show_default="sixty Turkish words cut by hand",
    ),
]
_Analyzer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="Who cuts words: zeyrek, zemberek, or a gold file of any language.",
        show_default="zeyrek for a text",
    ),
]
_Inner = Annotated[
    bool, typer.Option("--inner", help="Without the ends of words, which are right for nothing.")
]
_Out = Annotated[
    Path | None,
    typer.Option(help="The file of finished cells, a line each.", show_default="PLAN.jsonl"),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("turkish")(turkish)
    app.command("turkish-sweep")(turkish_sweep)


def turkish(
    tokenizers: _Tokenizers,
    text: _Text = None,
    analyzer: _Analyzer = None,
    inner: _Inner = False,
    accept_licence: shared.AcceptLicence = False,
    limit: shared.Limit = None,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Show how many tokens are words or morphemes, and how well cuts meet morphemes.

    --limit takes the first words of the text.
    """
    from pertoken.cli.progress import delayed_bar
    from pertoken.prompts import read_utf8
    from pertoken.tokenize import morphology_report, open_analyzer, open_tokenizer
    from pertoken.tokenize.sections_morphology import lines

    output = shared.Output(as_json, html)
    words = None if text is None else read_utf8(text, "text file").split()
    reader = open_analyzer(analyzer or ("gold" if text is None else "zeyrek"))
    given = (list(reader.words) if words is None else words)[:limit]
    opened = {
        name: open_tokenizer(name, accept_licence=accept_licence)
        for name in dict.fromkeys(tokenizers)
    }
    with delayed_bar() as tell:
        found = lines(
            {
                name: morphology_report(one, given, reader, final=not inner, progress=tell)
                for name, one in opened.items()
            }
        )
    if not output.write(found):
        print(found.table())


def turkish_sweep(
    plan: Annotated[Path, typer.Argument(help="TOML: corpora, vocabularies, families, words.")],
    out: _Out = None,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    ray: shared.Ray = False,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Train tokenizers over corpora, families and sizes; measure where they cut words.

    Run it again to go on. Exit code 1 where cells were lost because their worker was killed.
    """
    from pertoken.cli.progress import progress_bar
    from pertoken.tokenize import morphology_sweep

    file = plan.with_suffix(".jsonl") if out is None else out
    output = shared.Output(as_json, html, out=file)
    with progress_bar() as tell:
        found = morphology_sweep(plan, file, jobs=jobs, ray=ray, progress=tell)
    if found.cells and not output.write(found):
        print(found.table())
    typer.echo(f"{len(found.cells)} cells in {file}", err=True)
    if found.lost:
        cells = ", ".join(" ".join(map(str, cell)) for cell in found.lost[:3])
        typer.echo(f"{len(found.lost)} lost, their worker was killed ({cells})", err=True)
        raise typer.Exit(1)
