"""Batches hold every text once, are small, and are hardly padded."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from pertoken._padded import batches, right_padded


@given(st.lists(st.integers(1, 60), max_size=80), st.integers(1, 200))
def test_every_text_is_in_one_small_batch(lengths: list[int], most: int) -> None:
    found = batches(lengths, most)
    assert sorted(text for batch in found for text in batch) == list(range(len(lengths)))
    for batch in found:
        places = len(batch) * max(lengths[text] for text in batch)
        assert len(batch) == 1 or places <= most
        assert places <= 1.25 * sum(lengths[text] for text in batch)


def test_padding_is_on_the_right_and_marked() -> None:
    ids, real = right_padded([torch.tensor([3]), torch.tensor([4, 5])], pad=9)
    assert ids.tolist() == [[3, 9], [4, 5]]
    assert real is not None
    assert real.tolist() == [[True, False], [True, True]]
    assert right_padded([torch.tensor([3]), torch.tensor([4])])[1] is None
