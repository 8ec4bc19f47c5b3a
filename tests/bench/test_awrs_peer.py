"""The AWRS bench: pools, their distance, and what it says without the peer."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
peer = pytest.importorskip("awrs_peer")


def runs(shares: dict[str, float], count: int, seed: int) -> list[Any]:
    """Runs of few particles each on one language."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        texts = draw.choices(list(shares), list(shares.values()), k=5)
        posterior = {text: texts.count(text) / 5 for text in set(texts)}
        found.append(peer.Run(posterior, draw.choice([0.0, 0.1, 0.3]), 7))
    return found


def test_a_pool_weighs_runs_by_their_marginal_and_skips_the_dead() -> None:
    found = peer.pooled([peer.Run({"a": 0.5, "b": 0.5}, 0.2, 0), peer.Run({}, 0.0, 0)])
    assert found == {"a": 0.5, "b": 0.5}
    assert peer.distance([peer.Run({}, 0.0, 0)], [peer.Run({"a": 1.0}, 0.2, 0)]) == 1.0


def test_the_permutation_tells_equal_from_different() -> None:
    one, same = runs({"a": 0.6, "b": 0.4}, 16, 1), runs({"a": 0.6, "b": 0.4}, 16, 2)
    other = runs({"a": 0.1, "b": 0.9}, 16, 3)
    assert peer.permutation(one, same, draws=300) > 0.05
    assert peer.permutation(one, other, draws=300) < 0.02


def test_the_report_judges_speed_and_agreement() -> None:
    speed = {
        "ours": [{"seconds": 1.0, "checks": 10.0}] * 3,
        "genlm-control": [{"seconds": 1.5, "checks": 20.0}] * 3,
    }
    same = runs({"a": 0.5, "b": 0.5}, 8, 4)
    written = peer.report(speed, {"where": {"ours": same, "genlm-control": same}}, {})
    rows = {row["metric"]: row for row in written["ratios"]}
    assert rows.keys() >= peer.BARS.keys()
    fast = rows["speed: seconds of genlm-control over ours"]
    assert (fast["here"], fast["bar"], fast["holds"]) == (1.5, ">= 1", True)
    assert rows["constraint checks of genlm-control over ours"]["here"] == 2.0
    assert rows["posterior: permutation p, smallest of all languages"]["holds"]
    assert written["languages"][0]["total_variation"] == 0.0
    json.dumps(written, allow_nan=False)
    nothing = {"ours": [], "genlm-control": []}
    written = peer.report(nothing, {"where": {"ours": same, "genlm-control": same}}, {})
    assert written["ratios"][0]["here"] is None
    assert not written["ratios"][0]["holds"]
    json.dumps(written, allow_nan=False)


def test_ours_counts_its_questions_and_survives_death() -> None:
    from pertoken.decode.constraint import RegexConstraint
    from pertoken.testing import ByteTokenizer, tiny_model

    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=tokenizer.vocab_size)
    constraint = peer.Counted(RegexConstraint("[a-z]{2}", tokenizer=tokenizer))
    ids = torch.tensor([tokenizer.encode("hm ")])
    run = peer.ours(model, tokenizer, constraint, ids, 99, 2, 0)
    assert run.checks == constraint.checks > 0
    assert sum(run.posterior.values()) == pytest.approx(1.0)
    assert all(len(text) == 2 for text in run.posterior)
    assert peer.ours(model, tokenizer, constraint, ids, 4, 1, 0) == peer.Run(
        {}, 0.0, constraint.checks - run.checks
    )
