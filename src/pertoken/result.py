"""What everything that measures gives back: one base, so that all results are read in one way.

    print(result.table())        # text for people
    result.rows()                # flat records for programs
    result.to_dataframe()        # the same as a pandas frame
    result.to_json("out.json")   # everything, as JSON
    result.to_html("out.html")   # a page that loads nothing from outside
    result.plot()                # a plotly figure, where a picture says more

A result says what it found once, as `Part`s (a table with its title and notes); text, page and
notebook view are made of them. A subclass writes `to_dict` and `rows`; `_parts` where its table is
not simply its rows; `plot` and `_page` where there is more to see.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar

from pertoken._extras import need
from pertoken._files import check_target, write_whole
from pertoken._html import grid, report

__all__ = ["COLOURS", "Part", "Result", "aligned", "cells", "figure", "plain", "to_json"]

COLOURS = (
    "#0068a6",
    "#9c6200",
    "#a13c7b",
    "#00704f",
    "#6f6700",
    "#1f7ba9",
    "#b54500",
    "#55585c",
)
"""The colours of the lines on the pages (`_page/page.css`), so that figures look like them."""


@dataclass(frozen=True)
class Part:
    """A table of a result: its title ("" for none), its lines with the head first, and notes.

    Without lines it is notes alone.
    """

    title: str
    lines: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """The part as aligned text.

        >>> print(Part("Pets", [["name", "legs"], ["cat", "4"]], ["a note"]).text())
        Pets
        <BLANKLINE>
        name  legs
        cat      4
        a note
        """
        title = f"{self.title}\n\n" if self.title else ""
        table = [aligned(self.lines)] if any(self.lines) else []
        return title + "\n".join([*table, *self.notes])

    def html(self) -> str:
        """The part as a piece of a page."""
        title = f"<h2>{escape(self.title)}</h2>\n" if self.title else ""
        table = [grid(self.lines)] if any(self.lines) else []
        notes = [f'<p class="faint">{escape(note)}</p>' for note in self.notes]
        return title + "\n".join([*table, *notes])


class Result(ABC):
    """Base of all results; see the module.

    >>> class Pets(Result):
    ...     def to_dict(self): return {"pets": self.rows()}
    ...     def rows(self): return [{"name": "cat", "legs": 4}, {"name": "eel", "legs": None}]
    >>> print(Pets().table())
    name  legs
    cat      4
    eel      -
    """

    _title: ClassVar[str] = "Result"
    """The heading of the page."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values: None for a number that is not finite."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """Flat records, one for each thing measured; the values are plain, or lists of plain."""

    def table(self) -> str:
        """The result as aligned text, to print."""
        return "\n\n".join(part.text() for part in self._parts())

    def to_json(self, path: str | Path | None = None) -> str:
        """`to_dict` as a text, also written to `path` if given.

        Raises PertokenError where the file could not be written; what was there is left whole.
        """
        return to_json(self.to_dict(), path)

    def to_dataframe(self) -> Any:
        """`rows` as a pandas frame (extra `dataframe`)."""
        return need("pandas", "dataframe").DataFrame(self.rows())

    def to_html(self, path: str | Path | None = None) -> str:
        """A page that needs nothing from outside, also written to `path` if given.

        Raises PertokenError where the file could not be written; what was there is left whole.
        """
        if path is not None:
            check_target(Path(path))
        text = self._page()
        if path is not None:
            write_whole(Path(path), text)
        return text

    def _repr_html_(self) -> str:
        return "\n".join(part.html() for part in self._parts())

    def _parts(self) -> list[Part]:
        """The tables, in order."""
        return [Part("", cells(self.rows()))]

    def _page(self) -> str:
        """The whole page."""
        return report(f"pertoken: {self._title}", self._title, Result._repr_html_(self))


def to_json(value: Any, path: str | Path | None = None) -> str:
    """Any value as JSON text, see `plain`; also written to `path`, with a line's end, if given.

    >>> print(to_json({"a": float("nan")}))
    {
     "a": null
    }
    """
    if path is not None:
        check_target(Path(path))
    text = json.dumps(plain(value), ensure_ascii=False, indent=1, allow_nan=False)
    if path is not None:
        write_whole(Path(path), text + "\n")
    return text


def plain(value: Any) -> Any:
    """Plain JSON values: sequences as lists, paths as text, numbers that are not finite as None.

    >>> plain({"a": (1, float("nan")), 2: Path("b")})
    {'a': [1, None], '2': 'b'}
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # arrays and numbers of numpy and torch
        return plain(value.tolist())
    return str(value)


def cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows as the lines of a table, the head first: their keys with blanks for underscores.

    >>> cells([{"mean_kl": 0.12345, "exact": True}, {"mean_kl": None, "exact": False}])
    [['mean kl', 'exact'], ['0.1235', 'yes'], ['-', 'no']]
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = [name.replace("_", " ") for name in names]
    return [head, *([_cell(row.get(name)) for name in names] for row in rows)]


def _cell(value: Any) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(map(_cell, value))
    return str(value)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns two blanks apart: the first to the left, the others to the right; empty ones go.

    >>> print(aligned([["a", "bb", ""], ["ccc", "d", ""]]))
    a    bb
    ccc   d
    """
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in zip(*columns, strict=True)
    )


def figure(traces: Any, **layout: Any) -> Any:
    """A plotly figure of one or more traces in the look that all figures share (extra `plot`)."""
    found = need("plotly.graph_objects", "plot").Figure(traces)
    found.update_layout(template="plotly_white", colorway=list(COLOURS), **layout)
    return found
