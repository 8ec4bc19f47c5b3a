"""Small charts for a page: lines over a number, and the bars of a histogram; SVG, no script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from pertoken._html import report

if TYPE_CHECKING:
    from pertoken.result import Result

__all__ = ["STYLE", "bars", "lines", "page", "side_by_side"]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 220, 56, 12, 12, 28  # pixels
_COLOURS = 8
_POINTS = 30  # up to which each has a mark
STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
svg.chart { width: 100%; max-width: 36rem; height: auto; }
svg.chart polyline { fill: none; stroke: currentcolor; stroke-width: 2; }
svg.chart circle { fill: currentcolor; }
svg.chart text { fill: var(--faint); font-size: 11px; }
.key { display: inline-block; margin-right: 1rem; }
""" + "\n".join(f".of{number} {{ color: var(--l{number}); }}" for number in range(_COLOURS))
"""What a page with charts adds to the style of all pages."""


def page(found: Result, heading: str, charts: Sequence[str]) -> str:
    """The page of a result: its tables, and charts under a heading."""
    tables = "\n".join(part.html() for part in found._parts())
    main = f"{tables}\n<h2>{escape(heading)}</h2>\n{side_by_side(charts)}"
    return report(f"pertoken: {found._title}", found._title, main, style=STYLE)


def side_by_side(charts: Sequence[str]) -> str:
    """Charts in as many columns as there is room for."""
    return '<div class="charts">' + "\n".join(charts) + "</div>"


def lines(
    title: str,
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    *,
    over: str,
    logarithmic: bool = False,
) -> str:
    """Lines over x, evenly apart, on one scale; curves: name ("" for none) -> a value for each x.

    over: what x is.
    """
    scale = _Scale([value for curve in curves.values() for value in curve], logarithmic)
    step = (_WIDTH - _LEFT - _RIGHT) / max(len(x) - 1, 1)
    across = [_LEFT + step * place for place in range(len(x))]
    every = 1 if len(x) <= 9 else (len(x) - 1) // 5
    parts = scale.marks()
    parts += [_below(across[place], x[place]) for place in range(0, len(x), every)]
    for number, (name, values) in enumerate(curves.items()):
        points = [(left, scale.up(value)) for left, value in zip(across, values, strict=True)]
        line = " ".join(f"{left:.1f},{height:.1f}" for left, height in points)
        parts.append(f'<g class="of{number % _COLOURS}"><polyline points="{line}"/>')
        parts += [
            f'<circle cx="{left:.1f}" cy="{height:.1f}" r="{3 if len(curves) == 1 else 2}"><title>'
            f"{escape(f'{name}: ' if name else '')}{value:.4g} at {at:g}</title></circle>"
            for (left, height), value, at in zip(points, values, x, strict=True)
            if len(x) <= _POINTS
        ]
        parts.append("</g>")
    keys = [
        f'<span class="key of{number % _COLOURS}">{escape(name)}</span>'
        for number, name in enumerate(curves)
        if name
    ]
    return _figure(title, over, parts, "".join(keys))


def bars(title: str, edges: Sequence[float], counts: Sequence[int], *, over: str) -> str:
    """A histogram: a bar from each of the edges [n + 1] to the next, its height logarithmic."""
    scale = _Scale([1, *(count for count in counts if count)], True)
    low, reach = edges[0], (edges[-1] - edges[0]) or 1.0

    def right(value: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - low) / reach

    ground = _HEIGHT - _BOTTOM
    parts = scale.marks()
    parts += [_below(right(value), value) for value in (low, low + reach / 2, low + reach)]
    for first, last, count in zip(edges, edges[1:], counts, strict=False):
        if count:
            # A bar of one stands on the ground and must be seen.
            top = min(scale.up(count), ground - 1)
            parts.append(
                f'<rect x="{right(first):.1f}" y="{top:.1f}" height="{ground - top:.1f}" '
                f'width="{right(last) - right(first):.1f}"><title>{count:,} from {first:.3g} to '
                f"{last:.3g}</title></rect>"
            )
    return _figure(title, over, parts)


class _Scale:
    """Where values stand, from the least to the greatest that is finite."""

    def __init__(self, values: Sequence[float], logarithmic: bool) -> None:
        self._logarithmic = logarithmic
        finite = [one for one in map(self._of, values) if math.isfinite(one)] or [0.0]
        self._low, self._high = min(finite), max(finite)

    def _of(self, value: float) -> float:
        return math.log(max(value, 1e-12)) if self._logarithmic else value

    def up(self, value: float) -> float:
        """The height of a value, pixels from above; one that is endless stands at the top."""
        return self._at(self._of(value))

    def _at(self, place: float) -> float:
        inside = (self._high - min(place, self._high)) / ((self._high - self._low) or 1.0)
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * inside

    def marks(self) -> list[str]:
        """Lines at both ends and between, each with its value."""
        found = []
        for mark in (self._low, (self._low + self._high) / 2, self._high):
            height = self._at(mark)
            found.append(
                f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
                f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">'
                f"{math.exp(mark) if self._logarithmic else mark:.3g}</text>"
            )
        return found


def _below(across: float, value: float) -> str:
    """A value of the axis, under the chart."""
    return f'<text x="{across:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{value:.3g}</text>'


def _figure(title: str, over: str, parts: Sequence[str], keys: str = "") -> str:
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)} over the {escape(over)}">\n'
        + "\n".join(parts)
        + f"\n</svg>{keys}</figure>"
    )
