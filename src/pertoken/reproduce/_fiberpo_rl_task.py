"""A real model on a task of `pertoken.train.tasks`, asked through its chat template.

What SmolLM2 samples is hardly ever a right sum, and without a reward there is no gradient. So it is
first taught a few right answers, the same for all objectives.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from pertoken.conversation import first_turn, stop_ids
from pertoken.reproduce._context import Context
from pertoken.reproduce._fiberpo_rl import Prompts, Quiz, teach
from pertoken.train.tasks import Example, task

MODEL, TASK = "smollm2", "arithmetic"
WARM_STEPS, WARM_ROWS, WARM_STEP_SIZE = 24, 16, 5e-5


def policy(context: Context) -> tuple[Any, Any]:
    """A model of its own with the weights that reinforcement learning starts from; tokenizer."""
    if context.smoke:
        from pertoken.testing import ByteTokenizer, tiny_model

        tokenizer: Any = ByteTokenizer()
        model: Any = tiny_model("llama", vocab_size=len(tokenizer), dtype=torch.float32)
        warm(model, tokenizer, context.seed, steps=1, rows=2)
        return model, tokenizer
    from pertoken.loading import load

    model, tokenizer = load(MODEL, dtype="float32")
    model.load_state_dict(_warmed(context.seed))
    return model, tokenizer


@lru_cache(maxsize=1)
def _warmed(seed: int) -> dict[str, torch.Tensor]:
    from pertoken.loading import load

    model, tokenizer = load(MODEL, dtype="float32")
    warm(model, tokenizer, seed)
    return dict(model.state_dict())


def warm(
    model: Any, tokenizer: Any, seed: int, steps: int = WARM_STEPS, rows: int = WARM_ROWS
) -> None:
    """Teach right answers for some steps of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=WARM_STEP_SIZE)
    questions = quiz(model, tokenizer, 1, 1)
    (stop, *_) = sorted(stop_ids(model)) or [0]
    for step in range(steps):
        prompts, examples = questions.ask("train", rows, 10_000 * seed + 5_000 + step)
        answers = [tokenizer(one.answer, add_special_tokens=False)["input_ids"] for one in examples]
        teach(model, prompts, [[*one, stop] for one in answers], optimizer)


def quiz(model: Any, tokenizer: Any, new_tokens: int, fresh: int) -> Quiz:
    """The task's problems; fresh: how many of the report's are looked at, once each."""
    chosen = task(TASK)

    def ask(split: str, count: int, seed: int) -> tuple[Prompts, list[Any]]:
        examples = chosen.examples(split, count, seed)
        return padded([first_turn(tokenizer, one.prompt) for one in examples]), list(examples)

    def reward(ids: list[int], example: Example) -> float:
        return chosen.reward(tokenizer.decode(ids, skip_special_tokens=True), example)

    return Quiz(ask, reward, stop_ids(model), new_tokens, ("report", fresh, 1))


def padded(prompts: list[list[int]]) -> Prompts:
    """Ids and mask of prompts, with zeros on the left up to the longest.

    >>> ids, mask = padded([[5, 6], [7]])
    >>> ids.tolist(), mask.tolist()
    ([[5, 6], [0, 7]], [[1, 1], [0, 1]])
    """
    time = max(map(len, prompts))
    ids = torch.tensor([[0] * (time - len(one)) + one for one in prompts])
    mask = torch.tensor([[0] * (time - len(one)) + [1] * len(one) for one in prompts])
    return ids, mask
