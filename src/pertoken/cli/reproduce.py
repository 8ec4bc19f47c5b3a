"""`pertoken reproduce`: run a paper's headline claim here and write the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from pertoken.reproduce import Report


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("reproduce")(reproduce)


def reproduce(
    slugs: Annotated[
        list[str] | None, typer.Argument(metavar="SLUG...", help="Papers, as in `pertoken list`.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every paper that can be run.")] = False,
    smoke: Annotated[
        bool,
        typer.Option("--smoke", help="Tiny model, one or two prompts; judges and writes nothing."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the reports as a JSON list.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the reports, instead of reports/.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="File or folder with the data, instead of fetching it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another model than the declared one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float64.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed than the declared one.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0 …")] = "cpu",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")
    ] = False,
    jobs: Annotated[
        int, typer.Option(help="Processes for what is not timed, of one thread each.")
    ] = 1,
    reasons: Annotated[
        bool,
        typer.Option(
            "--reasons", help="Only bring changed REASONS into the written report; run nothing."
        ),
    ] = False,
) -> None:
    """Run the headline claim of papers here and write reports/SLUG.json.

    Exit code 0: every declared bar was measured, and holds or has its reason. 1: a bar without a
    measurement, or one that does not hold without a reason (the report is written all the same).
    2: something to mend, such as an unknown paper.
    """
    from rich.console import Console

    from pertoken.errors import PertokenError
    from pertoken.reproduce import _harness as harness

    names = _names(slugs or [], every, harness.available)
    for name in names:
        harness.find(name)  # a wrong name is said before hours are spent on the right ones
    console = Console(stderr=True)

    def once(slug: str) -> Report:
        if reasons:
            return harness.refresh_reasons(slug, out)
        return harness.reproduce(
            slug,
            smoke,
            model=model,
            dtype=dtype,
            seed=seed,
            device=device,
            data=data,
            out=out,
            resume=resume,
            jobs=jobs,
            progress=not as_json and console.is_terminal,
            console=console,
        )

    reports: list[Report] = []
    failures = []
    for slug in names:
        try:
            report = once(slug)
        except KeyboardInterrupt:
            if not smoke and not reasons:
                _say(console, f"{slug}: stopped; `--resume` goes on behind the finished units")
            raise
        except PertokenError as error:
            if len(names) == 1:
                raise
            failures.append(slug)
            _say(console, f"error: {slug}: {error}")
            continue
        reports.append(report)
        if not as_json:
            _show(report)
        for fault in report.faults:
            _say(console, f"{report.slug}: {fault}")
    if as_json:
        typer.echo(json.dumps([report.to_dict() for report in reports], ensure_ascii=False))
    if failures:
        raise typer.Exit(2)
    if any(report.faults for report in reports):
        raise typer.Exit(1)


def _names(slugs: list[str], every: bool, available: Callable[[], list[str]]) -> list[str]:
    from pertoken.errors import PertokenError

    if every and slugs:
        raise PertokenError("name papers or say --all, not both")
    if every:
        found = available()
        if not found:
            raise PertokenError("no paper can be reproduced yet")
        return found
    if not slugs:
        raise PertokenError("name a paper (see `pertoken list`) or say --all")
    return list(dict.fromkeys(slugs))


def _show(report: Report) -> None:
    import shutil

    from rich.console import Console

    from pertoken.reproduce._table import notes, table

    console = Console(width=max(100, shutil.get_terminal_size((120, 40)).columns))
    console.print(table(report))
    for line in notes(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
