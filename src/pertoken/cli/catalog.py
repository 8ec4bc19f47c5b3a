"""`pertoken list`, `pertoken show` and `pertoken new`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pertoken.catalog import FAMILIES, PLUGS, Card, baselines, card, methods
from pertoken.cli import options as shared
from pertoken.errors import PertokenError, nearest


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("list")(list_methods)
    app.command("show")(show)
    app.command("new")(new)


def list_methods(
    family: Annotated[
        str | None, typer.Option(help=f"Only this family: {', '.join(FAMILIES)}.")
    ] = None,
    references: Annotated[
        bool, typer.Option("--baselines", help="The references methods are compared with.")
    ] = False,
    as_json: shared.Json = None,
) -> None:
    """List the papers and the methods of other packages: what each is for, is it ready."""
    if family is not None and family not in FAMILIES:
        raise PertokenError(
            f"unknown family {family!r}{nearest(family, FAMILIES)}; "
            f"the families are {', '.join(FAMILIES)}"
        )
    cards = baselines() if references else methods()
    cards = [one for one in cards if family in (None, one.family)]
    if shared.Output(as_json).write([one.to_dict() for one in cards]):
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_listed(cards))
    if not references:
        usable = sum(one.status != "planned" for one in cards)
        console.print(f"{usable} of {len(cards)} there; `pertoken show METHOD` tells more")


def show(
    slug: Annotated[str, typer.Argument(metavar="METHOD", help="A name of `pertoken list`.")],
    as_json: shared.Json = None,
) -> None:
    """Show one method: what it does, how to call it, what its paper claims, what holds here."""
    one = card(slug)
    report = one.report
    if shared.Output(as_json).write({**one.to_dict(), "report": report}):
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    console.print(f"[bold]{one.slug}[/bold]  {escape(one.title)}")
    links = [f"https://arxiv.org/abs/{one.arxiv}" if one.arxiv else "", one.code or ""]
    place = [f"family {one.family}", f"plug {one.plug}", _status(one)]
    facts = [", ".join(one.authors), one.date, *links, *place]
    console.print(escape(" · ".join(fact for fact in facts if fact)), style="dim")
    sentences = filter(None, (one.does, one.use_when, one.avoid_when))
    console.print("\n" + escape("\n".join(sentences)))
    if one.headline:
        console.print(f"\n[bold]The paper says[/bold]\n{escape(one.headline)}")
    if one.path is not None:
        if one.cost:
            console.print(f"\n[bold]What it costs[/bold]\n{escape(one.cost)}")
        console.print(f"\n[bold]How to call it[/bold]\n{escape(_usage(one))}", soft_wrap=True)
    if report is not None:
        console.print("\n[bold]Reproduced here[/bold]")
        console.print(f"model {report.get('model')}, version {report.get('version')}", style="dim")
        console.print(_rows(report))
        for remark in _remarks(report):
            console.print(escape(f"- {remark}"))
        if more := len(report["rows"]) - len(_barred(report)):
            console.print(f"{more} more rows: `pertoken show {one.slug} --json -`", style="dim")
    elif one.status == "planned":
        console.print("\nPlanned, not there yet.")
    elif not one.baseline and one.package == "pertoken":
        console.print(f"\nNot reproduced yet: `pertoken reproduce {one.slug}`")


def new(
    slug: Annotated[str, typer.Argument(help="Name of the method, such as my-paper.")],
    title: Annotated[str | None, typer.Option(help="The paper's title, if it is new here.")] = None,
    family: Annotated[
        str | None, typer.Option(help=f"Where it belongs: {', '.join(FAMILIES)}.")
    ] = None,
    plug: Annotated[
        str | None, typer.Option(help=f"How it meets a model: {', '.join(PLUGS)}.")
    ] = None,
    arxiv: Annotated[str | None, typer.Option(help="Its arXiv number, such as 2604.02047.")] = None,
    root: Annotated[
        Path | None, typer.Option(help="The source tree to write to (default: this one).")
    ] = None,
) -> None:
    """Start a paper: its file, its test, its reproduction and its row of the catalogue."""
    from pertoken.scaffold import scaffold

    for path in scaffold(slug, root=root, title=title, family=family, plug=plug, arxiv=arxiv):
        print(path)


def _listed(cards: list[Card]) -> Any:
    """A row per card under the heads of their families; the last column has most of the width."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("bars held", no_wrap=True)
    table.add_column("what for")
    family, order = None, list(FAMILIES)
    for one in sorted(cards, key=lambda one: order.index(one.family)):
        if one.family != family:
            if family is not None:
                table.add_row()
            family = one.family
            table.add_row(f"[bold]{family}[/bold]", "", f"[dim]{FAMILIES[family]}[/dim]")
        bars = one.bars if one.status == "ready" else None
        told = one.status if bars is None else f"{bars[0]} of {bars[1]}"
        owner = "" if one.package == "pertoken" else f" (package {one.package})"
        table.add_row(f"  {one.slug}", told, escape(one.use_when.removeprefix("Use it ") + owner))
    return table


def _status(one: Card) -> str:
    if one.package != "pertoken":
        return f"{one.status}, of the package {one.package}"
    bars = one.bars if one.status == "ready" else None
    return one.status if bars is None else f"{one.status}, {bars[0]} of {bars[1]} bars hold"


def _usage(one: Card) -> str:
    assert one.entry is not None
    module, _, name = one.entry.partition(":")
    return f"from {module} import {name}\n{one.call or f'help({name})'}"


def _rows(report: dict[str, Any]) -> Any:
    """The figures that have a bar, as a table."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("metric", "paper", "here", "bar", "holds?"):
        table.add_column(heading, no_wrap=heading in ("bar", "holds?"), min_width=7)
    for row in _barred(report):
        figures = [_figure(row.get(key)) for key in ("paper", "here")]
        if row.get("unit") and figures[1]:
            figures[1] += f" {row['unit']}"
        table.add_row(*map(escape, (row["metric"], *figures, row["bar"], _verdict(row))))
    return table


def _barred(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if row.get("bar")]


def _verdict(row: dict[str, Any]) -> str:
    told = "" if row.get("holds") is None else "yes" if row["holds"] else "no"
    return f"{told}, but" if row.get("caveat") else told


def _remarks(report: dict[str, Any]) -> list[str]:
    """Why bars do not hold, and how to read those that do, each once with its metrics."""
    told: dict[str, list[str]] = {}
    for row in _barred(report):
        text = row.get("why") if row.get("holds") is False else row.get("caveat")
        if text:
            told.setdefault(f"{_verdict(row)}: {text}", []).append(row["metric"])
    return [f"{'; '.join(metrics)}: {text}" for text, metrics in told.items()]


def _figure(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
