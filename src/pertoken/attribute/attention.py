"""Attention as an answer to which tokens mattered: the cheap baselines.

The weights of the last position before a target: averaged over layers and heads ("attention"), of
the last layer ("attention-last"), or followed through the layers ("attention-rollout": the product
of 0.5 A + 0.5 I over the layers, heads averaged; Abnar and Zuidema 2020). One forward for all
targets. The weights are recomputed beside transformers' own sdpa, only those that are asked for, so
the model is not switched to another attention. The rollout is followed from the top, since only the
rows of the targets are wanted: it holds all layers' queries and keys, and never a square of tokens.

These do not depend on the target or the quantity, only on the place. The authors of ReAGent take
the softmax of the weights; these are the weights themselves, which sum to 1 (ours).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pertoken._takeover import Takeover, layer_windows, refuse_unfit, sdpa, visible
from pertoken.attribute._question import Question
from pertoken.attribute._scores import Scores
from pertoken.attribute.quantity import Quantity

__all__ = ["attention", "attention_last", "attention_rollout"]

_ROWS = 512  # of a layer's weights that the rollout holds
Weights = Callable[[torch.Tensor], torch.Tensor]
"""Positions of queries [rows] -> their weights [rows, time], averaged over heads."""


def attention(question: Question, quantity: Quantity, *, seed: int = 0) -> Scores:
    """Weights averaged over layers and heads, [targets, time]."""
    asked = _asking(question)
    total = torch.zeros(len(asked), question.places[-1], dtype=torch.float64, device=asked.device)
    layers = _watch(question, "attention", lambda weights, layer: total.add_(weights(asked)))
    return _scores(question, total / layers)


def attention_last(question: Question, quantity: Quantity, *, seed: int = 0) -> Scores:
    """Weights of the last layer, averaged over heads, [targets, time]."""
    last: list[Weights] = []

    def keep(weights: Weights, layer: int) -> None:
        last[:] = [weights]

    _watch(question, "attention-last", keep)
    return _scores(question, last[0](_asking(question)))


def attention_rollout(question: Question, quantity: Quantity, *, seed: int = 0) -> Scores:
    """Weights multiplied through the layers, half of each step for the residual stream."""
    layers: list[Weights] = []
    _watch(question, "attention-rollout", lambda weights, layer: layers.append(weights))
    rows = torch.nn.functional.one_hot(_asking(question), question.places[-1]).double()
    for weights in reversed(layers):
        step = 0.5 * rows
        for part in rows.any(0).nonzero()[:, 0].split(_ROWS):
            step += 0.5 * rows[:, part] @ weights(part)
        rows = step
    return _scores(question, rows)


def _asking(question: Question) -> torch.Tensor:
    """The positions whose output predicts the targets."""
    return torch.tensor([place - 1 for place in question.places], device=question.ids.device)


@torch.no_grad()
def _watch(question: Question, method: str, see: Callable[[Weights, int], object]) -> int:
    """Call `see(weights, layer)` in every layer; the number of layers."""
    model = question.model
    refuse_unfit(model, f"the method {method!r}")
    windows = layer_windows(model)
    ids = question.ids[: question.places[-1]]  # nothing is read behind the last target
    places = torch.arange(len(ids), device=ids.device)
    seen: set[int] = set()

    def attend(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer = int(module.layer_idx)
        window = windows[layer]
        seen.add(layer)

        def weights(rows: torch.Tensor) -> torch.Tensor:
            return _weights(query, key, scaling, rows, visible(rows, places, window))

        see(weights, layer)
        allowed = None if window is None else visible(places, places, window)[None, None]
        return sdpa(module, query, key, value, allowed, scaling=scaling, **kwargs)

    with Takeover(model)(attend):
        model.get_decoder()(input_ids=ids[None], position_ids=places[None], use_cache=False)
    return len(seen)


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float | None,
    asked: torch.Tensor,
    allowed: torch.Tensor,
) -> torch.Tensor:
    """Attention weights [asked, time] of a layer, averaged over heads, one head at a time."""
    heads, groups = query.shape[1], key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    total = torch.zeros(allowed.shape, dtype=torch.float64, device=query.device)
    wide = torch.promote_types(query.dtype, torch.float32)
    for head in range(heads):
        own = key[0, head * groups // heads].to(wide)
        scores = (query[0, head, asked].to(wide) @ own.T).double() * scale
        total += scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return total / heads


def _scores(question: Question, weights: torch.Tensor) -> Scores:
    values = torch.full((len(weights), len(question.ids)), torch.nan, dtype=torch.float64)
    for number, place in enumerate(question.places):
        values[number, :place] = weights[number, :place].cpu()
    return Scores(values)
