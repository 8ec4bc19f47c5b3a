"""What a sweep tells: its tables, and the page with them and the counts over the vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from pertoken._html import asset, document, grid
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from pertoken.tokenize.sweeps import Sweep

__all__ = ["Part", "page", "sections"]

Part = tuple[str, list[list[str]], str]  # (title, lines with the head first, note)

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 360, 64, 28  # pixels
_STYLE = """
svg.chart { width: 100%; max-width: 48rem; height: auto; }
svg.chart polyline { fill: none; stroke: var(--l0); stroke-opacity: .45; }
svg.chart polyline.reference { stroke: var(--l6); stroke-opacity: 1; stroke-width: 3; }
svg.chart text { fill: var(--faint); font-size: 12px; }
"""


def sections(found: Sweep, target: float | None) -> list[Part]:
    """The tables: counts, then each kind's vocabularies and regression where there is enough."""
    parts: list[Part] = [("Corpus token counts over the languages", found.cells(), "")]
    for kind in dict.fromkeys(kind for kind, _ in found.settings()):
        part = _vocabularies(found, kind, target)
        if part is not None:
            parts.append(part)
        part = _regression(found, kind)
        if part is not None:
            parts.append(part)
    return parts


def _vocabularies(found: Sweep, kind: str, target: float | None) -> Part | None:
    laws = found.optimal(kind, target)
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
    return (f"{kind}: the vocabulary at which each language takes {goal:.0f} tokens", lines, note)


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
        head = ["factor", "coefficient", "error", "t", "R² alone"]
        title = f"{kind}, vocabulary {size}: what the counts go with"
        note = (
            f"R² {result.r2:.3f} together, adjusted {result.adjusted_r2:.3f}, {result.n} languages."
        )
        return title, [head, *result.cells()], note
    return None


def page(found: Sweep, parts: Sequence[Part]) -> str:
    """One file without anything from outside and without a script."""
    style = asset("compare.css") + _STYLE
    tables = "\n".join(
        f"<h2>{escape(title)}</h2>\n{grid(lines)}"
        + (f'\n<p class="faint">{escape(note)}</p>' if note else "")
        for title, lines, note in parts
    )
    kinds = dict.fromkeys(kind for kind, _ in found.settings())
    charts = "\n".join(
        f"<h2>{escape(kind)}: counts over the vocabulary</h2>\n{_chart(found, kind)}"
        for kind in kinds
    )
    body = f"""\
<header>
<h1>Tokens for the same text, over languages and vocabularies</h1>
</header>
<main>
{tables}
{charts}
<p class="faint">A line per language, both axes logarithmic; thick: {escape(found.reference)}.</p>
</main>"""
    return document("pertoken premiums", body, style=style)


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
