"""A learned deferral rule: how much deferring an answer gains, from features of the answer.

The target is z = (1 + large − small) / 2 of the two answers' qualities in 0 … 1, and the loss the
cross-entropy to it. Its minimum orders questions by the expected gain, which is the order of the
best curve; for answers that are right or wrong, z is 0, ½ or 1 (our reading).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

__all__ = ["Learned", "fit"]

FOLDS = 5
DECAYS = (0.001, 0.01, 0.1, 1.0)  # of the logistic rule: one is chosen by cross-validation
STEPS = (10, 25, 50, 100)  # of the MLP, likewise
HIDDEN = (32,) * 5  # with batch normalisation; Adam
RATE = 0.005


@dataclass(frozen=True)
class Learned:
    """Linear layers with ReLU between them behind standardised features; float64."""

    mean: torch.Tensor
    scale: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Log-odds [items] that deferring gains, of features [items, features]."""
        hidden = (features - self.mean) * self.scale
        for place, (weight, bias) in enumerate(self.layers):
            hidden = (hidden.relu() if place else hidden) @ weight.T + bias
        return hidden[:, 0]

    def to_list(self) -> list[Any]:
        """Plain numbers, for a file."""
        layers = [[weight.tolist(), bias.tolist()] for weight, bias in self.layers]
        return [self.mean.tolist(), self.scale.tolist(), layers]

    @classmethod
    def from_list(cls, value: Sequence[Any]) -> Learned:
        """What `to_list` gave."""
        mean, scale, layers = value
        pairs = tuple((_tensor(weight), _tensor(bias)) for weight, bias in layers)
        return cls(_tensor(mean), _tensor(scale), pairs)


def fit(
    features: torch.Tensor, gains: torch.Tensor, net: str, seed: int
) -> tuple[Learned, torch.Tensor]:
    """The rule, and for each item the log-odds by a rule that was fitted without it, [items].

    features: [items, features]; gains: [items], in −1 … 1; net: "logistic" or "mlp".
    """
    targets = (1 + gains) / 2
    draw = torch.Generator().manual_seed(seed)
    fold = torch.randperm(len(targets), generator=draw) % FOLDS
    apart: list[torch.Tensor] = []  # by choice
    for number in range(FOLDS):
        inside = fold != number
        rules = _fit(features[inside], targets[inside], net, seed)
        apart = apart or [torch.empty_like(targets) for _ in rules]
        for scores, rule in zip(apart, rules, strict=True):
            scores[~inside] = rule(features[~inside])
    losses = [float(cross_entropy(scores, targets)) for scores in apart]
    best = min(range(len(losses)), key=losses.__getitem__)
    return _fit(features, targets, net, seed)[best], apart[best]


def _fit(features: torch.Tensor, targets: torch.Tensor, net: str, seed: int) -> list[Learned]:
    """A rule for each choice."""
    mean, spread = features.mean(0), features.std(0, unbiased=False)
    # A feature that never moves tells nothing: it stays 0 whatever it is later.
    scale = torch.where(spread > 1e-9 * (1 + mean.abs()), 1 / spread, 0.0)
    inputs = (features - mean) * scale
    found = _logistic(inputs, targets) if net == "logistic" else _mlp(inputs, targets, seed)
    return [Learned(mean, scale, layers) for layers in found]


Layers = tuple[tuple[torch.Tensor, torch.Tensor], ...]


def _logistic(inputs: torch.Tensor, targets: torch.Tensor) -> list[Layers]:
    """The logistic regression of each decay, by Newton's method.

    The penalty is decay / 2 times the squared weights, beside the mean loss of an item in nats.
    """
    # The penalty knows no directions: the fit is the same in the span of the items.
    _, _, axes = torch.linalg.svd(inputs, full_matrices=False)
    design = torch.cat((inputs @ axes.T, torch.ones(len(inputs), 1, dtype=torch.float64)), -1)
    found: list[Layers] = []
    for decay in DECAYS:
        penalty = torch.full((design.shape[1],), decay, dtype=torch.float64)
        penalty[-1] = 0.0  # the bias is free

        def loss(weight: torch.Tensor, penalty: torch.Tensor = penalty) -> float:
            held = penalty @ weight.square() / 2
            return float(cross_entropy(design @ weight, targets) + held)

        weight = torch.zeros(design.shape[1], dtype=torch.float64)
        for _ in range(50):
            chance = (design @ weight).sigmoid()
            slope = design.T @ (chance - targets) / len(targets) + penalty * weight
            if float(slope.abs().max()) < 1e-9:
                break
            curve = (chance * (1 - chance) / len(targets)).clamp(min=1e-12)
            hessian = design.T @ (design * curve[:, None]) + penalty.diag()
            step = torch.linalg.solve(hessian, slope)
            before = loss(weight)
            while loss(weight - step) > before and float(step.abs().max()) > 1e-12:
                step = step / 2
            weight = weight - step
        found.append((((weight[:-1] @ axes)[None], weight[-1:]),))
    return found


def _mlp(inputs: torch.Tensor, targets: torch.Tensor, seed: int) -> list[Layers]:
    """The MLP after each number of steps, its normalisations folded into its layers."""
    sizes, dtype = (inputs.shape[1], *HIDDEN), torch.float64
    found: list[Layers] = []
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        sides = zip(sizes, (*HIDDEN, 1), strict=True)
        linear = [torch.nn.Linear(a, b, dtype=dtype) for a, b in sides]
        # All items are one batch, so its statistics are the ones to keep.
        norms = [torch.nn.BatchNorm1d(size, momentum=1.0, dtype=dtype) for size in HIDDEN]
        pairs = list(zip(linear[:-1], norms, strict=True))
        blocks = [part for pair in pairs for part in (*pair, torch.nn.ReLU())]
        model = torch.nn.Sequential(*blocks, linear[-1])
        weights = list(model.parameters())
        first, second = ([torch.zeros_like(each) for each in weights] for _ in range(2))
        for step in range(1, max(STEPS) + 1):
            slopes = torch.autograd.grad(cross_entropy(model(inputs)[:, 0], targets), weights)
            _adam(weights, slopes, first, second, step)
            if step in STEPS:
                last = (linear[-1].weight.detach().clone(), linear[-1].bias.detach().clone())
                found.append((*(_folded(*pair) for pair in pairs), last))
    return found


@torch.no_grad()
def _adam(
    weights: Sequence[torch.Tensor],
    slopes: Sequence[torch.Tensor],
    first: Sequence[torch.Tensor],
    second: Sequence[torch.Tensor],
    step: int,
) -> None:
    """One step of Adam in place; torch's own takes seconds to import."""
    for weight, slope, mean, square in zip(weights, slopes, first, second, strict=True):
        mean.lerp_(slope, 0.1)
        square.lerp_(slope.square(), 0.001)
        spread = (square / (1 - 0.999**step)).sqrt() + 1e-8
        weight.addcdiv_(mean, spread, value=-RATE / (1 - 0.9**step))


@torch.no_grad()
def _folded(linear: Any, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """One linear layer that does what a layer and its normalisation do."""
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    bias = (linear.bias - norm.running_mean) * factor + norm.bias
    return linear.weight * factor[:, None], bias


def _tensor(value: Any) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)
