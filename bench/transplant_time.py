"""How long a transplant of 50,000 tokens takes: TokenAdapt on SmolLM2, to a fresh BPE.

    python bench/transplant_time.py --out reports/bench/transplant_time.json

The same work as the timed row of TokenAdapt's reproduction, several times and by itself, with the
tokenizer trained beforehand: the model's own states are the embedder, no text is scored.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from comparison import show_and_write

SOURCES = ("brown", "spam-assassin", "gsm8k", "humaneval", "udhr")  # the tokenizer's texts
BARS = {"seconds of a transplant of 50,000 tokens, slowest run": "< 180"}  # before the first run


def report(seconds: list[float], **about: Any) -> dict[str, Any]:
    """The written form: the slowest run with its bar, all runs, settings."""
    from pertoken.reproduce._bars import Bar

    slowest = max(seconds)
    comparisons = [
        {"metric": metric, "here": slowest, "bar": bar, "holds": Bar.parse(bar).holds(slowest)}
        for metric, bar in BARS.items()
    ]
    figures = {"tokenadapt": {"median": statistics.median(seconds), "seconds": seconds}}
    return {"comparisons": comparisons, "figures": figures, **about}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=50_000)
    given = parser.parse_args()

    import torch

    import pertoken
    from pertoken.reproduce._machine import machine, versions
    from pertoken.reproduce._tokenadapt_texts import training
    from pertoken.tokenize import train_tokenizer, transplant

    torch.set_num_threads(given.threads)
    rows = {name: pertoken.data(name) for name in SOURCES}
    model, old = pertoken.load("smollm2")
    new = train_tokenizer(training(rows), given.tokens)
    seconds = []
    for _ in range(given.runs):
        began = time.perf_counter()
        transplant(model, old, new)
        seconds.append(time.perf_counter() - began)
    settings = {key: value for key, value in vars(given).items() if key != "out"}
    written = report(seconds, settings=settings, machine=machine("cpu"), versions=versions())
    show_and_write(written, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
