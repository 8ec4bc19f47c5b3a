"""A section of the audit: rows of figures, a column per tokenizer, and what is drawn of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pertoken._extras import need
from pertoken.result import Part, Result, figure, plain

__all__ = ["Row", "Section", "Value"]

Value = float | str | None
"""A figure, a word, or None where the question makes no sense for the tokenizer."""


@dataclass(frozen=True)
class Row:
    """One line: what it says, and a value for each tokenizer, in their order.

    group: the heading it stands under; rows of one group are next to each other. unit: "" (a number
    of two decimals), "count" or "share" (0 to 1, shown in per cent); words are shown as they are.
    """

    group: str
    label: str
    unit: str
    values: tuple[Value, ...]

    def cells(self) -> list[str]:
        """The values as a table shows them.

        >>> Row("g", "l", "share", (0.5, 1.0, 0.9999, None)).cells()
        ['50.0 %', '100 %', '99.9 %', '-']
        >>> Row("g", "l", "count", (12345,)).cells(), Row("g", "l", "", (1.234, "l2r")).cells()
        (['12,345'], ['1.23', 'l2r'])
        >>> Row("g", "l", "share", (0.0, 0.0001)).cells()
        ['0 %', '< 0.1 %']
        """
        return [_shown(value, self.unit) for value in self.values]


def _shown(value: Value, unit: str) -> str:
    if isinstance(value, str):
        return value
    if value is None or not math.isfinite(value):
        return "-"
    if unit == "count":
        return f"{value:,.0f}"
    if unit == "share":  # 100 only where it is exactly all, 0 only where it is none
        if value in (0, 1):
            return f"{100 * value:.0f} %"
        return "< 0.1 %" if value < 5e-4 else f"{min(100 * value, 99.9):.1f} %"
    return f"{value:.2f}"


@dataclass(frozen=True)
class Section(Result):
    """Title, lines, which group of them is drawn as bars ("" draws nothing), and notes.

    tokenizers: the names of the columns.
    """

    title: str
    tokenizers: tuple[str, ...]
    lines: tuple[Row, ...]
    drawn: str = ""
    notes: tuple[str, ...] = ()

    def groups(self) -> list[tuple[str, list[Row]]]:
        """The rows under their headings, in order."""
        found: dict[str, list[Row]] = {}
        for row in self.lines:
            found.setdefault(row.group, []).append(row)
        return list(found.items())

    def bars(self) -> list[Row]:
        """The rows that are drawn: those of the group `drawn`."""
        return [row for row in self.lines if self.drawn and row.group == self.drawn]

    def to_dict(self) -> dict[str, Any]:
        """Title, notes, and each row with its value by tokenizer."""
        return {
            "title": self.title,
            "notes": list(self.notes),
            "rows": [
                {
                    "group": row.group,
                    "row": row.label,
                    "unit": row.unit,
                    "values": plain(dict(zip(self.tokenizers, row.values, strict=True))),
                }
                for row in self.lines
            ],
        }

    def rows(self) -> list[dict[str, Any]]:
        """A record per value: group, row, unit, tokenizer, value."""
        return [
            {
                "group": row.group,
                "row": row.label,
                "unit": row.unit,
                "tokenizer": name,
                "value": value,
            }
            for row in self.lines
            for name, value in zip(self.tokenizers, row.values, strict=True)
        ]

    def plot(self) -> Any:
        """The drawn rows as bars, a colour per tokenizer: a plotly figure (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        rows = self.bars()
        bars = [
            graph.Bar(name=name, x=[r.label for r in rows], y=[r.values[at] for r in rows])
            for at, name in enumerate(self.tokenizers)
        ]
        axis = {"title": self.drawn, "rangemode": "tozero"}
        return figure(bars, title=self.title, yaxis=axis)

    def _parts(self) -> list[Part]:
        """The rows, a heading line for each group."""
        lines = [["", *self.tokenizers]]
        for group, rows in self.groups():
            if group:
                lines.append([group, *[""] * len(self.tokenizers)])
            lines += [[("  " if group else "") + row.label, *row.cells()] for row in rows]
        return [Part(self.title, lines, [f"note: {note}" for note in self.notes])]

    def _page(self) -> str:
        from pertoken.tokenize._audit_html import section_page

        return section_page(self)


def rows_of(
    group: str, unit: str, labels: Sequence[str], columns: Sequence[Sequence[Value]]
) -> list[Row]:
    """Rows from columns: `columns[tokenizer][row]`.

    >>> [row.values for row in rows_of("g", "", ["a", "b"], [[1.0, 2.0], [3.0, 4.0]])]
    [(1.0, 3.0), (2.0, 4.0)]
    """
    lines = zip(*columns, strict=True)
    return [Row(group, label, unit, tuple(line)) for label, line in zip(labels, lines, strict=True)]
