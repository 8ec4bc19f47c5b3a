"""The progress bar of the commands that take long."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, gone when it is done; yields the function (what, done, total) it shows."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    # Redrawn seldom: the drawing thread and the decoding share the cores.
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        refresh_per_second=2,
    ) as bar:
        task = bar.add_task("starting", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield tell


@contextlib.contextmanager
def delayed_bar(seconds: float = 2.0) -> Iterator[Callable[[str, int, int], None]]:
    """As `progress_bar`, shown only when the work has taken some seconds."""
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        shown: list[Callable[[str, int, int], None]] = []

        def tell(what: str, done: int, total: int) -> None:
            if not shown and time.perf_counter() - began >= seconds:
                shown.append(stack.enter_context(progress_bar()))
            for show in shown:
                show(what, done, total)

        yield tell
