"""Archives that are damaged, cut short, or read where their law does not come out the same."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pertoken.cache import _ids as ids_module
from pertoken.cache import inspect_cache, restore_cache, save_cache
from pertoken.cache._coder import Law
from pertoken.cache._format import LEVELS
from pertoken.cache._trials import damage_trials, same_rows
from pertoken.cache.archive import prefill
from pertoken.errors import PertokenError
from pertoken.testing import tiny_model

VOCAB = 64


def text(length: int, seed: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(1, VOCAB, (length,), generator=draw).tolist()
    return ids


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("architecture", "count"), [("llama", 200), ("qwen3-sliding", 50)])
def test_damage_is_named_or_harmless(
    tmp_path: Path, level: str, architecture: str, count: int
) -> None:
    model = tiny_model(architecture, dtype=torch.float32)
    save_cache(tmp_path / "a", model, text(14), level=level, chunk=4)
    found = damage_trials(model, tmp_path / "a", count, seed=1)
    assert found.wrong == []
    assert found.named == count


@pytest.mark.parametrize("level", ["raw", "tokens"])
def test_every_place_a_file_can_be_cut_is_named(tmp_path: Path, level: str) -> None:
    model = tiny_model("llama", dtype=torch.float32, layers=1)
    path = tmp_path / "a"
    save_cache(path, model, text(6), level=level, chunk=3)
    whole, wanted = path.read_bytes(), restore_cache(path, model)
    for length in range(0, len(whole), 1 if level == "tokens" else 7):
        path.write_bytes(whole[:length])
        try:
            restored = restore_cache(path, model)
        except PertokenError as error:
            said = str(error)
        else:
            said = restored.damage
            assert same_rows(restored.cache, wanted.cache)
            assert torch.equal(restored.input_ids, wanted.input_ids)
        assert "cut short" in said or (length < 8 and "is not a .ptkv file" in said)


def test_the_whole_part_is_read_and_the_rest_computed(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    path, ids = tmp_path / "a", text(30)
    save_cache(path, model, ids, chunk=8)
    size = path.stat().st_size
    flip(path, size - 5)
    restored = restore_cache(path, model)
    assert (restored.verified, restored.prefilled) == (24, 5)
    assert restored.damage.endswith("is damaged in keys and values, chunk 4 of 4")
    assert same_rows(restored.cache, prefill(model, ids[:-1], chunk=8))
    assert inspect_cache(path).damage == restored.damage
    path.write_bytes(path.read_bytes()[: size // 2])
    restored = restore_cache(path, model)
    assert 0 < restored.verified < 24
    assert restored.verified % 8 == 0
    assert "cut short" in restored.damage
    assert same_rows(restored.cache, prefill(model, ids[:-1], chunk=8))


def test_a_sliding_layer_s_last_rows_do_not_serve_a_shorter_text(tmp_path: Path) -> None:
    model = tiny_model("gemma3", dtype=torch.float32)
    path, ids = tmp_path / "a", text(30)
    save_cache(path, model, ids, chunk=8)
    flip(path, path.stat().st_size - 5)
    restored = restore_cache(path, model)
    assert (restored.verified, restored.prefilled) == (0, 29)
    assert same_rows(restored.cache, prefill(model, ids[:-1], chunk=8))
    short = text(7)  # within the window of 8: all rows are there
    save_cache(path, model, short, chunk=4)
    flip(path, path.stat().st_size - 5)
    restored = restore_cache(path, model)
    assert (restored.verified, restored.prefilled) == (4, 2)
    assert same_rows(restored.cache, prefill(model, short[:-1], chunk=4))


def test_damaged_ids_are_refused_with_what_is_whole(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    path = tmp_path / "a"
    save_cache(path, model, text(30), chunk=8)
    start = len(inspect_cache(path).header.to_bytes())
    flip(path, start + 13 + 6 + 13)  # a record's frame is 13 bytes, 8 ids are 6
    with pytest.raises(PertokenError, match="ids, chunk 2 of 4: 8 of 30 tokens are whole"):
        restore_cache(path, model)


def shake(monkeypatch: pytest.MonkeyPatch, where: Any) -> None:
    """Laws that are off in their last bits where `where(tokens read, call number)` says so."""
    plain, calls = Law.logits, [0]

    def logits(self: Law) -> np.ndarray:
        found = plain(self)
        calls[0] += 1
        return found * np.float32(1 + 1e-6) if where(self.read, calls[0]) else found

    monkeypatch.setattr(Law, "logits", logits)


def test_a_law_that_differs_names_the_chunk_and_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    save_cache(tmp_path / "a", model, text(30), level="tokens", chunk=8)
    shake(monkeypatch, lambda read, _: read >= 20)
    with pytest.raises(PertokenError, match="chunk 3 of 4 does not reproduce: threads, lib"):
        restore_cache(tmp_path / "a", model)
    here = ids_module.numerics(model) | {"torch": "3.0", "threads": 2}
    monkeypatch.setattr(ids_module, "numerics", lambda _: here)
    with pytest.raises(PertokenError) as error:
        restore_cache(tmp_path / "a", model)
    assert "chunk 3 of 4 does not reproduce: written with threads 1, torch 2" in str(error.value)
    assert "here threads 2, torch 3.0" in str(error.value)


def test_a_chunk_that_does_not_come_out_twice_is_kept_as_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model("llama", dtype=torch.float32), text(30)
    with monkeypatch.context() as patched:
        # The writer's 30 laws, then those of the check: once, in the second chunk, another.
        shake(patched, lambda read, call: read == 12 and call > 30)
        saved = save_cache(tmp_path / "a", model, ids, level="tokens", chunk=8)
    assert saved.raw_chunks == 1
    assert inspect_cache(tmp_path / "a").coded_chunks == 3
    restored = restore_cache(tmp_path / "a", model)
    assert restored.input_ids.tolist() == [ids]
    assert same_rows(restored.cache, prefill(model, ids[:-1], chunk=8))


@pytest.mark.parametrize("level", ["raw", "tokens"])
def test_other_thread_counts_restore_and_are_left_as_they_were(tmp_path: Path, level: str) -> None:
    model, ids = tiny_model("llama", dtype=torch.float32), text(12)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        save_cache(tmp_path / "a", model, ids, level=level)
        wanted = restore_cache(tmp_path / "a", model)
        torch.set_num_threads(1)
        restored = restore_cache(tmp_path / "a", model)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert restored.input_ids.tolist() == [ids]
    assert same_rows(restored.cache, wanted.cache)


def test_a_law_under_another_attention_restores_or_is_refused(tmp_path: Path) -> None:
    sdpa = tiny_model("llama", dtype=torch.float32)
    eager = tiny_model("llama", dtype=torch.float32, attention="eager")
    ids = text(30)
    save_cache(tmp_path / "a", sdpa, ids, level="tokens", chunk=8)
    with contextlib.suppress(PertokenError):
        assert restore_cache(tmp_path / "a", eager).input_ids.tolist() == [ids]
