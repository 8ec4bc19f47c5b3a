"""`pertoken premiums …`: what a vocabulary costs in each language, over a sweep of tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pertoken.cli import options as shared
from pertoken.cli._group import Group
from pertoken.errors import PertokenError

_Out = Annotated[
    Path | None,
    typer.Option(help="The file of finished cells, a line each.", show_default="CONFIG.jsonl"),
]


def register(app: typer.Typer) -> None:
    """Add the group and its commands."""
    group = typer.Typer(
        cls=Group,
        help="Train tokenizers over languages and sizes; see what evens out their costs.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command("sweep")(sweep)
    group.command("show")(show)
    app.add_typer(group, name="premiums")


def sweep(
    config: Annotated[Path, typer.Argument(help="TOML: languages, vocabularies, kinds, text.")],
    out: _Out = None,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    ray: shared.Ray = False,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Train and count every cell that is not finished yet; run it again to go on.

    Exit code 1 where cells were lost because their worker was killed.
    """
    from pertoken.cli.progress import progress_bar
    from pertoken.tokenize.sweeps import sweep as run

    file = config.with_suffix(".jsonl") if out is None else out
    output = shared.Output(as_json, html, out=file)
    with progress_bar() as tell:
        found = run(config, file, jobs=jobs, ray=ray, progress=tell)
    if found.cells and not output.write(found):
        print(found.table())
    typer.echo(f"{len(found.cells)} cells in {file}", err=True)
    if found.lost:
        cells = ", ".join(f"{language} {kind} {size}" for language, kind, size in found.lost[:3])
        more = ", …" if len(found.lost) > 3 else ""
        typer.echo(
            f"{len(found.lost)} lost, their worker was killed ({cells}{more}): "
            "run the same command again",
            err=True,
        )
        raise typer.Exit(1)


def show(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="The file of a sweep.")],
    reference: Annotated[
        str | None,
        typer.Option(help="The language that premiums are over.", show_default="eng"),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            help="Tokens that each language is to take.",
            show_default="the least that all came down to",
        ),
    ] = None,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Show a sweep: counts and spread, each language's vocabulary for a target, the regression."""
    from pertoken.tokenize.sweeps import read_sweep

    output = shared.Output(as_json, html)
    if target is not None and not target > 0:
        raise PertokenError(f"--target is a number of tokens above 0, not {target:g}")
    found = read_sweep(file, reference)
    found.target = target
    if not output.write(found):
        print(found.table())
