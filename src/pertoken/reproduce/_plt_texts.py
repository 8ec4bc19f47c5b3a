"""Texts of plt-kv's reproduction: Spec-Bench prompts of a split, joined by group, cut into pieces.

Single prompts are too short to quantise the cache of one part and read another behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pertoken.errors import PertokenError
from pertoken.reproduce._spec_bench import Split, select

SMOKE_ROWS: list[dict[str, Any]] = [
    {"question_id": n, "category": category, "turns": [f"{category} {n}: one two three four five"]}
    for n in range(1, 9)
    for category in ("qa", "rag")
]


def pieces(
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    split: Split,
    *,
    length: int,
    per_group: int,
    skip: int = 0,
) -> dict[str, list[int]]:
    """Pieces of `length` token ids, by name: up to `per_group` of each task group behind `skip`.

    A group whose prompts are short gives fewer; PertokenError where none gives one.
    """
    joined: dict[str, list[str]] = {}
    for prompt in select(rows, split=split):
        joined.setdefault(prompt.group, []).append(prompt.text)
    found = {}
    for group, texts in joined.items():
        ids = list(tokenizer("\n\n".join(texts))["input_ids"])
        whole = len(ids) // length
        for number in range(skip, min(skip + per_group, whole)):
            found[f"{group} {number}"] = ids[number * length : (number + 1) * length]
    if not found:
        raise PertokenError(f"no group of the {split} split holds {(skip + 1) * length} tokens")
    return found
