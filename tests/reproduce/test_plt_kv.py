"""The parts of plt-kv's reproduction: splits apart, counts by hand, wrong results seen as wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pertoken import PertokenError
from pertoken.cache import archive
from pertoken.cache._rows import plain_cache
from pertoken.cache.prefix_trie import PrefixTrie
from pertoken.reproduce import _plt_archive, _plt_rates, _plt_sessions
from pertoken.reproduce._plt_texts import SMOKE_ROWS, pieces
from pertoken.testing import ByteTokenizer


def test_pieces_of_the_splits_share_no_prompt_and_no_place() -> None:
    rows = [{"question_id": n, "category": "qa", "turns": [chr(96 + n) * 10]} for n in range(1, 13)]
    tokenizer = ByteTokenizer()
    text = {
        name: tokenizer.decode(ids)
        for split in ("dev", "report")
        for skip in (0, 2)
        for name, ids in (
            (f"{split} {key}", ids)
            for key, ids in pieces(
                tokenizer,
                rows,
                split,
                length=12,
                per_group=2,
                skip=skip,  # type: ignore[arg-type]
            ).items()
        )
    }
    assert len(text) == 8
    assert len(set(text.values())) == 8
    letters = {
        split: {c for name, t in text.items() if name.startswith(split) for c in t if c.isalpha()}
        for split in ("dev", "report")
    }
    assert letters["report"] <= set("acegik")
    assert letters["dev"] <= set("bdfhjl")
    with pytest.raises(PertokenError, match="no group of the dev split holds 1000"):
        pieces(tokenizer, rows, "dev", length=1000, per_group=1)
    assert len(pieces(tokenizer, SMOKE_ROWS, "report", length=8, per_group=1)) == 2


@pytest.mark.parametrize("bits", [0.5, 1.0, 2.7, 4.0, 6.0, 9.0])
def test_the_step_for_some_bits_lies_on_the_curve(bits: float) -> None:
    """Bits that fall by one each time the step doubles: a straight line, also beyond its ends."""
    curve = [(2.0**n, 5.0 - n) for n in range(-1, 5)]
    assert _plt_rates.step_for(bits, curve) == pytest.approx(2 ** (5 - bits))


def test_the_hand_count_is_that_of_the_trie() -> None:
    drawn = torch.Generator().manual_seed(0)
    texts = [
        torch.randint(1, 3, (int(n),), generator=drawn).tolist()
        for n in torch.randint(1, 20, (30,), generator=drawn)
    ]
    trie = PrefixTrie(block=4)
    for text in texts:
        # Rows that hang on the whole prefix, so that equal prefixes have equal rows.
        row = torch.tensor([hash(tuple(text[: n + 1])) % 997 for n in range(len(text))]).float()
        trie.add(text, plain_cache([(row.view(1, 1, -1, 1), row.view(1, 1, -1, 1))]))
    assert trie.stats().bytes_held == 8 * _plt_sessions.blocks_by_hand(texts, 4)


def test_round_trips_and_damage_pass_on_the_archive() -> None:
    assert _plt_archive._trips(0, 0, 2) == 0
    found = _plt_archive._damage(0, 0, 12)
    assert found.pop("wrong") == 0
    assert sum(found.values()) == 12


@pytest.mark.parametrize("what", ["ids", "rows", "crash"])
def test_a_wrong_restore_is_counted_as_wrong(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    restore, calls = archive.restore_cache, [0]

    def broken(*args: Any) -> Any:
        calls[0] += 1
        found = restore(*args)
        if calls[0] <= 3:  # the undamaged files are read first
            return found
        if what == "crash":
            raise IndexError("not an error that a user can read")
        if what == "ids":
            return dataclasses.replace(found, input_ids=found.input_ids + 1)
        found.cache.layers[0].keys[..., 0] += 1
        return found

    monkeypatch.setattr(archive, "restore_cache", broken)
    found = _plt_archive._damage(0, 0, 6)
    assert found["wrong"] == 6 - found["named"] > 0


def test_every_bar_is_of_a_label_that_is_measured() -> None:
    from pertoken.reproduce import plt_kv

    for label in _plt_rates.LABELS:
        assert f"attention error at equal bits: predictive over {label}" in plt_kv.BARS
    assert _plt_rates.ALONE_AT in _plt_rates.LABELS
