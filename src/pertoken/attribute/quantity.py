"""What is explained, apart from how: a number read off the next-token logits.

Every quantity is a function `(logits [rows, vocab], targets [rows]) -> [rows]`, differentiable, so
every method can explain every quantity. Logarithms are natural: units are nats. Add your own with
`register`:

    @register("odds", unit="nats")
    def log_odds(logits, targets):
        p = probability(logits, targets)
        return torch.log(p / (1 - p))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pertoken.errors import PertokenError, nearest

Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`(logits [rows, vocab], targets [rows]) -> [rows]`."""


@dataclass(frozen=True)
class Quantity:
    """A named measure. unit: "probability" for numbers in [0, 1], "nats" for logarithms."""

    name: str
    unit: str
    measure: Measure

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """One number per row, from logits [rows, vocab] and target ids [rows]."""
        return self.measure(logits, targets)


QUANTITIES: dict[str, Quantity] = {}
"""All quantities by name; `register` adds to them."""


def register(name: str, unit: str) -> Callable[[Measure], Measure]:
    """Make a function known as a quantity of this name (replacing one of the same name)."""
    if unit not in ("probability", "nats"):
        raise PertokenError(f"the unit of a quantity is 'probability' or 'nats', not {unit!r}")

    def keep(measure: Measure) -> Measure:
        QUANTITIES[name] = Quantity(name, unit, measure)
        return measure

    return keep


def find(quantity: str | Quantity) -> Quantity:
    """The quantity of a name; one that is an object already is given back.

    >>> find("entropy").unit
    'nats'
    """
    if isinstance(quantity, Quantity):
        return quantity
    if quantity not in QUANTITIES:
        raise PertokenError(
            f"unknown quantity {quantity!r}{nearest(str(quantity), QUANTITIES)}; there is: "
            f"{', '.join(QUANTITIES)}, and contrast(foil)"
        )
    return QUANTITIES[quantity]


@register("probability", unit="probability")
def probability(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The probability of the target."""
    return log_probability(logits, targets).exp()


@register("log-probability", unit="nats")
def log_probability(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The logarithm of the target's probability, nats.

    >>> log_probability(torch.zeros(1, 4), torch.tensor([2])).exp().item()
    0.25
    """
    return logit(logits, targets) - logits.logsumexp(-1)


@register("logit", unit="nats")
def logit(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The target's logit: its log-probability up to a constant that depends on the input, nats."""
    return logits.gather(-1, targets[:, None])[:, 0]


@register("entropy", unit="nats")
def entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The entropy of the next token, nats; the target does not matter.

    >>> round(entropy(torch.zeros(1, 8), torch.tensor([0])).exp().item(), 4)
    8.0
    """
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def contrast(foil: int) -> Quantity:
    """Why the target and not the token `foil`: log of the ratio of their probabilities, nats.

    Raises PertokenError for a foil that is no id; one that the model does not know is refused when
    it is asked. Source: contrastive explanations, Yin and Neubig 2022.

    >>> contrast(0)(torch.tensor([[1.0, 3.0]]), torch.tensor([1])).item()
    2.0
    """

    if not isinstance(foil, int) or isinstance(foil, bool) or foil < 0:
        raise PertokenError(f"a foil is the id of a token, 0 or more, got {foil!r}")

    def difference(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if foil >= logits.shape[-1]:
            raise PertokenError(f"the foil must be in 0..{logits.shape[-1] - 1}, got {foil}")
        return logit(logits, targets) - logits[:, foil]

    return Quantity(f"contrast with token {foil}", "nats", difference)
