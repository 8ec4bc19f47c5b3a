"""The throughput bench: all contenders count the same, its ratios are paired and the right way."""

from __future__ import annotations

import pytest

from pertoken.tokenize import train_tokenizer

bench = pytest.importorskip("audit_throughput")
TEXTS = {
    "eng": ["all are free\nand equal", "e\u0301 and é"],
    "deu": ["alle sind frei", "und gleich"],
}


def test_contenders_count_the_same_tokens() -> None:
    made = bench.contenders(train_tokenizer(TEXTS["eng"] * 3, 270), TEXTS)
    assert set(made) == {"raw", "raw fast", "counts", "premiums"}
    assert len({call() for call in made.values()}) == 1


def test_less_time_is_more_throughput_in_the_median_of_paired_rounds() -> None:
    seconds = {
        "raw": [1.0, 10.0, 2.0],
        "raw fast": [0.5, 5.0, 1.0],
        "counts": [1.0, 8.0, 2.5],
        "premiums": [2.0, 20.0, 2.0],
    }
    written = bench.report(seconds, 4_000_000, settings={})
    by_name = {row["metric"]: row for row in written["comparisons"]}
    assert by_name["throughput: counts over raw"]["here"] == 1.0
    assert by_name["throughput: counts over raw"]["holds"]
    assert by_name["throughput: premiums over raw"]["here"] == 0.5
    assert not by_name["throughput: premiums over raw"]["holds"]
    assert written["figures"]["raw fast"] == {"MB per second": 4.0, "throughput over raw": 2.0}
