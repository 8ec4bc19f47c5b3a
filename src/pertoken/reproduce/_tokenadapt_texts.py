"""Texts of TokenAdapt's reproduction: what tokenizers are trained on, and what models are asked.

Of every set, rows whose number leaves 0 or 2 when divided by 4 train tokenizers, 1 is for choosing
settings and 3 for the report. Nothing is chosen by result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["KINDS", "LANGUAGES", "evaluated", "prose", "training"]

KINDS = ("prose", "mail", "mathematics", "code")
LANGUAGES = ("fra", "deu_1996", "spa", "tur", "rus", "hin")
LENGTH = 800  # characters of an evaluated text at most
_TRAIN = 3_000_000  # characters of a kind of text that a tokenizer is trained on at most
_SPLITS = {"train": (0, 2), "dev": (1,), "report": (3,)}

Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def prose(sentences: Sequence[Sequence[str]]) -> str:
    """Tagged words as text again: blanks before marks go, and quotes are plain.

    >>> prose([["``", "Well", "''", ",", "he", "said", "."]])
    '"Well", he said.'
    """
    text = " ".join(word for sentence in sentences for word in sentence)
    text = re.sub(r"`` ?", '"', text)
    text = re.sub(r" ?''", '"', text)
    return re.sub(r" ([,.;:!?)])|(\() ", r"\1\2", text)


def _brown(row: Mapping[str, Any]) -> str:
    return prose(row["words"])


def _mail(row: Mapping[str, Any]) -> str:
    """Ham that is no page of HTML and mostly not a quotation."""
    text = str(row["text"])
    plain = row["label"] == "ham" and not re.search(r"<html|<HTML|=\d\d", text)
    return text.strip() if plain else ""


def _problem(row: Mapping[str, Any]) -> str:
    return f"{row['question']}\n{re.sub('<<.*?>>', '', row['answer'])}"


def _code(row: Mapping[str, Any]) -> str:
    return f"{row['prompt']}{row['canonical_solution']}"


_READ: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "prose": ("brown", _brown),
    "mail": ("spam-assassin", _mail),
    "mathematics": ("gsm8k", _problem),
    "code": ("humaneval", _code),
}


def _all(rows: Rows, kind: str, split: str) -> list[str]:
    name, read = _READ[kind]
    wanted = _SPLITS[split]
    texts = (read(row) for number, row in enumerate(rows[name]) if number % 4 in wanted)
    return [text for text in texts if len(text) > 200]


def training(rows: Rows) -> list[str]:
    """Texts for tokenizers: every kind, at most `_TRAIN` characters of each."""
    found = []
    for kind in KINDS:
        size = 0
        for text in _all(rows, kind, "train"):
            if size < _TRAIN:
                found.append(text)
                size += len(text)
    return found


def evaluated(rows: Rows, split: str, count: int) -> dict[str, list[str]]:
    """The first texts of each kind, `count` at most, spread over the set, cut at a blank; and the
    first paragraphs of the declaration of human rights in `LANGUAGES`, which have no dev split."""
    found = {}
    for kind in KINDS:
        texts = _all(rows, kind, split)
        step = max(1, len(texts) // count)
        found[kind] = [_cut(text) for text in texts[::step][:count]]
    if split == "report":
        codes = {row["code"]: row for row in rows["udhr"]}
        found["other languages"] = [
            _cut("\n".join(codes[code]["articles"][:6])) for code in LANGUAGES if code in codes
        ]
    return found


def _cut(text: str) -> str:
    return text if len(text) <= LENGTH else text[:LENGTH].rsplit(" ", 1)[0]
