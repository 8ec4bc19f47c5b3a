"""The page of `compare-caches`: its table, and the KL of each cache turn by turn.

One file without anything from outside and without a script; its security policy allows its own
style only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from pertoken._html import report

if TYPE_CHECKING:
    from pertoken.cli._caches_report import CacheComparison, Row

__all__ = ["page"]

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 320, 56, 28  # pixels
_FLOOR = 1e-9  # nats; a smaller KL is drawn here
_DASHES = ("", "6 3", "2 2", "8 3 2 3")
_COLOURS = 8  # --l0 to --l7 in the style sheet

_STYLE = """
svg.chart { width: 100%; max-width: 48rem; height: auto; }
svg.chart polyline { fill: none; stroke-width: 2; }
svg.chart circle { stroke: none; }
svg.chart text { fill: var(--faint); font-size: 12px; }
svg.chart line { stroke: var(--line); stroke-dasharray: none; }
svg.chart.key { width: 2.2rem; height: .7rem; margin-right: .4rem; }
""" + "".join(
    f".c{i} {{ stroke: var(--l{i}); }} circle.c{i} {{ fill: var(--l{i}); }}\n"
    for i in range(_COLOURS)
)


def page(found: CacheComparison) -> str:
    """The whole page as HTML."""
    tables = "\n".join(part.html() for part in found._parts())
    legend = "\n".join(
        f'<li><svg class="key chart" viewBox="0 0 36 10" aria-hidden="true">'
        f'<polyline points="0,5 36,5" {_look(place)}/></svg>{escape(row.label)}</li>'
        for place, row in enumerate(found.caches)
    )
    main = f"""\
<h2>What each cache forgets, holds and takes</h2>
{tables}
<h2>How far from the full cache, turn by turn</h2>
<p class="faint">Mean KL of a turn's steps, in nats, on a logarithmic scale; nothing is drawn below
{_FLOOR:g}.</p>
{_chart(found.caches)}
<ul id="legend">
{legend}
</ul>"""
    count = len(found.caches)
    heading = f"One conversation, decoded with {count} cache{'s' if count > 1 else ''}"
    return report("pertoken compare-caches", heading, main, style=_STYLE)


def _look(place: int) -> str:
    dash = _DASHES[place // _COLOURS % len(_DASHES)]
    return f'class="c{place % _COLOURS}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _chart(rows: Sequence[Row]) -> str:
    curves = [row.by_turn() for row in rows]
    finite = [value for curve in curves for value in curve if math.isfinite(value)]
    low = math.floor(math.log10(_FLOOR))
    high = max(math.ceil(math.log10(max([*finite, _FLOOR]))), low + 1)

    def across(turn: int) -> float:
        steps = max(len(curves[0]) - 1, 1)
        return _LEFT + (_WIDTH - _LEFT - 8) * turn / steps

    def up(value: float) -> float:
        exponent = math.log10(max(value, _FLOOR)) if math.isfinite(value) else high
        return 8 + (_HEIGHT - _BOTTOM - 8) * (high - exponent) / (high - low)

    lines = [
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{up(10.0**e):.1f}" y2="{up(10.0**e):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{up(10.0**e) + 4:.1f}" text-anchor="end">1e{e}</text>'
        for e in range(low, high + 1)
    ]
    lines += [
        f'<text x="{across(turn):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{turn + 1}</text>'
        for turn in range(0, len(curves[0]), max(1, len(curves[0]) // 10))
    ]
    for place, (row, curve) in enumerate(zip(rows, curves, strict=True)):
        points = [(across(turn), up(value)) for turn, value in enumerate(curve)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        lines.append(
            f'<polyline points="{path}" {_look(place)}><title>{escape(row.label)}</title>'
            "</polyline>"
        )
        lines += [
            f'<circle class="c{place % _COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="2.5">'
            f"<title>{escape(row.label)}, turn {turn}: {value:.3g}</title></circle>"
            for turn, ((x, y), value) in enumerate(zip(points, curve, strict=True), 1)
        ]
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        'aria-label="Mean KL of each turn">\n' + "\n".join(lines) + "\n</svg>"
    )
