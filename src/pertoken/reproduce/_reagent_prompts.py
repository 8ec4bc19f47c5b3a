"""Prompts of ReAGent's reproduction, made by rule: analogies, cut prose, planted facts.

What stands at an odd place of a list is the report's, so the two splits have no pair of words, no
name and no sentence in between in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Split = Literal["dev", "report"]

# By relation a text, whose first gap decides how it goes on behind the aside in the second, and
# pairs of words: what stands in the gap, and what follows the text.
RELATIONS = {
    "capital": (
        "We landed in {} after midnight and took the first train.{} Our hotel was in the middle of "
        "the capital, the city of",
        "France Paris, Germany Berlin, Italy Rome, Spain Madrid, Japan Tokyo, China Beijing, "
        "Russia Moscow, Egypt Cairo, Iraq Baghdad, Iran Tehran, Greece Athens, Austria Vienna, "
        "Cuba Havana, Canada Ottawa, Ireland Dublin, Poland Warsaw, Vietnam Hanoi, Kenya Nairobi, "
        "Portugal Lisbon, Norway Oslo, Sweden Stockholm, Thailand Bangkok, England London, "
        "Belgium Brussels",
    ),
    "country": (
        "All through the winter he read books by {} writers and dreamed of going there.{} In May "
        "he bought a ticket and flew to",
        "French France, German Germany, Italian Italy, Spanish Spain, Japanese Japan, "
        "Chinese China, Russian Russia, Egyptian Egypt, Greek Greece, Polish Poland, "
        "Irish Ireland, Swedish Sweden, Indian India, Mexican Mexico, Canadian Canada, "
        "Australian Australia, Brazilian Brazil, Korean Korea, Turkish Turkey, Cuban Cuba",
    ),
    "comparative": (
        "The first one was quite {}.{} The second one was even",
        "big bigger, small smaller, tall taller, cold colder, warm warmer, fast faster, "
        "slow slower, strong stronger, weak weaker, bright brighter, dark darker, cheap cheaper, "
        "old older, young younger, long longer, short shorter, high higher, deep deeper, "
        "loud louder, sharp sharper, smart smarter, large larger, wide wider, hard harder",
    ),
    "opposite": (
        "The first one was very {}.{} The second one was the opposite, very",
        "hot cold, bad good, big small, hard easy, fast slow, sad happy, true false, dark light, "
        "poor rich, high low, early late, wet dry, strong weak, expensive cheap",
    ),
    "participle": (
        "He wants to {} all day long.{} His mother thinks that he should stop",
        "sing singing, swim swimming, run running, walk walking, play playing, dance dancing, "
        "write writing, sleep sleeping, fight fighting, talk talking, work working, eat eating, "
        "drink drinking, cook cooking, paint painting, read reading, train training, "
        "travel traveling, sit sitting, fish fishing, hunt hunting, jump jumping, drive driving, "
        "ride riding, cry crying, speak speaking",
    ),
    "plural": (
        "I have always wanted a {}.{} So we went into the shop that sells",
        "book books, chair chairs, lamp lamps, bottle bottles, knife knives, banana bananas, "
        "flower flowers, hat hats, box boxes, basket baskets, shirt shirts, clock clocks, "
        "carpet carpets, melon melons, mouse mice, pen pens, mirror mirrors, brush brushes, "
        "toy toys, plate plates",
    ),
    "family": (
        "The man is my {}.{} The woman beside him is my",
        "uncle aunt, brother sister, father mother, grandfather grandmother, son daughter, "
        "nephew niece, grandson granddaughter, husband wife",
    ),
}
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
    """A prompt and the target text that follows it (None: what the model writes).

    fact: where it stands that decides the target, characters of the prompt; plain: the prompt
    without what has nothing to do with it.
    """

    number: int
    prompt: str
    target: str | None = None
    fact: tuple[int, int] | None = None
    plain: str = ""


def analogies(split: Split) -> list[Asked]:
    """Pairs of words, the first far before the second and an aside in between, as LongRA's.

    All of them, relations in turn; `plain` is the same text without the aside. Which ones a model
    knows is for it to say.
    """
    asides = _own(split, BETWEEN)
    columns = []
    for text, words in RELATIONS.values():
        pairs = [pair.split() for pair in words.split(", ")]
        columns.append([(text, first, second) for first, second in _own(split, pairs)])
    rows = [each for row in zip_longest(*columns) for each in row if each is not None]
    found = []
    for place, (number, row) in enumerate(zip(_numbers(split, len(rows)), rows, strict=True)):
        text, first, second = row
        aside = f" ({asides[place % len(asides)]})"
        prompt, plain = text.format(first, aside), text.format(first, "")
        found.append(Asked(number, prompt, f" {second}", plain=plain))
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
