"""Cautious decoding with its trials in one forward beside one trial after the other: seconds.

    python bench/cntp_batched.py --out reports/bench/cntp_batched.json --threads 1

Both write the same text from the same draws: eight trials at every place of GSM8K answers. One
after the other is the loop of the paper at its best: each trial goes on from a copy of the cache,
and the place where trials begin is read once (the released loop reads it again for every trial).
`one prompt` is a question at a time; `equal trials` has trials of 16 tokens each, which shows what
a pass over eight rows costs beside eight passes; `eight prompts` are in one batch, whose trials all
go through the model together. Compared are seconds per new token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from comparison import show_and_write

TRIALS = 8
BATCH = 8
SAMPLED = {"do_sample": True, "temperature": 1.2, "top_p": 0.9, "top_k": 50}
BARS = {  # fixed before the first run
    "one prompt: one by one over together": ">= 3",
    "eight prompts: one by one over together": ">= 3",
}
KINDS = ("one prompt", "equal trials", "eight prompts")
Found = dict[str, Any]


def together(model: Any, method: Any, rows: Sequence[Any], new_tokens: int, seed: int) -> Found:
    """New tokens of prompts [time] in one batch, and the trials' rows of the cache."""
    import torch

    from pertoken.testing.setups import decode, left_pad, pad_id

    ids, mask = left_pad(rows, pad_id(model))
    torch.manual_seed(seed)
    texts = decode(model, method, ids, mask, max_new_tokens=new_tokens, **SAMPLED)
    return {"texts": texts, "new": sum(map(len, texts)), "forwards": method.stats.forwards}


def one_by_one(model: Any, method: Any, rows: Sequence[Any], new_tokens: int, seed: int) -> Found:
    """The same, prompt after prompt and trial after trial."""
    import torch

    from pertoken.testing._trial_by_trial import trial_by_trial

    torch.manual_seed(seed)
    texts = [
        trial_by_trial(method, model, row[None], max_new_tokens=new_tokens, **SAMPLED)
        for row in rows
    ]
    return {"texts": texts, "new": sum(map(len, texts))}


def contenders(
    model: Any, tokenizer: Any, prompts: Sequence[Any], new_tokens: int
) -> dict[str, Callable[[int], Found]]:
    """Name -> one round, by its number."""
    from pertoken.decode import CautiousDecoding

    made: dict[str, Callable[[int], Found]] = {}
    for kind in KINDS:
        for name, run in (("together", together), ("one by one", one_by_one)):

            def turn(number: int, kind: str = kind, run: Any = run) -> Found:
                equal = kind == "equal trials"
                method = CautiousDecoding(
                    tokenizer,
                    trials=TRIALS,
                    punctuation=() if equal else "code",
                    cap=16 if equal else None,
                )
                count = BATCH if kind == "eight prompts" else 1
                rows = [prompts[(number * count + k) % len(prompts)] for k in range(count)]
                found: Found = run(model, method, rows, new_tokens, number)
                return found

            made[f"{kind}: {name}"] = turn
    return made


def report(seconds: dict[str, list[float]], found: dict[str, list[Found]], **about: Any) -> Found:
    """The written form: comparisons with their bars, figures, settings."""
    from pertoken.reproduce._bars import Bar

    each = {
        name: [spent / one["new"] for spent, one in zip(seconds[name], found[name], strict=True)]
        for name in seconds
    }
    ratios = {
        f"{kind}: one by one over together": statistics.median(
            # Rounds are pairs: the machine's state is the same within one.
            b / a
            for a, b in zip(each[f"{kind}: together"], each[f"{kind}: one by one"], strict=True)
        )
        for kind in KINDS
    }
    comparisons = [
        {
            "metric": metric,
            "here": ratios[metric],
            "bar": bar,
            "holds": Bar.parse(bar).holds(ratios[metric]),
        }
        for metric, bar in BARS.items()
    ]
    figures: Found = {
        name: {"seconds per new token": statistics.median(values)} for name, values in each.items()
    }
    for kind in KINDS:
        pair = zip(found[f"{kind}: together"], found[f"{kind}: one by one"], strict=True)
        figures[f"{kind}: together"] |= {
            "one by one over together": ratios[f"{kind}: one by one over together"],
            "forwards per new token": statistics.mean(
                one["forwards"] / one["new"] for one in found[f"{kind}: together"]
            ),
        }
        if kind != "eight prompts":  # there the draws come in another order
            same = [a["texts"] == b["texts"] for a, b in pair]
            figures[f"{kind}: together"]["same texts"] = sum(same) / len(same)
    return {"comparisons": comparisons, "figures": figures, **about}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, help="threads torch computes with")
    given = parser.parse_args()

    import torch

    import pertoken
    from pertoken.data import data
    from pertoken.prompts import encode_prompt
    from pertoken.reproduce._machine import machine, versions
    from pertoken.timing import alternate

    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        model, tokenizer = pertoken.load(given.model, dtype=given.dtype)
        rows = data("gsm8k")[1::2][: given.rounds * BATCH]
    except pertoken.PertokenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    texts = [str(row["question"]) for row in rows]
    prompts = [encode_prompt(tokenizer, model, text, given.new_tokens)[0] for text in texts]
    made = contenders(model, tokenizer, prompts, given.new_tokens)
    run = alternate(made, given.rounds)
    if not run.kept:
        print("all rounds were disturbed by other programs: nothing to show", file=sys.stderr)
        return 1
    written = report(
        {name: run.seconds(name) for name in made},
        {name: run.values(name) for name in made},
        settings={
            **{key: value for key, value in vars(given).items() if key != "out"},
            "trials": TRIALS,
            "batch": BATCH,
            "sampled": SAMPLED,
        },
        noise=run.noise(),
        machine=machine("cpu"),
        versions=versions(),
    )
    show_and_write(written, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
