"""Perturbation methods beside ReAGent: occlusion and LIME.

"occlusion": a token matters as much as the quantity falls, on average, when it alone is replaced.
"lime" (Ribeiro 2016): tokens are replaced at random, each with probability 1/2, and a weighted
linear model of what is kept explains the quantity; its coefficients are the values. Texts that keep
more weigh more: sqrt(exp(-(1 - c)^2 / width^2)), c the cosine between what is kept and all.

Own code for LIME: captum's needs scikit-learn beside it and draws from global random states.
Protected tokens are never replaced and not rated.
"""

from __future__ import annotations

import torch

from pertoken.attribute._forward import most_tokens, read_rows
from pertoken.attribute._question import Question
from pertoken.attribute._replace import Replacer, prepare
from pertoken.attribute._scores import Scores, seeded
from pertoken.attribute.quantity import Quantity
from pertoken.errors import PertokenError

__all__ = ["lime", "occlusion"]

_RIDGE = 1e-6  # only so that the equations have one solution
_WIDTH = 0.25  # as in the authors' own package, on the cosine distance


def occlusion(
    question: Question,
    quantity: Quantity,
    *,
    seed: int = 0,
    draws: int = 3,
    replacer: str | Replacer = "lm_topk",
) -> Scores:
    """Fall of the quantity when a token alone is replaced, mean over `draws` replacements."""
    if draws < 1:
        raise PertokenError(f"draws must be 1 or more, got {draws}")
    draw = prepare(replacer, question)
    values = _empty(question)
    for number, place in enumerate(question.places):
        ids, free = question.ids[:place], question.free[:place].nonzero()[:, 0]
        uniforms = torch.rand(draws, place, generator=seeded(seed, number), dtype=torch.float64).to(
            ids.device
        )
        stand_in = draw(uniforms)
        whole = _measure(question, quantity, place, ids[None])
        for some in free.split(max(1, most_tokens(question.model) // place)):
            rows = ids.repeat(draws, len(some), 1)  # [draws, some, time]
            each = torch.arange(len(some), device=ids.device)
            rows[:, each, some] = stand_in[:, some]
            measured = _measure(question, quantity, place, rows.flatten(0, 1))
            falls = whole - measured.view(draws, len(some)).mean(0)
            values[number, some.cpu()] = falls.cpu()
        question.progress(number + 1, len(question.places))
    return Scores(values)


def lime(
    question: Question,
    quantity: Quantity,
    *,
    seed: int = 0,
    samples: int = 200,
    replacer: str | Replacer = "lm_topk",
) -> Scores:
    """Coefficients of a weighted linear model of which tokens are kept.

    With fewer samples than tokens they are the smallest coefficients that fit.
    """
    if samples < 2:
        raise PertokenError(f"samples must be 2 or more, got {samples}")
    draw = prepare(replacer, question)
    values = _empty(question)
    for number, place in enumerate(question.places):
        ids, free = question.ids[:place], question.free[:place]
        uniforms = torch.rand(
            2, samples, place, generator=seeded(seed, number), dtype=torch.float64
        ).to(ids.device)
        kept = (uniforms[0] < 0.5) | ~free
        kept[0] = True  # the text itself is one of the samples
        rows = torch.where(kept, ids, draw(uniforms[1]))
        measured = _measure(question, quantity, place, rows)
        found = _coefficients(kept[:, free].double(), measured)
        values[number, free.nonzero()[:, 0].cpu()] = found.cpu()
        question.progress(number + 1, len(question.places))
    return Scores(values)


def _coefficients(kept: torch.Tensor, measured: torch.Tensor) -> torch.Tensor:
    """Weighted least squares [tokens] of `measured` [samples] on `kept` [samples, tokens].

    >>> kept = torch.tensor([[1., 1.], [1., 0.], [0., 1.], [0., 0.]], dtype=torch.float64)
    >>> _coefficients(kept, kept @ torch.tensor([2., -1.], dtype=torch.float64)).round(decimals=3)
    tensor([ 2., -1.], dtype=torch.float64)
    """
    cosine = kept.mean(1).sqrt()
    weight = torch.exp(-((1 - cosine) ** 2) / _WIDTH**2).sqrt()
    mean = weight / weight.sum()
    x = kept - mean @ kept  # centred, which takes the place of an intercept
    y = measured - mean @ measured
    root = weight.sqrt()[:, None]
    ridge = _RIDGE**0.5 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    left = torch.cat((root * x, ridge))
    right = torch.cat((root[:, 0] * y, y.new_zeros(x.shape[1])))
    solution: torch.Tensor = torch.linalg.lstsq(left, right[:, None]).solution[:, 0]
    return solution


def _measure(
    question: Question, quantity: Quantity, place: int, rows: torch.Tensor
) -> torch.Tensor:
    """The quantity [rows] at texts [rows, place]."""
    target = question.ids[place]
    return read_rows(
        question.model,
        [rows],
        lambda logits, _: quantity(logits, target.expand(len(logits))).double(),
    )


def _empty(question: Question) -> torch.Tensor:
    return torch.full((len(question.places), len(question.ids)), torch.nan, dtype=torch.float64)
