"""Bars come from the declaration alone, reports are honest and whole, refusals come first."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pertoken
from pertoken.errors import PertokenError
from pertoken.reproduce import Context, Report, Reproduction, Row, read_report
from pertoken.reproduce import _harness as harness
from pertoken.reproduce._report import REPORT_KEYS, ROW_KEYS, write_json
from pertoken.reproduce._table import notes


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path / "home"))


def fake(*rows: Row, bars: dict[str, str], **names: Any) -> SimpleNamespace:
    def run(context: Context) -> Reproduction:
        return context.reproduction(rows, prompts=3)

    return SimpleNamespace(**{"BARS": bars, "run": run, **names})


def go(module: Any, out: Path, **options: Any) -> Report:
    return harness.run_module(module, "fake", out=out, **options)


def test_report_follows_the_schema(tmp_path: Path) -> None:
    row = Row(
        "speed-up", 1.5, unit="x", paper=2.0, paper_setting="7B", interval=(1.4, 1.6), baseline=20
    )
    report = go(fake(row, Row("note", 3), bars={"speed-up": ">= 1.2"}, VERSION=4), tmp_path, seed=7)
    assert report.path == tmp_path / "fake.json"
    written = json.loads(report.path.read_text())
    assert tuple(written) == REPORT_KEYS
    assert all(tuple(row) == ROW_KEYS for row in written["rows"])
    assert written["rows"][0] == {
        "metric": "speed-up",
        "unit": "x",
        "paper": 2.0,
        "paper_setting": "7B",
        "here": 1.5,
        "interval": [1.4, 1.6],
        "baseline": 20,
        "bar": ">= 1.2",
        "holds": True,
        "why": "",
        "caveat": "",
    }
    assert written["rows"][1]["bar"] == ""
    assert written["rows"][1]["holds"] is None
    assert (written["version"], written["seed"], written["model"]) == (4, 7, "smollm2")
    assert written["settings"]["prompts"] == 3
    assert {"pertoken", "torch", "transformers", "tokenizers", "python"} <= set(written["versions"])
    assert {"cpu", "cores", "threads", "memory_gib", "device"} <= set(written["machine"])
    assert not report.faults
    assert read_report(report.path).to_dict() == written


def test_report_does_not_name_the_host(tmp_path: Path) -> None:
    report = go(fake(bars={}), tmp_path)
    if len(platform.node()) > 3:
        assert platform.node() not in json.dumps(report.to_dict()["machine"])


def test_bars_are_frozen_before_the_run(tmp_path: Path) -> None:
    bars = {"speed-up": ">= 2"}

    def run(context: Context) -> Reproduction:
        bars["speed-up"] = ">= 1"  # a run must not be able to lower its own bar
        return context.reproduction([Row("speed-up", 1.5, why="slow here")])

    report = go(SimpleNamespace(BARS=bars, run=run), tmp_path)
    assert (report.figures[0].bar, report.figures[0].holds) == (">= 2", False)


def test_a_row_cannot_bring_its_own_bar() -> None:
    with pytest.raises(TypeError):
        Row("speed-up", 1.5, bar=">= 1")  # type: ignore[call-arg]


def test_a_failing_bar_without_a_reason_is_written_and_is_a_fault(tmp_path: Path) -> None:
    report = go(fake(Row("speed-up", 1.0), bars={"speed-up": ">= 2"}), tmp_path)
    assert report.faults == ["'speed-up' does not hold and no reason is given"]
    assert report.path is not None
    assert json.loads(report.path.read_text())["rows"][0]["why"] == ""


def test_a_failing_bar_with_a_declared_reason_is_no_fault(tmp_path: Path) -> None:
    module = fake(Row("speed-up", 1), bars={"speed-up": ">= 2"}, REASONS={"speed-up": "two cores"})
    report = go(module, tmp_path)
    assert not report.faults
    assert report.figures[0].why == "two cores"


def test_the_reason_of_a_bar_that_holds_is_not_shown(tmp_path: Path) -> None:
    module = fake(Row("speed-up", 3), bars={"speed-up": ">= 2"}, REASONS={"speed-up": "two cores"})
    assert go(module, tmp_path).figures[0].why == ""


def test_a_reason_without_a_bar_is_refused_before_the_run(tmp_path: Path) -> None:
    module = fake(bars={"speed-up": ">= 2"}, REASONS={"speedup": "two cores"})
    with pytest.raises(PertokenError, match=r"'speedup', which has no bar \(did you mean"):
        go(module, tmp_path)


def test_a_declared_bar_without_a_row_fails_and_keeps_what_was_measured(tmp_path: Path) -> None:
    report = go(fake(Row("other", 1), bars={"speed-up": ">= 2"}), tmp_path)
    assert report.faults[0] == "BARS declares 'speed-up' but no such row was returned"
    assert [(row.metric, row.holds) for row in report.figures] == [
        ("other", None),
        ("speed-up", False),
    ]
    assert report.path is not None
    assert json.loads(report.path.read_text())["rows"][1]["here"] is None


def test_two_rows_of_one_name_are_a_fault(tmp_path: Path) -> None:
    report = go(fake(Row("a", 1), Row("a", 3), bars={"a": ">= 0"}), tmp_path)
    assert report.faults == ["two rows are named 'a'"]


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_figures_that_are_not_finite_fail_and_are_written_as_null(
    tmp_path: Path, figure: float
) -> None:
    row = Row("speed-up", figure, interval=(figure, figure), why="not measured")
    report = go(fake(row, bars={"speed-up": ">= 0"}), tmp_path)
    assert report.path is not None
    written = json.loads(report.path.read_text(), parse_constant=pytest.fail)["rows"][0]
    assert (written["here"], written["holds"], written["interval"]) == (None, False, [None, None])


@pytest.mark.parametrize("here", ["1.5 x", None, [1, 2]])
def test_here_must_be_a_number(here: Any) -> None:
    with pytest.raises(PertokenError, match="'speed-up'"):
        Row("speed-up", here)


def test_a_smoke_run_judges_nothing_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "reports_folder", lambda: tmp_path / "reports")
    module = fake(Row("speed-up", 1), bars={"speed-up": ">= 2"})
    report = harness.run_module(module, "fake", smoke=True)
    assert (report.figures[0].bar, report.figures[0].holds) == (">= 2", None)
    assert report.path is None
    assert not report.faults
    assert report.model == "tiny"
    assert list(tmp_path.rglob("*.json*")) == []


def test_a_smoke_run_never_replaces_a_real_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "reports_folder", lambda: tmp_path)
    module = fake(bars={})
    with pytest.raises(PertokenError, match="smoke run never"):
        go(module, tmp_path / "x" / "..", smoke=True)
    assert go(module, tmp_path / "elsewhere", smoke=True).path is not None


def test_a_smoke_run_loads_a_tiny_model_that_reads_bytes(tmp_path: Path) -> None:
    context = Context(slug="fake", version=1, smoke=True)
    model, tokenizer = context.load()
    ids = tokenizer("ab", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape[-1] == model.config.vocab_size
    assert context.load()[0] is model
    assert context.data("spec-bench", smoke_rows=[{"turns": ["hi"]}]) == [{"turns": ["hi"]}]


def test_the_dtype_of_a_report_is_the_loaded_models(tmp_path: Path) -> None:
    def run(context: Context) -> Reproduction:
        context.load()
        return context.reproduction([])

    report = go(SimpleNamespace(BARS={}, run=run, DTYPE="float64"), tmp_path, smoke=True)
    assert report.settings["dtype"] == "float64"


def test_a_missing_data_path_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(PertokenError, match="no data at nowhere"):
        go(fake(bars={}), tmp_path, data="nowhere")


def test_out_that_is_a_file_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PertokenError, match="is a file; name a folder"):
        go(fake(bars={}), tmp_path / "file")


def test_run_must_return_a_reproduction(tmp_path: Path) -> None:
    with pytest.raises(PertokenError, match="must return"):
        go(SimpleNamespace(BARS={}, run=lambda context: []), tmp_path)


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "goose.json"
    write_json({"a": 1}, path)

    def interrupted(self: Path, text: str, **_: Any) -> None:
        self.write_bytes(text[:3].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json({"a": 2}, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["goose.json"]
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not JSON"), ("[]", "schema"), ('{"slug": "goose"}', "schema")],
)
def test_a_damaged_report_is_refused_with_its_path(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "goose.json").write_text(text)
    with pytest.raises(PertokenError, match=rf"goose\.json.*{message}"):
        read_report(tmp_path / "goose.json")


def test_reasons_are_brought_into_a_report_without_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fake(Row("speed-up", 1), Row("b", 1), bars={"speed-up": ">= 2", "b": ">= 1"})
    before = go(module, tmp_path).to_dict()
    module.REASONS = {"speed-up": "two cores", "b": "never shown"}
    module.run = pytest.fail
    monkeypatch.setattr(harness, "find", lambda slug: (slug, module))
    report = harness.refresh_reasons("fake", tmp_path)
    assert not report.faults
    before["rows"][0]["why"] = "two cores"
    module.CAVEATS = {"speed-up": "never shown", "b": "by construction"}
    harness.refresh_reasons("fake", tmp_path)
    before["rows"][1]["caveat"] = "by construction"
    assert json.loads((tmp_path / "fake.json").read_text()) == before
    module.VERSION = 2
    with pytest.raises(PertokenError, match="report is of version 1, its reasons are of version 2"):
        harness.refresh_reasons("fake", tmp_path)
    module.BARS = {"speed-up": ">= 1", "b": ">= 1"}
    with pytest.raises(PertokenError, match="bars of fake changed"):
        harness.refresh_reasons("fake", tmp_path)


def test_a_caveat_is_told_with_a_bar_that_holds(tmp_path: Path) -> None:
    module = fake(Row("a", 1), Row("b", 1), bars={"a": ">= 2", "b": ">= 1"})
    module.REASONS, module.CAVEATS = {"a": "small"}, {"a": "never shown", "b": "by construction"}
    report = go(module, tmp_path)
    assert [row.caveat for row in report.figures] == ["", "by construction"]
    assert "b: holds, but by construction" in notes(report)
    assert read_report(tmp_path / "fake.json").figures[1].caveat == "by construction"
    module.CAVEATS = {"c": "no bar"}
    with pytest.raises(PertokenError, match="CAVEATS of fake names 'c', which has no bar"):
        go(module, tmp_path)


def test_an_interrupted_sweep_resumes_behind_its_finished_units(tmp_path: Path) -> None:
    measured: list[int] = []
    stopped: list[bool] = []

    def measure(unit: int) -> dict[str, Any]:
        measured.append(unit)
        return {"accepted": (unit, unit + 1)}

    def run(context: Context) -> Reproduction:
        seen = []
        for unit in range(3):
            if unit == 2 and not stopped:
                stopped.append(True)
                raise KeyboardInterrupt
            seen.append(context.remember(["goose", unit], lambda unit=unit: measure(unit)))
        assert seen == [{"accepted": [unit, unit + 1]} for unit in range(3)]
        return context.reproduction([])

    module = SimpleNamespace(BARS={}, run=run)
    with pytest.raises(KeyboardInterrupt):
        go(module, tmp_path)
    assert not (tmp_path / "fake.json").exists()
    go(module, tmp_path, resume=True)
    assert measured == [0, 1, 2]
    assert list((tmp_path / "home").rglob("*.jsonl")) == []
    assert read_report(tmp_path / "fake.json").settings["resumed_units"] == 2


def test_a_resumed_sweep_takes_no_unit_of_other_settings(tmp_path: Path) -> None:
    measured: list[int] = []

    def run(context: Context) -> Reproduction:
        context.remember("unit", lambda: measured.append(context.seed))
        raise KeyboardInterrupt

    module = SimpleNamespace(BARS={}, run=run)
    for seed, resume in [(0, False), (1, True), (0, True), (0, False)]:
        with pytest.raises(KeyboardInterrupt):
            go(module, tmp_path, seed=seed, resume=resume)
    assert measured == [0, 1, 0]  # the third run finds its unit, the fourth starts anew


def test_pertoken_reproduce_can_be_called_whatever_was_imported_first() -> None:
    assert callable(pertoken.reproduce)
    with pytest.raises(PertokenError, match="no reproduction named"):
        pertoken.reproduce("no-such-paper")
