"""A tiny policy that is right half the time, its own answers, its two copies, and the pairs.

What critical-token DPO needs, on the sums of `_worked_sums`; everything but the models is the
library's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from random import Random
from typing import Any

import torch

from pertoken.reproduce import _worked_sums as lab
from pertoken.train import (
    Lesson,
    Sampled,
    contrast_data,
    replaced,
    rollout_scores,
    sample_answers,
    tdpo_loss,
    token_dpo_loss,
    weighted_nll,
)
from pertoken.train.contrast import scored
from pertoken.train.critical_tokens import continued

BASE_EXAMPLES, BASE_STEPS, BASE_RATE = 4000, 600, 2e-3
ENOUGH, ASKED, EVERY = 50, 200, 20  # points; problems, and steps between the looks
QUESTIONS, SAMPLES, TEMPERATURE = 1500, 64, 1.0
COPY_STEPS, COPY_RATE = 60, 3e-4
EPOCHS, DPO_BATCH, BETA = 3, 32, 0.1  # the authors'
TEST = 500

Unit = dict[str, Any]


class _Enough(Exception):
    """The training of a base model may end."""


class Signs:
    """The tokenizer of the sums, as far as sampling and judging ask for one."""

    eos_token_id = lab.END

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": lab.ids_of(text)}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(lab.SIGNS[one - 3] for one in ids if one > lab.MASK)


SIGNS = Signs()


class Start:
    """A policy, its own answers to the training questions, its two copies, and the pairs."""

    def __init__(self, seed: int, smoke: bool) -> None:
        self.seed, self.smoke = seed, smoke
        rows = lab.sums(lab.BATCH if smoke else BASE_EXAMPLES, f"base {seed}")
        self.policy = self._base(rows)
        self.known = rows + lab.sums(8 if smoke else QUESTIONS, f"pairs {seed}", without=rows)
        asked = [_lesson(row) for row in self.known[len(rows) :]]
        answers = sample_answers(
            self.policy,
            SIGNS,
            asked,
            n=4 if smoke else SAMPLES,
            temperature=TEMPERATURE,
            top_p=1.0,
            max_new_tokens=26,
            batch=512,
            seed=seed,
        )
        # One judge for all: what stands behind the last "=".
        answers = [
            [replace(one, right=_is(row, one.text)) for one in some]
            for some, row in zip(answers, self.known[len(rows) :], strict=True)
        ]
        if smoke:  # a model of two steps has no right answer
            answers = [[*some, _right(one)] for some, one in zip(answers, asked, strict=True)]
        data = contrast_data([one.prompt for one in asked], answers, seed)
        self.pairs = data.pairs
        self.copies = [self._copy(lessons) for lessons in (data.positive, data.negative)]
        self.ids, self.weights = self._encoded()

    def _base(self, rows: Sequence[lab.Sum]) -> Any:
        """A model that is right half the time: its training ends when it is."""
        model = lab.new_model(self.seed)
        asked = lab.sums(ASKED, f"base dev {self.seed}", without=rows)

        def watch(done: int) -> None:
            if done % EVERY:
                return
            model.eval()
            if 100 * sum(lab.solved(model, asked)) / ASKED >= ENOUGH:
                raise _Enough
            model.train()

        with suppress(_Enough):
            lab.learn(
                model,
                *lab.encode(rows),
                _mean_loss,
                steps=2 if self.smoke else BASE_STEPS,
                learning_rate=BASE_RATE,
                seed=self.seed,
                watch=watch,
            )
        return model.eval()

    def _copy(self, lessons: Sequence[Lesson]) -> Any:
        """The policy after learning some answers."""
        model = lab.new_model(self.seed)
        model.load_state_dict(self.policy.state_dict())
        rows = [lab.Sum(one.prompt, one.answer, 0) for one in lessons]
        rows = (rows * (lab.BATCH // len(rows) + 1))[: max(len(rows), lab.BATCH)]
        steps = 2 if self.smoke else COPY_STEPS
        return lab.learn(
            model,
            *lab.encode(rows),
            _mean_loss,
            steps=steps,
            learning_rate=COPY_RATE,
            seed=self.seed,
        )

    def _encoded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels [pairs, 2, 2, time] of both answers, and the weights of the rejected."""
        sides = [
            lab.encode([lab.Sum(one.prompt, getattr(one, side), 0) for one in self.pairs])
            for side in ("chosen", "rejected")
        ]
        width = max(ids.shape[1] for ids, _ in sides)
        fill = (lab.PAD, lab.IGNORED)
        both = [
            [
                torch.nn.functional.pad(each, (0, width - each.shape[1]), value=value)
                for each, value in zip(side, fill, strict=True)
            ]
            for side in sides
        ]
        ids = torch.stack([torch.stack(side, 1) for side in both], 1)
        rows = [_cut(pair.prompt, pair.rejected) for pair in self.pairs]
        weights = torch.zeros(len(rows), width)
        for place, ((own, before), (scores, _)) in enumerate(
            zip(rows, scored(self.copies[0], self.copies[1], rows), strict=True)
        ):
            weights[place, before : len(own)] = 1 - torch.tensor(scores)
        return ids, weights

    def trained(self, arm: str, rate: float) -> Any:
        """The policy after preference training."""
        model = lab.new_model(self.seed)
        model.load_state_dict(self.policy.state_dict())
        draw = torch.Generator().manual_seed(self.seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
        steps = 2 if self.smoke else EPOCHS * len(self.ids) // DPO_BATCH
        for step in range(steps):
            rows = torch.randint(len(self.ids), (DPO_BATCH,), generator=draw)
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / max(1, 0.1 * steps), 1 - step / steps)
            loss = self._loss(arm, model, rows, step)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), lab.CLIP)
            optimizer.step()
        return model.eval()

    def _loss(self, arm: str, model: Any, rows: torch.Tensor, step: int) -> torch.Tensor:
        (chosen, chosen_labels), (rejected, rejected_labels) = (
            self.ids[rows, side].unbind(1) for side in (0, 1)
        )
        masks = [labels[:, 1:] != lab.IGNORED for labels in (chosen_labels, rejected_labels)]
        ids = torch.cat([chosen, rejected])
        logits = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        with torch.no_grad():
            past = self.policy(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        sides = [each.gather(-1, ids[:, 1:, None])[..., 0].chunk(2) for each in (logits, past)]
        given = (*sides[0], *sides[1], *masks)
        if arm == "tdpo":
            kl = (past.exp() * (past - logits)).sum(-1).chunk(2)
            return tdpo_loss(*given, *kl, beta=BETA)[0]
        weights = self.weights[rows, 1:] if arm != "dpo" else None
        if arm == "shuffled weights" and weights is not None:
            weights = _shuffled(weights, masks[1], self.seed * 100_003 + step)
        how: Any = "position" if arm == "cdpo by position" else "sequence"
        return token_dpo_loss(*given, rejected_weights=weights, beta=BETA, reduction=how)[0]

    def accuracy(self, model: Any, tests: str) -> float:
        """The share of new questions answered rightly, in points."""
        rows = lab.sums(8 if self.smoke else TEST, f"{tests} {self.seed}", without=self.known)
        return 100 * sum(lab.solved(model, rows)) / len(rows)

    def critical(self, count: int) -> list[Unit]:
        """Wrong answers to new questions: the critical token, what replacing does, its ranks."""
        rows = lab.sums(40 * count, f"wrong {self.seed}", without=self.known)
        found: list[Unit] = []
        draw = Random(self.seed)
        for number, row in enumerate(rows):
            if len(found) == count:
                break
            one = self._one(row, draw, number)
            if one is not None:
                found.append(one)
        return found

    def _one(self, row: lab.Sum, draw: Random, number: int) -> Unit | None:
        """What is measured of one sampled answer; None where it is right or can't be read."""
        n = 4 if self.smoke else SAMPLES
        given: dict[str, Any] = {
            "temperature": TEMPERATURE,
            "top_p": 1.0,
            "max_new_tokens": 26,
            "batch": 2048,
        }
        lesson = _lesson(row)
        said = sample_answers(self.policy, SIGNS, [lesson], n=1, seed=number, **given)[0][0]
        if _is(row, said.text) or not (said.answer or self.smoke) or not said.text:
            return None
        prompt, answer = lab.ids_of(row.question), [*lab.ids_of(said.text), lab.END]
        judge = {"is_correct": partial(_is, row), "n": n, **given}
        found = rollout_scores(self.policy, SIGNS, prompt, answer, seed=number, **judge)
        place = found.critical
        if place is None:
            return None
        again = dict(judge, seed=number + 10**6)
        other = draw.choice([at for at in range(len(answer) - 1) if at != place])
        before = draw.randrange(place) if place else None
        model, signs = self.policy, SIGNS
        return {
            "length": len(answer),
            "place": place,
            "other": other,
            "before": before,
            "behind": continued(model, signs, prompt, answer[: place + 1], **again),
            "instead": replaced(model, signs, prompt, answer, place, **again).right,
            "random": replaced(model, signs, prompt, answer, other, **again).right,
            "earlier": None
            if before is None
            else replaced(model, signs, prompt, answer, before, **again).right,
            "n": n,
            "ranks": self._ranks(prompt, answer, place),
        }

    @torch.no_grad()
    def _ranks(self, prompt: list[int], answer: list[int], place: int) -> dict[str, int]:
        """How many tokens of the answer stand before the critical one in each ranking."""
        ids = torch.tensor([[*prompt, *answer]])
        logits = self.policy(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        scores, ratios = scored(self.copies[0], self.copies[1], [(ids[0].tolist(), len(prompt))])[0]
        rankings = {
            "s_t": scores,
            "log ratio": ratios,
            "probability": logits.gather(-1, ids[0, len(prompt) :, None])[..., 0].tolist(),
            "entropy": (logits.exp() * logits).sum(-1).tolist(),  # the highest first
        }
        return {
            name: sum(one < values[place] for one in values) for name, values in rankings.items()
        }


start = cache(Start)
"""A start, made once in a process."""


def _lesson(row: lab.Sum) -> Lesson:
    return Lesson(row.question, f"{row.worked}#### {row.value}")


def _right(lesson: Lesson) -> Sampled:
    worked, _, value = lesson.answer.partition("#### ")
    return Sampled(worked, value, True)


def _is(row: lab.Sum, text: str) -> bool:
    return text.rpartition("=")[2] == str(row.value)


def _cut(question: str, answer: str) -> tuple[list[int], int]:
    front = lab.ids_of(question)
    return [*front, *lab.ids_of(answer), lab.END], len(front)


def _mean_loss(
    model: Any, ids: torch.Tensor, labels: torch.Tensor, step: int, steps: int
) -> torch.Tensor:
    mask = labels[:, 1:] != lab.IGNORED
    return weighted_nll(lab.log_probs_of(model, ids), torch.ones_like(mask), mask)


def _shuffled(weights: torch.Tensor, mask: torch.Tensor, seed: int) -> torch.Tensor:
    """The weights of each answer among its own tokens in another order."""
    found = torch.zeros_like(weights)
    draw = torch.Generator().manual_seed(seed)
    for row, own in enumerate(mask):
        values = weights[row, own]
        found[row, own] = values[torch.randperm(len(values), generator=draw)]
    return found
