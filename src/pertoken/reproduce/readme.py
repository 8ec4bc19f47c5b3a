"""Fill the generated parts of README.md: results and losses from reports/, methods by family.

``python -m pertoken.reproduce.readme`` writes, ``--check`` only says whether it is stale.
A part lies between ``<!-- results:begin -->`` and ``<!-- results:end -->`` (likewise ``losses``
and ``methods``). The whole tables stand in the reports, and on the site's page of each method.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from pertoken.catalog import FAMILIES, Card, source_tree
from pertoken.catalog import methods as cards
from pertoken.errors import PertokenError
from pertoken.reproduce._report import Report, Row, read_report
from pertoken.reproduce._table import NO_REASON, figure, number


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (1: stale under --check, 2: to be mended)."""
    parser = argparse.ArgumentParser(
        prog="python -m pertoken.reproduce.readme", description=__doc__
    )
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    parser.add_argument("--root", type=Path, default=source_tree() or Path.cwd())
    given = parser.parse_args(arguments)
    try:
        stale = update(given.root, write=not given.check)
    except PertokenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if stale and given.check:
        print("README.md is stale: run `make readme`", file=sys.stderr)
        return 1
    return 0


def update(root: Path, *, write: bool) -> bool:
    """Whether the README in `root` differed from what its reports and the catalogue say."""
    path = root / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PertokenError(f"no README.md in {root}") from None
    reports = read_reports(root / "reports")
    fresh = fill(text, "results", results(reports))
    fresh = fill(fresh, "losses", losses(reports))
    fresh = fill(fresh, "methods", methods(one for one in cards() if one.package == "pertoken"))
    if write and fresh != text:
        path.write_text(fresh, encoding="utf-8")
    return fresh != text


def fill(text: str, part: str, content: str) -> str:
    """`text` with what lies between the markers of `part` replaced.

    >>> fill("a <!-- x:begin -->old<!-- x:end --> b", "x", "new")
    'a <!-- x:begin -->\\nnew\\n<!-- x:end --> b'
    """
    begin, end = f"<!-- {part}:begin -->", f"<!-- {part}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise PertokenError(f"README.md needs {begin} and {end} once each, in this order")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}\n{content}\n{end}{tail}"


def read_reports(folder: Path) -> list[Report]:
    """The reports of a folder by slug; smoke runs are left out, for their figures mean nothing."""
    reports = [read_report(path) for path in sorted(folder.glob("*.json"))]
    return [report for report in reports if not report.smoke]


def results(reports: Iterable[Report]) -> str:
    """A line per report: the row that stands for the claim, with its caveat, and the bars."""
    lines = [
        "| method | what was measured | paper | here | bars |",
        "| --- | --- | --- | --- | --- |",
    ]
    notes: list[str] = []
    for report in reports:
        judged = _judged(report)
        if not judged:
            continue
        row = headline(report, judged)
        held = sum(row.holds is True for row in judged)
        link = f"[{report.slug}](reports/{report.slug}.json)"
        bars = f"{held} of {len(judged)} hold"
        if careful := sum(bool(one.caveat) for one in judged):
            bars += f", {careful} with a caveat"
        here = figure(row)
        if row.caveat:
            notes.append(f"{report.slug}: {row.caveat}")
            here += f" ({_letter(len(notes))})"
        cells = (link, row.metric, number(row.paper), here, bars)
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    if len(lines) == 2:
        return "No paper has been reproduced yet."
    if not notes:
        return "\n".join(lines)
    told = [f"- ({_letter(place)}) {_cell(note)}" for place, note in enumerate(notes, 1)]
    below = "<details><summary>How to read the figures with a letter</summary>"
    return "\n".join([*lines, "", below, "", *told, "", "</details>"])


def _letter(place: int) -> str:
    """a, b, … of 1, 2, …"""
    return chr(ord("a") + place - 1)


def losses(reports: Iterable[Report]) -> str:
    """Every bar that does not hold, the reasons below; a reason shared by bars stands once."""
    lines = ["| method | bar | here |", "| --- | --- | --- |"]
    reasons: list[str] = []
    for report in reports:
        for row in _judged(report):
            if row.holds is not False:
                continue
            why = row.why or NO_REASON
            if why not in reasons:
                reasons.append(why)
            cells = (
                report.slug,
                f"{row.metric} {row.bar}",
                f"{figure(row)} ({reasons.index(why) + 1})",
            )
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    if not reasons:
        return "No bar fails."
    told = [f"{place}. {_cell(why)}" for place, why in enumerate(reasons, 1)]
    below = "<details><summary>The reasons</summary>"
    return "\n".join([*lines, "", below, "", *told, "", "</details>"])


def headline(report: Report, judged: Sequence[Row]) -> Row:
    """The row that stands for a report: the one its card names, else the first with a figure of
    the paper, else the first."""
    named = {card.slug: card.headline_row for card in cards()}.get(report.slug)
    chosen = [row for row in judged if row.metric == named]
    return next(iter(chosen or [row for row in judged if row.paper is not None] or judged))


def methods(papers: Iterable[Card]) -> str:
    """A line per family: the papers that are there, and those that are planned."""
    lines = ["| family | acts on | there | planned |", "| --- | --- | --- | --- |"]
    every = list(papers)
    for family, acts_on in FAMILIES.items():
        there: list[str] = []
        planned: list[str] = []
        for card in every:
            if card.family == family:
                (planned if card.status == "planned" else there).append(_linked(card))
        cells = (family, acts_on, ", ".join(there), ", ".join(planned))
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def _judged(report: Report) -> list[Row]:
    return [row for row in report.figures if row.bar]


def _linked(card: Card) -> str:
    return f"[{card.slug}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else card.slug


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


if __name__ == "__main__":
    sys.exit(main())
