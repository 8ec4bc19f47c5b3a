"""A policy that learns two-step sums in seconds, and its problems.

A problem is a sum of three digits modulo 7 with room for the running results, such as 3+6?-4?, and
its answer is the same with the results filled in, 3+62-45, and an end: one token a character. (As
the answer repeats the problem, every step looks alike to the model, and learning is quick.) Only
the last result is judged.

A tiny Llama learns worked answers until most of what it samples is right. Then its logits are
scaled down, as by a temperature, until three in ten answers are: what it knows is still there to
be found, which is where reinforcement learning of language models starts, and what it can find in
the few thousand answers that a test on a small machine has room for. (Started from less
knowledge, no objective learned in that time.)
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from random import Random
from typing import Any

import torch

from pertoken.reproduce._fiberpo_rl import Prompts, Quiz, judged, sample, teach

MODULUS, STEPS = 7, 2
SYMBOLS = " $+-?0123456"  # padding and the end first; a symbol's place is its id
END = SYMBOLS.index("$")
NEW_TOKENS = 3 * STEPS + 3  # one more than an answer has
KNOWN, START = 0.8, 0.3  # share of sampled answers that are right before and after the scaling
DULLER = 0.95  # one step of the scaling
WARM_STEP_SIZE, WARM_ROWS = 3e-3, 64
WARM_LOOK, WARM_MOST = 10, 1000  # steps between two looks at that share, and steps at most
HIDDEN, LAYERS, HEADS = 48, 2, 4


def quiz(fresh: str, count: int | None = None) -> Quiz:
    """The problems; fresh: "dev" or "report", of which `count` problems or all are looked at."""
    count = len(problems()[fresh]) if count is None else count
    return Quiz(_ask, reward, frozenset([END]), NEW_TOKENS, (fresh, count, 4))


@lru_cache(maxsize=1)
def problems() -> dict[str, list[str]]:
    """All problems by split, a tenth of them each for dev and report."""
    digits = [str(digit) for digit in range(MODULUS)]
    signed = [f"{sign}{digit}?" for sign in "+-" for digit in digits]
    found = ["".join(parts) for parts in product(digits, *[signed] * STEPS)]
    Random(0).shuffle(found)
    tenth = len(found) // 10
    return {"dev": found[:tenth], "report": found[tenth : 2 * tenth], "train": found[2 * tenth :]}


def answer(problem: str) -> str:
    """The problem with its running results, and the end.

    >>> answer("3+6?-4?")
    '3+62-45$'
    """
    result, *steps = problem.split("?")[0][:1], *problem[1:].split("?")[:-1]
    written = result
    for step in steps:
        result = str((int(result) + int(step)) % MODULUS)
        written += step + result
    return written + "$"


def encode(text: str) -> list[int]:
    """Ids of a text.

    >>> encode("3+6?")
    [8, 2, 11, 4]
    """
    return [SYMBOLS.index(letter) for letter in text]


def reward(ids: list[int], problem: str) -> float:
    """1 where the completion is as long as the answer and its last result is right.

    >>> reward(encode("3+60-45$"), "3+6?-4?"), reward(encode("3+62-45"), "3+6?-4?")
    (1.0, 0.0)
    """
    right = encode(answer(problem))
    return float(len(ids) == len(right) and ids[-2:] == right[-2:])


def _ask(split: str, count: int, seed: int) -> tuple[Prompts, list[Any]]:
    chosen = Random(f"{split} {seed}").sample(problems()[split], count)
    ids = torch.tensor([encode(problem) for problem in chosen])
    return (ids, torch.ones_like(ids)), chosen


@lru_cache(maxsize=2)
def warmed(seed: int) -> dict[str, torch.Tensor]:
    """Weights of the policy that reinforcement learning starts from, the same for all methods."""
    model = untrained(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=WARM_STEP_SIZE)
    generator, random = torch.Generator().manual_seed(seed), Random(seed)
    for step in range(WARM_MOST):
        if step % WARM_LOOK == 0 and _sampled_right(model, random, generator) >= KNOWN:
            break
        prompts, asked = quiz("dev").ask("train", WARM_ROWS, random.randrange(2**32))
        teach(model, prompts, [encode(answer(problem)) for problem in asked], optimizer)
    while _sampled_right(model, random, generator) > START:
        with torch.no_grad():
            model.lm_head.weight *= DULLER
    return {name: value.clone() for name, value in model.state_dict().items()}


def _sampled_right(model: Any, random: Random, generator: torch.Generator) -> float:
    questions = quiz("dev")
    prompts, asked = questions.ask("train", 256, random.randrange(2**32))
    found = sample(model, prompts, 1, NEW_TOKENS, questions.stops, generator)
    return float(judged(questions, *found, asked).mean())


def policy(seed: int) -> Any:
    """A model with the weights of `warmed`."""
    model = untrained(seed)
    model.load_state_dict(warmed(seed))
    return model


def untrained(seed: int) -> Any:
    """A tiny Llama in float32, its weights drawn wide enough to learn at once."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = LlamaConfig(
        vocab_size=len(SYMBOLS),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=32,
        initializer_range=0.1,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
