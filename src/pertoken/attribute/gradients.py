"""Gradient methods: how the quantity changes with the input embeddings.

"input-x-gradient" sums the product of embedding and gradient over the hidden dimension;
"gradient-norm" is the gradient's length; "integrated-gradients" (Sundararajan 2017) integrates the
gradient on the straight way from a baseline, so that values add up to f(x) - f(baseline);
"gradient-shap" (Lundberg 2017, as expected gradients) takes it at random points of the ways from
random baselines, so that values add up to f(x) minus the mean over the baselines, on average.

Own code, checked against captum in the tests. Behind an RMS norm the quantity changes most
within a ten-thousandth of the way from embeddings of zeros, where the nodes of captum's integral
are too far apart: its values do not add up. Here the way is run as alpha = t^8, the same integral
with the nodes where they are needed. A norm also makes input x gradient small: scaling an embedding
changes nothing behind it.

One forward and one backward; of a text of more than 1,024 tokens the blocks run twice, so that one
block's activations are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from pertoken._blocks import replaced
from pertoken.attribute._forward import LONG, last_logits, twice
from pertoken.attribute._linear import blocks_of
from pertoken.attribute._question import Question
from pertoken.attribute._replace import Replacer, prepare
from pertoken.attribute._scores import Scores, seeded
from pertoken.attribute.quantity import Quantity
from pertoken.errors import PertokenError

__all__ = ["gradient_norm", "gradient_shap", "input_x_gradient", "integrated_gradients"]

_POWER = 8
_TOLERANCE = 0.05  # of the whole difference; a note says when integrated gradients miss more


def input_x_gradient(question: Question, quantity: Quantity, *, seed: int = 0) -> Scores:
    """Sum over the hidden dimension of embedding times gradient, [targets, time], signed."""

    def one(place: int) -> torch.Tensor:
        embeds = _embeds(question, place)
        gradient = _gradients(question, quantity, place, embeds)
        return (gradient * embeds).sum(-1)[0]

    return _each_target(question, one)


def gradient_norm(question: Question, quantity: Quantity, *, seed: int = 0) -> Scores:
    """Euclidean length of the gradient at each token's embedding, [targets, time]."""

    def one(place: int) -> torch.Tensor:
        return _gradients(question, quantity, place, _embeds(question, place)).norm(dim=-1)[0]

    return _each_target(question, one)


def integrated_gradients(
    question: Question, quantity: Quantity, *, seed: int = 0, steps: int = 50
) -> Scores:
    """Path integral from embeddings of zeros, Gauss-Legendre with `steps` points, signed.

    A note says so where the values miss f(x) - f(baseline) by more than 5 %.
    """
    if steps < 1:
        raise PertokenError(f"steps must be 1 or more, got {steps}")
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    t = torch.from_numpy((nodes + 1) / 2).to(question.ids.device)
    share = torch.from_numpy(weights / 2).to(t) * _POWER * t ** (_POWER - 1)
    alphas = t**_POWER
    gaps: list[tuple[float, float]] = []

    def one(place: int) -> torch.Tensor:
        embeds = _embeds(question, place)
        total = torch.zeros_like(embeds[0], dtype=torch.float64)
        for part in _parts(question, place, steps):
            points = alphas[part, None, None].to(embeds.dtype) * embeds
            gradients = _gradients(question, quantity, place, points)
            total += torch.einsum("r,rth->th", share[part], gradients)
        values = (total * embeds[0]).sum(-1)
        ends = torch.cat((embeds, torch.zeros_like(embeds)))
        with torch.no_grad():
            top, bottom = _function(question, quantity, place)(ends).tolist()
        if abs(float(values.sum()) - (top - bottom)) > _TOLERANCE * abs(top - bottom):
            gaps.append((float(values.sum()), top - bottom))
        return values

    scores = _each_target(question, one)
    if not gaps:
        return scores
    total, difference = gaps[0]
    note = (
        f"{len(gaps)} of {len(scores.values)} sums miss f(x) - f(baseline) by more than 5 % "
        f"(the first is {total:.3g}, wanted {difference:.3g}): more steps help"
    )
    return Scores(scores.values, (note,))


def gradient_shap(
    question: Question,
    quantity: Quantity,
    *,
    seed: int = 0,
    samples: int = 50,
    replacer: str | Replacer = "uniform",
) -> Scores:
    """Expected gradients over texts whose tokens are replaced, and random points between, signed.

    replacer: where the baselines' tokens come from; protected tokens stay.
    """
    if samples < 1:
        raise PertokenError(f"samples must be 1 or more, got {samples}")
    draw = prepare(replacer, question)
    table = question.model.get_input_embeddings()

    def one(place: int) -> torch.Tensor:
        generator = seeded(seed, place - question.prompt)
        ids, free = question.ids[:place], question.free[:place]
        embeds = _embeds(question, place)
        uniforms = torch.rand(samples, place + 1, generator=generator, dtype=torch.float64)
        uniforms = uniforms.to(ids.device)
        texts = torch.where(free, draw(uniforms[:, 1:]), ids)
        total = torch.zeros(place, dtype=torch.float64, device=ids.device)
        for part in _parts(question, place, samples):
            with torch.no_grad():
                way = embeds - table(texts[part])
            points = embeds - uniforms[part, :1, None].to(embeds.dtype) * way
            total += (_gradients(question, quantity, place, points) * way).sum((0, 2))
        return total / samples

    return _each_target(question, one)


def _gradients(
    question: Question, quantity: Quantity, place: int, points: torch.Tensor
) -> torch.Tensor:
    """Gradient of the quantity at embeddings [rows, place, hidden], in float64."""
    points = points.detach().requires_grad_()
    blocks = blocks_of(question.model) if place > LONG else []
    with torch.enable_grad(), replaced(blocks, lambda block: partial(twice, block.forward)):
        values = _function(question, quantity, place)(points)
        # Rows do not see each other, so the gradient of the sum is that of each row.
        (gradient,) = torch.autograd.grad(values.sum(), points)
    return gradient.double()


def _parts(question: Question, place: int, rows: int) -> list[slice]:
    """Rows in batches of which all blocks' activations can be held."""
    step = max(1, LONG // place)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def _each_target(question: Question, one: Callable[[int], torch.Tensor]) -> Scores:
    values = torch.full((len(question.places), len(question.ids)), torch.nan, dtype=torch.float64)
    for number, place in enumerate(question.places):
        values[number, :place] = one(place).detach().cpu()
        question.progress(number + 1, len(question.places))
    return Scores(values)


@torch.no_grad()
def _embeds(question: Question, place: int) -> torch.Tensor:
    """Input embeddings [1, place, hidden] of the text before a target."""
    embedded: torch.Tensor = question.model.get_input_embeddings()(question.ids[None, :place])
    return embedded.detach().clone()


def _function(
    question: Question, quantity: Quantity, place: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The quantity [rows] as a function of embeddings [rows, place, hidden]."""
    target = question.ids[place : place + 1]

    def f(embeds: torch.Tensor) -> torch.Tensor:
        logits = last_logits(question.model, embeds=embeds)
        return quantity(logits, target.expand(len(logits)))

    return f
