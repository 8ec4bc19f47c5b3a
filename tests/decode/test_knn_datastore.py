"""The store on disk: whole or not there, exact, and only for what made it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pertoken.decode import KNNDatastore, _knn_build, _knn_search
from pertoken.decode._knn_build import Build, made_with
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, tiny_model

TEXTS = ["the cat sat on the mat and on the hat", "", "a dog", "x", "on and on and on"]
TOKENIZER = ByteTokenizer()
ENTRIES = sum(max(0, len(text) - 1) for text in TEXTS)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", vocab_size=258)


class Stopped(Exception):
    pass


def stop_at(window: int) -> Any:
    def tell(what: str, done: int, total: int) -> None:
        if done == window:
            raise Stopped

    return tell


def files(store: KNNDatastore) -> list[bytes]:
    return [(store.path / name).read_bytes() for name in ("keys.bin", "values.bin", "store.json")]


def test_a_killed_build_goes_on_and_is_the_same(model: Any, tmp_path: Path) -> None:
    whole = KNNDatastore.build(model, TOKENIZER, TEXTS, tmp_path / "whole", context=8)
    assert len(whole) == ENTRIES
    place = tmp_path / "store"
    for window in (2, 5):
        with pytest.raises(Stopped):
            KNNDatastore.build(model, TOKENIZER, TEXTS, place, context=8, progress=stop_at(window))
        with pytest.raises(PertokenError, match="its build did not end, run it again"):
            KNNDatastore(model, TOKENIZER, place)
    with (tmp_path / "store.part" / "keys.bin").open("ab") as file:
        file.write(b"half a ke")  # killed while it wrote
    seen: list[int] = []
    store = KNNDatastore.build(
        model, TOKENIZER, TEXTS, place, context=8, progress=lambda *at: seen.append(at[1])
    )
    assert min(seen) == 5
    assert files(store) == files(whole)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"whole", "store"}
    assert {path.name for path in place.iterdir()} == {"keys.bin", "values.bin", "store.json"}


@pytest.mark.parametrize("name", ["keys.bin", "values.bin"])
def test_what_is_shorter_than_was_noted_is_read_again(
    model: Any, tmp_path: Path, name: str
) -> None:
    whole = KNNDatastore.build(model, TOKENIZER, TEXTS, tmp_path / "whole", context=8)
    place = tmp_path / "store"
    with pytest.raises(Stopped):
        KNNDatastore.build(model, TOKENIZER, TEXTS, place, context=8, progress=stop_at(4))
    file = tmp_path / "store.part" / name
    file.write_bytes(file.read_bytes()[:-1])
    store = KNNDatastore.build(model, TOKENIZER, TEXTS, place, context=8)
    assert files(store) == files(whole)


@pytest.mark.slow
def test_a_killed_process_leaves_a_build_to_go_on_with(model: Any, tmp_path: Path) -> None:
    place = tmp_path / "store"
    killed = f"""
import os, signal
from pertoken.decode import KNNDatastore
from pertoken.testing import ByteTokenizer, tiny_model

def die(what, done, total):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

model = tiny_model("llama", vocab_size=258)
KNNDatastore.build(model, ByteTokenizer(), {TEXTS!r}, {str(place)!r}, context=8, progress=die)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -9
    seen: list[int] = []
    store = KNNDatastore.build(
        model, TOKENIZER, TEXTS, place, context=8, progress=lambda *at: seen.append(at[1])
    )
    assert min(seen) == 3
    assert files(store) == files(
        KNNDatastore.build(model, TOKENIZER, TEXTS, tmp_path / "whole", context=8)
    )


def test_another_build_starts_clean_and_the_same_one_is_opened(model: Any, tmp_path: Path) -> None:
    place = tmp_path / "store"
    with pytest.raises(Stopped):
        KNNDatastore.build(model, TOKENIZER, ["other text"], place, progress=stop_at(0))
    store = KNNDatastore.build(model, TOKENIZER, TEXTS, place)
    assert len(store) == ENTRIES
    before = files(store)

    def never(*_: object) -> None:
        raise AssertionError

    same = KNNDatastore.build(model, TOKENIZER, TEXTS, place, progress=never)
    assert files(same) == before
    for change, line in (
        ({"context": 16}, "another context"),
        ({"dtype": "float16"}, "another dtype of keys"),
    ):
        with pytest.raises(PertokenError, match=line):
            KNNDatastore.build(model, TOKENIZER, TEXTS, place, **change)
    with pytest.raises(PertokenError, match="a store of other texts: name another place"):
        KNNDatastore.build(model, TOKENIZER, TEXTS[:1], place)
    assert files(same) == before


def test_one_process_builds_at_a_time(model: Any, tmp_path: Path) -> None:
    place = tmp_path / "store"
    held = Build(place, {"hidden": 1, "dtype": "float32"})
    with held, pytest.raises(PertokenError, match="is being built by another process"):
        KNNDatastore.build(model, TOKENIZER, TEXTS, place)


def test_a_store_is_only_for_what_made_it(model: Any, tmp_path: Path) -> None:
    store = KNNDatastore.build(model, TOKENIZER, TEXTS, tmp_path / "store")
    other = tiny_model("llama", vocab_size=258, seed=1)
    with pytest.raises(PertokenError, match="made with LlamaForCausalLM, and this is another mod"):
        KNNDatastore(other, TOKENIZER, store.path)
    tokenizer = ByteTokenizer()
    tokenizer.backend_tokenizer.add_tokens(["cat"])
    with pytest.raises(PertokenError, match="this is another tokenizer"):
        KNNDatastore(model, tokenizer, store.path)
    tokenizer = ByteTokenizer()
    tokenizer.backend_tokenizer.enable_padding()
    assert made_with(model, tokenizer) == made_with(model, TOKENIZER)


def test_damage_is_named(model: Any, tmp_path: Path) -> None:
    store = KNNDatastore.build(model, TOKENIZER, TEXTS, tmp_path / "store")
    keys = store.path / "keys.bin"
    keys.write_bytes(keys.read_bytes()[:-8])
    with pytest.raises(PertokenError, match="is damaged: it does not hold the keys"):
        KNNDatastore(model, TOKENIZER, store.path)
    header = json.loads((store.path / "store.json").read_text())
    for name in ("fingerprint", "hidden", "documents"):
        less = {key: value for key, value in header.items() if key != name}
        (store.path / "store.json").write_text(json.dumps(less))
        with pytest.raises(PertokenError, match=f"is damaged: store.json has no {name}"):
            KNNDatastore(model, TOKENIZER, store.path)
    (store.path / "store.json").write_text(json.dumps(header | {"entries": "many"}))
    with pytest.raises(PertokenError, match="is damaged: it does not hold the keys"):
        KNNDatastore(model, TOKENIZER, store.path)
    (store.path / "store.json").write_text("{")
    with pytest.raises(PertokenError, match=r"is damaged: store.json can't be read"):
        KNNDatastore(model, TOKENIZER, store.path)
    (store.path / "store.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(PertokenError, match=r"^[^ ]*store has format 99, this reads 1"):
        KNNDatastore(model, TOKENIZER, store.path)
    with pytest.raises(PertokenError, match="nowhere is no KNN-LM store"):
        KNNDatastore(model, TOKENIZER, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("texts", "options", "line"),
    [
        ([], {}, "the corpus is empty: none of 0 texts has two tokens"),
        (["", "x"], {}, "none of 2 texts has two tokens"),
        (["ab", 7], {}, "text 2 of the corpus is int, not text"),
        (["ab", "a\ud800"], {}, "text 2 of the corpus is not UTF-8"),
        (["ab"], {"index": "flatt"}, "unknown index 'flatt'.*flat"),
        (["ab"], {"context": 1}, "context must be from 2 to the model's 512 positions, got 1"),
        (["ab"], {"dtype": "int8"}, "dtype of keys must be"),
        (["abc"], {"index": "ivfpq"}, "learns from 9,984 entries or more, and there are 2"),
    ],
)
def test_a_build_that_cannot_be(
    model: Any, tmp_path: Path, texts: Any, options: dict[str, Any], line: str
) -> None:
    if options.get("index") == "ivfpq":
        pytest.importorskip("faiss")
    with pytest.raises(PertokenError, match=line):
        KNNDatastore.build(model, TOKENIZER, texts, tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


def test_an_index_that_cannot_be_is_refused_before_the_corpus_is_read(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    place, options = tmp_path / "store", {"index": "ivfpq", "progress": never}
    if importlib.util.find_spec("faiss"):
        with pytest.raises(PertokenError, match=f'there are {ENTRIES}; take index="flat"'):
            KNNDatastore.build(model, TOKENIZER, TEXTS, place, **options)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(PertokenError, match=r'pip install "pertoken\[knn\]"'):
        KNNDatastore.build(model, TOKENIZER, TEXTS, place, **options)
    assert list(tmp_path.iterdir()) == []


def test_another_index_goes_on_with_what_was_read(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_knn_build, "check_inverted", lambda _: None)
    place, options = tmp_path / "store", {"context": 8}
    with pytest.raises(Stopped):
        KNNDatastore.build(
            model, TOKENIZER, TEXTS, place, index="ivfpq", progress=stop_at(4), **options
        )
    (tmp_path / "store.part" / "index.faiss").write_bytes(b"half an ind")
    seen: list[int] = []
    store = KNNDatastore.build(
        model, TOKENIZER, TEXTS, place, progress=lambda *at: seen.append(at[1]), **options
    )
    assert min(seen) == 4
    assert files(store) == files(
        KNNDatastore.build(model, TOKENIZER, TEXTS, tmp_path / "o", **options)
    )
    assert not (place / "index.faiss").exists()


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    small = tiny_model("llama", vocab_size=64)
    with pytest.raises(PertokenError, match="do not belong together"):
        KNNDatastore.build(small, TOKENIZER, TEXTS, tmp_path / "store")


def test_keys_in_half_precision_are_near(model: Any, tmp_path: Path) -> None:
    exact = KNNDatastore.build(model, TOKENIZER, TEXTS, tmp_path / "a")
    half = KNNDatastore.build(model, TOKENIZER, TEXTS, tmp_path / "b", dtype="float16")
    assert half.keys.nbytes * 4 == exact.keys.nbytes
    assert np.allclose(half.keys, exact.keys, atol=0.01)
    queries = torch.from_numpy(exact.keys[3:6])
    assert half.search(queries, 1).entries[:, 0].tolist() == [3, 4, 5]


@pytest.mark.parametrize("spared", [[], [(0, 30), (60, 65)]])
def test_search_over_many_blocks_is_the_definition(
    spared: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_knn_search, "ROWS", 16)
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(77, 6, dtype=torch.float64, generator=draw)
    queries = torch.randn(5, 6, dtype=torch.float64, generator=draw)
    distances = (queries[:, None] - keys).square().sum(-1)
    for first, stop in spared:
        distances[:, first:stop] = torch.inf
    expected = distances.argsort(dim=1)[:, :40]
    norms = _knn_search.squared_norms(keys.numpy())
    found = _knn_search.search_all(queries, keys.numpy(), norms, 40, spared)
    assert torch.equal(found, expected)
    exact = _knn_search.exact_distances(queries, keys.numpy(), found)
    assert torch.allclose(exact, distances.gather(1, expected))


def test_an_inverted_file_finds_most_of_it_and_spares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(_knn_search, "FEWEST", 600)
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(12, 8)) * 6
    keys = (centres[draw.integers(0, 12, 600)] + draw.normal(size=(600, 8))).astype(np.float32)
    _knn_search.write_inverted(tmp_path / "index", keys)
    index = _knn_search.open_inverted(tmp_path / "index")
    with pytest.raises(PertokenError, match="is damaged: gone can't be read"):
        _knn_search.open_inverted(tmp_path / "gone")
    (tmp_path / "half").write_bytes((tmp_path / "index").read_bytes()[:99])
    with pytest.raises(PertokenError, match="is damaged: half can't be read"):
        _knn_search.open_inverted(tmp_path / "half")
    queries = torch.from_numpy(keys[::60])
    exact = _knn_search.search_all(queries, keys, _knn_search.squared_norms(keys), 8)
    near = _knn_search.search_inverted(queries, index, 8)
    common = [len({*a} & {*b}) for a, b in zip(exact.tolist(), near.tolist(), strict=True)]
    assert sum(common) >= 0.8 * exact.numel()
    spared = _knn_search.search_inverted(queries, index, 600, [(0, 100), (300, 590)])
    left = spared[spared >= 0]
    assert bool((((left >= 100) & (left < 300)) | (left >= 590)).all())
    distances = _knn_search.exact_distances(queries, keys, spared)
    assert bool(distances[spared < 0].isinf().all())  # and such a neighbour has no vote


def test_without_faiss_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(PertokenError, match=r'pip install "pertoken\[knn\]"'):
        _knn_search.write_inverted(tmp_path / "index", np.zeros((2, 2), np.float32))
