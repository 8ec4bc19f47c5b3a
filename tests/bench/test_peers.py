"""What every bench beside a peer says where that peer is not installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
PEERS = {
    "awrs_peer": "genlm",
    "bytes_peer": "genlm",
    "inseq_peer": "inseq",
    "kvpress_peer": "kvpress",
    "mergekit_peer": "mergekit",
}
if not BENCH.is_dir():
    pytest.skip("the benches are not in this copy", allow_module_level=True)


@pytest.mark.parametrize(("bench", "peer"), PEERS.items())
def test_without_the_peer_it_says_so_in_one_line(bench: str, peer: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(peer) is not None:
        pytest.skip("the peer is installed")
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, str(BENCH / f"{bench}.py"), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "not installed" in done.stderr
    assert not out.exists()
