"""The doctor says what is here and what is missing, in data, in full and in short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pertoken import doctor
from pertoken._fetch import keep


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def make(work: Path) -> dict[str, Any]:
    (work / "model.safetensors").write_bytes(b"0" * 2_000_000)
    return {
        "name": "tiny",
        "licence": "Apache-2.0",
        "source": "PyPI tiny 1",
        "weights": "float32, de-quantised from Q4_1",
    }


def test_an_empty_machine(home: Path) -> None:
    facts = doctor.diagnose(speed=False)
    assert facts["models"] == facts["data"] == []
    assert facts["free_gb"] > 0
    assert not home.exists()  # looking leaves no trace
    json.dumps(facts)
    assert any("none yet" in line for line in doctor.long_lines(facts))
    assert 2 <= len(doctor.short_lines(facts)) <= 6


def test_kept_models_with_origin_and_licence(home: Path) -> None:
    keep(home / "models" / "tiny-1", make)
    (home / "models" / "half").mkdir()  # not whole: not listed
    (entry,) = doctor.kept("models")
    assert (entry["name"], entry["megabytes"], entry["licence"]) == ("tiny", 2.0, "Apache-2.0")
    facts = doctor.diagnose(speed=False)
    text = "\n".join(doctor.long_lines(facts))
    assert "tiny, 2 MB, from PyPI tiny 1, licence: Apache-2.0" in text
    assert "de-quantised from Q4_1" in text
    assert any("about 4 bits" in line for line in doctor.short_lines(facts))


def test_missing_extras_are_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    lines = doctor.long_lines(doctor.diagnose(speed=False))
    missing = [line for line in lines if line.startswith("missing")]
    assert len(missing) == 4
    assert any("pip install accelerate" in line for line in missing)
    assert any("npm" in line for line in missing)


def test_speeds_are_plausible(home: Path) -> None:
    speeds = doctor.dtype_speeds()
    assert set(speeds) == {"float32", "bfloat16"}
    for speed in speeds.values():
        assert speed["gflops"] > 0
        assert 0.01 < speed["gb_per_s"] < 20_000
