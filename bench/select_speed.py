"""How fast documents are selected from a file, and how much memory that takes, by itself.

    python bench/select_speed.py --out reports/bench/select_speed.json

The timed rows of PreSelect's reproduction, without its trainings: a scorer of n-grams, learned from
mathematics against mails, selects a tenth of a file with two processes, start and writing included.
The speed does not depend on what the scorer has learned.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from comparison import show_and_write

SMALL, LARGE = 60, 240  # megabytes
BARS = {  # those of the reproduction
    "megabytes per second, 2 processes": ">= 20",
    f"memory on {LARGE} MB over that on {SMALL} MB": "<= 1.1",
}


def report(found: dict[int, Any], **about: Any) -> dict[str, Any]:
    """The written form; runs beside other load are counted, not used. None left: no figure."""
    from dataclasses import asdict

    from pertoken.reproduce._bars import Bar
    from pertoken.timing import FOREIGN_LIMIT, spread

    quiet = [run for run in found[LARGE] if (run.foreign or 0.0) <= FOREIGN_LIMIT]
    if not quiet:
        raise SystemExit("error: no run was quiet: stop what else runs here, and run it again")
    speeds = [LARGE / run.seconds for run in quiet]
    memory = {size: max(run.megabytes for run in runs) for size, runs in found.items()}
    here = dict(zip(BARS, (statistics.median(speeds), memory[LARGE] / memory[SMALL]), strict=True))
    comparisons = [
        {"metric": name, "here": here[name], "bar": bar, "holds": Bar.parse(bar).holds(here[name])}
        for name, bar in BARS.items()
    ]
    figures = {
        "megabytes per second": asdict(spread(speeds)),
        "runs": {"quiet": len(quiet), "dropped": len(found[LARGE]) - len(quiet)},
        "greatest memory, MB": {str(size): round(most) for size, most in memory.items()},
    }
    return {"comparisons": comparisons, "figures": figures, **about}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()

    import pertoken
    from pertoken.reproduce._machine import machine, versions
    from pertoken.reproduce._pool_speed import selecting
    from pertoken.train import NgramScorer

    school = [f"{row['question']}\n{row['answer']}" for row in pertoken.data("gsm8k")]
    mails = [row["text"] for row in pertoken.data("spam-assassin") if row["label"] == "ham"]
    texts = school[: len(mails)] + mails
    scorer = NgramScorer.fit(texts, [1] * (len(texts) - len(mails)) + [0] * len(mails))
    found = selecting(scorer, texts, (SMALL, LARGE), given.runs)
    settings = {"runs": given.runs, "keep": 0.1, "documents": len(texts)}
    about = {"machine": machine("cpu"), "versions": versions()}
    show_and_write(report(found, settings=settings, **about), given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
