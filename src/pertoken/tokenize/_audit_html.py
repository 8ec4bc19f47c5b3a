"""The page of an audit: every section with its table, and bars of what it draws.

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
    from pertoken.tokenize.report import Audit
    from pertoken.tokenize.section import Row, Section

__all__ = ["page", "section_page"]

_COLOURS = 8  # --l0 to --l7 in the style sheet
_LABEL, _WIDTH, _BAR, _GAP = 200, 720, 9, 7  # pixels
_MOST = 40  # rows that are drawn; a longer table speaks for itself

_STYLE = """
svg.bars { width: 100%; max-width: 48rem; height: auto; margin: .6rem 0; }
svg.bars text { fill: var(--ink); font-size: 11px; }
svg.bars text.v { fill: var(--faint); font-size: 9px; }
tbody tr.group th { color: var(--faint); font-weight: 600; padding-top: .8rem; text-align: left; }
td.word { white-space: normal; max-width: 14rem; overflow-wrap: anywhere; }
ul.key { display: flex; flex-wrap: wrap; gap: .35rem 1.3rem; list-style: none; padding: 0; }
ul.key svg { width: .8rem; height: .8rem; margin-right: .4rem; }
""" + "".join(f"svg rect.c{at} {{ fill: var(--l{at}); }}\n" for at in range(_COLOURS))


def page(audit: Audit) -> str:
    """The whole page as HTML."""
    parts = "\n".join(_section(name, part) for name, part in audit.sections.items())
    return _report(audit.tokenizers, parts)


def section_page(section: Section) -> str:
    """A page of one section."""
    return _report(section.tokenizers, _section("section", section))


def _report(tokenizers: Sequence[str], main: str) -> str:
    key = "".join(
        f'<li><svg viewBox="0 0 10 10" aria-hidden="true"><rect class="c{at % _COLOURS}" '
        f'width="10" height="10"/></svg>{escape(name)}</li>'
        for at, name in enumerate(tokenizers)
    )
    count = len(tokenizers)
    what = tokenizers[0] if count == 1 else f"{count} tokenizers side by side"
    return report(
        f"pertoken audit: {', '.join(tokenizers)}",
        f"Tokenizer audit: {what}",
        main,
        lead=f'<ul class="key">{key}</ul>',
        style=_STYLE,
    )


def _section(name: str, section: Section) -> str:
    notes = "\n".join(f'<p class="faint">{escape(note)}</p>' for note in section.notes)
    return (
        f'<section id="{escape(name)}">\n<h2>{escape(section.title)}</h2>\n'
        f"{_bars(section)}{_table(section)}\n{notes}\n</section>"
    )


def _table(section: Section) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in ("", *section.tokenizers))
    lines = []
    for group, rows in section.groups():
        if group:
            lines.append(
                f'<tr class="group"><th scope="rowgroup" colspan="{len(section.tokenizers) + 1}">'
                f"{escape(group)}</th></tr>"
            )
        lines += [_line(row) for row in rows]
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _line(row: Row) -> str:
    cells = "".join(
        f'<td class="word">{escape(cell)}</td>'
        if isinstance(value, str)
        else f"<td>{escape(cell)}</td>"
        for value, cell in zip(row.values, row.cells(), strict=True)
    )
    return f'<tr><th scope="row">{escape(row.label)}</th>{cells}</tr>'


def _bars(section: Section) -> str:
    """A bar per row and tokenizer, with its figure; nothing where there is nothing to draw."""
    rows = section.bars()
    longest = max((_length(value) for row in rows for value in row.values), default=0.0)
    if not rows or len(rows) > _MOST or longest <= 0:
        return ""
    height = _BAR * len(section.tokenizers) + _GAP
    drawn = []
    for place, row in enumerate(rows):
        top = place * height
        label = row.label if len(row.label) <= 34 else row.label[:33] + "…"
        middle = top + (height - _GAP) / 2 + 4
        drawn.append(
            f'<text x="{_LABEL - 8}" y="{middle:g}" text-anchor="end">{escape(label)}</text>'
        )
        for at, (value, cell) in enumerate(zip(row.values, row.cells(), strict=True)):
            width = (_WIDTH - _LABEL - 50) * _length(value) / longest
            y = top + at * _BAR
            drawn.append(
                f'<rect class="c{at % _COLOURS}" x="{_LABEL}" y="{y}" width="{width:.1f}" '
                f'height="{_BAR - 1}"><title>{escape(section.tokenizers[at])}, '
                f"{escape(row.label)}: {escape(cell)}</title></rect>"
                f'<text class="v" x="{_LABEL + width + 4:.1f}" y="{y + _BAR - 1}">{escape(cell)}'
                "</text>"
            )
    return (
        f'<p class="faint">{escape(section.drawn)}</p>\n'
        f'<svg class="bars" viewBox="0 0 {_WIDTH} {height * len(rows)}" role="img" '
        f'aria-label="{escape(section.drawn)}">\n' + "\n".join(drawn) + "\n</svg>\n"
    )


def _length(value: object) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
