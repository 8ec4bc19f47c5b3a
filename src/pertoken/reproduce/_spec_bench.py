"""Which Spec-Bench prompts a reproduction or bench runs: chosen by rule, never by result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pertoken.errors import PertokenError

Split = Literal["report", "dev"]
_CHAT = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
)
GROUPS = ("chat", "translation", "summarization", "qa", "math_reasoning", "rag")
"""The six task groups: eight small categories of Spec-Bench are its chat group."""


@dataclass(frozen=True)
class Prompt:
    """The first turn of one question."""

    question_id: int
    group: str
    text: str


def select(
    rows: Iterable[Mapping[str, Any]], *, split: Split = "report", per_group: int | None = None
) -> list[Prompt]:
    """Prompts of a split, `per_group` of every task group, spread evenly over its ids.

    split: "report" holds the odd question ids, "dev" the even ones; settings are chosen on dev
        and figures are given on report.
    Raises PertokenError where a group has fewer than `per_group` prompts.
    """
    parity = {"report": 1, "dev": 0}[split]
    groups: dict[str, list[Prompt]] = {}
    for row in sorted(rows, key=lambda row: int(row["question_id"])):
        if int(row["question_id"]) % 2 == parity:
            category = str(row["category"])
            group = "chat" if category in _CHAT else category
            prompt = Prompt(int(row["question_id"]), group, str(row["turns"][0]))
            groups.setdefault(group, []).append(prompt)
    order = [group for group in GROUPS if group in groups]
    order += sorted(groups.keys() - set(GROUPS))
    chosen = []
    for group in order:
        members = groups[group]
        wanted = len(members) if per_group is None else per_group
        if wanted > len(members):
            raise PertokenError(
                f"{group} has {len(members)} prompts in the {split} split, {wanted} were asked for"
            )
        chosen += [members[i * len(members) // wanted] for i in range(wanted)]
    return chosen


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one user turn, through the chat template where the tokenizer has one."""
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return list(tokenizer(ids, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text)["input_ids"])
