"""Fill the generated parts of README.md: results from reports/, methods from the catalogue.

``python -m pertoken.reproduce.readme`` writes, ``--check`` only says whether it is stale.
A part lies between ``<!-- results:begin -->`` and ``<!-- results:end -->`` (likewise ``methods``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from pertoken.catalog import Card, source_tree
from pertoken.catalog import methods as cards
from pertoken.errors import PertokenError
from pertoken.reproduce._report import Report, read_report
from pertoken.reproduce._table import NO_REASON, figure, number, verdict

PARTS = ("results", "methods")


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
    fresh = fill(text, "results", results(read_reports(root / "reports")))
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
    """One table per report, the reasons of what does not hold below it."""
    return "\n\n".join(map(_section, reports)) or "No paper has been reproduced yet."


def _section(report: Report) -> str:
    lines = [
        f"**{report.slug}** on {report.model}, {report.settings.get('dtype', 'float32')}, "
        f"{report.machine.get('cores')} cores of {report.machine.get('cpu')} "
        f"([full report](reports/{report.slug}.json))",
        "",
        "| claim | paper | here | bar | holds? |",
        "| --- | --- | --- | --- | --- |",
    ]
    reasons: list[str] = []
    for row in report.rows:
        if not row.bar:  # information: in the full report
            continue
        held = verdict(row)
        if row.holds is False:
            reasons.append(row.why or NO_REASON)
            held += f" ({len(reasons)})"
        paper = number(row.paper)
        if row.paper_setting:
            paper += f" ({row.paper_setting})"
        cells = (row.metric, paper, figure(row), row.bar, held)
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    if reasons:
        lines += ["", *(f"({i}) {_cell(why)}  " for i, why in enumerate(reasons, 1))]
    return "\n".join(lines)


def methods(papers: Iterable[Card]) -> str:
    """A table of the catalogue's papers, in its order."""
    lines = ["| method | family | use it when | paper |", "| --- | --- | --- | --- |"]
    for card in papers:
        link = f"https://arxiv.org/abs/{card.arxiv}"
        title = f"[{card.title}]({link})" if card.arxiv else card.title
        cells = (f"`{card.slug}`", card.family, card.use_when.removeprefix("Use it when "), title)
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


if __name__ == "__main__":
    sys.exit(main())
