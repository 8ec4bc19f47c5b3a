"""Contrastive estimation: which tokens of a wrong answer are critical, without sampling from each.

Two copies of the model are fine-tuned on its own answers, one on right ones and one on wrong ones.
A token that the first finds unlikely and the second likely is where answers go wrong (arXiv
2411.19943, section 3):

    s_t = softmax((1 + β) z_positive - β z_negative)[y_t]

Low means critical. Mind that s_t is a probability: it is low for every unlikely token; the log
ratio of the two models (`log_ratio`) is not.

`contrast_data` chooses what the two copies learn, and the pairs of the preference training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from pertoken._padded import batches, right_padded
from pertoken.errors import PertokenError
from pertoken.train.lessons import Lesson, Pair
from pertoken.train.reducer import widened

__all__ = ["ContrastData", "Sampled", "contrast_data", "contrastive_scores", "log_ratio", "scored"]

NEGATIVE_SHARE = 0.5  # of a question's wrong answers, by how often they were given
_PLACES = 1024  # tokens of a batch, at most: the logits of two models lie in memory


@dataclass(frozen=True)
class Sampled:
    """A sampled answer: its text, what it answers ("" where that can't be read), whether right."""

    text: str
    answer: str
    right: bool


@dataclass(frozen=True)
class ContrastData:
    """What the two copies learn, and the pairs; unread: answers that could not be read."""

    positive: list[Lesson]
    negative: list[Lesson]
    pairs: list[Pair]
    unread: int


def contrastive_scores(
    logits_positive: torch.Tensor,
    logits_negative: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    beta: float = 1.0,
) -> torch.Tensor:
    """s_t of each token, [batch, time - 1], column t of token t + 1; 0 under the mask.

    logits: [batch, time, vocab], as the models give them for ids [batch, time]; mask: [batch,
    time], true for the answer's tokens. beta: how much the negative model counts; at 0, and where
    both models are one, s_t is the positive model's probability. Section 3.1 of the paper; its β
    is 1. PertokenError for models of different vocabularies and a negative beta.

    >>> ids, mask = torch.tensor([[0, 1]]), torch.tensor([[False, True]])
    >>> likes, dislikes = torch.tensor([0.8, 0.2]).log(), torch.tensor([0.2, 0.8]).log()
    >>> found = contrastive_scores(dislikes.expand(1, 2, 2), likes.expand(1, 2, 2), ids, mask)
    >>> round(found.item(), 4)  # 0.8² / 0.2 against 0.2² / 0.8
    0.9846
    """
    if logits_positive.shape != logits_negative.shape:
        raise PertokenError(
            "the positive and the negative model must have the same tokens: their logits are "
            f"{list(logits_positive.shape)} and {list(logits_negative.shape)}"
        )
    if not (math.isfinite(beta) and beta >= 0):
        raise PertokenError(f"beta must be 0 or more, got {beta}")
    mixed = (1 + beta) * widened(logits_positive[:, :-1]) - beta * widened(logits_negative[:, :-1])
    chosen = mixed.gather(-1, ids[:, 1:, None])[..., 0]
    return torch.where(mask[:, 1:].bool(), (chosen - mixed.logsumexp(-1)).exp(), 0.0)


def log_ratio(
    logits_positive: torch.Tensor,
    logits_negative: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """log p_positive - log p_negative of each token in nats, shapes as of `contrastive_scores`.

    >>> ids, mask = torch.tensor([[0, 1]]), torch.tensor([[False, True]])
    >>> one, other = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    >>> found = log_ratio(one.expand(1, 2, 2), other.expand(1, 2, 2), ids, mask)
    >>> round(found.exp().item(), 4)
    2.0
    """
    sides = [
        widened(each[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        for each in (logits_positive, logits_negative)
    ]
    return torch.where(mask[:, 1:].bool(), sides[0] - sides[1], 0.0)


@torch.no_grad()
def scored(
    positive: Any, negative: Any, rows: Sequence[tuple[Sequence[int], int]], beta: float = 1.0
) -> list[tuple[list[float], list[float]]]:
    """s_t and the log ratio of each answer token of many texts, in batches of like length.

    rows: (ids of prompt and answer, tokens of the prompt); the first token of a row has no score,
    even without a prompt, since nothing predicts it. Both models in evaluation, without gradient;
    the mode they were in comes back.
    """
    found: list[tuple[list[float], list[float]]] = [([], [])] * len(rows)
    modes = positive.training, negative.training
    positive.eval(), negative.eval()
    try:
        for part in batches([len(ids) for ids, _ in rows], _PLACES):
            texts = [torch.tensor(rows[text][0], device=positive.device) for text in part]
            ids, real = right_padded(texts)
            more = {} if real is None else {"attention_mask": real.long()}
            one, other = (
                each(ids, use_cache=False, **more).logits for each in (positive, negative)
            )
            every = torch.ones_like(ids)
            scores = contrastive_scores(one, other, ids, every, beta).tolist()
            ratios = log_ratio(one, other, ids, every).tolist()
            for at, text in enumerate(part):
                own = slice(max(rows[text][1] - 1, 0), len(rows[text][0]) - 1)
                found[text] = scores[at][own], ratios[at][own]
    finally:
        positive.train(modes[0]), negative.train(modes[1])
    return found


def contrast_data(
    questions: Sequence[str], answers: Sequence[Sequence[Sampled]], seed: int = 0
) -> ContrastData:
    """Choose from sampled answers what the positive and the negative model learn, and the pairs.

    answers: many of each question (the paper samples 64). Those that can't be read are neither
    right nor wrong and are left out. Positive: one right answer of each question. Negative: one of
    each different wrong answer, the most frequent first, until half of the question's wrong ones
    are stood for; behind the first only those given more than once. Pairs: a right answer, and one
    of the most frequent wrong answer. Which text stands for an answer is drawn with `seed`.
    Section 3.2 of the paper, details as in the authors' code. PertokenError where there is no right
    answer at all, or no wrong one.

    >>> wrong, right = Sampled("2+2=5", "5", False), Sampled("2+2=4", "4", True)
    >>> found = contrast_data(["2+2?"], [[wrong, right, wrong, Sampled("um", "", False)]])
    >>> found.pairs[0].chosen, found.pairs[0].rejected, found.unread
    ('2+2=4', '2+2=5', 1)
    """
    draw = Random(seed)
    made = ContrastData([], [], [], sum(not one.answer for some in answers for one in some))
    for number, (question, some) in enumerate(zip(questions, answers, strict=True), 1):
        place = f"question {number}"
        by_answer: dict[tuple[str, bool], list[str]] = {}
        for one in some:
            if one.answer:
                by_answer.setdefault((one.answer, one.right), []).append(one.text.strip())
        ranked = sorted(by_answer, key=lambda each: -len(by_answer[each]))
        texts = {each: draw.choice(by_answer[each]) for each in ranked}
        right = next((texts[each] for each in ranked if each[1]), None)
        wrong = [each for each in ranked if not each[1]]
        if right is not None:
            made.positive.append(Lesson(question, right, place))
        wanted = left = math.ceil(NEGATIVE_SHARE * sum(len(by_answer[each]) for each in wrong))
        for each in wrong:
            if left > 0 and (left == wanted or len(by_answer[each]) > 1):
                made.negative.append(Lesson(question, texts[each], place))
                left -= len(by_answer[each])
        if right is not None and wrong:
            made.pairs.append(Pair(question, right, texts[wrong[0]], place))
    for name, lessons in (("right", made.positive), ("wrong", made.negative)):
        if not lessons:
            raise PertokenError(
                f"none of {sum(map(len, answers))} sampled answers is {name} ({made.unread} could "
                "not be read): sample more, at another temperature, or take other questions"
            )
    return made
