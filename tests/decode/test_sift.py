"""SIFT's control flow against a scripted model: every branch, every call, in its order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pertoken.decode.sift import DIRECT, Sifted, SiftedAll, Wording, clean, sift, sift_all
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, tiny_model

WORDING = Wording(
    sticker="SG({question})",
    forward="FO({question}, {sticker})",
    inverse="IG({prediction})",
    both="{question} + {sticker}",
    predict="LLM({text})",
)


class Scripted:
    """Answers what the script says, and writes down what it was asked."""

    def __init__(self, script: Mapping[str, str]) -> None:
        self.script, self.asked = script, []

    asked: list[str]

    def __call__(self, messages: Sequence[Mapping[str, str]]) -> str:
        (message,) = messages
        assert message["role"] == "user"
        self.asked.append(message["content"])
        return self.script[message["content"]]


SCRIPT = {
    "SG(Q)": "S1",
    "LLM(S1)": "so 1",
    "LLM(Q + S1)": "so 2",
    "FO(Q, S1)": "S2",
    "LLM(S2)": "so 3",
    "LLM(Q + S2)": "so 4",
    "IG(so 4)": "S",
    "FO(Q, S)": "S3",
    "LLM(S3)": "so 5",
    "LLM(Q + S3)": "so 6",
    "LLM(Q)": "so 7",
}
CALLS = list(SCRIPT)


@pytest.mark.parametrize(
    ("agree", "calls", "answer", "ended", "stage"),
    [
        ({"LLM(S1)": r"\boxed{2.0}"}, 3, "2", "consensus at stage 1", 1),
        ({"LLM(S2)": "4"}, 6, "4", "consensus at stage 2", 2),
        ({"LLM(S3)": "6"}, 10, "6", "consensus at stage 3", 3),
        ({}, 11, "7", DIRECT, None),
        ({"LLM(Q)": "I do not know"}, 11, None, DIRECT, None),
        # What holds no answer agrees with nothing.
        ({"LLM(S1)": "?", "LLM(Q + S1)": "?", "LLM(S2)": "4"}, 6, "4", "consensus at stage 2", 2),
    ],
)
def test_every_branch_asks_the_algorithms_calls_in_order(
    agree: dict[str, str], calls: int, answer: str | None, ended: str, stage: int | None
) -> None:
    model = Scripted({**SCRIPT, **agree})
    found = sift("Q", model, wording=WORDING)
    assert model.asked == CALLS[:calls]
    assert (found.answer, found.ended, found.stage) == (answer, ended, stage)
    assert found.calls == calls
    assert [step.text for step in found.steps if step.answer is None][:1] == ["S1"]
    assert found.stickers == ["S1", "S2", "S", "S3"][: len(found.stickers)]
    assert Sifted.from_dict(found.to_dict()) == found
    assert found.tokens is None
    assert found.table().splitlines()[-1] == f"{answer or 'no answer'} ({ended})"


def test_questions_go_through_the_stages_together() -> None:
    script = {key.replace("Q", name): text for name in "QR" for key, text in SCRIPT.items()}
    script |= {"SG(R)": "T1", "LLM(T1)": "2", "LLM(R + T1)": "2"}
    asked: list[list[str]] = []

    def replies(conversations: Any, **options: Any) -> list[Any]:
        asked.append([one[0]["content"] for one in conversations])
        assert options == {"max_new_tokens": 9, "threads": 4}
        return [SimpleNamespace(text=script[text], tokens=("a", "b")) for text in asked[-1]]

    seen: list[Any] = []
    found = sift_all(
        ["Q", "R"],
        SimpleNamespace(replies=replies),
        max_new_tokens=9,
        batch=4,
        wording=WORDING,
        progress=lambda *at: seen.append(at),
    )
    assert asked[:3] == [
        ["SG(Q)", "SG(R)"],
        ["LLM(S1)", "LLM(Q + S1)", "LLM(T1)", "LLM(R + T1)"],
        ["FO(Q, S1)"],
    ]
    assert [one.answer for one in found.found] == ["7", "2"]
    assert [one.tokens for one in found.found] == [22, 6]
    assert len(asked) == len(seen) == 8
    assert seen[2] == ("questions", 1, 2)


def test_the_usual_wording_carries_question_sticker_and_prediction() -> None:
    asked: list[str] = []

    def model(messages: Any) -> str:
        asked.append(messages[0]["content"])
        if "Write" in asked[-1]:
            return f"```\n**Conditions:**\n1. note {len(asked)} {{x}}\n```"
        return f"\\boxed{{{len(asked)}}}"

    found = sift("How many {legs}?", model)
    assert found.ended == DIRECT
    wants_question = [text for n, text in enumerate(asked) if n not in (1, 4, 6, 8)]
    assert all("How many {legs}?" in text for text in wants_question)
    assert not any("How many {legs}?" in asked[n] for n in (1, 4, 6, 8))
    assert "1. note 1 {x}" in asked[3]  # forward
    assert "\\boxed{6}" in asked[6]  # inverse: the text of the stage's prediction
    assert all(r"into \boxed{}." in asked[n] for n in (1, 2, 4, 5, 8, 9, 10))


@pytest.mark.parametrize(
    ("text", "sticker"),
    [
        ("```\n**Conditions:**\n1. A\n\n**Question:**\nB?\n```\nmore", None),
        ("**Conditions:**\n1. A\n\n**Question:**\nB?", None),
        ("**Conditions:**\n1. A\n\n**Question:**\nB?\n**Conditions:**\n1. C", None),
        ("no form at all ``` here", "no form at all ``` here"),
    ],
)
def test_a_sticker_is_cut_out_of_a_reply(text: str, sticker: str | None) -> None:
    assert clean(text) == (sticker or "**Conditions:**\n1. A\n\n**Question:**\nB?")


def test_a_local_model_is_asked_in_batches_as_one_by_one() -> None:
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), dtype=torch.float64)
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": 6, "wording": WORDING}
    together = sift_all(["One?", "Two and more?"], model, batch=3, **options)
    alone = [sift(one, model, **options) for one in ("One?", "Two and more?")]
    assert list(together.found) == alone
    assert all(step.tokens == 6 for one in alone for step in one.steps)
    assert together.without_number == sum(one.answer is None for one in alone)
    short = tiny_model("llama", vocab_size=len(tokenizer), max_positions=8)
    with pytest.raises(PertokenError, match="does not fit the model's 8 positions: shorten it"):
        sift("One?", short, **options)


def test_a_result_of_many_counts() -> None:
    found = sift_all(["Q"] * 2, Scripted({**SCRIPT, "LLM(S1)": "2"}), wording=WORDING)
    judged = SiftedAll(found.found, ("2.0", None))
    assert judged.accuracy == 1.0
    assert found.accuracy is None
    text = judged.table()
    assert "consensus at stage 1: 2" in text
    assert "answers without a number: 0 of 2" in text
    assert "right: 100.0%" in text
    assert judged.to_dict()["questions"][0]["steps"][0]["what"] == "sticker"


def test_what_cannot_be_asked_is_refused() -> None:
    for question, model, line in (
        (" ", Scripted({}), "question 1 is empty"),
        ("Q", 3, "not int"),
        ("Q", tiny_model("llama"), "needs its tokenizer"),
        ("Q", lambda messages: 3, "must give text, not int"),
    ):
        with pytest.raises(PertokenError, match=line):
            sift(question, model)
