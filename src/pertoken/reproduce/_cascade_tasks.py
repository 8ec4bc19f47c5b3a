"""The questions of the real pair: the mixed traffic that a cascade is for, made of GSM8K.

Two kinds, two of the first for one of the second. Sums: a calculation of the worked answers
("48/2="), behind four examples; few tokens, and the large model is the better one. Questions: the
sentence of a problem that asks for something, to be copied out behind the problem, behind one
example; many tokens, most of them sure. Both are right or wrong, by exact match. Problems with an
even number are development, those with an odd one the report, and a calculation that is in both is
of the development half alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

__all__ = ["SMOKE", "STOP", "TASK", "questions"]

TASK = "gsm8k"
STOP = ("\n",)
LONGEST = 45  # words of a problem that a question is copied from

SMOKE: list[dict[str, Any]] = [
    {"question": f"Tom has {n}. Ann has {m}. How many?", "answer": f"<<{n}+{m}={n + m}>>"}
    for n in range(6)
    for m in range(10)
]

_SUMS = "12+7=19\n3*15=45\n80/4=20\n9.5*2=19\n"
_COPY = (
    "Text: Tom has 3 apples. He buys 4 more. How many apples does he have now?\n"
    "Question: How many apples does he have now?\n\n"
)


def questions(data: Sequence[dict[str, Any]], split: str, count: int) -> list[tuple[str, str]]:
    """(prompt, reference) of `count` questions of a half, "dev" or "report", shuffled."""
    kinds = [(_sums(data, split), 2 * count // 3), (_copies(data, split), count - 2 * count // 3)]
    draw = random.Random(0)
    found = [each for rows, share in kinds for each in draw.sample(rows, min(share, len(rows)))]
    draw.shuffle(found)
    return found


def _half(data: Sequence[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    return list(data[split == "report" :: 2])


def _sums(data: Sequence[dict[str, Any]], split: str) -> list[tuple[str, str]]:
    found = {
        half: dict(
            each
            for row in _half(data, half)
            for each in re.findall(r"<<([^<>=]+)=([^<>]+)>>", row["answer"])
        )
        for half in ("dev", "report")
    }
    known = set(found["dev"]) if split == "report" else set()
    rows = [each for each in found[split].items() if each[0] not in known]
    return [(f"{_SUMS}{left}=", right) for left, right in rows]


def _copies(data: Sequence[dict[str, Any]], split: str) -> list[tuple[str, str]]:
    found = []
    for row in _half(data, split):
        text = " ".join(row["question"].split())
        last = re.split(r"(?<=[.!?]) ", text)[-1]
        if last != text and last.endswith("?") and len(text.split()) <= LONGEST:
            found.append((f"{_COPY}Text: {text}\nQuestion:", last))
    return found
