"""Sums of several steps with their worked answers, and the tiny Llamas that learn them.

    a=3,b=8:a+5-b+7>3+5=8;8-8=0;0+7=7

One token per character. Terms have one digit and no step leaves 0 to 99. In the "irrelevant"
variant the second name is never used (a=3,b=8:a+5-2+7>); in no training is that so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

PAD, END, MASK = 0, 1, 2
SIGNS = "0123456789+-=:;,>ab"
TOKENS = 3 + len(SIGNS)
IGNORED = -100
TERMS = 4
BATCH, CLIP, DECAY, WARM_UP = 64, 1.0, 0.01, 0.05
LAYERS, HIDDEN, HEADS = 3, 96, 4

Step = Callable[[Any, torch.Tensor, torch.Tensor, int, int], torch.Tensor]
"""(model, ids, labels, step, steps) -> the loss of a training step."""


@dataclass(frozen=True)
class Sum:
    """A question up to its ">", its worked answer, and the value."""

    question: str
    worked: str
    value: int


def sums(
    count: int,
    seed: int | str,
    *,
    names: bool = True,
    irrelevant: bool = False,
    without: Sequence[Sum] = (),
) -> list[Sum]:
    """Different sums; `without` are left out. names: two terms are named before the sum.

    >>> one = sums(1, 0)[0]
    >>> one.worked.rpartition("=")[2] == str(one.value)
    True
    """
    random, found = Random(f"{seed}"), dict.fromkeys(one.question for one in without)
    left = len(found)
    made: list[Sum] = []
    while len(found) < count + left:
        one = _draw(random, names, irrelevant)
        if one is not None and one.question not in found:
            found[one.question] = None
            made.append(one)
    return made


def _draw(random: Random, names: bool, irrelevant: bool) -> Sum | None:
    terms = [random.randrange(1, 10) for _ in range(TERMS)]
    signs = [random.choice("+-") for _ in range(TERMS - 1)]
    shown = [str(term) for term in terms]
    told = ""
    if names:
        places = sorted(random.sample(range(TERMS), 2))
        values = [terms[place] for place in places]
        shown[places[0]] = "a"
        if irrelevant:
            values[1] = random.randrange(1, 10)
        else:
            shown[places[1]] = "b"
        told = f"a={values[0]},b={values[1]}:"
    value, steps = terms[0], []
    for sign, term in zip(signs, terms[1:], strict=True):
        after = value + term if sign == "+" else value - term
        if not 0 <= after <= 99:
            return None
        steps.append(f"{value}{sign}{term}={after}")
        value = after
    question = told + shown[0] + "".join(a + b for a, b in zip(signs, shown[1:], strict=True)) + ">"
    return Sum(question, ";".join(steps), value)


def ids_of(text: str) -> list[int]:
    """A token per character."""
    return [3 + SIGNS.index(sign) for sign in text]


def encode(rows: Sequence[Sum]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels [batch, time]; labels are of the worked answers and their ends."""
    parts = [(ids_of(row.question), [*ids_of(row.worked), END]) for row in rows]
    width = max(len(front) + len(back) for front, back in parts)
    ids = torch.full((len(parts), width), PAD)
    labels = torch.full((len(parts), width), IGNORED)
    for place, (front, back) in enumerate(parts):
        end = len(front) + len(back)
        ids[place, :end] = torch.tensor(front + back)
        labels[place, len(front) : end] = torch.tensor(back)
    return ids, labels


def new_model(seed: int) -> LlamaForCausalLM:
    """A Llama of about 0.3 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=TOKENS,
                hidden_size=HIDDEN,
                intermediate_size=2 * HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                max_position_embeddings=128,
                tie_word_embeddings=True,
                bos_token_id=None,
                pad_token_id=PAD,
                eos_token_id=END,
            )
        )


def learn(
    model: Any,
    ids: torch.Tensor,
    labels: torch.Tensor,
    loss_of: Step,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    watch: Callable[[int], None] = lambda step: None,
) -> Any:
    """Train on rows in a random order, again and again; a linear rise and a linear fall to 0.

    watch: called with the number of steps done.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=DECAY)
    draw = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    model.train()
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(ids), generator=draw)])
        rows, order = order[:BATCH], order[BATCH:]
        share = min((step + 1) / max(1, WARM_UP * steps), 1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * share
        loss = loss_of(model, ids[rows], labels[rows], step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        watch(step + 1)
    return model.eval()


def log_probs_of(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    """log p of each token but the first [batch, time - 1]. Padding on the right needs no mask."""
    given = more or {"input_ids": ids}
    logits = model(**given, use_cache=False).logits[:, :-1]
    found: torch.Tensor = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return found


@torch.no_grad()
def solved(model: Any, rows: Sequence[Sum]) -> list[bool]:
    """Whether each greedy answer ends with the right value; all questions are equally long."""
    questions = torch.tensor([ids_of(row.question) for row in rows])
    written = model.generate(
        questions,
        attention_mask=torch.ones_like(questions),
        max_new_tokens=26,
        do_sample=False,
        suppress_tokens=[MASK],
    )[:, questions.shape[1] :]
    found = []
    for row, ids in zip(rows, written.tolist(), strict=True):
        text = "".join(SIGNS[one - 3] if one > MASK else " " for one in ids).strip()
        found.append(END in ids and text.split(" ")[0].rpartition("=")[2] == str(row.value))
    return found


def gap(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences and its standard error.

    >>> gap([3.0, 5.0], [1.0, 1.0])
    (3.0, 1.0)
    """
    each = torch.tensor(one).double() - torch.tensor(other).double()
    spread = each.std().item() if len(each) > 1 else 0.0  # one seed, of a smoke run, has none
    return each.mean().item(), spread / math.sqrt(len(each))
