"""What an n-gram style costs: its share of SmolLM2's decoding step, and seconds to train it.

    python bench/style_overhead.py --out reports/bench/style_overhead.json

A step of the model with its cache and the processor behind it are timed one after the other, token
by token of a text that is read; the figure is the median over all steps. The style is of
Shakespeare's plays, over a million tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from comparison import show_and_write

BARS = {  # fixed before the first run
    "processor over the model's step, median": "<= 0.03",
    "seconds to train a million tokens, slowest run": "< 30",
}


def report(shares: list[float], seconds: list[float], **about: Any) -> dict[str, Any]:
    """The written form: comparisons with their bars, figures, settings."""
    from pertoken.reproduce._bars import Bar

    here = dict(zip(BARS, (statistics.median(shares), max(seconds)), strict=True))
    comparisons = [
        {
            "metric": metric,
            "here": here[metric],
            "bar": bar,
            "holds": Bar.parse(bar).holds(here[metric]),
        }
        for metric, bar in BARS.items()
    ]
    figures = {"ngram-style": {"steps": len(shares), "seconds": seconds}}
    return {"comparisons": comparisons, "figures": figures, **about}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()

    import torch

    import pertoken
    from pertoken.decode import NGramStyle
    from pertoken.reproduce._machine import machine, versions
    from pertoken.reproduce._style_speed import overhead, seconds_per_million

    torch.set_num_threads(given.threads)
    texts = ["\n\n".join(row["speeches"]) for row in pertoken.data("shakespeare")]
    model, tokenizer = pertoken.load("smollm2")
    seconds = [seconds_per_million(tokenizer, texts) for _ in range(given.runs)]
    style = NGramStyle.train(texts, tokenizer)
    shares = overhead(model, tokenizer, style, texts[0], given.steps)
    settings = {key: value for key, value in vars(given).items() if key != "out"}
    written = report(
        shares, seconds, settings=settings, machine=machine("cpu"), versions=versions()
    )
    show_and_write(written, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
