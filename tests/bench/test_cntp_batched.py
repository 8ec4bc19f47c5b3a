"""The bench of batched trials: both ways write the same, and rounds are compared as pairs."""

from __future__ import annotations

import pytest

from pertoken.testing import ByteTokenizer, tiny_model
from pertoken.testing.setups import random_prompts

bench = pytest.importorskip("cntp_batched")


def test_both_ways_do_the_same_work_and_ratios_are_of_pairs() -> None:
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=tokenizer.vocab_size)
    made = bench.contenders(model, tokenizer, random_prompts(258, (5, 8)), 3)
    kinds = ("one prompt", "equal trials")
    found = {name: [turn(1)] for name, turn in made.items() if name.startswith(kinds)}
    for kind in kinds:
        pair = found[f"{kind}: together"][0], found[f"{kind}: one by one"][0]
        assert pair[0]["texts"] == pair[1]["texts"]
        assert pair[0]["new"] == 3
    found |= {
        f"eight prompts: {name}": [{"new": 24, "forwards": 6, "texts": []}] * 2
        for name in ("together", "one by one")
    }
    rounds = {name: [values[0]] * 2 for name, values in found.items()}
    seconds = {name: [1.0, 10.0] if "together" in name else [4.0, 40.0] for name in rounds}
    written = bench.report(seconds, rounds, settings={"rounds": 2})
    assert [(row["here"], row["holds"]) for row in written["comparisons"]] == [(4.0, True)] * 2
    assert written["figures"]["one prompt: together"]["same texts"] == 1.0
    assert written["figures"]["eight prompts: together"]["forwards per new token"] == 0.25
    assert written["settings"] == {"rounds": 2}
