"""One number per token, tied to the characters it stands for.

Attribution scores, log-probabilities, policy ratios, surprisals: whatever a method says about the
tokens of a text comes back as a `TokenSignal`, which shows itself in the terminal, in a notebook,
as a page or as a table, and can be joined to words.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from pertoken._pieces import pieces
from pertoken.errors import PertokenError
from pertoken.result import Part, Result, cells, figure, plain

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

__all__ = ["TokenSignal", "TopToken"]

FORMAT = 1  # of the JSON form; raised when it changes
_LEVELS = 9  # shades of one side, both in the page's style sheet and in the terminal
_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class TopToken:
    """A token with its value, its place among the tokens and its characters in the text."""

    index: int
    token: str
    value: float
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class TokenSignal(Result):
    """Values of the tokens of a text.

    text: what the tokens stand for, joined.
    values: [tokens], or [tokens, targets] where every target has its own (an attribution of each
        generated token); NaN where nothing was measured.
    offsets: for each token the characters of `text` it covers, (start, end), in order; a token
        that ends inside a character covers none.
    name: what the values are, with their unit ("surprisal, bits").
    targets: what the columns belong to, in order; empty for one value per token.
    notes: what must be known about the values, a sentence each.
    Raises PertokenError where these do not fit together or a value is infinite.

    >>> signal = TokenSignal("to be", [0.5, -1.0], [(0, 2), (2, 5)], "weight")
    >>> signal.tokens
    ['to', ' be']
    >>> [(top.token, top.value) for top in signal.top(1)]
    [(' be', -1.0)]
    """

    text: str
    values: npt.NDArray[np.float64]
    offsets: Sequence[tuple[int, int]]
    name: str
    targets: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)  # a copy: a result does not change
        values.setflags(write=False)
        offsets = tuple((int(start), int(end)) for start, end in self.offsets)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "notes", tuple(self.notes))
        wanted = (len(offsets), len(self.targets)) if self.targets else (len(offsets),)
        if values.shape != wanted:
            raise PertokenError(
                f"values of the shape {list(values.shape)} do not fit {len(offsets)} tokens"
                + (f" and {len(self.targets)} targets" if self.targets else "")
            )
        if np.isinf(values).any():
            raise PertokenError(f"a value of {self.name!r} is infinite")
        last = 0
        for start, end in offsets:
            if not last <= start <= end <= len(self.text):
                raise PertokenError(
                    f"token offsets must follow each other inside the text of {len(self.text)} "
                    f"characters, got ({start}, {end}) behind {last}"
                )
            last = end

    @classmethod
    def from_ids(
        cls,
        tokenizer: Any,
        ids: Iterable[int],
        values: npt.ArrayLike,
        name: str,
        targets: Sequence[str] = (),
    ) -> Self:
        """The signal of token ids, whose text is what the tokenizer decodes them to."""
        found = pieces(tokenizer, ids)
        ends = np.cumsum([len(piece) for piece in found], dtype=int).tolist()
        offsets = list(zip([0, *ends[:-1]], ends, strict=True)) if found else []
        return cls("".join(found), np.asarray(values), offsets, name, targets)

    @property
    def tokens(self) -> list[str]:
        """The text of each token; empty for one that ends inside a character."""
        return [self.text[start:end] for start, end in self.offsets]

    def __len__(self) -> int:
        return len(self.offsets)

    def target(self, which: int | str) -> TokenSignal:
        """The signal of one target, by its place or its text (the first one of that text)."""
        if isinstance(which, str):
            if which not in self.targets:
                raise PertokenError(f"{which!r} is no target; there is: {', '.join(self.targets)}")
            which = list(self.targets).index(which)
        if not -len(self.targets) <= which < len(self.targets):
            raise PertokenError(f"no target {which}: there are {len(self.targets)}")
        name = f"{self.name} for {self.targets[which]!r}"
        return replace(self, values=self.values[:, which], name=name, targets=())

    def total(self) -> TokenSignal:
        """One value per token: the mean over the targets, those without a value left out."""
        if not self.targets:
            return self
        measured = ~np.isnan(self.values)
        count = measured.sum(1)
        sums = np.where(measured, self.values, 0.0).sum(1)
        values = np.where(count > 0, sums / np.maximum(count, 1), np.nan)
        return replace(self, values=values, targets=())

    def words(self, how: Literal["sum", "mean", "max"] = "sum") -> TokenSignal:
        """The signal of whole words: tokens that share one are joined.

        A word is a run of characters without white space. "sum" keeps what attributions add up
        to, "mean" suits probabilities, "max" takes the value furthest from zero. A token that
        reaches into several words counts for the first of them, one that ends inside a character
        for the word of the token that completes it; white space alone counts for the word before.

        >>> split = TokenSignal("to be", [1.0, 2.0, 3.0], [(0, 1), (1, 2), (2, 5)], "w")
        >>> split.words().tokens, split.words().values.tolist()
        (['to', ' be'], [3.0, 3.0])
        """
        starts = [match.start() for match in _WORD.finditer(self.text)]
        groups: list[list[int]] = []
        word = -1
        for index, (start, end) in enumerate(_completed(self.offsets)):
            first = _WORD.search(self.text, start, end)
            # A continuation starts inside a word that began before; else the word begins here.
            own = word if first is None else _place(starts, first.start())
            if own != word or not groups:
                groups.append([])
                word = own
            groups[-1].append(index)
        offsets = [(self.offsets[group[0]][0], self.offsets[group[-1]][1]) for group in groups]
        rows = [_joined(self.values[group], how) for group in groups]
        shape = (len(groups), *self.values.shape[1:])
        return replace(self, values=np.array(rows).reshape(shape), offsets=offsets)

    def top(self, count: int = 10) -> list[TopToken]:
        """The tokens whose values are furthest from zero, the furthest first; over all targets."""
        values = self.total().values
        order = np.argsort(-np.abs(np.where(np.isnan(values), 0.0, values)), kind="stable")
        tokens = self.tokens
        return [
            TopToken(int(i), tokens[i], float(values[i]), *self.offsets[i])
            for i in order[:count]
            if not math.isnan(values[i])
        ]

    def to_dict(self) -> dict[str, Any]:
        """A JSON form; NaN becomes null."""
        return {
            "format": FORMAT,
            "name": self.name,
            "text": self.text,
            "offsets": [list(pair) for pair in self.offsets],
            "targets": list(self.targets),
            "notes": list(self.notes),
            "values": plain(self.values),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A record per token: token, start, end, value (None where nothing was measured).

        With targets a record per target and token, `target` and `target_index` in front.
        """
        spans = [
            {"token": token, "start": start, "end": end}
            for token, (start, end) in zip(self.tokens, self.offsets, strict=True)
        ]
        if not self.targets:
            values = plain(self.values)
            return [{**span, "value": value} for span, value in zip(spans, values, strict=True)]
        return [
            {"target_index": place, "target": target, **span, "value": value}
            for place, target in enumerate(self.targets)
            for span, value in zip(spans, plain(self.values[:, place]), strict=True)
        ]

    def _parts(self) -> list[Part]:
        """The tokens with their values, the means over the targets where there are some."""
        rows = [{**row, "token": repr(row["token"])} for row in self.total().rows()]
        return [Part(self.name, cells(rows), [f"note: {note}" for note in self.notes])]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` gave; PertokenError for anything else."""
        try:
            given = json.loads(text)
            if given["format"] != FORMAT:
                raise PertokenError(
                    f"a token signal of format {given['format']}; this version reads {FORMAT}"
                )
            shape = (len(given["offsets"]), *([len(given["targets"])] if given["targets"] else []))
            values = np.array(given["values"], dtype=np.float64).reshape(shape)
            notes = given.get("notes", ())
            return cls(
                given["text"], values, given["offsets"], given["name"], given["targets"], notes
            )
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise PertokenError(f"this is no token signal: {error}") from None

    def to_dataframe(self) -> Any:
        """A pandas frame with a row per token: index, token, start, end, value or one per target.

        Needs the extra `dataframe`.
        """
        from pertoken._extras import need

        frame = need("pandas", "dataframe").DataFrame(
            {
                "token": self.tokens,
                "start": [start for start, _ in self.offsets],
                "end": [end for _, end in self.offsets],
            }
        )
        columns = list(self.targets) or ["value"]
        for place, column in enumerate(columns):
            values = self.values[:, place] if self.targets else self.values
            # Two targets may have the same text.
            frame.insert(3 + place, column, values, allow_duplicates=True)
        return frame

    def plot(self) -> Any:
        """A plotly figure: bars per token, or a map of tokens and targets (extra `plot`)."""
        from pertoken._extras import need

        graph = need("plotly.graph_objects", "plot")
        places = list(range(len(self)))
        if self.targets:
            reach = _reach(self.values)
            trace = graph.Heatmap(
                z=self.values.T, x=places, colorscale="RdBu_r", zmin=-reach, zmax=reach
            )
            rows = {"tickvals": list(range(len(self.targets))), "ticktext": list(self.targets)}
        else:
            trace, rows = graph.Bar(x=places, y=self.values), {"title": self.name}
        ticks = {"tickvals": places, "ticktext": self.tokens}
        return figure(trace, title=self.name, xaxis=ticks, yaxis=rows)

    def _page(self) -> str:
        """The text, each token coloured by its value; with targets there is a text for each."""
        from pertoken._signal_html import page

        return page(self)

    def _repr_html_(self) -> str:
        from pertoken._signal_html import fragment

        return fragment(self)

    def shades(self, values: npt.NDArray[np.float64] | None = None) -> list[int]:
        """How strongly each token is coloured, -9 to 9, against the largest of all values."""
        values = self.total().values if values is None else values
        reach = _reach(self.values)
        if not reach:
            return [0] * len(values)
        return [0 if math.isnan(v) else round(_LEVELS * v / reach) for v in values.tolist()]

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        from rich.style import Style
        from rich.text import Text

        line = Text()
        for token, shade in zip(self.tokens, self.shades(), strict=True):
            style = None
            if shade:
                red, green, blue = _colour(shade)
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140
                style = Style(
                    color="white" if dark else "black", bgcolor=f"rgb({red},{green},{blue})"
                )
            line.append(token, style)
        yield line
        yield Text(f"{self.name}: {_legend(self.values)}", style="dim")
        for note in self.notes:
            yield Text(f"note: {note}", style="dim")

    def __repr__(self) -> str:
        targets = f", {len(self.targets)} targets" if self.targets else ""
        return f"TokenSignal({self.name!r}, {len(self)} tokens{targets})"


def _completed(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The offsets, where a token without characters has those of the one that completes it."""
    found = list(offsets)
    for index in range(len(found) - 2, -1, -1):
        start, end = found[index]
        if start == end == found[index + 1][0]:
            found[index] = found[index + 1]
    return found


def _place(starts: list[int], position: int) -> int:
    """Which word holds a character: the last that starts at or before it."""
    from bisect import bisect_right

    return bisect_right(starts, position) - 1


def _joined(rows: npt.NDArray[np.float64], how: str) -> npt.NDArray[np.float64]:
    """One value, or one per target, for the tokens of a word; NaN where none was measured."""
    measured = ~np.isnan(rows)
    filled = np.where(measured, rows, 0.0)
    if how == "sum":
        found = filled.sum(0)
    elif how == "mean":
        found = filled.sum(0) / np.maximum(measured.sum(0), 1)
    elif how == "max":
        furthest = np.abs(filled).argmax(0)
        found = np.take_along_axis(filled, furthest[None], 0)[0]
    else:
        raise PertokenError(f"words are joined by sum, mean or max, not {how!r}")
    result: npt.NDArray[np.float64] = np.where(measured.any(0), found, np.nan)
    return result


def _reach(values: npt.NDArray[np.float64]) -> float:
    """The largest distance from zero."""
    return float(np.nanmax(np.abs(values))) if (~np.isnan(values)).any() else 0.0


def _colour(shade: int) -> tuple[int, int, int]:
    """Orange for above zero, blue for below; told apart by all kinds of colour vision."""
    full = (230, 120, 0) if shade > 0 else (0, 100, 200)
    share = abs(shade) / _LEVELS
    red, green, blue = (round(255 + (part - 255) * share) for part in full)
    return red, green, blue


def _legend(values: npt.NDArray[np.float64]) -> str:
    if not (~np.isnan(values)).any():
        return "nothing measured"
    return f"{np.nanmin(values):.4g} to {np.nanmax(values):.4g}"
