"""Two-scale containment: one stale batch, 16 steps of Adam, and where the drift ends.

A tiny Llama, a batch of texts, and two stresses. *Common drift*: every text repeats one token and
advantages are +1 and -1 in turn, so that all tokens of a text are pushed the same way. *Outlier
token*: the model has learned its own texts, one token of each was then exchanged for an unlikely
one, and all advantages are +1: the other tokens are near certain and cannot move, the odd one can.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pertoken.reproduce._fiberpo_methods import Loss

STRESSES = ("common drift", "outlier token")
STEPS = 16
BATCH, TIME, VOCABULARY = 8, 24, 64
LEARNING_STEPS, LEARNING_RATE = 60, 3e-3  # to know the texts by heart before the second stress


def contained(
    losses: Mapping[str, Loss],
    stress: str,
    seed: int,
    step_size: float,
    token: tuple[float, float],
    trajectory: float,
    steps: int = STEPS,
    momentum: float = 0.9,
) -> dict[str, list[float]]:
    """Name -> [largest token residual, largest trajectory drift] after the steps, in budgets.

    token: bounds of the token budget in nats, (low, high); trajectory: of the drift, +-.
    momentum: Adam's first beta.
    """
    start, texts, advantages = _setting(stress, seed)
    found = {}
    for name, loss in losses.items():
        model = _model(seed)
        model.load_state_dict(start)
        old = _log_probs(model, texts).detach()
        optimizer = torch.optim.Adam(model.parameters(), lr=step_size, betas=(momentum, 0.999))
        mask = torch.ones_like(old)
        for _ in range(steps):
            optimizer.zero_grad()
            loss(_log_probs(model, texts), old, advantages, mask)[0].backward()
            optimizer.step()
        with torch.no_grad():
            log_ratio = _log_probs(model, texts) - old
        drift = log_ratio.mean(1)
        residual = log_ratio - drift[:, None]
        found[name] = [
            float(torch.maximum(residual / token[1], residual / token[0]).max()),
            float(drift.abs().max() / trajectory),
        ]
    return found


def _setting(stress: str, seed: int) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """The weights before the steps, the texts [batch, time] and the advantages [batch]."""
    model = _model(seed)
    if stress == "common drift":
        generator = torch.Generator().manual_seed(seed)
        texts = torch.randperm(VOCABULARY - 1, generator=generator)[:BATCH, None] + 1
        texts = texts.expand(-1, TIME + 1)
        advantages = torch.ones(BATCH, dtype=torch.float64)
        advantages[1::2] = -1
        return _weights(model), texts, advantages
    texts = _sample(model, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(LEARNING_STEPS):
        optimizer.zero_grad()
        (-_log_probs(model, texts).mean()).backward()
        optimizer.step()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(BATCH)
    # Near the end: few tokens then follow an odd one.
    where = torch.randint(TIME - TIME // 4, TIME, (BATCH,), generator=generator)
    texts = texts.clone()
    texts[rows, where] = (texts[rows, where] % (VOCABULARY - 1)) + 1
    return _weights(model), texts, torch.ones(BATCH, dtype=torch.float64)


def _model(seed: int) -> Any:
    from pertoken.testing import tiny_model

    return tiny_model("llama", vocab_size=VOCABULARY, seed=seed)


def _weights(model: Any) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _sample(model: Any, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(1, VOCABULARY, (BATCH, 1), generator=generator)
    with torch.no_grad():
        for _ in range(TIME):
            chances = model(input_ids=texts).logits[:, -1].softmax(-1)
            texts = torch.cat([texts, torch.multinomial(chances, 1, generator=generator)], 1)
    return texts


def _log_probs(model: Any, texts: torch.Tensor) -> torch.Tensor:
    """log p of every token behind the first: [batch, time]."""
    logits = model(input_ids=texts[:, :-1]).logits.log_softmax(-1)
    return logits.gather(-1, texts[:, 1:, None])[..., 0]
