"""Runs many calls in several processes, or on Ray; a process that is killed costs its call alone.

Neither of Python's own pools does that: one breaks as a whole when a worker dies, the other waits
for the lost call for ever.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from pertoken._extras import need

__all__ = ["LOST", "in_processes", "on_ray"]

LOST = object()  # in place of a result: the worker was killed
Result = tuple[int, Any]


def in_processes(
    work: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int
) -> Iterator[Result]:
    """(place, `work(*calls[place])`) for every call, as they are done; `LOST` for a killed one.

    work: a function of a module, so that a new process finds it. What it raises is raised here.
    """
    pool = get_context("spawn")  # a fork of a process with threads may hang
    left = deque(range(len(calls)))
    at: dict[Connection, tuple[Any, int]] = {}

    def start() -> None:
        ours, theirs = pool.Pipe()
        process = pool.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # else the end of a dead worker would stay open
        give(ours, process)

    def give(pipe: Connection, process: Any) -> None:
        with contextlib.suppress(OSError):  # dead already: told below, as any dead one
            pipe.send((work, calls[left[0]]) if left else None)
        if left:
            at[pipe] = (process, left.popleft())
        else:
            pipe.close()
            process.join()

    try:
        for _ in range(min(jobs, len(calls))):
            start()
        while at:
            for pipe in wait(list(at)):
                assert isinstance(pipe, Connection)
                process, place = at[pipe]
                try:
                    done, value = pipe.recv()
                except (EOFError, OSError):
                    del at[pipe]
                    pipe.close()
                    process.join()
                    if left:
                        start()
                    yield place, LOST
                    continue
                if not done:
                    raise value
                del at[pipe]
                give(pipe, process)
                yield place, value
    finally:
        for pipe, (process, _) in at.items():
            process.terminate()
            process.join()
            pipe.close()


def _serve(pipe: Connection) -> None:
    """A worker: calls until there are none, or until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with contextlib.suppress(EOFError, OSError):
        while True:
            job = pipe.recv()
            if job is None:
                return
            work, call = job
            try:
                answer = (True, work(*call))
            except Exception as error:
                answer = (False, error)
            pipe.send(answer)


def on_ray(
    work: Callable[..., Any], calls: Sequence[tuple[Any, ...]], jobs: int
) -> Iterator[Result]:
    """The same on Ray (extra `ray`): a cluster connected to or in RAY_ADDRESS, else a local one.

    A lost call is not tried again: what killed it may kill it again.
    """
    ray = need("ray", "ray")
    own = not ray.is_initialized()
    if own:
        # A cluster that is there brings its own number of workers, and refuses another.
        local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": jobs}
        environment = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}
        ray.init(**local, log_to_driver=False, runtime_env=environment)
    errors = ray.exceptions
    killed = (errors.WorkerCrashedError, errors.OutOfMemoryError, errors.NodeDiedError)
    remote = ray.remote(num_cpus=1, max_retries=0)(work)
    left = iter(range(len(calls)))
    at: dict[Any, int] = {}

    def give() -> None:
        place = next(left, None)
        if place is not None:
            at[remote.remote(*calls[place])] = place

    try:
        # A few more than there are workers, so that none waits; the texts of all would fill it.
        for _ in range(int(ray.cluster_resources().get("CPU", jobs)) + 1):
            give()
        while at:
            (done,), _ = ray.wait(list(at), num_returns=1)
            place = at.pop(done)
            give()
            try:
                value = ray.get(done)
            except killed:
                value = LOST
            except errors.RayTaskError as error:
                raise error.cause from None
            yield place, value
    finally:
        for each in at:
            ray.cancel(each, force=True)
        if own:
            ray.shutdown()
