"""`pertoken audit`: what tokenizers cost and what survives them, a column each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pertoken.cli import options as shared
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from rich.console import Console

    from pertoken.tokenize import Audit


_Tokenizers = Annotated[
    list[str],
    typer.Argument(
        metavar="TOKENIZER...",
        help="Public names such as cl100k, files (tokenizer.json, .model, .tiktoken), folders "
        "or Hub ids.",
    ),
]
_Langs = Annotated[
    str | None,
    typer.Option(
        metavar="CODE[,CODE...]|all",
        help="Languages: en, deu, cmn_hans …; a choice and the five dearest if not given.",
    ),
]
_Text = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Count on a text of yours instead. Repeatable."),
]
_Section = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Only this: overview, text, languages, numbers, fidelity, controls, redundancy "
        "or morphology. Repeatable.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("audit")(audit)


def audit(
    tokenizers: _Tokenizers,
    langs: _Langs = None,
    text: _Text = None,
    section: _Section = None,
    accept_licence: shared.AcceptLicence = False,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Show what tokenizers cost per language and text, how they cut numbers, what they lose."""
    from pertoken.cli.progress import delayed_bar
    from pertoken.prompts import read_utf8
    from pertoken.tokenize.report import audit as run

    output = shared.Output(as_json, html)
    codes: list[str] | str | None = langs
    if langs is not None and langs != "all":
        codes = [code.strip() for code in langs.split(",") if code.strip()]
        if not codes:
            raise PertokenError("--langs names no language: give codes such as en,de, or all")
    texts = {str(file): read_utf8(file, "text file", exact=True) for file in text or []}
    with delayed_bar() as tell:
        found = run(
            tokenizers,
            codes,
            texts or None,
            sections=section,
            accept_licence=accept_licence,
            progress=tell,
        )
    if not output.write(found):
        _print(found)


def _print(found: Audit) -> None:
    """Tables with lines on a terminal; plain text, of any width, into a pipe."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        typer.echo(found.table())
        return
    _print_tables(found, console)


def _print_tables(found: Audit, console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for part in found.sections.values():
        table = Table(title=Text(part.title), title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("")
        for name in part.tokenizers:
            table.add_column(Text(name), justify="right")
        for group, rows in part.groups():
            if group:
                table.add_row(Text(group, style="dim"), *[""] * len(part.tokenizers))
            for row in rows:
                label = ("  " if group else "") + row.label
                table.add_row(Text(label), *(Text(cell) for cell in row.cells()))
        console.print(table)
        for note in part.notes:
            console.print(Text(f"note: {note}", style="dim"))
