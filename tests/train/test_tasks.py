"""Tasks: splits that share nothing, and rewards that cannot be talked into."""

from __future__ import annotations

from importlib import import_module

import pytest

from pertoken.errors import PertokenError
from pertoken.train.tasks import TASKS, Example, task

GENERATED = ("arithmetic", "countdown")


@pytest.mark.parametrize("name", GENERATED)
def test_splits_share_no_problem(name):
    found = {
        split: {
            (e.answer, tuple(sorted(e.numbers)) or e.prompt)
            for e in TASKS[name].examples(split, 400, seed)
        }
        for seed, split in enumerate(("train", "dev", "report"))
    }
    assert not found["train"] & found["dev"]
    assert not found["train"] & found["report"]
    assert not found["dev"] & found["report"]


@pytest.mark.parametrize("name", GENERATED)
def test_same_seed_same_problems(name):
    examples = TASKS[name].examples
    assert examples("train", 20, 3) == examples("train", 20, 3)
    assert examples("train", 20, 3) != examples("train", 20, 4)


def test_arithmetic_answers_are_right():
    for example in TASKS["arithmetic"].examples("train", 200, 0):
        question = example.prompt.split("What is ")[1].split("?")[0]
        assert eval(question) == int(example.answer)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("42", 1.0),
        ("The answer is 42.", 1.0),
        ("6 * 7 = 42", 1.0),
        ("$42.00", 1.0),
        ("42 or 43", 0.0),
        ("-42", 0.0),
        ("", 0.0),
        ("forty-two", 0.0),
        ("142", 0.0),
        ("x42", 1.0),
    ],
)
def test_last_number_is_the_answer(text, reward):
    assert TASKS["arithmetic"].reward(text, Example("", "42")) == reward


def test_negative_answers():
    reward = TASKS["arithmetic"].reward
    assert reward("12 - 20 = -8", Example("", "-8")) == 1.0
    assert reward("-8", Example("", "-8")) == 1.0
    assert reward("8", Example("", "-8")) == 0.0
    assert reward("1,250 apples", Example("", "1250")) == 1.0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("(7 - 3) * 5", 1.0),
        ("(7 - 3) * 5 = 20", 1.0),
        ("Sure:\n5*(7-3)", 1.0),
        ("5 × (7 - 3)", 1.0),
        ("7 + 3 + 5", 0.1),
        ("20", 0.0),
        ("4 * 5", 0.0),
        ("7 * 5 - 3 * 5", 0.0),
        ("7 / (3 - 3) + 5", 0.0),
        ("__import__('os')", 0.0),
        ("7 ** 3 + 5", 0.0),
        ("True + 7 + 3 + 5", 0.0),
        ("7 -", 0.0),
        ("", 0.0),
        ("(" * 5000, 0.0),
        ("7.0 + 3 + 5", 0.0),
    ],
)
def test_countdown_wants_each_number_once(text, reward):
    assert TASKS["countdown"].reward(text, Example("", "20", (3, 5, 7))) == reward


def test_countdown_problems_can_be_solved():
    from itertools import permutations, product

    example_of = TASKS["countdown"]
    for example in example_of.examples("train", 30, 0):
        a_first = [
            f"({a} {p} {b}) {q} {c}"
            for a, b, c in permutations(example.numbers)
            for p, q in product("+-*/", repeat=2)
        ]
        assert any(example_of.reward(text, example) == 1.0 for text in a_first)


def test_gsm8k_answers(monkeypatch):
    rows = [{"question": f"Q{i}?", "answer": f"steps\n#### 1,{i:03}"} for i in range(10)]
    monkeypatch.setattr(import_module("pertoken.data"), "data", lambda name: rows)
    dev = TASKS["gsm8k"].examples("dev", 5, 0)
    report = TASKS["gsm8k"].examples("report", 5, 0)
    assert {example.answer for example in dev} == {f"1{i:03}" for i in range(5)}
    assert {example.answer for example in report} == {f"1{i:03}" for i in range(5, 10)}
    with pytest.raises(PertokenError, match="5 problems"):
        TASKS["gsm8k"].examples("dev", 6, 0)


def test_mistakes_are_named():
    with pytest.raises(PertokenError, match="arithmetic"):
        task("arithmetics")
    with pytest.raises(PertokenError, match="no split named 'test'"):
        TASKS["arithmetic"].examples("test", 1, 0)
    with pytest.raises(PertokenError, match="1 or more"):
        TASKS["countdown"].examples("dev", 0, 0)
