"""How a training is shown: a live table on a terminal, else a line per step."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_SHOWN = 12  # rows of the live table


class LossRows:
    """The newest rows of a fine-tuning as a table, and what is said above it."""

    def __init__(self, title: str, steps: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self.title, self.steps = title, steps
        self._began = time.monotonic()
        self._first = 0

    def add(self, row: dict[str, Any]) -> None:
        if not self.rows:
            self._first = row["step"] - 1
        self.rows.append(row)

    def told(self) -> str:
        """What stands above the table: how far it is."""
        if not self.rows:
            return self.title
        done = self.rows[-1]["step"]
        each = (time.monotonic() - self._began) / (done - self._first)
        left = each * (self.steps - done)
        return f"{self.title}: step {done} of {self.steps}, about {left:.0f} s to go"

    def cells(self, row: dict[str, Any]) -> list[str]:
        return [f"{one:.4g}" if isinstance(one, float) else str(one) for one in row.values()]

    def heads(self) -> list[str]:
        return [name.replace("_", " ") for name in (self.rows[-1] if self.rows else ("step",))]

    def table(self) -> Table:
        from rich.table import Table

        table = Table(title=self.told(), title_justify="left", title_style="", box=None)
        for name in self.heads():
            table.add_column(name, justify="right")
        for row in self.rows[-_SHOWN:]:
            table.add_row(*self.cells(row))
        return table


class PolicyRows(LossRows):
    """The newest rows as a table, and what is said above it."""

    def __init__(self, method: str, task: str, steps: int, beta: float) -> None:
        super().__init__(f"{method} on {task}", steps)
        self.kl = "KL to the start" if beta else "KL old to new"

    def cells(self, row: dict[str, Any]) -> list[str]:
        return cells(row)

    def heads(self) -> list[str]:
        levels = list(self.rows[-1]["closed"]) if self.rows else []
        closed = [f"{level} {side}" for level in levels for side in ("low", "high")]
        return ["step", "reward", self.kl, *closed, "tokens", "s"]


def cells(row: dict[str, Any]) -> list[str]:
    """A row's figures as text; the share of closed gates by level and side, low and then high.

    >>> cells({"step": 2, "reward": None, "kl": 0.00123, "closed": {"token": [0.25, 0]},
    ...        "tokens": 0, "seconds": 1.5})
    ['2', '', '0.0012', '25.0%', '0.0%', '', '1.5']
    """
    shares = [f"{share:.1%}" for sides in row["closed"].values() for share in sides]
    reward = "" if row["reward"] is None else f"{row['reward']:.3f}"
    tokens = str(row["tokens"] or "")
    return [str(row["step"]), reward, f"{row['kl']:.2g}", *shares, tokens, f"{row['seconds']:.1f}"]


@contextlib.contextmanager
def live(console: Console, rows: LossRows) -> Iterator[Any]:
    """Yields the function that shows a row: in a table on a terminal, else as a line."""
    if not console.is_terminal:

        def line(row: dict[str, Any]) -> None:
            rows.add(row)
            told = zip(rows.heads(), rows.cells(row), strict=True)
            typer.echo("  ".join(f"{name} {cell}" for name, cell in told if cell), err=True)

        yield line
        return
    from rich.live import Live

    with Live(rows.table(), console=console, auto_refresh=False) as live:

        def show(row: dict[str, Any]) -> None:
            rows.add(row)
            live.update(rows.table(), refresh=True)

        yield show


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and notes of transformers, which would break the table."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def how_to_go_on(out: Path) -> str:
    from pertoken.train._folder import latest

    found = latest(out)
    if found is None:
        return f"there is no checkpoint in {out} yet: the same command starts anew"
    return f"the checkpoint of step {found[0]} is whole: the same command with --resume goes on"
