"""The page of a sweep over strengths: its table, six charts, and a text of each strength."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from pertoken._html import report
from pertoken.decode._chart import STYLE, lines, side_by_side

if TYPE_CHECKING:
    from pertoken.decode.style_figures import StyleSweep

__all__ = ["page"]

_STYLE = """
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
    charts = [
        lines(
            title,
            strengths,
            {"": [getattr(row, name) for row in found.found]},
            over="strength",
            logarithmic=logarithmic,
        )
        for title, name, logarithmic in _CHARTS
    ]
    texts = "\n".join(
        f"<h3>strength {strength:g}</h3>\n<blockquote>{escape(text)}</blockquote>"
        for strength, text in found.samples.items()
    )
    return report(
        "pertoken style sweep",
        "A style over its strengths",
        f"{tables}\n<h2>Over the strength</h2>\n{side_by_side(charts)}\n"
        f"<h2>The first prompt, continued</h2>\n{texts}",
        style=STYLE + _STYLE,
    )
