"""Rows, reproductions and the report file they end up in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pertoken.errors import PertokenError
from pertoken.reproduce._bars import Bar
from pertoken.result import Part, Result, plain

ROW_KEYS = (
    "metric",
    "unit",
    "paper",
    "paper_setting",
    "here",
    "interval",
    "baseline",
    "bar",
    "holds",
    "why",
    "caveat",
)
REPORT_KEYS = (
    "slug",
    "version",
    "model",
    "settings",
    "seed",
    "versions",
    "machine",
    "seconds",
    "rows",
)


@dataclass
class Row:
    """One figure of a reproduction.

    metric: what was measured; the key under which a bar may be declared in ``BARS``.
    here: the measured number (the ratio itself where the bar is on a ratio); NaN where it could
        not be measured, which fails every bar.
    unit: "x", "%", "tokens/s", "tokens per forward" …
    paper, paper_setting: the published figure and the model, data and budget it was got with.
    interval: (low, high) of `here`, for instance from `bootstrap_ratio`.
    baseline: the figure of what `here` is compared with, on this machine.
    why: the reason where a bar does not hold; a note elsewhere.
    caveat: how to read a bar that holds, where it says less than it seems to.
    `bar`, `holds` and `caveat` are filled in by the harness alone, from what the module declares.
    """

    metric: str
    here: float
    unit: str = ""
    paper: float | str | None = None
    paper_setting: str = ""
    interval: tuple[float, float] | None = None
    baseline: float | str | None = None
    why: str = ""
    bar: str = field(default="", init=False)
    holds: bool | None = field(default=None, init=False)
    caveat: str = field(default="", init=False)

    def __post_init__(self) -> None:
        try:
            self.here = float(self.here)
            if self.interval is not None:
                low, high = self.interval
                self.interval = (float(low), float(high))
        except (TypeError, ValueError):
            raise PertokenError(
                f"row {self.metric!r}: `here` must be one number and `interval` two, got "
                f"{self.here!r} and {self.interval!r}"
            ) from None

    def judge(self, bar: Bar) -> None:
        """Set `bar` and `holds`."""
        self.bar, self.holds = bar.text, bar.holds(self.here)

    def to_dict(self) -> dict[str, Any]:
        """The row as it stands in a report; numbers that are not finite become None."""
        return {key: plain(getattr(self, key)) for key in ROW_KEYS}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """A row as read from a report."""
        here = float("nan") if data["here"] is None else data["here"]
        given = {k: data[k] for k in ("metric", "unit", "paper", "paper_setting", "baseline")}
        row = cls(here=here, interval=_interval(data["interval"]), why=data["why"] or "", **given)
        row.bar, row.holds = data["bar"] or "", data["holds"]
        row.caveat = data.get("caveat") or ""
        return row


@dataclass
class Reproduction:
    """What `run(context)` of a reproduction returns; `Context.reproduction` fills most of it.

    version: raised whenever a change of the reproduction moves its figures.
    settings: what else is needed to repeat the run (numbers, strings, lists, dicts).
    """

    slug: str
    version: int
    model: str
    settings: dict[str, Any]
    seed: int
    rows: Sequence[Row]


@dataclass
class Report(Result):
    """A reproduction that was run: figures with their bars judged, and what it was run with.

    path: where it was written, None if it was not.
    faults: what keeps the reproduction from being accepted; the bars that failed without a
        reason are among them.
    """

    slug: str
    version: int
    model: str
    settings: dict[str, Any]
    seed: int
    versions: dict[str, str]
    machine: dict[str, Any]
    seconds: float
    figures: list[Row]
    path: Path | None = None
    faults: list[str] = field(default_factory=list)

    _title = "A paper's claim, reproduced here"

    @property
    def smoke(self) -> bool:
        """Whether this was a smoke run: a tiny model, figures without meaning."""
        return bool(self.settings.get("smoke"))

    def to_dict(self) -> dict[str, Any]:
        """The report as it is written: plain JSON values, no NaN."""
        data = {key: plain(getattr(self, key)) for key in REPORT_KEYS if key != "rows"}
        return {**data, "rows": self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        """A record per figure, with its bar."""
        return [row.to_dict() for row in self.figures]

    def _parts(self) -> list[Part]:
        from pertoken.reproduce._table import lines, notes, title

        return [Part(title(self), lines(self), notes(self))]


def write_json(data: Mapping[str, Any], path: Path) -> None:
    """Write `data` whole or not at all: to a neighbour first, then renamed over `path`."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise PertokenError(f"{path.parent} is a file; name a folder to write to") from None
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_report(path: Path) -> Report:
    """Read a report file; PertokenError where it is missing, not JSON, or lacks a field."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PertokenError(f"no report at {path}; run `pertoken reproduce {path.stem}`") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PertokenError(f"{path} is not JSON ({error}); run it again to replace it") from None
    try:
        fields = {key: data[key] for key in REPORT_KEYS if key != "rows"}
        return Report(**fields, figures=[Row.from_dict(row) for row in data["rows"]], path=path)
    except (KeyError, TypeError) as error:
        raise PertokenError(f"{path} does not follow the report schema: {error}") from None


def _interval(value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    low, high = (float("nan") if end is None else float(end) for end in value)
    return (low, high)
