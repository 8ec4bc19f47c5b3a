"""What a sweep tells: its tables, and the page with them and the counts over the vocabulary."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from pertoken._html import report
from pertoken.errors import PertokenError
from pertoken.result import Part

if TYPE_CHECKING:
    from pertoken.tokenize.sweeps import Sweep

__all__ = ["page", "parts"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 360, 64, 28  # pixels
_STYLE = """
svg.chart { width: 100%; max-width: 48rem; height: auto; }
svg.chart polyline { fill: none; stroke: var(--l0); stroke-opacity: .45; }
svg.chart polyline.reference { stroke: var(--l6); stroke-opacity: 1; stroke-width: 3; }
svg.chart text { fill: var(--faint); font-size: 12px; }
"""


def parts(found: Sweep) -> list[Part]:
    """The tables: counts, then each kind's vocabularies and regression where there is enough."""
    shown: list[Part | None] = [_counts(found)]
    for kind in dict.fromkeys(kind for kind, _ in found.settings()):
        shown += [_vocabularies(found, kind), _regression(found, kind)]
    return [part for part in shown if part is not None]


def _counts(found: Sweep) -> Part:
    """A line per kind and vocabulary. Spread is the standard deviation over the mean."""
    head = ["kind", "vocabulary", "languages", "came out", "mean CTC", "spread", "dearest"]
    lines = [head]
    for kind, size in found.settings():
        rows = [row for row in found.cells if (row["kind"], row["vocabulary"]) == (kind, size)]
        counts = [row["tokens"] for row in rows]
        mean = sum(counts) / len(counts)
        spread = (sum((n - mean) ** 2 for n in counts) / max(len(counts) - 1, 1)) ** 0.5
        worst = max(rows, key=lambda row: row["tokens"])
        own = next((r["tokens"] for r in rows if r["language"] == found.reference), None)
        over = f" {worst['tokens'] / own:.2f} x" if own else ""
        sizes = sum(row["size"] for row in rows) / len(rows)
        line = [kind, str(size), str(len(rows)), f"{sizes:.0f}", f"{mean:.0f}"]
        lines.append([*line, f"{spread / mean:.1%}", f"{worst['language']}{over}"])
    return Part("Corpus token counts over the languages", lines)


def _vocabularies(found: Sweep, kind: str) -> Part | None:
    laws = found.optimal(kind)
    if not laws:
        return None
    lines = [["language", "vocabulary", "a", "b", "R²"]]
    for name, law in sorted(laws.items(), key=lambda item: item[1].vocabulary):
        size = f"{law.vocabulary:.0f}" if law.vocabulary < 1e7 else f"{law.vocabulary:.1e}"
        if math.isnan(law.vocabulary):
            size = "-"
        mark = "" if law.measured else " ?"
        lines.append([name, size + mark, f"{law.a:.4g}", f"{law.b:.3f}", f"{law.r2:.3f}"])
    goal = next(iter(laws.values())).target
    note = "CTC = a · n^b with n tokens learnt beyond the alphabet."
    if any(line[1].endswith("?") for line in lines):
        note += " ?: outside the sizes that were measured, a guess."
    title = f"{kind}: the vocabulary at which each language takes {goal:.0f} tokens"
    return Part(title, lines, [note])


def _regression(found: Sweep, kind: str) -> Part | None:
    """At the largest vocabulary, of the factors that vary and leave enough rows."""
    from pertoken.tokenize.sweeps import FACTORS

    size = max(size for each, size in found.settings() if each == kind)
    factors = list(FACTORS)
    while factors:
        try:
            result = found.regression(kind, size, factors)
        except PertokenError:  # too few languages for so many columns
            factors.pop()
            continue
        (part,) = result._parts()
        title = f"{kind}, vocabulary {size}: what the counts go with"
        return Part(title, part.lines, part.notes)
    return None


def page(found: Sweep) -> str:
    """One file without anything from outside and without a script."""
    tables = "\n".join(part.html() for part in parts(found))
    kinds = dict.fromkeys(kind for kind, _ in found.settings())
    charts = "\n".join(
        f"<h2>{escape(kind)}: counts over the vocabulary</h2>\n{_chart(found, kind)}"
        for kind in kinds
    )
    note = f"A line per language, both axes logarithmic; thick: {found.reference}."
    return report(
        "pertoken premiums",
        "Tokens for the same text, over languages and vocabularies",
        f'{tables}\n{charts}\n<p class="faint">{escape(note)}</p>',
        style=_STYLE,
    )


def _chart(found: Sweep, kind: str) -> str:
    curves = found.counts(kind)
    sizes = sorted({size for own in curves.values() for size in own})
    counts = [count for own in curves.values() for count in own.values()]
    low, high = math.log(min(counts)), math.log(max(counts))

    def across(size: int) -> float:
        reach = math.log(sizes[-1] / sizes[0]) or 1.0
        return _LEFT + (_WIDTH - _LEFT - 24) * math.log(size / sizes[0]) / reach

    def up(count: float) -> float:
        return 8 + (_HEIGHT - _BOTTOM - 8) * (high - math.log(count)) / ((high - low) or 1.0)

    marks = [math.exp(low + (high - low) * step / 4) for step in range(5)]
    lines = [
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{up(mark):.1f}" y2="{up(mark):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{up(mark) + 4:.1f}" text-anchor="end">{mark:.0f}</text>'
        for mark in marks
    ]
    lines += [
        f'<text x="{across(size):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{size}</text>'
        for size in sizes
    ]
    for name, own in curves.items():
        points = " ".join(f"{across(size):.1f},{up(own[size]):.1f}" for size in sorted(own))
        look = ' class="reference"' if name == found.reference else ""
        lines.append(f'<polyline points="{points}"{look}><title>{escape(name)}</title></polyline>')
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="Counts over the vocabulary, {escape(kind)}">\n'
        + "\n".join(lines)
        + "\n</svg>"
    )
