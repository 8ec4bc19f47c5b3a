"""`pertoken reproduce`: run a paper's headline claim here and write the report."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pertoken.cli import options as shared
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from pertoken.reproduce import Report


_Slugs = Annotated[
    list[str] | None, typer.Argument(metavar="SLUG...", help="Papers, as in `pertoken list`.")
]
_Smoke = Annotated[
    bool,
    typer.Option("--smoke", help="Tiny model, one or two prompts; judges and writes nothing."),
]
_Out = Annotated[Path | None, typer.Option(help="Folder for the reports, instead of reports/.")]
_Data = Annotated[
    Path | None, typer.Option(help="File or folder with the data, instead of fetching it.")
]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")]
_Jobs = Annotated[int, typer.Option(help="Processes for what is not timed, of one thread each.")]
_Reasons = Annotated[
    bool,
    typer.Option(
        "--reasons", help="Only bring changed REASONS into the written report; run nothing."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("reproduce")(reproduce)


def reproduce(
    slugs: _Slugs = None,
    every: Annotated[bool, typer.Option("--all", help="Every paper that can be run.")] = False,
    smoke: _Smoke = False,
    out: _Out = None,
    data: _Data = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:0.")] = "cpu",
    resume: _Resume = False,
    jobs: _Jobs = 1,
    reasons: _Reasons = False,
    model: shared.OptionalModel = None,
    dtype: shared.Dtype = None,
    seed: shared.OptionalSeed = None,
    as_json: shared.Json = None,
) -> None:
    """Run the headline claim of papers here and write reports/SLUG.json.

    --model, --dtype and --seed take the place of the declared ones. --json writes a list of the
    reports. Exit code 0: every declared bar was measured, and holds or has its reason. 1: a bar
    without a measurement, or one that does not hold without a reason (the report is written all
    the same). 2: something to mend, such as an unknown paper.
    """
    from rich.console import Console

    from pertoken.reproduce import _harness as harness

    output = shared.Output(as_json)
    names = _names(slugs or [], every, harness.available)
    for name in names:
        harness.find(name)  # a wrong name is said before hours are spent on the right ones
    console = Console(stderr=True)
    if reasons:
        once = partial(harness.refresh_reasons, out=out)
    else:
        once = partial(
            harness.reproduce,
            smoke=smoke,
            model=model,
            dtype=dtype,
            seed=seed,
            device=device,
            data=data,
            out=out,
            resume=resume,
            jobs=jobs,
            progress=not output.quiet and console.is_terminal,
            console=console,
        )
    hint = not smoke and not reasons
    reports, failures = _run(names, once, console, hint=hint, quiet=output.quiet)
    output.write([report.to_dict() for report in reports])
    if failures:
        raise typer.Exit(2)
    if any(report.faults for report in reports):
        raise typer.Exit(1)


def _run(
    names: list[str], once: Callable[[str], Report], console: Console, *, hint: bool, quiet: bool
) -> tuple[list[Report], list[str]]:
    """The reports, each shown when it is there unless `quiet`, and the names that failed.

    hint: say how to go on when Ctrl-C stops it.
    """
    reports: list[Report] = []
    failures = []
    for slug in names:
        try:
            report = once(slug)
        except KeyboardInterrupt:
            if hint:
                _say(console, f"{slug}: stopped; `--resume` goes on behind the finished units")
            raise
        except PertokenError as error:
            if len(names) == 1:
                raise
            failures.append(slug)
            _say(console, f"error: {slug}: {error}")
            continue
        reports.append(report)
        if not quiet:
            _show(report)
        for fault in report.faults:
            _say(console, f"{report.slug}: {fault}")
    return reports, failures


def _names(slugs: list[str], every: bool, available: Callable[[], list[str]]) -> list[str]:
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
