"""Prompts are chosen by rule: odd ids for reports, even ones for choices, never both."""

import pytest

from pertoken.errors import PertokenError
from pertoken.reproduce._spec_bench import GROUPS, encode, select
from pertoken.testing import ByteTokenizer

ROWS = [
    {"question_id": i, "category": category, "turns": [f"question {i}", "never used"]}
    for i, category in enumerate(["rag"] * 20 + ["writing"] * 6 + ["coding"] * 6 + ["qa"] * 9, 81)
]


def test_the_splits_share_no_prompt_and_hold_all() -> None:
    report, dev = select(ROWS, split="report"), select(ROWS, split="dev")
    assert all(prompt.question_id % 2 == 1 for prompt in report)
    assert {p.question_id for p in report} | {p.question_id for p in dev} == set(range(81, 122))
    assert len(report) + len(dev) == 41


def test_every_group_gives_as_many_spread_over_its_ids() -> None:
    chosen = select(reversed(ROWS), per_group=4)
    assert [prompt.group for prompt in chosen] == ["chat"] * 4 + ["qa"] * 4 + ["rag"] * 4
    assert [p.question_id for p in chosen if p.group == "rag"] == [81, 85, 91, 95]
    assert {p.group for p in chosen} <= set(GROUPS)
    assert chosen == select(ROWS, per_group=4)
    assert chosen[0].text == f"question {chosen[0].question_id}"


def test_too_many_asked_for_is_refused() -> None:
    with pytest.raises(PertokenError, match="qa has 5 prompts in the report split, 6 were"):
        select(ROWS, per_group=6)


def test_encode_without_a_template() -> None:
    assert encode(ByteTokenizer(), "ab") == [99, 100]
