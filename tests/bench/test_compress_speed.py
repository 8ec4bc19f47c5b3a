"""The bench of salience: the median of each figure is judged by its own bar."""

from __future__ import annotations

import pytest

bench = pytest.importorskip("compress_speed")


def test_each_figure_has_its_own_bar() -> None:
    rates = {"globenc": [1000.0, 3000.0, 2500.0], "decompx": [1.0], "self-information": [2.0]}
    costs = {"minilm": [0.5, 0.7, 0.9], "smollm2": [1.5, 1.0, 2.0]}
    written = bench.report(rates, costs, settings={"rounds": 3})
    assert [row["here"] for row in written["comparisons"]] == [2500.0, 0.7, 1.5]
    assert [row["holds"] for row in written["comparisons"]] == [True, True, False]
    assert written["figures"]["decompx: tokens per second"]["median"] == 1.0
    assert written["settings"] == {"rounds": 3}
