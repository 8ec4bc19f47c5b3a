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

from pertoken._takeover import Takeover, layer_windows
from pertoken.cache import H2OCache, SnapKVCache, StreamingLLMCache, TOVACache, WindowCache
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
        shape = (len(self.windows), self.shared, sum(PIECES), sum(PIECES))
        self.seen = torch.zeros(shape, dtype=torch.bool)  # layer, head, query, token
        self.moved = torch.zeros(shape[0], shape[2], dtype=torch.long)  # layer, query
        self.weights: dict[int, torch.Tensor] = {}

    def feed(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Logits of tokens start … of a text [1, time]; then evict."""
        end = ids.shape[1]
        for layer, window in enumerate(self.windows):
            moves = self._streams(window) and self.model.config.model_type not in ("gpt2", "opt")
            moved = max(0, start - self.budget) if moves else 0
            self.moved[layer, start:end] = moved
            for head in range(self.shared):
                for query in range(start, end):
                    for token in [*self.kept[layer][head], *range(start, query + 1)]:
                        place = token + moved if token < SINKS else token
                        if window is None or place > query - window:
                            self.seen[layer, head, query, token] = True
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

    def _attend(self, module, query, key, value, mask, scaling=None, **_):
        layer, time, group = module.layer_idx, query.shape[2], self.heads // self.shared
        key, value = (x[0].repeat_interleave(group, 0) for x in (key, value))
        scores = query[0] @ key.transpose(1, 2) * scaling
        for places in set(self.moved[layer, :time].tolist()) - {0}:
            rows = self.moved[layer, :time] == places
            sinks = self._moved_on(layer, key[:, :SINKS], places)
            scores[:, rows, :SINKS] = query[0][:, rows] @ sinks.transpose(1, 2) * scaling
        seen = self.seen[layer, :, :time, :time].repeat_interleave(group, 0)
        weights = self.weights[layer] = scores.masked_fill(~seen, -math.inf).softmax(-1)
        return (weights @ value).transpose(0, 1)[None], None

    def _moved_on(self, layer: int, key: torch.Tensor, places: int) -> torch.Tensor:
        """Keys after the rotation of `places` more, from the definition of rotary positions."""
        config = self.model.config
        rope = config.rope_parameters
        if "rope_theta" not in rope:  # one per type of layer
            rope = rope[config.layer_types[layer]]
        size = int(key.shape[-1] * rope.get("partial_rotary_factor", 1.0))
        angles = [places * rope["rope_theta"] ** (-2 * i / size) for i in range(size // 2)]
        turn = torch.polar(torch.ones(size // 2).double(), torch.tensor(angles).double())
        real, imaginary, rest = key.split((size // 2, size // 2, key.shape[-1] - size), -1)
        turned = torch.complex(real, imaginary) * turn
        return torch.cat((turned.real, turned.imag, rest), -1)

    def _keep(self, layer: int, head: int, there: list[int], start: int, end: int) -> list[int]:
        """The method's rule on the tokens that are there, in order."""
        group = self.heads // self.shared
        mine = self.weights[layer][head * group : (head + 1) * group]  # [group, queries, tokens]
        budget, sums = self.budget, self.sums[layer][head]
        if self.method == "h2o":
            came = mine[:, start:end].sum((0, 1)).tolist()
            for token in there:
                sums[token] = sums.get(token, 0.0) + came[token]
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
            last = self.weights[layer][:, end - 1].mean(0).tolist()
            return sorted(sorted(there, key=lambda token: -last[token])[:budget])
        window, old = there[-VOTERS:], there[:-VOTERS]
        each = mine[:, max(0, end - VOTERS) : end].sum((0, 1)).tolist()
        votes = [each[token] for token in old]
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
