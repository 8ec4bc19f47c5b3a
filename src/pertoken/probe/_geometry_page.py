"""Curves over layers as SVG, alone or in a page that loads nothing from outside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from pertoken._html import report
from pertoken.result import COLOURS

Curves = Mapping[str, Mapping[str, Sequence[float]]]
"""Title of a picture -> name of a curve -> a value per layer."""

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _ABOVE, _BELOW = 720, 260, 48, 120, 28, 26  # pixels

# The picture has its own colours; in a page those of the page's scheme come over them.
_STYLE = """
svg.chart { width: 100%; max-width: 48rem; height: auto; }
svg.chart text { fill: var(--faint); }
svg.chart line { stroke: var(--line); stroke-dasharray: none; }
""" + "".join(
    f"svg.chart polyline.c{i} {{ stroke: var(--l{i}); }}\n"
    f"svg.chart text.c{i} {{ fill: var(--l{i}); }}\n"
    for i in range(len(COLOURS))
)


def page(title: str, heading: str, curves: Curves, tables: str) -> str:
    """The whole page: pictures, then tables (HTML)."""
    return report(title, heading, f"{svg(curves)}\n{tables}", style=_STYLE)


def svg(curves: Curves) -> str:
    """The pictures below each other; not finite values are left out."""
    height = _HEIGHT * len(curves)
    parts = [
        f'<g transform="translate(0 {_HEIGHT * place})">\n{_picture(title, lines)}\n</g>'
        for place, (title, lines) in enumerate(curves.items())
    ]
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="Curves over layers">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _picture(title: str, lines: Mapping[str, Sequence[float]]) -> str:
    finite = [value for line in lines.values() for value in line if math.isfinite(value)]
    low, high = min([0.0, *finite]), max([1.0, *finite])
    low = max(low, -1.0)  # what is worse than that is off the picture's edge
    count = max((len(line) for line in lines.values()), default=1)

    def across(layer: int) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * layer / max(count - 1, 1)

    def up(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return _HEIGHT - _BELOW - (_HEIGHT - _BELOW - _ABOVE) * share

    parts = [f'<text x="{_LEFT}" y="16" fill="#1c1c1e">{escape(title)}, by layer</text>']
    for value in (low, (low + high) / 2, high):
        y = up(value)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="#d6d9dd"/>'
        )
        parts.append(_label(_LEFT - 6, y + 4, "end", f"{value:.2g}"))
    for layer in range(0, count, max(1, count // 10)):
        parts.append(_label(across(layer), _HEIGHT - 8, "middle", str(layer)))
    for place, (name, line) in enumerate(lines.items()):
        at, colour = place % len(COLOURS), COLOURS[place % len(COLOURS)]
        points = [
            f"{across(layer):.1f},{up(value):.1f}"
            for layer, value in enumerate(line)
            if math.isfinite(value)
        ]
        parts.append(
            f'<polyline class="c{at}" points="{" ".join(points)}" fill="none" stroke="{colour}" '
            f'stroke-width="2"><title>{escape(name)}</title></polyline>'
        )
        parts.append(
            f'<text class="c{at}" x="{_WIDTH - _RIGHT + 10}" y="{_ABOVE + 6 + 17 * place}" '
            f'fill="{colour}">{escape(name)}</text>'
        )
    return "\n".join(parts)


def _label(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#55585c">{text}</text>'
