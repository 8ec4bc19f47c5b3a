"""Rows kept in a cache after a tree are those that the kept text would have written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from pertoken.decode import Goose
from pertoken.decode.forward import TreeForward
from pertoken.decode.rows import keep_rows, refuse_unfit_cache, start_recording, stop_recording
from pertoken.decode.tree import TokenTree, ancestor_mask
from pertoken.errors import PertokenError
from pertoken.testing import ARCHITECTURES, EXTRA_ARCHITECTURES, tiny_model

NAMES = (*ARCHITECTURES, *EXTRA_ARCHITECTURES)
PREFIXES = [5, 7, 8, 12, 20]  # around the window of 8


def a_tree(root: int) -> TokenTree:
    tree = TokenTree(root)
    tree.add_chain(0, [11, 12, 13])
    tree.add_chain(0, [21, 22])
    tree.add_chain(1, [31, 32])
    return tree  # 0 -> 1 -> 2 -> 3, 0 -> 4 -> 5, 1 -> 6 -> 7


PATHS = [[0], [0, 1], [0, 4, 5], [0, 1, 6, 7], [0, 1, 2, 3]]


def text_of(length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (1, length), generator=generator)


def feed_tree(
    forward: TreeForward, trees: list[TokenTree], mask: torch.Tensor, cache: Any
) -> torch.Tensor:
    visible = torch.stack([ancestor_mask(tree.parents) for tree in trees])
    tokens = torch.tensor([tree.tokens for tree in trees])
    depths = torch.tensor([tree.depths for tree in trees])
    return forward.tree(tokens, depths, visible, mask, cache)


def next_logits(model: PreTrainedModel, text: torch.Tensor) -> torch.Tensor:
    return model(text, use_cache=False).logits[:, -1]


@torch.no_grad()
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["dynamic", "typed", "static"])
@pytest.mark.parametrize("architecture", NAMES)
def test_the_text_goes_on_as_if_nothing_else_had_been_fed(
    architecture: str, kind: str, prefix: int
) -> None:
    if kind == "static" and architecture in ("mistral", "gemma3", "qwen3-sliding"):
        pytest.skip("static caches of sliding models are refused")
    model = tiny_model(architecture)
    forward = TreeForward(model)
    for path in PATHS:
        cache: Any = DynamicCache()
        if kind == "typed":
            cache = DynamicCache(config=model.config)
        elif kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=40)
        text = text_of(prefix)
        mask = torch.ones_like(text)
        forward.text(text, mask, cache)
        start_recording(cache)
        for step in range(3):  # several rounds: what one leaves, the next must find right
            tree = a_tree(7 + step)
            logits = feed_tree(forward, [tree], mask, cache)
            mask = keep_rows(cache, mask, len(tree), [path])
            kept = torch.tensor([[tree.tokens[node] for node in path]])
            text = torch.cat((text, kept), -1)
            assert mask.shape == text.shape
            assert int(cache.get_seq_length()) == text.shape[1]
            assert torch.allclose(logits[:, path[-1]], next_logits(model, text), atol=1e-9)
        stop_recording(cache)
        after = torch.tensor([[9]])
        found = forward.text(after, torch.cat((mask, mask[:, :1]), -1), cache)[:, -1]
        wanted = next_logits(model, torch.cat((text, after), -1))
        assert torch.allclose(found, wanted, atol=1e-9)
        for layer in cache.layers:  # an ordinary cache again, no row too many
            if hasattr(layer, "sliding_window"):
                assert layer.keys.shape[-2] == min(text.shape[1] + 1, layer.sliding_window - 1)


@torch.no_grad()
@pytest.mark.parametrize("architecture", NAMES)
@pytest.mark.parametrize("typed", [True, False])
def test_rows_of_a_batch_keep_different_paths(architecture: str, typed: bool) -> None:
    model = tiny_model(architecture)
    forward = TreeForward(model)
    texts = [text_of(length, seed=length) for length in (4, 9, 20)]
    width = max(text.shape[1] for text in texts)
    ids = torch.cat([torch.nn.functional.pad(t, (width - t.shape[1], 0)) for t in texts])
    mask = (ids != 0).long()
    cache = DynamicCache(config=model.config) if typed else DynamicCache()
    forward.text(ids, mask, cache)
    start_recording(cache)
    rounds = [
        [PATHS[3], PATHS[0], PATHS[2]],
        [PATHS[1], PATHS[1], PATHS[1]],
        [PATHS[0], PATHS[4], PATHS[1]],
        [PATHS[3], PATHS[4], PATHS[3]],  # equally long, but not the same
        [PATHS[4], PATHS[0], PATHS[0]],
    ]
    for step, paths in enumerate(rounds):
        trees = [a_tree(7 + step + row) for row in range(3)]
        logits = feed_tree(forward, trees, mask, cache)
        mask = keep_rows(cache, mask, len(trees[0]), paths)
        for row, path in enumerate(paths):
            kept = torch.tensor([[trees[row].tokens[node] for node in path]])
            texts[row] = torch.cat((texts[row], kept), -1)
            wanted = next_logits(model, texts[row])[0]
            assert torch.allclose(logits[row, path[-1]], wanted, atol=1e-9)
            length = texts[row].shape[1]
            assert mask[row].tolist() == [0] * (mask.shape[1] - length) + [1] * length
        # No column that is padding in every row is carried along.
        assert mask.shape[1] == max(text.shape[1] for text in texts)
        assert int(cache.get_seq_length()) == mask.shape[1]
    ones = torch.ones(3, 1, dtype=torch.long)
    found = forward.text(ones * 9, torch.cat((mask, ones), -1), cache)[:, -1]
    for row, text in enumerate(texts):
        wanted = next_logits(model, torch.cat((text, torch.tensor([[9]])), -1))[0]
        assert torch.allclose(found[row], wanted, atol=1e-9)


@torch.no_grad()
def test_a_finished_row_keeps_nothing_and_disturbs_nobody() -> None:
    model = tiny_model("gemma3")
    forward = TreeForward(model)
    text = text_of(12)
    cache = DynamicCache(config=model.config)
    mask = torch.ones(2, 12, dtype=torch.long)
    forward.text(text.expand(2, -1), mask, cache)
    start_recording(cache)
    for step in range(12):
        trees = [a_tree(7 + step), TokenTree(0)]
        trees[1].add_chain(0, [0] * 7)
        logits = feed_tree(forward, trees, mask, cache)
        mask = keep_rows(cache, mask, 8, [PATHS[3], []])
        kept = torch.tensor([[trees[0].tokens[node] for node in PATHS[3]]])
        text = torch.cat((text, kept), -1)
        assert torch.allclose(logits[0, 7], next_logits(model, text)[0], atol=1e-9)


def test_static_layers_are_refused_for_unequal_rows() -> None:
    model = tiny_model("llama")
    forward = TreeForward(model)
    cache = StaticCache(config=model.config, max_cache_len=20)
    ids = text_of(6).expand(2, -1)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        forward.text(ids, mask, cache)
        feed_tree(forward, [a_tree(7), a_tree(8)], mask, cache)
    with pytest.raises(PertokenError, match="static cache"):
        keep_rows(cache, mask, 8, [[0], [0, 1]])


def test_caches_that_cannot_drop_rows_are_refused_by_name() -> None:
    refuse_unfit_cache(DynamicCache(), Goose())
    refuse_unfit_cache(StaticCache(config=tiny_model("llama").config, max_cache_len=8), Goose())
    sliding = StaticCache(config=tiny_model("mistral").config, max_cache_len=20)
    with pytest.raises(PertokenError, match="StaticSlidingWindowLayer"):
        refuse_unfit_cache(sliding, Goose())

    class QuantoQuantizedLayer(DynamicLayer):
        pass

    quantized = DynamicCache()
    quantized.layers.append(QuantoQuantizedLayer())
    with pytest.raises(PertokenError, match="QuantoQuantizedLayer"):
        refuse_unfit_cache(quantized, Goose())
    offloaded = DynamicCache()
    offloaded.offloading = True
    with pytest.raises(PertokenError, match="offloaded"):
        refuse_unfit_cache(offloaded, Goose())
    for cache in (sliding, quantized, offloaded):
        with pytest.raises(PertokenError) as error:
            refuse_unfit_cache(cache, Goose())
        assert "\n" not in str(error.value)
