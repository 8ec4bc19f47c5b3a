"""Prompts of ReAGent's reproduction, made by rule: analogies, cut prose, planted facts.

The two splits have no capital, name or sentence in between in common: what stands at an odd place
of a list is the report's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Split = Literal["dev", "report"]

# Pairs after the Google analogy set's capitals, as the paper's LongRA.
CAPITALS = (
    ("Athens", "Greece"), ("Bangkok", "Thailand"), ("Berlin", "Germany"), ("Cairo", "Egypt"),
    ("Canberra", "Australia"), ("Hanoi", "Vietnam"), ("Havana", "Cuba"), ("Helsinki", "Finland"),
    ("Kabul", "Afghanistan"), ("London", "England"), ("Madrid", "Spain"), ("Moscow", "Russia"),
    ("Oslo", "Norway"), ("Ottawa", "Canada"), ("Paris", "France"), ("Rome", "Italy"),
    ("Stockholm", "Sweden"), ("Tehran", "Iran"), ("Tokyo", "Japan"), ("Baghdad", "Iraq"),
    ("Lima", "Peru"), ("Nairobi", "Kenya"), ("Vienna", "Austria"), ("Warsaw", "Poland"),
    ("Beijing", "China"), ("Bern", "Switzerland"), ("Brussels", "Belgium"), ("Budapest", "Hungary"),
    ("Copenhagen", "Denmark"), ("Dublin", "Ireland"), ("Jakarta", "Indonesia"),
    ("Kathmandu", "Nepal"), ("Lisbon", "Portugal"), ("Santiago", "Chile"), ("Sofia", "Bulgaria"),
    ("Tunis", "Tunisia"),
)  # fmt: skip
BETWEEN = (
    "The market was full of people that morning, and the weather was mild.",
    "My sister called twice about the broken kitchen window.",
    "The train was late again, so we waited and talked about the summer.",
    "He left his umbrella at the office and walked home in the rain.",
    "They mended the old fence in a day and planted tomatoes behind it.",
    "A new bakery has opened beside the bridge, and everybody talks about it.",
    "The meeting took two hours, and nothing was decided in the end.",
    "We found the map under a pile of letters that nobody had read.",
    "The children built a tower of boxes, which fell before dinner.",
    "Her bicycle has a flat tyre, so she takes the bus this week.",
)
NAMES = (
    *("Anna", "Peter", "Maria", "David", "Laura", "Thomas", "Julia", "Simon"),
    *("Clara", "Martin", "Helen", "Oscar", "Nina", "Victor", "Alice", "Robert"),
)
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
    own, between = _own(split, CAPITALS), _own(split, BETWEEN)
    found = []
    for place, number in enumerate(_numbers(split, count)):
        # The first of each pair goes round all capitals, the second stands ever further behind it.
        apart = 1 + (5 * place + place // len(own)) % (len(own) - 1)
        first, second = own[place % len(own)], own[(place + apart) % len(own)]
        prompt = (
            f"When I think of {first[0]}, I think of {first[1]}. {between[place % len(between)]} "
            f"When I think of {second[0]}, I think of"
        )
        found.append(Asked(number, prompt, f" {second[1]}"))
    return found


def prose(rows: Sequence[dict[str, Any]], split: Split, count: int) -> list[Asked]:
    """The first 24 to 40 words of GSM8K questions; the model writes what follows."""
    texts = [(number, str(row["question"]).split()) for number, row in enumerate(rows)]
    wanted = 1 if split == "report" else 0
    fit = [(n, words) for n, words in texts if n % 2 == wanted and len(words) > 24 + n % 17]
    return [Asked(n, " ".join(words[: 24 + n % 17])) for n, words in fit[:count]]


def planted(split: Split, count: int) -> list[Asked]:
    """A fact, two unrelated sentences, and a question that only the fact can answer."""
    names, between = _own(split, NAMES), _own(split, BETWEEN)
    found = []
    for place, number in enumerate(_numbers(split, count)):
        every = 37 * place % 128  # all 128 facts in turn, neighbours unlike each other
        name, value = names[every % 8], every // 32
        thing, kind, values = THINGS[every // 8 % 4]
        head = f"The {kind} of {name}'s {thing} is "
        one, two = between[place % 5], between[(place + 1 + place // 5 % 4) % 5]
        prompt = (
            f"{head}{values[value]}. {one} {two} To say it again, the {kind} of {name}'s {thing} is"
        )
        fact = (len(head) - 1, len(head) + len(values[value]))
        found.append(Asked(number, prompt, f" {values[value]}", fact))
    return found


def _own(split: Split, every: Sequence[T]) -> Sequence[T]:
    return every[1::2] if split == "report" else every[::2]


def _numbers(split: Split, count: int) -> range:
    begin = 1 if split == "report" else 0
    return range(begin, begin + 2 * count, 2)
