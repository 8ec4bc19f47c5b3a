"""A real model on a task of `pertoken.train.tasks`, asked through its chat template."""

from __future__ import annotations

from typing import Any

import torch

from pertoken.conversation import first_turn, stop_ids
from pertoken.reproduce._context import Context
from pertoken.reproduce._fiberpo_rl import Prompts, Quiz
from pertoken.train.tasks import Example, task

MODEL, TASK = "smollm2", "arithmetic"


def load(context: Context) -> tuple[Any, Any]:
    """The model and its tokenizer anew, since training changes the model."""
    if context.smoke:
        from pertoken.testing import ByteTokenizer, tiny_model

        tokenizer = ByteTokenizer()
        return tiny_model("llama", vocab_size=len(tokenizer), dtype=torch.float32), tokenizer
    from pertoken.loading import load as load_model

    return load_model(MODEL, device=context.device, dtype="float32")


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
