"""Evicting caches against brute force: every weight computed anew, every rule in plain loops.

The oracle runs the whole text again for every piece of it, without any cache. Its attention is a
few lines of softmax with a mask that says, for every layer, head and query, which tokens are left;
what is left after a piece is decided by the papers' rules on its own weights.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pertoken.cache import H2OCache, SnapKVCache, StreamingLLMCache, TOVACache, WindowCache
from pertoken.cache._attention import Takeover, layer_windows
from pertoken.testing import ARCHITECTURES, EXTRA_ARCHITECTURES, tiny_model

NAMES = (*ARCHITECTURES, *EXTRA_ARCHITECTURES)
SINKS, RECENT, VOTERS, KERNEL = 2, 2, 3, 3
PIECES = [14, 1, 1, 1, 5, 1, 1, 4, 1]
METHODS = ("window", "streaming-llm", "h2o", "snapkv", "tova")


def make(name: str, model: PreTrainedModel, budget: int) -> Any:
    if name == "window":
        return WindowCache(model, budget)
    if name == "streaming-llm":
        return StreamingLLMCache(model, budget, sinks=SINKS)
    if name == "h2o":
        return H2OCache(model, budget, recent=RECENT)
    if name == "snapkv":
        return SnapKVCache(model, budget, window=VOTERS, kernel=KERNEL)
    return TOVACache(model, budget)


class Oracle:
    """Kept tokens and logits of one text, one layer and head at a time."""

    def __init__(self, method: str, model: PreTrainedModel, budget: int) -> None:
        self.method, self.model, self.budget = method, model, budget
        self.windows = layer_windows(model)
        config = model.config
        self.heads = config.num_attention_heads
        self.shared = getattr(config, "num_key_value_heads", None) or self.heads
        self.kept = [[[] for _ in range(self.shared)] for _ in self.windows]
        self.sums = [[{} for _ in range(self.shared)] for _ in self.windows]
        # seen[layer][head][query]: {token: places by which its key is moved on}
        self.seen: list[list[list[dict[int, int]]]] = [
            [[] for _ in range(self.shared)] for _ in self.windows
        ]
        self.weights: dict[int, torch.Tensor] = {}

    def feed(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Logits of tokens start … of a text [1, time]; then evict."""
        end = ids.shape[1]
        for layer, window in enumerate(self.windows):
            moved = max(0, start - self.budget) if self._streams(window) else 0
            if not self._rotates():
                moved = 0
            for head in range(self.shared):
                for query in range(start, end):
                    visible = {}
                    for token in [*self.kept[layer][head], *range(start, query + 1)]:
                        move = moved if token < SINKS else 0
                        if window is None or token + move > query - window:
                            visible[token] = move
                    self.seen[layer][head].append(visible)
        with torch.no_grad(), Takeover(self.model)(self._attend):
            logits = self.model(ids, use_cache=False).logits[:, start:]
        for layer, window in enumerate(self.windows):
            for head in range(self.shared):
                there = [*self.kept[layer][head], *range(start, end)]
                if window is not None and not (self._streams(window) and self.budget < window):
                    there = [token for token in there if token > end - window]
                self.kept[layer][head] = self._keep(layer, head, there, start, end)
        return logits

    def _streams(self, window: int | None) -> bool:
        return self.method == "streaming-llm" and (window is None or self.budget < window)

    def _rotates(self) -> bool:
        return self.model.config.model_type not in ("gpt2", "opt")

    def _attend(self, module, query, key, value, mask, scaling=None, **_):
        layer = module.layer_idx
        key, value = (x[0].repeat_interleave(self.heads // self.shared, 0) for x in (key, value))
        plain = query[0] @ key.transpose(1, 2) * scaling
        scores = torch.full_like(plain, -math.inf)
        for head in range(self.heads):
            for row, visible in enumerate(self.seen[layer][head // (self.heads // self.shared)]):
                tokens = list(visible)
                scores[head, row, tokens] = plain[head, row, tokens]
                for token in tokens:
                    if visible[token]:
                        there = self._moved(layer, key[head, token], visible[token])
                        scores[head, row, token] = query[0, head, row] @ there * scaling
        weights = self.weights[layer] = scores.softmax(-1)
        return (weights @ value).transpose(0, 1)[None], None

    def _moved(self, layer: int, key: torch.Tensor, places: int) -> torch.Tensor:
        """A key after the rotation of `places` more, from the definition of rotary positions."""
        config = self.model.config
        rope = config.rope_parameters
        if "rope_theta" not in rope:  # one per type of layer
            rope = rope[config.layer_types[layer]]
        size = int(len(key) * rope.get("partial_rotary_factor", 1.0))
        angles = [places * rope["rope_theta"] ** (-2 * i / size) for i in range(size // 2)]
        turn = torch.polar(torch.ones(size // 2).double(), torch.tensor(angles).double())
        turned = torch.complex(key[: size // 2], key[size // 2 : size]) * turn
        return torch.cat((turned.real, turned.imag, key[size:]))

    def _keep(self, layer: int, head: int, there: list[int], start: int, end: int) -> list[int]:
        """The method's rule on the tokens that are there, in order."""
        group = self.heads // self.shared
        mine = self.weights[layer][head * group : (head + 1) * group]  # [group, queries, tokens]
        budget, sums = self.budget, self.sums[layer][head]
        if self.method == "h2o":
            for token in there:
                sums[token] = sums.get(token, 0.0) + float(mine[:, start:end, token].sum())
        if len(there) <= budget:
            return there
        if self.method == "window":
            return there[-budget:]
        if self.method == "streaming-llm":
            sinks = [token for token in there if token < SINKS]
            return sinks + there[len(there) - budget + len(sinks) :]
        if self.method == "h2o":
            recent, old = there[-RECENT:], there[:-RECENT]
            heavy = sorted(old, key=lambda token: -sums[token])[: budget - RECENT]
            for token in set(there) - {*recent, *heavy}:
                del sums[token]
            return sorted(heavy) + recent
        if self.method == "tova":
            last = self.weights[layer][:, end - 1].mean(0)
            return sorted(sorted(there, key=lambda token: -float(last[token]))[:budget])
        window, old = there[-VOTERS:], there[:-VOTERS]
        voters = range(max(0, end - VOTERS), end)
        votes = [sum(float(mine[:, q, token].mean()) for q in voters) for token in old]
        side = KERNEL // 2
        padded = [0.0] * side + votes + [0.0] * side
        pooled = {token: sum(padded[i : i + KERNEL]) for i, token in enumerate(old)}
        best = sorted(old, key=lambda token: -pooled[token])[: budget - VOTERS]
        return sorted(best) + window


def held(cache: Any, layer: int, head: int, row: int = 0) -> list[int]:
    positions = cache.layers[layer].positions[row]
    return [place for place in positions[min(head, len(positions) - 1)].tolist() if place >= 0]


@torch.no_grad()
@pytest.mark.parametrize("budget", [5, 10])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", NAMES)
def test_every_step_keeps_and_sees_what_brute_force_does(
    architecture: str, method: str, budget: int
) -> None:
    model = tiny_model(architecture)
    text = torch.randint(1, 64, (1, sum(PIECES)), generator=torch.Generator().manual_seed(3))
    cache, oracle = make(method, model, budget), Oracle(method, model, budget)
    close = 1e-5 if method == "streaming-llm" else 1e-9  # the model's angles are float32
    start = 0
    for piece in PIECES:
        end = start + piece
        found = model(text[:, start:end], past_key_values=cache).logits
        wanted = oracle.feed(text[:, :end], start)
        assert (found - wanted).abs().max() < close
        for layer in range(len(oracle.windows)):
            for head in range(oracle.shared):
                kept = held(cache, layer, head)
                assert kept == oracle.kept[layer][head], (piece, layer, head)
                assert len(kept) <= budget
        start = end
        assert cache.get_seq_length() == end
