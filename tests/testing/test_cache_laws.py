"""Each law for caches once kept and once broken."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from pertoken.errors import PertokenError
from pertoken.testing import (
    LawBroken,
    check_cache_batch,
    check_cache_crop,
    check_cache_equals_full,
    check_cache_reorder,
    check_cache_restores,
    check_cache_turns,
    tiny_model,
)

MODEL = tiny_model("llama", vocab_size=32)


class Bent(DynamicCache):
    """A full cache with one mistake."""

    def update(self, keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
        keys, values = super().update(keys, values, layer, *args, **kwargs)
        return self.bend(keys, values)

    def bend(self, keys: torch.Tensor, values: torch.Tensor) -> Any:
        return keys, values


class Scaled(Bent):
    def bend(self, keys: torch.Tensor, values: torch.Tensor) -> Any:
        return keys, values * (1 + 1e-7)


class FirstRow(Bent):
    """Values of the first row for all rows of a batch."""

    def bend(self, keys: torch.Tensor, values: torch.Tensor) -> Any:
        return keys, values[:1].expand_as(values)


class Forgets(Bent):
    """The second prompt it reads is seen without what was before."""

    def bend(self, keys: torch.Tensor, values: torch.Tensor) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return keys, values * 0 if self.calls > 12 else values


class NoOrder(DynamicCache):
    def reorder_cache(self, beam_idx: torch.Tensor) -> None: ...


class NoCrop(DynamicCache):
    def crop(self, tokens_to_remove: int) -> None: ...


class WrongCrop(DynamicCache):
    """Drops the newest tokens' places but keeps the wrong ones."""

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self.layers:
            layer.keys = layer.keys[:, :, -tokens_to_remove:]
            layer.values = layer.values[:, :, -tokens_to_remove:]


class Refuses(DynamicCache):
    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        raise PertokenError("Refuses has no beams")

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("no")


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_a_full_cache_keeps_all_laws(architecture: str) -> None:
    model = tiny_model(architecture, vocab_size=32)

    def make(model: Any) -> DynamicCache:
        return DynamicCache()

    check_cache_equals_full(make, model, max_new_tokens=6)
    check_cache_batch(make, model, max_new_tokens=6)
    check_cache_turns(make, model)
    assert check_cache_reorder(make, model) is None
    assert check_cache_crop(make, model) is None
    check_cache_restores(lambda model, ids, cache: copy.deepcopy(cache), model)


BROKEN: list[tuple[Callable[..., Any], Any, str]] = [
    (check_cache_equals_full, Scaled, "not the full cache: prompt 0: logits differ by"),
    (check_cache_equals_full, Forgets, "not the full cache: prompt 0 .*step"),
    (check_cache_batch, FirstRow, "batch differs from single runs"),
    (check_cache_reorder, NoOrder, "rows are mixed up by reorder_cache: step 0"),
    (check_cache_crop, NoCrop, r"crop\(-4\) of 16 tokens left 16, expected 12"),
    (check_cache_crop, WrongCrop, "tokens that were cropped still have a say"),
    (check_cache_crop, Refuses, "crop is refused without a name: ValueError: no"),
]


@pytest.mark.parametrize(
    ("law", "kind", "said"), BROKEN, ids=lambda each: str(getattr(each, "__name__", each))[-30:]
)
def test_what_is_wrong_is_found(law: Callable[..., Any], kind: Any, said: str) -> None:
    with pytest.raises(LawBroken, match=said):
        law(lambda model: kind(), MODEL)


def test_a_second_turn_that_is_another_one_is_found() -> None:
    caches = iter([DynamicCache(), Forgets()])  # one call, two calls
    with pytest.raises(LawBroken, match="does not go on where the first ended"):
        check_cache_turns(lambda model: next(caches), MODEL)


def test_a_refusal_with_a_name_is_returned() -> None:
    assert check_cache_reorder(lambda model: Refuses(), MODEL) == "Refuses has no beams"


def test_a_restored_cache_that_is_not_the_same_is_found() -> None:
    def round_trip(model: Any, ids: torch.Tensor, cache: Any) -> Any:
        cache.layers[1].values *= 1 + 1e-9
        return cache

    with pytest.raises(LawBroken, match="a restored cache is another one: logits differ by"):
        check_cache_restores(round_trip, MODEL)
