"""The bench of a transplant's seconds: its slowest run is judged."""

from __future__ import annotations

import pytest

bench = pytest.importorskip("transplant_time")


def test_the_slowest_run_is_judged() -> None:
    (row,) = bench.report([10.0, 200.0, 20.0])["comparisons"]
    assert row["here"] == 200.0
    assert not row["holds"]
    written = bench.report([10.0, 20.0], settings={"runs": 2})
    assert written["comparisons"][0]["holds"]
    assert written["figures"]["tokenadapt"]["median"] == 15.0
    assert written["settings"] == {"runs": 2}
