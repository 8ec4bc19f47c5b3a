"""The page of a sweep over strengths: its table, six charts, and a text of each strength."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from pertoken._html import report

if TYPE_CHECKING:
    from pertoken.decode.style_figures import StyleSweep

__all__ = ["page"]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 220, 56, 12, 12, 28  # pixels
_STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
svg.chart { width: 100%; height: auto; }
svg.chart polyline { fill: none; stroke: var(--l0); stroke-width: 2; }
svg.chart circle { fill: var(--l0); }
svg.chart text { fill: var(--faint); font-size: 11px; }
blockquote { margin: .3rem 0 1rem; padding-left: .8rem; border-left: 3px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere; }
"""
_CHARTS = (
    ("style perplexity", "style_perplexity", True),
    ("base perplexity", "base_perplexity", True),
    ("Jensen-Shannon divergence, nats", "divergence", False),
    ("share of the kinds of tokens that the corpus has", "overlap", False),
    ("distinct bigrams", "distinct_2", False),
    ("repeated 4-grams", "repetition", False),
)  # title, field, logarithmic


def page(found: StyleSweep) -> str:
    """One file without anything from outside and without a script."""
    tables = "\n".join(part.html() for part in found._parts())
    strengths = [row.strength for row in found.found]
    charts = "\n".join(
        f"<figure><figcaption>{escape(title)}</figcaption>"
        + _chart(title, strengths, [getattr(row, name) for row in found.found], logarithmic)
        + "</figure>"
        for title, name, logarithmic in _CHARTS
    )
    texts = "\n".join(
        f"<h3>strength {strength:g}</h3>\n<blockquote>{escape(text)}</blockquote>"
        for strength, text in found.samples.items()
    )
    return report(
        "pertoken style sweep",
        "A style over its strengths",
        f'{tables}\n<h2>Over the strength</h2>\n<div class="charts">{charts}</div>\n'
        f"<h2>The first prompt, continued</h2>\n{texts}",
        style=_STYLE,
    )


def _chart(title: str, x: list[float], values: list[float], logarithmic: bool) -> str:
    """A line over the strengths, evenly apart; its own scale, marked at both ends and between."""
    scale = [math.log(max(one, 1e-12)) if logarithmic else one for one in values]
    finite = [one for one in scale if math.isfinite(one)] or [0.0]
    low, high = min(finite), max(finite)
    reach = (high - low) or 1.0

    def up(value: float) -> float:
        inside = (high - min(value, high)) / reach
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * inside

    step = (_WIDTH - _LEFT - _RIGHT) / max(len(x) - 1, 1)
    points = [(_LEFT + step * place, up(value)) for place, value in enumerate(scale)]
    marks = [low, (low + high) / 2, high]
    parts = [
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{up(mark):.1f}" y2="{up(mark):.1f}"/>'
        f'<text x="{_LEFT - 6}" y="{up(mark) + 4:.1f}" text-anchor="end">'
        f"{math.exp(mark) if logarithmic else mark:.3g}</text>"
        for mark in marks
    ]
    parts += [
        f'<text x="{across:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{strength:g}</text>'
        for (across, _), strength in zip(points, x, strict=True)
    ]
    line = " ".join(f"{across:.1f},{height:.1f}" for across, height in points)
    parts.append(f'<polyline points="{line}"/>')
    parts += [
        f'<circle cx="{across:.1f}" cy="{height:.1f}" r="3"><title>{value:.4g} at {strength:g}'
        "</title></circle>"
        for (across, height), value, strength in zip(points, values, x, strict=True)
    ]
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)} over the strength">\n' + "\n".join(parts) + "\n</svg>"
    )
