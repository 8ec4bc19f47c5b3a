"""How long a look-up in a store of a million entries takes beside a decoding step.

    python bench/knn_lookup.py --out reports/bench/knn_lookup.json

The same work as the timed row of KNN-LM's reproduction, by itself, for an inverted file and for a
search that reads every key. The store is SmolLM2's own states on GSM8K; its keys are filled up to
the number of entries with their likes. 2.3 GB of disk for a million.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from comparison import show_and_write

BARS = {"ivfpq: a look-up among the entries over a decoding step": "<= 0.2"}  # before the first run


def report(found: list[dict[str, Any]], **about: Any) -> dict[str, Any]:
    """The written form: the bar, each index with its share of a step and all seconds, settings."""
    from pertoken.reproduce._bars import Bar

    comparisons = []
    for each in found:
        metric = f"{each['index']}: a look-up among the entries over a decoding step"
        share = each["lookup"] / each["step"]
        if metric in BARS:
            holds = Bar.parse(BARS[metric]).holds(share)
            row = {"metric": metric, "here": share, "bar": BARS[metric], "holds": holds}
            comparisons.append(row)
        each["share"] = share
    return {"comparisons": comparisons, "figures": {each["index"]: each for each in found}, **about}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--texts", type=int, default=60)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()

    import torch

    import pertoken
    from pertoken.decode import KNNDatastore
    from pertoken.reproduce._knn_lookup import lookup_times
    from pertoken.reproduce._machine import machine, versions

    torch.set_num_threads(given.threads)
    model, tokenizer = pertoken.load("smollm2", dtype="float32")
    rows = pertoken.data("gsm8k")[: given.texts]
    texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    with TemporaryDirectory() as folder:
        store = KNNDatastore.build(model, tokenizer, texts, f"{folder}/store")
        run = {"entries": given.entries, "turns": given.turns}
        found = [lookup_times(store, index=index, **run) for index in ("ivfpq", "flat")]
    settings = {key: value for key, value in vars(given).items() if key != "out"}
    settings["keys read"] = len(store)
    written = report(found, settings=settings, machine=machine("cpu"), versions=versions())
    show_and_write(written, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
