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
    """`per_group` pieces of `length` token ids of each task group, by name, behind `skip` others.

    Raises PertokenError where a group's prompts are too short for that.
    """
    joined: dict[str, list[str]] = {}
    for prompt in select(rows, split=split):
        joined.setdefault(prompt.group, []).append(prompt.text)
    found = {}
    for group, texts in joined.items():
        ids = list(tokenizer("\n\n".join(texts))["input_ids"])
        wanted = (skip + per_group) * length
        if len(ids) < wanted:
            raise PertokenError(f"{group} has {len(ids)} tokens in the {split} split, not {wanted}")
        for number in range(skip, skip + per_group):
            found[f"{group} {number}"] = ids[number * length : (number + 1) * length]
    return found
