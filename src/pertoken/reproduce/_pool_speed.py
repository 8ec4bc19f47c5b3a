"""Seconds and memory of selecting from files of two sizes, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from pertoken.timing import foreign_share, read_cpu
from pertoken.train import NgramScorer

JOBS = 2
_RUN = """
import json, resource, sys, time
from pertoken.train import NgramScorer, select_file
if __name__ == "__main__":
    source, target, scorer, jobs = sys.argv[1:]
    began = time.perf_counter()
    select_file(source, target, NgramScorer.load(scorer), 0.1, jobs=int(jobs))
    seconds = time.perf_counter() - began
    # RUSAGE_SELF would tell the size of the process that this one was started from.
    status = open("/proc/self/status").read()
    own = int(status.partition("VmHWM:")[2].split()[0])
    print(json.dumps([seconds, own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


class Run(NamedTuple):
    """seconds and greatest memory of a run; foreign: what others used of the machine, a share."""

    seconds: float
    megabytes: float
    foreign: float | None


def selecting(
    scorer: NgramScorer, documents: Sequence[str], megabytes: Sequence[int], repeats: int
) -> dict[int, list[Run]]:
    """The runs for each size in MB of text, in turns.

    Memory is the parent's and the greatest of one worker's together; Linux alone tells it. The
    documents are repeated until a file has its size.
    """
    found: dict[int, list[Run]] = {size: [] for size in megabytes}
    with TemporaryDirectory() as name:
        folder = Path(name)
        scorer.save(folder / "scorer")
        script = folder / "run.py"
        script.write_text(_RUN, encoding="utf-8")
        for size in megabytes:
            _fill(folder / f"{size}.jsonl", documents, size * 10**6)
        for _ in range(repeats):
            for size in megabytes:
                files = [str(folder / f"{size}.jsonl"), str(folder / "out.jsonl")]
                command = [sys.executable, str(script), *files, str(folder / "scorer"), str(JOBS)]
                before = read_cpu()
                run = subprocess.run(command, capture_output=True, text=True, check=True)
                foreign = foreign_share(before, read_cpu())
                seconds, kilobytes = json.loads(run.stdout)
                found[size].append(Run(seconds, kilobytes / 1024, foreign))
    return found


def _fill(path: Path, documents: Sequence[str], wanted: int) -> None:
    size = 0
    with path.open("w", encoding="utf-8") as file:
        while size < wanted:
            for text in documents:
                file.write(json.dumps({"text": text}) + "\n")
                size += len(text.encode())
                if size >= wanted:
                    break
