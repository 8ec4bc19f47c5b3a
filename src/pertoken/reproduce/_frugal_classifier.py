"""A linear classifier on a frozen model's states: what classification is for a small model.

Asked in words, models of this size answer every mail alike. Their states tell the mails apart: the
mean over the tokens of the last layer, standardised, with a logistic regression learnt on
development mails (ours; the paper asks models of 8B and more in words).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

DECAY = 0.1  # times half the squared weights, beside the mean loss of a mail


def learn(
    model: Any, tokenizer: Any, texts: Sequence[str], labels: Sequence[int]
) -> dict[str, Any]:
    """What a `Classifier` knows after texts with labels 0 and 1, a JSON form."""
    states = torch.stack([_state(model, tokenizer, text) for text in texts])
    mean, scale = states.mean(0), states.std(0) + 1e-6
    weight, bias = fit((states - mean) / scale, torch.tensor(labels))
    found = {"mean": mean, "scale": scale, "weight": weight, "bias": bias}
    return {name: value.tolist() for name, value in found.items()}


class Classifier:
    """Says how likely a text's label is 1, after what `learn` has given for the same model."""

    def __init__(self, model: Any, tokenizer: Any, learnt: Mapping[str, Any]) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._learnt = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in learnt.items()
        }

    def ids(self, text: str) -> list[int]:
        """The text's tokens, special ones left out."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def loss(self, text: str, label: int) -> float:
        """Negative log-likelihood of the label, nats."""
        state, own = _state(self._model, self._tokenizer, text), self._learnt
        score = (state - own["mean"]) / own["scale"] @ own["weight"] + own["bias"]
        return float(torch.nn.functional.softplus(-score if label else score))


def _state(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """[hidden], float64."""
    ids = torch.tensor([tokenizer(text)["input_ids"]], device=model.device)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[0].double().mean(0).cpu()


def fit(
    states: torch.Tensor, labels: torch.Tensor, decay: float = DECAY
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logistic regression: weight [hidden] and bias, float64; states: [texts, hidden].

    >>> weight, bias = fit(torch.tensor([[-1.0], [1.0]]).double(), torch.tensor([0, 1]))
    >>> bool(weight > 0), abs(float(bias)) < 1e-6
    (True, True)
    """
    weight = torch.zeros(states.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [weight, bias],
        max_iter=200,
        tolerance_grad=1e-8,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        search.zero_grad()
        score = states @ weight + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(score, labels.double())
        total = loss + decay / 2 * weight.square().sum()
        total.backward()
        return total

    search.step(closure)
    return weight.detach(), bias.detach()
