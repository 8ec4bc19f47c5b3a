"""The bench of a style's cost: the median step and the slowest training are judged."""

from __future__ import annotations

import pytest

bench = pytest.importorskip("style_overhead")


def test_the_median_step_and_the_slowest_run_are_judged() -> None:
    written = bench.report([0.01, 0.5, 0.02], [10.0, 40.0], settings={"runs": 2})
    step, training = written["comparisons"]
    assert (step["here"], step["holds"]) == (0.02, True)
    assert (training["here"], training["holds"]) == (40.0, False)
    assert written["settings"] == {"runs": 2}
