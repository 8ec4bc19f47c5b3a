"""Prompts of ReAGent's reproduction, made by rule: analogies, cut prose, planted facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Split = Literal["dev", "report"]

# Pairs after the Google analogy set's capitals, as the paper's LongRA.
CAPITALS = (
    ("Athens", "Greece"), ("Bangkok", "Thailand"), ("Berlin", "Germany"), ("Cairo", "Egypt"),
    ("Canberra", "Australia"), ("Hanoi", "Vietnam"), ("Havana", "Cuba"), ("Helsinki", "Finland"),
    ("Kabul", "Afghanistan"), ("London", "England"), ("Madrid", "Spain"), ("Moscow", "Russia"),
    ("Oslo", "Norway"), ("Ottawa", "Canada"), ("Paris", "France"), ("Rome", "Italy"),
    ("Stockholm", "Sweden"), ("Tehran", "Iran"), ("Tokyo", "Japan"), ("Baghdad", "Iraq"),
    ("Lima", "Peru"), ("Nairobi", "Kenya"), ("Vienna", "Austria"), ("Warsaw", "Poland"),
)  # fmt: skip
BETWEEN = (
    "The market was full of people that morning, and the weather was mild.",
    "My sister called twice about the broken kitchen window.",
    "The train was late again, so we waited and talked about the summer.",
    "He left his umbrella at the office and walked home in the rain.",
    "They mended the old fence in a day and planted tomatoes behind it.",
)
NAMES = ("Anna", "Peter", "Maria", "David", "Laura", "Thomas", "Julia", "Simon")
THINGS = (
    ("cat", "colour", ("black", "white", "red", "brown")),
    ("car", "colour", ("green", "blue", "yellow", "grey")),
    ("lunch", "dish", ("soup", "pizza", "rice", "fish")),
    ("dog", "name", ("Max", "Bella", "Rocky", "Daisy")),
)


@dataclass(frozen=True)
class Asked:
    """A prompt, the target text that follows it (None: what the model writes), and where the fact
    stands that decides it: characters of the prompt."""

    number: int
    prompt: str
    target: str | None = None
    fact: tuple[int, int] | None = None


def analogies(split: Split, count: int) -> list[Asked]:
    """A capital's country after another pair and an unrelated sentence, as in LongRA."""
    found = []
    for number in _numbers(split, count):
        first, second = CAPITALS[number % 24], CAPITALS[(number * 7 + number // 24 + 5) % 24]
        if first == second:
            second = CAPITALS[(number + 1) % 24]
        prompt = (
            f"When I think of {first[0]}, I think of {first[1]}. {BETWEEN[number % 5]} "
            f"When I think of {second[0]}, I think of"
        )
        found.append(Asked(number, prompt, f" {second[1]}"))
    return found


def prose(rows: Sequence[dict[str, Any]], split: Split, count: int) -> list[Asked]:
    """The first 24 to 40 words of GSM8K questions; the model writes what follows."""
    texts = [(number, str(row["question"]).split()) for number, row in enumerate(rows)]
    wanted = 1 if split == "report" else 0
    fit = [(n, words) for n, words in texts if n % 2 == wanted and len(words) >= 28]
    return [Asked(n, " ".join(words[: 24 + n % 17])) for n, words in fit[:count]]


def planted(split: Split, count: int) -> list[Asked]:
    """A fact, two unrelated sentences, and a question that only the fact can answer."""
    found = []
    for number in _numbers(split, count):
        name = NAMES[number % 8]
        thing, kind, values = THINGS[number // 2 % 4]
        value = values[number // 8 % 4]
        head = f"The {kind} of {name}'s {thing} is "
        prompt = (
            f"{head}{value}. {BETWEEN[number % 5]} {BETWEEN[(number + 2) % 5]} "
            f"To say it again, the {kind} of {name}'s {thing} is"
        )
        fact = (len(head) - 1, len(head) + len(value))
        found.append(Asked(number, prompt, f" {value}", fact))
    return found


def _numbers(split: Split, count: int) -> range:
    begin = 1 if split == "report" else 0
    return range(begin, begin + 2 * count, 2)
