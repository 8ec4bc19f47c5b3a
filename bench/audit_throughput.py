"""Counting tokens for an audit beside the raw tokenizer on the same lines: bytes per second.

    python bench/audit_throughput.py --out reports/bench/audit_throughput.json

`counts` is `corpus_token_counts`, `premiums` is `token_premiums` with its table: what the audit
does with every text. `raw` is `encode_batch` of `tokenizers` on the same lines, already split and
in normal form; `raw fast` is the call without offsets, which the counts use. All take turns in one
process with one tokenizer, whose cache of words is warm for each. The text is the Declaration of
Human Rights in many languages.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison import show_and_write

BARS = {  # fixed before the first run
    "throughput: counts over raw": ">= 0.9",
    "throughput: premiums over raw": ">= 0.9",
}
Call = Callable[[], Any]


def contenders(tokenizer: Any, texts: Mapping[str, Sequence[str]]) -> dict[str, Call]:
    """Name -> one pass over all texts, each giving the number of tokens."""
    from unicodedata import normalize

    from pertoken.tokenize import corpus_token_counts, token_premiums

    every = [text for own in texts.values() for text in own]
    lines = [line for text in every for line in normalize("NFC", text).split("\n") if line]
    backend = tokenizer.backend_tokenizer
    first = next(iter(texts))

    def premiums() -> int:
        found = token_premiums(texts, tokenizer, reference=first)
        found.table()
        return sum(map(found.count, texts))

    return {
        "raw": lambda: sum(map(len, backend.encode_batch(lines, add_special_tokens=False))),
        "raw fast": lambda: sum(
            map(len, backend.encode_batch_fast(lines, add_special_tokens=False))
        ),
        "counts": lambda: sum(corpus_token_counts(tokenizer, every)),
        "premiums": premiums,
    }


def report(seconds: dict[str, list[float]], size: int, **about: Any) -> dict[str, Any]:
    """The written form: comparisons with their bars, figures, settings. size: bytes of a pass."""
    from pertoken.reproduce._bars import Bar

    def over(name: str, other: str) -> float:
        # Rounds are pairs: the machine's state is the same within one. Less time, more throughput.
        return statistics.median(b / a for a, b in zip(seconds[name], seconds[other], strict=True))

    comparisons = []
    for metric, bar in BARS.items():
        here = over(*metric.removeprefix("throughput: ").split(" over "))
        comparisons.append(
            {"metric": metric, "here": here, "bar": bar, "holds": Bar.parse(bar).holds(here)}
        )
    figures = {
        name: {
            "MB per second": size / statistics.median(values) / 1e6,
            "throughput over raw": over(name, "raw"),
        }
        for name, values in seconds.items()
    }
    return {"comparisons": comparisons, "figures": figures, **about}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", default="smollm2")
    parser.add_argument("--languages", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(given.threads)  # read when the first batch is encoded

    from pertoken.data import data
    from pertoken.loading import load_tokenizer
    from pertoken.reproduce._machine import machine, versions
    from pertoken.timing import alternate

    rows = data("udhr")
    texts = {row["code"]: row["articles"] for row in rows[:: max(1, len(rows) // given.languages)]}
    made = contenders(load_tokenizer(given.tokenizer), texts)
    counts = {name: call() for name, call in made.items()}  # also warms the cache
    if len(set(counts.values())) != 1:
        print(f"they do not count the same: {counts}", file=sys.stderr)
        return 1

    def turn(call: Call) -> Callable[[int], None]:
        def run(_: int) -> None:
            call()

        return run

    run = alternate({name: turn(call) for name, call in made.items()}, given.rounds)
    if not run.kept:
        print("all rounds were disturbed by other programs: nothing to show", file=sys.stderr)
        return 1
    size = sum(len(text.encode()) for own in texts.values() for text in own)
    settings = {key: value for key, value in vars(given).items() if key != "out"}
    written = report(
        {name: run.seconds(name) for name in made},
        size,
        settings={**settings, "bytes": size, "tokens": counts["raw"]},
        noise=run.noise(),
        machine=machine("cpu"),
        versions=versions(),
    )
    show_and_write(written, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
