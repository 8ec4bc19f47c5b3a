"""Tasks whose answers a program can check: what reinforcement learning needs to run at all.

A task gives examples of three splits that share no problem ("train", "dev", "report") and a reward
between 0 and 1 for a text. Nothing is judged by a model.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any

from pertoken._answers import last_number
from pertoken.errors import PertokenError, nearest

__all__ = ["TASKS", "Example", "Task", "rewards_of", "task"]

SPLITS = ("train", "dev", "report")


@dataclass(frozen=True)
class Example:
    """A problem: the user's message, the answer, and the numbers that it is to be made of."""

    prompt: str
    answer: str
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Task:
    """`examples(split, count, seed)` gives problems, `reward(text, example)` judges a text."""

    name: str
    about: str
    examples: Callable[[str, int, int], list[Example]]
    reward: Callable[[str, Example], float]


def task(name: str) -> Task:
    """A task by name; PertokenError with the nearest name where there is none.

    >>> arithmetic = task("arithmetic")
    >>> example = arithmetic.examples("dev", 1, 0)[0]
    >>> arithmetic.reward(f"It is {example.answer}.", example)
    1.0
    """
    if name not in TASKS:
        raise PertokenError(
            f"no task named {name!r}{nearest(name, TASKS)}; there is: {', '.join(TASKS)}"
        )
    return TASKS[name]


def rewards_of(task: Task, problems: list[Example]) -> Callable[..., list[float]]:
    """TRL's reward function: the task's, of one text at a time, checked."""

    def reward(completions: list[Any], problem: list[int], **_: Any) -> list[float]:
        texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
        return [one(text, problems[which]) for text, which in zip(texts, problem, strict=True)]

    def one(text: str, example: Example) -> float:
        try:
            value = task.reward(text, example)
        except Exception as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise PertokenError(f"the reward of {task.name!r} raised {told}") from error
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise PertokenError(
                f"the reward of {task.name!r} must be one finite number for a text, got {value!r}"
            )
        return float(value)

    return reward


def _split_of(*numbers: int) -> str:
    """The split a problem belongs to, by its numbers alone: a tenth each to dev and report."""
    return {0: "report", 1: "dev"}.get(Random(repr(numbers)).randrange(10), "train")


def _drawn(
    split: str, count: int, seed: int, draw: Callable[[Random], tuple[str, Example] | None]
) -> list[Example]:
    """`count` problems of a split. draw: a problem and its split, None for one that is no good."""
    if split not in SPLITS:
        raise PertokenError(f"no split named {split!r}; there is: {', '.join(SPLITS)}")
    if count < 1:
        raise PertokenError(f"the number of examples must be 1 or more, got {count}")
    random = Random(f"{split} {seed}")
    found: list[Example] = []
    while len(found) < count:
        drawn = draw(random)
        if drawn is not None and drawn[0] == split:
            found.append(drawn[1])
    return found


# ---------------------------------------------------------------------------------- arithmetic


def _arithmetic(split: str, count: int, seed: int) -> list[Example]:
    return _drawn(split, count, seed, _sum)


def _sum(random: Random) -> tuple[str, Example]:
    # Half of them with single digits: a small model must be right now and then to learn at all.
    low, high = random.choice(((0, 10), (10, 100)))
    first, second = random.randrange(low, high), random.randrange(low, high)
    sign = random.choice("+-")
    answer = first + second if sign == "+" else first - second
    prompt = f"What is {first} {sign} {second}? Reply with the number only."
    return _split_of(first, second), Example(prompt, str(answer))


def _equals(text: str, example: Example) -> float:
    """1 where the last number of the text is the answer."""
    found = last_number(text)
    return float(found is not None and Fraction(found) == Fraction(example.answer))


# --------------------------------------------------------------------------------------- GSM8K


def _gsm8k(split: str, count: int, seed: int) -> list[Example]:
    """The training rows; dev and report are the first and the second half of the test rows."""
    from pertoken.data import data

    if split not in SPLITS:
        raise PertokenError(f"no split named {split!r}; there is: {', '.join(SPLITS)}")
    rows = data("gsm8k-train" if split == "train" else "gsm8k")
    half = len(rows) // 2
    rows = {"train": rows, "dev": rows[:half], "report": rows[half:]}[split]
    if not 1 <= count <= len(rows):
        raise PertokenError(
            f"the split {split!r} of gsm8k has {len(rows)} problems: ask for 1 to {len(rows)}, "
            f"not {count}"
        )
    return [
        Example(
            f"{row['question']}\nReason in short steps and end with the answer as a number.",
            row["answer"].rpartition("####")[2].strip().replace(",", ""),
        )
        for row in Random(f"{split} {seed}").sample(rows, count)
    ]


# ----------------------------------------------------------------------------------- countdown

_OPERATIONS: dict[type[Any], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _countdown(split: str, count: int, seed: int) -> list[Example]:
    return _drawn(split, count, seed, _target)


def _target(random: Random) -> tuple[str, Example] | None:
    numbers = tuple(random.randrange(1, 21) for _ in range(3))
    value = Fraction(numbers[0])
    for number in numbers[1:]:
        operation = random.choice(list(_OPERATIONS.values()))
        value = operation(value, Fraction(number))
    if value.denominator != 1 or not 1 <= value <= 200:
        return None
    listed = ", ".join(map(str, numbers))
    prompt = (
        f"Make {value} out of the numbers {listed}: use each of them once, with +, -, *, / and "
        "parentheses. Reply with the expression only."
    )
    return _split_of(*sorted(numbers), int(value)), Example(prompt, str(value), numbers)


def _makes(text: str, example: Example) -> float:
    """1 for an expression of exactly these numbers with the right value, 0.1 for a wrong value.

    The expression is the last line of the text, without what stands behind an equals sign.
    """
    lines = [line for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return 0.0
    written = lines[-1].partition("=")[0].replace("×", "*").replace("÷", "/").strip(" .`$")
    try:
        used: list[int] = []
        value = _value(ast.parse(written, mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return 0.0
    if sorted(used) != sorted(example.numbers):
        return 0.0
    return 1.0 if value == Fraction(example.answer) else 0.1


def _value(node: ast.expr, used: list[int]) -> Fraction:
    """The value of an expression; the numbers it uses are added to `used`."""
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left, used), _value(node.right, used))
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    raise ValueError("not an expression of +, -, *, / over whole numbers")


TASKS: dict[str, Task] = {
    each.name: each
    for each in (
        Task(
            "arithmetic",
            "sums and differences of numbers of one or two digits",
            _arithmetic,
            _equals,
        ),
        Task("countdown", "a number made out of three others", _countdown, _makes),
        Task("gsm8k", "grade-school maths problems", _gsm8k, _equals),
    )
}
"""The tasks of `pertoken train` by name."""
