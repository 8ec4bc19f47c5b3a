"""The mergekit bench: the peer's model is made once where its folder is kept, and never half."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench"
if not BENCH.is_dir():
    pytest.skip("the benches are not in this copy", allow_module_level=True)

TOOL = """#!/bin/sh
mkdir -p "$3" && echo "$4 $5 $8 $9" >> "$3/../runs" && echo made > "$3/model"
"""
BROKEN = """#!/bin/sh
mkdir -p "$3" && echo half > "$3/half" && echo no memory >&2 && exit 1
"""


def _peer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_mergekit", BENCH / "mergekit_peer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _tool(folder: Path, text: str) -> str:
    path = folder / "tool"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_kept_folder_is_used_again_with_its_seconds(tmp_path: Path) -> None:
    peer, out = _peer(), tmp_path / "kept" / "omp"
    first = peer.by_omp(_tool(tmp_path, TOOL), tmp_path, tmp_path, out, 64, batch=32)
    again = peer.by_omp(_tool(tmp_path, TOOL), tmp_path, tmp_path, out, 64)
    assert again == first > 0
    assert (tmp_path / "kept" / "runs").read_text(encoding="utf-8") == "-k 64 --batch-size 32\n"
    assert (out / "model").is_file()


def test_what_a_failed_run_left_is_no_model(tmp_path: Path) -> None:
    peer, out = _peer(), tmp_path / "omp"
    with pytest.raises(RuntimeError, match="no memory"):
        peer.by_omp(_tool(tmp_path, BROKEN), tmp_path, tmp_path, out, 64)
    peer.by_omp(_tool(tmp_path, TOOL), tmp_path, tmp_path, out, 64)
    assert not (out / "half").exists()


@pytest.mark.parametrize("option", ["--batch-size", "--texts", "-k"])
def test_nothing_to_do_is_said_before_anything_runs(
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    peer = _peer()
    monkeypatch.setattr(peer, "measure", lambda *_: pytest.fail("it ran"))
    words = ["bench", "--program", _tool(tmp_path, TOOL), "--out", str(tmp_path / "out"), option]
    monkeypatch.setattr("sys.argv", [*words, "0"])
    assert peer.main() == 2
    assert capsys.readouterr().err.endswith("must be 1 or more, got 0\n")


def test_a_folder_that_cannot_be_made_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peer, kept, out = _peer(), tmp_path / "kept", tmp_path / "out.json"
    kept.write_text("a file", encoding="utf-8")
    monkeypatch.setattr(peer, "measure", lambda *_: pytest.fail("it ran"))
    words = ["bench", "--program", _tool(tmp_path, TOOL), "--keep", str(kept), "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    assert peer.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(kept) in error
    assert not out.exists()
