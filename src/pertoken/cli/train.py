"""`pertoken train`: reinforcement learning with one of four objectives on a checkable task."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pertoken.train import Run

_SHOWN = 12  # rows of the live table

_Token = Annotated[
    str | None,
    typer.Option(
        metavar="LOW,HIGH",
        help="Bounds on a token's ratio.",
        show_default="fiberpo 0.8,1.25; grpo 0.8,1.2; cispo 0,5",
    ),
]
_Trajectory = Annotated[
    str | None,
    typer.Option(
        metavar="LOW,HIGH",
        help="Bounds on a trajectory's ratio.",
        show_default="fiberpo and gspo 0.9,1.1",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("train")(train)


def train(
    method: Annotated[str, typer.Argument(help="fiberpo, grpo, gspo or cispo.")],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="New folder for checkpoints, log and trained model."),
    ],
    task: Annotated[str, typer.Option(help="arithmetic, countdown or gsm8k.")] = "arithmetic",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Updates in all.")] = 80,
    group: Annotated[int, typer.Option(help="Completions for each prompt.")] = 8,
    batch: Annotated[int, typer.Option(help="Completions sampled at once.")] = 32,
    iterations: Annotated[
        int, typer.Option(help="Updates from one batch; all but the first are off-policy.")
    ] = 4,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, constant.")] = 1e-5,
    beta: Annotated[float, typer.Option(help="Weight of the KL term to the start.")] = 0.0,
    token: _Token = None,
    trajectory: _Trajectory = None,
    save_every: Annotated[
        int | None,
        typer.Option(help="Steps between checkpoints.", show_default="a tenth of the run"),
    ] = None,
    model: shared.Model = "smollm2",
    seed: shared.Seed = 0,
    max_new_tokens: shared.OptionalMaxNewTokens = None,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Train a model by reinforcement learning on a task whose answers a program checks.

    The four methods differ in the objective alone. Completions have at most 16 tokens for
    arithmetic, 32 for countdown and 160 for gsm8k, else --max-new-tokens. The page is that of the
    last batch: ratio, gate and level of each token. Needs the extra rl.
    """
    output = shared.Output(as_json, html)
    settings: dict[str, Any] = {
        "token": _bounds("--token", token),
        "trajectory": _bounds("--trajectory", trajectory),
        "learning_rate": learning_rate,
        "max_new_tokens": max_new_tokens,
        "save_every": save_every,
        "seed": seed,
        "resume": resume,
    }
    run = _run(method, out, model, task, steps, group, batch, iterations, beta, settings)
    if not output.write(run):
        print("\n".join(run.notes()))


def _run(
    method: str,
    out: Path,
    model: str,
    task: str,
    steps: int,
    group: int,
    batch: int,
    iterations: int,
    beta: float,
    settings: dict[str, Any],
) -> Run:
    """The run, shown step by step; stopped by Ctrl-C it says how to go on."""
    from rich.console import Console

    from pertoken.train import train_policy

    try:
        with _quiet(), _live(Console(stderr=True), method, task, steps, beta) as show:
            return train_policy(
                method,
                out,
                model=model,
                task=task,
                steps=steps,
                group=group,
                batch=batch,
                iterations=iterations,
                beta=beta,
                progress=show,
                **settings,
            )
    except KeyboardInterrupt:
        typer.echo(_how_to_go_on(out), err=True)
        raise


class _Rows:
    """The newest rows as a table, and what is said above it."""

    def __init__(self, method: str, task: str, steps: int, beta: float) -> None:
        self.rows: list[dict[str, Any]] = []
        self.title, self.steps = f"{method} on {task}", steps
        self.kl = "KL to the start" if beta else "KL old to new"
        self._began = time.monotonic()
        self._first = 0

    def add(self, row: dict[str, Any]) -> None:
        if not self.rows:
            self._first = row["step"] - 1
        self.rows.append(row)

    def table(self) -> Table:
        from rich.table import Table

        told = self.title
        if self.rows:
            done = self.rows[-1]["step"]
            each = (time.monotonic() - self._began) / (done - self._first)
            told += f": step {done} of {self.steps}, about {each * (self.steps - done):.0f} s to go"
        table = Table(title=told, title_justify="left", title_style="", box=None)
        levels = list(self.rows[-1]["closed"]) if self.rows else []
        closed = [f"{level} {side}" for level in levels for side in ("low", "high")]
        for name in ("step", "reward", self.kl, *closed, "tokens", "s"):
            table.add_column(name, justify="right")
        for row in self.rows[-_SHOWN:]:
            table.add_row(*cells(row))
        return table


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
def _live(console: Console, method: str, task: str, steps: int, beta: float) -> Iterator[Any]:
    """Yields the function that shows a row: in a table on a terminal, else as a line."""
    rows = _Rows(method, task, steps, beta)
    if not console.is_terminal:

        def line(row: dict[str, Any]) -> None:
            rows.add(row)
            names = [column.header for column in rows.table().columns]
            told = zip(names, cells(row), strict=True)
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
def _quiet() -> Iterator[None]:
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


def _bounds(option: str, text: str | None) -> tuple[float, float] | None:
    """LOW,HIGH as numbers.

    >>> _bounds("--token", "0.8,1.25")
    (0.8, 1.25)
    """
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise PertokenError(f"{option} takes LOW,HIGH such as 0.8,1.25, got {text!r}") from None
    return low, high


def _how_to_go_on(out: Path) -> str:
    from pertoken.train._folder import latest

    found = latest(out)
    if found is None:
        return f"there is no checkpoint in {out} yet: the same command starts anew"
    return f"the checkpoint of step {found[0]} is whole: the same command with --resume goes on"
