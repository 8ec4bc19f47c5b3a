"""Ids coded by a model's law: exact both ways, and no longer than the law says."""

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.cache._coder import (
    TOTAL,
    Chunk,
    Law,
    decode_chunk,
    encode_chunk,
    frequencies,
    pack_ids,
    packed_size,
    unpack_ids,
)
from pertoken.errors import PertokenError
from pertoken.testing import tiny_model

VOCAB = 64


class Tables:
    """A law that needs no model: a table of logits per step."""

    def __init__(self, logits: np.ndarray) -> None:
        self._logits, self._step = logits, 0

    def add(self, token: int) -> None:
        self._step += 1

    def logits(self) -> np.ndarray:
        return self._logits[self._step]


def law(seed: int = 0, **options: Any) -> Law:
    return Law(tiny_model("llama", dtype=torch.float32, seed=seed, **options), VOCAB)


@given(st.integers(0, 2**32 - 1), st.integers(2, 400), st.sampled_from([0.0, 0.1, 3.0, 40.0]))
@settings(max_examples=80, deadline=None)
def test_frequencies_are_whole_and_sum_to_the_coder_s_total(
    seed: int, vocab: int, spread: float
) -> None:
    logits = np.random.default_rng(seed).normal(size=vocab).astype(np.float32) * spread
    table = frequencies(logits)
    p = torch.softmax(torch.from_numpy(logits).double(), -1).numpy()
    assert table.sum(dtype=np.int64) == TOTAL
    assert table.min() >= 1
    rest = np.arange(vocab) != int(table.argmax())
    expected = np.maximum(1, np.rint(p * (TOTAL - vocab)))
    assert np.abs(table - expected)[rest].max() <= 1  # numpy's and torch's sums may differ
    assert np.array_equal(table, frequencies(logits.copy()))


def test_what_is_left_goes_to_the_first_of_the_most_likely() -> None:
    table = frequencies(np.zeros(3, dtype=np.float32))
    rounded = round((TOTAL - 3) / 3)
    assert table.tolist() == [TOTAL - 2 * rounded, rounded, rounded]


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from([2, 5, VOCAB, 1000]))
@settings(max_examples=60, deadline=None)
def test_a_code_is_exact_and_at_most_a_byte_longer_than_its_tables_say(
    seed: int, count: int, vocab: int
) -> None:
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(count + 1, vocab)).astype(np.float32) * draw.choice([0.1, 2, 9])
    tables = [frequencies(row) for row in logits[:count]]
    ids = [int(draw.choice(vocab, p=table / TOTAL)) for table in tables]
    if seed % 3 == 0:
        ids = draw.integers(0, vocab, count).tolist()  # unlikely ones too
    chunk = encode_chunk(Tables(logits), ids)  # type: ignore[arg-type]
    bits = sum(-math.log2(table[i] / TOTAL) for table, i in zip(tables, ids, strict=True))
    assert 8 * len(chunk.code) <= bits + 8.01
    assert decode_chunk(Tables(logits), chunk, count) == ids  # type: ignore[arg-type]


@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), st.integers(1, 30))
@settings(max_examples=12, deadline=None)
def test_any_ids_come_back_through_a_model_s_law(ids: list[int], cut: int) -> None:
    writer, reader = law(), law()
    for part in (ids[:cut], ids[cut:]):
        if part:
            assert decode_chunk(reader, encode_chunk(writer, part), len(part)) == part


def test_the_law_is_the_model_s_next_token_law() -> None:
    model = tiny_model("llama")
    ids = torch.randint(VOCAB, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits[0].float().numpy()
    text = Law(model, VOCAB)
    assert text.logits().tolist() == [0.0] * VOCAB  # no law before the first token
    for place in range(12):
        text.add(int(ids[0, place]))
        assert np.abs(text.logits() - expected[place]).max() < 1e-5


def test_entropy_is_that_of_the_ids_under_the_model() -> None:
    model = tiny_model("llama")
    ids = torch.randint(VOCAB, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_probs = torch.log_softmax(model(ids).logits[0].double(), -1)
    own = log_probs[torch.arange(29), ids[0, 1:]].sum().item() / -math.log(2)
    found = encode_chunk(Law(model, VOCAB), ids[0].tolist()).entropy
    assert found == pytest.approx(own + math.log2(VOCAB), abs=1e-4)


def test_another_law_never_gives_wrong_ids() -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, 30).tolist()
    chunk = encode_chunk(law(), ids)
    for seed in range(1, 4):
        assert decode_chunk(law(seed), chunk, 30) is None


def test_a_law_that_is_off_in_its_last_bits_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, 30).tolist()
    chunk = encode_chunk(law(), ids)
    plain = Law.logits

    def shaken(self: Law) -> np.ndarray:
        return plain(self) * np.float32(1 + 1e-6)

    monkeypatch.setattr(Law, "logits", shaken)
    found = decode_chunk(law(), chunk, 30)
    assert found is None


def test_other_bytes_than_the_coder_s_never_give_wrong_ids() -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, 20).tolist()
    chunk = encode_chunk(law(), ids)
    draw = np.random.default_rng(1)
    for _ in range(8):
        code = bytearray(chunk.code)
        code[draw.integers(len(code))] ^= int(draw.integers(1, 256))
        other = Chunk(bytes(code), chunk.checksum, chunk.crc)
        assert decode_chunk(law(), other, 20) in (None, ids)


@given(st.data(), st.sampled_from([2, 3, 64, 49_152, 262_145]))
@settings(max_examples=60, deadline=None)
def test_packed_ids_come_back(data: st.DataObject, vocab: int) -> None:
    ids = data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=50))
    packed = pack_ids(ids, vocab)
    assert len(packed) == packed_size(len(ids), vocab)
    assert unpack_ids(packed, len(ids), vocab) == ids


def test_logits_that_are_no_numbers_are_named() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    text = Law(model, VOCAB)
    text.add(7)
    with pytest.raises(PertokenError, match=r"logits behind 1 tokens are not finite.*level=.raw"):
        text.logits()


def test_without_constriction_the_install_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(PertokenError, match=r'pip install "pertoken\[archive\]"'):
        encode_chunk(law(), [1])
    with pytest.raises(PertokenError, match=r'pip install "pertoken\[archive\]"'):
        decode_chunk(law(), Chunk(b"", b"", 0), 1)


def test_the_end_of_a_code_is_cut_only_where_it_still_decodes() -> None:
    """A sure thing leaves a wide last interval, an unlikely one a narrow one."""
    sure = np.zeros((9, VOCAB), dtype=np.float32)
    sure[:, 3] = 60.0
    for ids in ([3] * 8, [4] * 8, [3] * 7 + [4], [63] * 8):
        chunk = encode_chunk(Tables(sure), ids)  # type: ignore[arg-type]
        assert decode_chunk(Tables(sure), chunk, 8) == ids  # type: ignore[arg-type]
    assert len(encode_chunk(Tables(sure), [3] * 8).code) <= 1  # type: ignore[arg-type]
