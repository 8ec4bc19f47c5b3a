"""Every reproduction file declares its bars and runs, on a tiny model without a download."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from pertoken.reproduce import _harness as harness
from pertoken.reproduce import read_report
from pertoken.reproduce._bars import freeze

SLUGS = harness.available()


def test_reproductions_are_files_of_catalogued_papers() -> None:
    assert set(SLUGS) <= set(harness._catalogued())


@pytest.mark.parametrize("slug", SLUGS)
def test_smoke_run_touches_every_declared_row(
    slug: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_download(*_: object, **__: object) -> None:
        pytest.fail("a smoke run must not load a real model or data set")

    monkeypatch.setattr(import_module("pertoken.loading"), "load", no_download)
    monkeypatch.setattr(import_module("pertoken.data"), "data", no_download)
    monkeypatch.chdir(tmp_path)
    report = harness.reproduce(slug, smoke=True)
    assert not report.faults
    assert [row.metric for row in report.figures if row.bar]
    assert not any(row.holds for row in report.figures)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("slug", SLUGS)
def test_its_report_is_of_its_declared_bars(slug: str) -> None:
    path = harness.reports_folder() / f"{slug}.json"
    if not path.exists():
        pytest.skip(f"{slug} has no report yet")
    _, module = harness.find(slug)
    bars = freeze(module.BARS, slug)
    assert len(bars) >= 3
    report = read_report(path)
    assert not report.smoke
    assert {row.metric: row.bar for row in report.figures if row.bar} == {
        metric: bar.text for metric, bar in bars.items()
    }
    for row in report.figures:
        if row.bar:
            assert row.holds == bars[row.metric].holds(row.here)
            assert row.holds or row.why
