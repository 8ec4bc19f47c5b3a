"""The questions of the real pair: the first sentence of a problem of GSM8K, to be copied out.

One worked example, the problem, "First sentence:". Right is what is that sentence, by exact match.
Answers are of 7 tokens and more. The small model often rewrites the sentence or runs on into the
next one, and the large one does so less: the task was chosen for that on development problems,
among sums, languages to name and other sentences to copy. Problems with an even number are
development, those with an odd one the report; the example is none of them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

__all__ = ["SMOKE", "STOP", "TASK", "questions"]

TASK = "gsm8k"
STOP = ("\n",)
LONGEST, LONGEST_SENTENCE = 60, 25  # words of a problem, and of what is to be copied

SMOKE: list[dict[str, Any]] = [
    {"question": f"Tom has {n}. Ann has {m}. How many?", "answer": ""}
    for n in range(6)
    for m in range(10)
]

_EXAMPLE = (
    "Text: Tom has 3 apples. He buys 4 more. How many apples does he have now?\n"
    "First sentence: Tom has 3 apples.\n\n"
)
_ABBREVIATION = re.compile(r"\b(Mr|Mrs|Ms|Dr|St|Jr|vs|No|[ap]\.m|oz|ft|lbs?)\.$", re.IGNORECASE)


def questions(data: Sequence[dict[str, Any]], split: str, count: int) -> list[tuple[str, str]]:
    """(prompt, first sentence) of at most `count` problems of a half, "dev" or "report"."""
    found = []
    for row in data[split == "report" :: 2]:
        text = " ".join(row["question"].split())
        first, *rest = re.split(r"(?<=[.!?]) (?=[A-Z])", text)
        fits = len(text.split()) <= LONGEST and len(first.split()) <= LONGEST_SENTENCE
        if rest and fits and not _ABBREVIATION.search(first):
            found.append((f"{_EXAMPLE}Text: {text}\nFirst sentence:", first))
    random.Random(0).shuffle(found)
    return found[:count]
