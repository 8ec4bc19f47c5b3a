"""The FiberPO bench: its contenders run, its memory is counted, its ratios are paired."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
bench = pytest.importorskip("fiberpo_loss")


def test_every_contender_runs_and_holds_memory() -> None:
    made = bench.contenders(4, 4096, 0)
    assert set(made) == {"bare ppo", "ppo", "fiberpo", "fiberpo censor"}
    for call in made.values():
        # The gradient alone is a tensor of the batch.
        assert bench.peak_bytes(call) >= 4 * 4096 * 4


def test_ratios_are_medians_over_paired_rounds() -> None:
    seconds = {"ppo": [1.0, 10.0, 2.0], "fiberpo": [1.0, 11.0, 1.0], "bare ppo": [1.0, 1.0, 1.0]}
    memory = {"ppo": 100, "fiberpo": 120, "bare ppo": 50}
    written = bench.report(seconds, memory, settings={})
    by_name = {row["metric"]: row for row in written["comparisons"]}
    assert by_name["time: fiberpo over ppo"]["here"] == 1.0
    assert by_name["time: fiberpo over ppo"]["holds"]
    assert by_name["memory: fiberpo over ppo"]["here"] == pytest.approx(1.2)
    assert not by_name["memory: fiberpo over ppo"]["holds"]
