"""The bench of a look-up's seconds: filled keys, the bar, and a look-up that is a whole one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pertoken.decode import KNNDatastore
from pertoken.reproduce._knn_lookup import fill, lookup_times
from pertoken.testing import ByteTokenizer, tiny_model

bench = pytest.importorskip("knn_lookup")


def test_the_look_up_of_the_inverted_file_is_judged() -> None:
    rows = [
        {"index": "ivfpq", "lookup": 0.3, "step": 1.0},
        {"index": "flat", "lookup": 2, "step": 1},
    ]
    written = bench.report(rows)
    (inverted,) = written["comparisons"]
    assert inverted["here"] == pytest.approx(0.3)
    assert not inverted["holds"]
    assert written["figures"]["flat"]["share"] == 2


def test_keys_are_filled_up_without_a_double(tmp_path: Path) -> None:
    real = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    fill(tmp_path / "keys", real, 70)
    keys = np.fromfile(tmp_path / "keys", np.float32).reshape(70, 4)
    assert (keys[:20] == real).all()
    assert len(np.unique(keys, axis=0)) == 70


def test_a_timed_look_up_leaves_the_store_as_it_is(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=258)
    store = KNNDatastore.build(model, ByteTokenizer(), ["a cat and a dog"], tmp_path / "store")
    found = lookup_times(store, 90, index="flat", turns=2)
    assert len(found["lookups"]) == len(found["steps"]) == 2
    assert min(found["lookups"]) > 0 < found["step"]
    assert len(store) == 14
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["store"]
