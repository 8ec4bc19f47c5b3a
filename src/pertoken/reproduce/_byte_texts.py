"""Texts of the byte model's reproduction, and where they are cut: by rule, never by result.

Prose: questions of GSM8K's test split. Code: HumanEval's prompts with their solutions, cut within
the solution. Even numbers are for choosing (dev), odd ones for figures (report). Nobody can say
that the models never saw these texts; but all contenders are the same model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any, Literal

Split = Literal["report", "dev"]
CONTEXT = 16  # bytes before the first cut of prose

SMOKE_PROSE = [
    {"question": "Ann has three red apples and buys two more. How many has she?", "answer": "5"},
    {"question": "Tom walks four miles a day for a week. How far does he walk?", "answer": "28"},
]
SMOKE_CODE = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f"def {name}(a, b):\n",
        "entry_point": name,
        "canonical_solution": "    total = a + b\n    return total\n",
        "test": "",
    }
    for number, name in enumerate(("add", "plus"))
]


@dataclass(frozen=True)
class Text:
    """One text; cuts lie at byte `begin` or behind."""

    kind: str
    number: int
    text: str
    begin: int

    @property
    def data(self) -> bytes:
        """The text as UTF-8."""
        return self.text.encode()


def prose(rows: Sequence[Mapping[str, Any]], split: Split, wanted: int) -> list[Text]:
    """Questions of a split, spread evenly over it."""
    texts = [Text("prose", n, str(row["question"]), CONTEXT) for n, row in enumerate(rows)]
    return _spread(texts, split, wanted)


def code(rows: Iterable[Mapping[str, Any]], split: Split, wanted: int) -> list[Text]:
    """Functions of a split, spread evenly over it."""
    texts = []
    for row in rows:
        prompt = str(row["prompt"])
        number = int(str(row["task_id"]).rpartition("/")[2])
        whole = prompt + str(row["canonical_solution"])
        texts.append(Text("code", number, whole, len(prompt.encode())))
    return _spread(texts, split, wanted)


def _spread(texts: Sequence[Text], split: Split, wanted: int) -> list[Text]:
    members = [text for text in texts if text.number % 2 == (split == "report")]
    count = min(wanted, len(members))
    return [members[i * len(members) // count] for i in range(count)]


def cuts(text: Text, wanted: int, seed: int) -> list[int]:
    """Random cut points in bytes, at any byte that begins a character; sorted, none twice.

    >>> cuts(Text("prose", 1, "abcdef", 2), 9, seed=0)
    [2, 3, 4, 5]
    """
    data = text.data
    places = [i for i in range(text.begin, len(data)) if data[i] & 0xC0 != 0x80]
    return sorted(_random(text, seed).sample(places, min(wanted, len(places))))


def line_cut(text: Text, pieces: Sequence[bytes], seed: int) -> int | None:
    """A random cut inside a token and inside a word of a code line, in bytes; None if none is.

    pieces: the bytes of the text's tokens, in order.

    >>> pieces = [b"def", b" f():\\n    ", b"re", b"turn"]
    >>> line_cut(Text("code", 1, "def f():\\n    return", 9), pieces, seed=0) in (14, 16, 17, 18)
    True
    """
    data = text.data
    ends = set(accumulate(map(len, pieces)))
    if b"".join(pieces) != data:
        return None
    places = [
        i
        for i in range(text.begin + 1, len(data))
        if i not in ends and data[i - 1 : i + 1].isalnum()
    ]
    places = [i for i in places if not _comment(data, i)]
    return _random(text, seed).choice(places) if places else None


def rest_of_line(text: Text, cut: int) -> bytes:
    """What stands behind the cut, up to and with the end of the line."""
    data = text.data
    end = data.find(b"\n", cut)
    return data[cut:] if end < 0 else data[cut : end + 1]


def _comment(data: bytes, place: int) -> bool:
    return b"#" in data[data.rfind(b"\n", 0, place) + 1 : place]


def _random(text: Text, seed: int) -> Random:
    return Random(f"{seed} {text.kind} {text.number}")
