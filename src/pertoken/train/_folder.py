"""The folder of a training run: its settings, its checkpoints, and which of them are whole.

    OUT/run.json          settings, versions, and a row for each step, as of the last checkpoint
    OUT/checkpoint-N/     model, optimizer and generators after step N; only the newest is kept
    OUT/model/            the trained model and its tokenizer, when the run is done
    OUT/tensorboard/      the log for TensorBoard

A checkpoint is whole when it holds `MARK`, which is written last.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from pertoken._files import write_whole
from pertoken.errors import PertokenError

__all__ = ["claim", "latest", "mark_whole", "write_run"]

MARK = "whole"
_MAY_CHANGE = ("steps", "save_every")  # of the settings, in a run that goes on


def latest(out: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest whole checkpoint; None where there is none."""
    found = [
        (int(match[1]), path)
        for path in out.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / MARK).is_file()
    ]
    return max(found, default=None)


def mark_whole(out: Path, step: int) -> None:
    """Say that the checkpoint of `step` is whole, and drop all others."""
    write_whole(out / f"checkpoint-{step}" / MARK, f"step {step}\n")
    for path in out.glob("checkpoint-*"):
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path, ignore_errors=True)


def write_run(out: Path, run: dict[str, Any]) -> None:
    """Write ``run.json``."""
    write_whole(out / "run.json", json.dumps(run, ensure_ascii=False, indent=1) + "\n")


def claim(out: Path, settings: dict[str, Any], *, resume: bool) -> Path | None:
    """Make `out` this run's folder; the checkpoint to go on from, None for a start.

    Raises PertokenError where `out` holds something else: without `resume` anything but a run that
    never came to a checkpoint, with it no whole checkpoint, other settings, or no steps to go.
    """
    if out.exists() and not out.is_dir():
        raise PertokenError(f"can't write {out}: it is a file, and a run needs a folder")
    checkpoint = latest(out)
    if not resume:
        if checkpoint is not None:
            raise PertokenError(
                f"{out} holds a run at step {checkpoint[0]}: go on with --resume (resume=True), or "
                "choose another folder"
            )
        if out.is_dir() and any(out.iterdir()) and not (out / "run.json").is_file():
            raise PertokenError(f"{out} is not empty and holds no run: choose another folder")
        _make(out)
        _drop_partial(out)
        return None
    if checkpoint is None:
        raise PertokenError(f"there is no whole checkpoint in {out}: leave --resume out to start")
    before = _settings(out)
    for name in sorted((before.keys() | settings.keys()) - set(_MAY_CHANGE)):
        if before.get(name) != settings.get(name):
            raise PertokenError(
                f"{out} was run with {name} {before.get(name)}, not {settings.get(name)}: "
                "resume with the same settings"
            )
    if settings["steps"] <= checkpoint[0]:
        raise PertokenError(
            f"{out} is at step {checkpoint[0]} of {settings['steps']} already: ask for more steps "
            "to go on"
        )
    _drop_partial(out)
    return checkpoint[1]


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PertokenError(f"can't make the folder {out}: {error.strerror or error}") from None


def _drop_partial(out: Path) -> None:
    for path in out.glob("checkpoint-*"):
        if not (path / MARK).is_file():
            shutil.rmtree(path, ignore_errors=True)


def _settings(out: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((out / "run.json").read_text("utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PertokenError(
            f"can't read the settings of the run in {out / 'run.json'} ({error})"
        ) from None
    return found
