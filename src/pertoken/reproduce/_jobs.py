"""Several processes for the units of a reproduction that are not timed.

`context.remember_all` starts helpers: each runs the same reproduction up to that call, claims units
from the shared checkpoint until none is left, and ends. All use one thread then, which two
processes on two cores put to better use than one process with two threads.

    python -m pertoken.reproduce._jobs '{"slug": "goose", ...}'
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

_PARENT = os.getppid()


class HelperDone(Exception):
    """Raised in a helper behind the units it came for."""


@contextlib.contextmanager
def helpers(job: Mapping[str, Any], count: int) -> Iterator[list[str]]:
    """Run `count` helpers of a job (see `help_with`) while the body runs; complaints of theirs.

    The list that is yielded is filled at the end: the last line of each helper that failed. Its
    units were computed by others.
    """
    complaints: list[str] = []
    running: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        for _ in range(count):
            log = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
            command = [sys.executable, "-m", __name__, json.dumps(dict(job))]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
            running.append((process, log))
        yield complaints
        for helper, output in running:
            if helper.wait():
                output.seek(0)
                lines = output.read().decode(errors="replace").strip().splitlines()
                complaints.append(lines[-1] if lines else f"exit code {helper.returncode}")
    finally:
        for helper, output in running:
            helper.kill()
            helper.wait()
            output.close()


def check_parent() -> None:
    """End a helper whose run is gone: killed, it could not end its helpers itself."""
    if os.getppid() != _PARENT:
        raise HelperDone


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes with one thread while this is open."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def help_with(job: Mapping[str, Any]) -> None:
    """Join the run of another process; job: module, slug and the options of `run_module`, among
    them `helper`, the call of `remember_all` it is for."""
    from pertoken.reproduce._harness import run_module

    options = dict(job)
    module = importlib.import_module(options.pop("module"))
    with contextlib.suppress(HelperDone):
        run_module(module, options.pop("slug"), resume=True, **options)


if __name__ == "__main__":
    # By its full name: the exception that ends a helper is the one the context raises.
    importlib.import_module("pertoken.reproduce._jobs").help_with(json.loads(sys.argv[1]))
