"""Update direction on a problem small enough to know the true gradient.

Policy: a table of logits [steps, symbols], every step independent of the others. Reward 1 where at
least `GOAL` of the steps show the target symbol. 64 texts are drawn from the old policy and their
advantages standardised. The policy then drifts from it, and at the place it has drifted to each
objective's gradient on those 64 texts is compared with the gradient of the expected reward there,
summed over all texts. All seeds run at once: [seeds, ...].
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import torch

from pertoken.reproduce._fiberpo_methods import Loss

STEPS, SYMBOLS, GOAL = 6, 4, 4
SAMPLES = 64
START = 0.5  # standard deviation of the old policy's logits
BIAS = 0.7  # of the target's logit, so that about one text in six is rewarded
ASCENT = 4.0  # step along the unclipped policy gradient of a text's mean
NOISE = 0.3  # standard deviation of the noise on the logits, where there is some
DRIFTS = tuple(product(("ascent", "mixed"), (4, 8, 16)))


def update_cosines(
    losses: Mapping[str, Loss], drift: tuple[str, int], seeds: int, first_seed: int
) -> dict[str, torch.Tensor]:
    """Cosine of every objective's update with the true gradient: name -> [seeds].

    drift: ("ascent" or "mixed", steps). 0 where an objective gives no gradient at all. `losses`
    must hold "policy gradient", the drift itself.
    """
    logits, texts, noise = _draw(seeds, first_seed)
    reward = _reward(texts)
    centred = reward - reward.mean(1, keepdim=True)
    advantages = centred / reward.std(1, keepdim=True).clamp(min=1e-6)
    old = _log_probs(logits, texts)
    at = logits.clone()
    for _ in range(drift[1]):
        at = at + ASCENT * _update(losses["policy gradient"], at, texts, old, advantages)
    if drift[0] == "mixed":
        at = at + NOISE * noise
    truth = true_gradient(at).flatten(1)
    return {
        name: torch.nn.functional.cosine_similarity(
            _update(loss, at, texts, old, advantages).flatten(1), truth, eps=1e-12
        )
        for name, loss in losses.items()
    }


def true_gradient(logits: torch.Tensor) -> torch.Tensor:
    """Gradient of the expected reward, by all texts: [seeds, steps, symbols]."""
    texts = torch.tensor(list(product(range(SYMBOLS), repeat=STEPS)))
    at = logits.detach().clone().requires_grad_()
    every = texts.expand(len(at), -1, -1)
    expected = (_log_probs(at, every).sum(-1).exp() * _reward(every)).sum()
    (found,) = torch.autograd.grad(expected, at)
    return found


def _draw(seeds: int, first: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Old logits, texts [seeds, samples, steps] and noise, each from the seed's own generator."""
    logits, texts, noise = [], [], []
    for seed in range(first, first + seeds):
        generator = torch.Generator().manual_seed(seed)
        shape = (STEPS, SYMBOLS)
        logits.append(START * torch.randn(shape, generator=generator, dtype=torch.float64))
        logits[-1][:, 0] += BIAS
        chances = logits[-1].softmax(-1)
        texts.append(torch.multinomial(chances, SAMPLES, replacement=True, generator=generator).T)
        noise.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    return torch.stack(logits), torch.stack(texts), torch.stack(noise)


def _reward(texts: torch.Tensor) -> torch.Tensor:
    """The target is symbol 0 at every step; symbols are alike, so which one does not matter."""
    return ((texts == 0).sum(-1) >= GOAL).double()


def _log_probs(logits: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """log p of every symbol of every text: [seeds, samples, steps]."""
    table = logits.log_softmax(-1).transpose(1, 2)  # [seeds, symbols, steps]
    return table.gather(1, texts)


def _update(
    loss: Loss,
    logits: torch.Tensor,
    texts: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
) -> torch.Tensor:
    """Minus the gradient of the loss, one batch per seed: [seeds, steps, symbols]."""
    at = logits.detach().clone().requires_grad_()
    new = _log_probs(at, texts).flatten(0, 1)
    value, _ = loss(
        new,
        old.flatten(0, 1),
        advantages.flatten(),
        torch.ones_like(new),
        reduction="sequence_mean",
        total=SAMPLES,
    )
    (found,) = torch.autograd.grad(value, at)
    return -found
