"""The bench of selecting: runs beside other load are left out; with all of them gone it ends."""

from __future__ import annotations

import pytest

from pertoken.reproduce._pool_speed import Run

bench = pytest.importorskip("select_speed")


def test_quiet_runs_alone_are_judged() -> None:
    large = [Run(10.0, 200.0, 0.01), Run(60.0, 210.0, 0.5), Run(8.0, 205.0, 0.02)]
    written = bench.report({60: [Run(3.0, 200.0, 0.9)] * 3, 240: large})
    speed, memory = written["comparisons"]
    assert (speed["here"], speed["holds"]) == (27.0, True)
    assert (memory["here"], memory["holds"]) == (1.05, True)
    assert written["figures"]["runs"] == {"quiet": 2, "dropped": 1}


def test_without_a_quiet_run_there_is_no_figure() -> None:
    with pytest.raises(SystemExit, match="no run was quiet"):
        bench.report({60: [Run(3.0, 200.0, 0.9)], 240: [Run(10.0, 200.0, 0.9)]})
