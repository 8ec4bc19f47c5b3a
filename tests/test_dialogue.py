"""Dialogues: questions and answers in order, and ids that only grow."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pertoken.dialogue import (
    Exchange,
    as_jsonl,
    exchanges,
    first_turn,
    follow,
    next_turn,
    read_dialogue,
    stop_ids,
)
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, tiny_model

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello\u2028you"},
    {"role": "user", "content": "And now?"},
]


@pytest.mark.parametrize("form", [".jsonl", ".json"])
def test_files_are_read_in_both_forms(tmp_path: Path, form: str) -> None:
    file = tmp_path / f"talk{form}"
    text = as_jsonl(TALK) if form == ".jsonl" else json.dumps(TALK, indent=2)
    file.write_text("\ufeff" + text.replace("\n", "\r\n"), encoding="utf-8")
    assert read_dialogue(file) == TALK
    assert exchanges(TALK) == (
        "Be brief.",
        [Exchange("Hi", "Hello\u2028you"), Exchange("And now?")],
    )


def test_the_sample_has_twenty_turns_and_reads_like_a_file(tmp_path: Path) -> None:
    sample = read_dialogue(None)
    _, turns = exchanges(sample)
    assert len(turns) == 20
    assert all(turn.answer for turn in turns)
    (tmp_path / "sample.jsonl").write_text(as_jsonl(sample), encoding="utf-8")
    assert read_dialogue(tmp_path / "sample.jsonl") == sample
    sample.clear()
    assert read_dialogue(None)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([("system", "Hi")], "has no message of the user"),
        ([("user", " ")], "message 1: it is empty"),
        ([("user", "a"), ("tool", "b")], "message 2: a dialogue has system, user and assistant"),
        ([("assistant", "a")], "message 1: an answer of the assistant without a question"),
        ([("user", "a"), ("assistant", "b"), ("assistant", "c")], "message 3: an answer of the"),
        ([("user", "a"), ("system", "b")], "message 2: a system message can only be the first"),
    ],
)
def test_what_is_no_dialogue_is_named(
    tmp_path: Path, messages: list[tuple[str, str]], message: str
) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_text(as_jsonl([{"role": role, "content": text} for role, text in messages]))
    with pytest.raises(PertokenError) as error:
        read_dialogue(file)
    assert f"talk.jsonl{'' if message.startswith('has') else ','} {message}" in str(error.value)
    assert "\n" not in str(error.value)


def test_plain_text_is_no_dialogue(tmp_path: Path) -> None:
    (tmp_path / "talk.txt").write_text("Hi")
    with pytest.raises(PertokenError, match="a dialogue has system, user and assistant messages"):
        read_dialogue(tmp_path / "talk.txt")


def test_without_a_template_turns_are_a_transcript() -> None:
    tokenizer = ByteTokenizer()
    ids = first_turn(tokenizer, "Hi", "Be brief.") + next_turn(tokenizer, "And?")
    assert tokenizer.decode(ids) == "Be brief.\n\nUser: Hi\nAssistant:\nUser: And?\nAssistant:"


def test_stop_ids_and_what_follows_them() -> None:
    model = tiny_model("llama")
    assert stop_ids(model) == frozenset()
    model.generation_config.eos_token_id = 3
    assert stop_ids(model) == {3}
    model.generation_config.eos_token_id = [3, 4]
    assert stop_ids(model) == {3, 4}
    assert follow([1, 4], [3, 5], {3, 4}) == [3, 5]  # ended by another stop token: kept
    assert follow([], [3, 5], {3}) == [3, 5]
    assert follow([1, 5], [5, 6], {3}) == [5, 6]  # repeats, but is no stop


class Templated(ByteTokenizer):
    """A template that trims, and that drops everything but the last answer's last word."""

    chat_template: Any = "some"
    keeps = True

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **_: Any) -> Any:
        parts = []
        for place, message in enumerate(messages):
            words = message["content"].strip()
            parts.append(f"<{message['role'][0]}>{words}" if self.keeps or not place else "")
        text = "".join(parts) + "<a>"
        return {"input_ids": self.encode(text)} if tokenize else text


def test_later_turns_are_cut_behind_the_answer() -> None:
    tokenizer = Templated()
    assert tokenizer.decode(next_turn(tokenizer, " And? ")) == "<u>And?<a>"
    tokenizer.keeps = False
    with pytest.raises(PertokenError, match="leaves out answers or questions"):
        next_turn(tokenizer, "And?")


@pytest.mark.model
def test_the_ids_of_a_real_template_grow_to_what_it_renders_at_once(smollm2: Any) -> None:
    _, tokenizer = smollm2
    sample = read_dialogue(None)
    _, turns = exchanges(sample)
    ids = first_turn(tokenizer, turns[0].question)
    for before, turn in pairwise(turns):
        ids += tokenizer(before.answer, add_special_tokens=False)["input_ids"]
        ids += next_turn(tokenizer, turn.question)
    whole = tokenizer.apply_chat_template(sample[:-1], add_generation_prompt=True, return_dict=True)
    assert ids == whole["input_ids"]


@pytest.mark.model
def test_a_template_that_refuses_is_named(smollm2: Any) -> None:
    from copy import copy

    tokenizer = copy(smollm2[1])
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(PertokenError, match="refuses the conversation: no system here"):
        first_turn(tokenizer, "Hi", "Be brief.")
