"""The matrix of methods and architectures as Markdown: ``python -m pertoken.testing.matrix``.

Runs the battery (minutes) and writes docs/matrix.md to standard output; a law that is broken, or
skipped without a declared reason, ends it. ``--declared`` writes what the reasons say, without a
run: the page is the same, which is what its test looks at.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from pertoken.catalog import PLUGS
from pertoken.errors import PertokenError
from pertoken.testing._law_sets import LAWS
from pertoken.testing.battery import (
    DRAWN_ON,
    Subject,
    expected_skips,
    finished,
    laws_on,
    subject,
)
from pertoken.testing.laws import LawBroken
from pertoken.testing.method import check_method
from pertoken.testing.models import ARCHITECTURES

__all__ = ["declared", "main", "page", "run"]

Cell = tuple[tuple[str, ...], dict[str, str]]
"""The laws that hold, and those skipped with their reasons."""
Cells = Mapping[tuple[str, str], Cell]
"""(slug, architecture) -> cell; the architecture of a method without a model is ""."""

_HEAD = """# Which method runs on which architecture

Every method of the catalogue that is written is run through the laws of its plug, on tiny random
models in float64 of eight architectures; no weight is loaded. ✓: every law of the plug holds. A
number behind it leads to a law that is left out there, with its reason; where the number stands
in the last column, that is so on all architectures. –: nothing applies. Whether sampled text
follows the model is drawn on {drawn} alone, since sampling sees logits and no architecture.
`pertoken.testing.check_method` runs the same laws on a method of yours, see [Testing](testing.md).

This page is written by `python -m pertoken.testing.matrix`."""


def main(arguments: list[str] | None = None) -> int:
    """Write the page to standard output; the exit code is 1 where a law is broken."""
    parser = argparse.ArgumentParser(prog="python -m pertoken.testing.matrix", description=__doc__)
    parser.add_argument("--declared", action="store_true", help="do not run the laws")
    given = parser.parse_args(arguments)
    try:
        cells = declared() if given.declared else run(_tell)
    except (LawBroken, PertokenError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(page(cells))
    return 0


def declared() -> Cells:
    """What the declared reasons say; nothing is run."""
    cells = {}
    for one, place, laws in _pairs():
        skips = expected_skips(one, laws)
        cells[one.name, place] = (tuple(law for law in laws if law not in skips), skips)
    return cells


def run(tell: Callable[[str], None] = lambda line: None) -> Cells:
    """Run all laws of all methods on all architectures.

    Raises LawBroken where one is broken, PertokenError where one is skipped that should not be.
    """
    cells = {}
    for one, place, laws in _pairs():
        tell(f"{one.name} {place}".strip())
        report = check_method(one.name, place or None, laws=laws)
        expected = expected_skips(one, laws)
        if report.skips.keys() != expected.keys():
            odd = sorted(report.skips.keys() ^ expected.keys())
            raise PertokenError(
                f"{one.name} on {place or 'no model'} skips other laws than the battery declares: "
                f"{', '.join(odd)}"
            )
        cells[one.name, place] = (report.holds, expected)
    return cells


def page(cells: Cells) -> str:
    """The page: a table per plug, the reasons below it."""
    parts = [_HEAD.format(drawn=DRAWN_ON)]
    for plug, what in PLUGS.items():
        slugs = [slug for slug in finished() if subject(slug).plug == plug]
        if slugs:
            parts.append(_section(plug, what, slugs, cells))
    return "\n\n".join(parts)


def _section(plug: str, what: str, slugs: Sequence[str], cells: Cells) -> str:
    notes: dict[tuple[str, tuple[str, ...]], int] = {}  # reason and its laws -> number

    def number(skips: Iterable[tuple[str, str]]) -> str:
        laws: dict[str, list[str]] = {}
        for law, reason in skips:
            laws.setdefault(reason, []).append(law)
        keys = [(reason, tuple(names)) for reason, names in laws.items()]
        return ", ".join(str(notes.setdefault(key, len(notes) + 1)) for key in keys)

    with_model = [slug for slug in slugs if subject(slug).meets_model]
    without = [slug for slug in slugs if slug not in with_model]
    lines = [f"## {plug}", "", f"`{what}`" if "(" in what else f"{what[:1].upper()}{what[1:]}."]
    lines += ["", f"Laws: {', '.join(LAWS[plug])}.", ""]
    for group, places in ((with_model, ARCHITECTURES), (without, ("",))):
        if group:
            lines += [_row("method", [place or "no model" for place in places], "left out")]
            lines += [_row("---", ["---"] * len(places), "---")]
            lines += [_method(slug, places, cells, number) for slug in group] + [""]
    lines += [f"{n}. *{', '.join(laws)}*: {reason}." for (reason, laws), n in notes.items()]
    for one in map(subject, slugs):
        if own := [law for law in one.laws if law not in LAWS[plug]]:
            lines += ["", f"`{one.name}` has laws of its own: {', '.join(own)}."]
    if settings := {slug: more for slug in slugs if (more := subject(slug).settings)}:
        named = (f"`{slug}` {', '.join(more)}" for slug, more in settings.items())
        lines += ["", f"Run with other settings too: {'; '.join(named)}."]
    return "\n".join(lines).rstrip()


def _method(
    slug: str,
    places: Sequence[str],
    cells: Cells,
    number: Callable[[Iterable[tuple[str, str]]], str],
) -> str:
    """A line of a table; reasons that hold everywhere go to its last column."""
    skips = [list(cells[slug, place][1].items()) for place in places]
    common = [skip for skip in skips[0] if all(skip in others for others in skips)]
    row = []
    for place, own in zip(places, skips, strict=True):
        special = number(skip for skip in own if skip not in common)
        row.append(("✓" if cells[slug, place][0] else "–") + (f" {special}" if special else ""))
    return _row(f"`{slug}`", row, number(common))


def _row(first: str, middle: Sequence[str], last: str) -> str:
    return f"| {' | '.join([first, *middle, last])} |".replace("|  |", "| |")


def _pairs() -> Iterable[tuple[Subject, str, tuple[str, ...]]]:
    """Every method with every architecture, or with "" if it meets no model; and its laws."""
    for slug in finished():
        one = subject(slug)
        for place in ARCHITECTURES if one.meets_model else ("",):
            yield one, place, laws_on(one, place or DRAWN_ON)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
