"""Conversations: files are checked line by line, and ids only grow."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pertoken.conversation import (
    TEXT,
    Exchange,
    as_jsonl,
    encode_conversation,
    exchanges,
    first_turn,
    follow,
    next_turn,
    read_conversation,
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


@pytest.mark.parametrize("form", ["lines", "list", "pretty"])
def test_files_are_read_in_both_forms(tmp_path: Path, form: str) -> None:
    file = tmp_path / "talk.jsonl"
    text = as_jsonl(TALK)
    if form != "lines":
        text = json.dumps(TALK, indent=2 if form == "pretty" else None)
    file.write_text("\ufeff" + text.replace("\n", "\r\n"), encoding="utf-8")
    assert read_conversation(file) == TALK
    assert exchanges(TALK) == (
        "Be brief.",
        [Exchange("Hi", "Hello\u2028you"), Exchange("And now?")],
    )


def test_the_sample_has_twenty_turns_and_reads_like_a_file(tmp_path: Path) -> None:
    sample = read_conversation(None)
    _, turns = exchanges(sample)
    assert len(turns) == 20
    assert all(turn.answer for turn in turns)
    (tmp_path / "sample.jsonl").write_text(as_jsonl(sample), encoding="utf-8")
    assert read_conversation(tmp_path / "sample.jsonl") == sample
    sample.clear()
    assert read_conversation(None)


def line(role: Any, content: Any) -> str:
    return json.dumps({"role": role, "content": content})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "talk is empty"),
        (b" \n\n", "talk is empty"),
        (b"[]", "talk has no message of the user"),
        (line("system", "Hi").encode(), "talk has no message of the user"),
        (line("user", "Hi").encode() + b"\n{", "talk, line 2: not JSON"),
        (b'[\n{"role": "user",\n}]', "talk, line 3: not JSON"),
        (b'\n"Hi"', 'talk, line 2: {"role": "user"'),
        (b'["Hi"]', 'talk, message 1: {"role": "user"'),
        (b'{"content": "Hi"}', "line 1: {"),
        (line("usr", "Hi").encode(), "not 'usr' (did you mean 'user'?)"),
        (line(["user"], "Hi").encode(), "not ['user']"),
        (line("user", 3).encode(), '"content" must hold text, not int'),
        (line("user", " ").encode(), "line 1: the message is empty"),
        (line("user", "a \ud800").encode(), "line 1: its character 3 is a broken one"),
        (line("assistant", "Hi").encode(), "an answer of the assistant without a question"),
        (
            "\n".join([line("user", "a"), line("assistant", "b"), line("assistant", "c")]).encode(),
            "line 3: an answer of the assistant without a question",
        ),
        (
            "\n".join([line("user", "a"), line("system", "b")]).encode(),
            "line 2: a system message can only be the first",
        ),
        (b"\xff\xfe", "talk is not UTF-8 (byte 1)"),
    ],
)
def test_broken_files_are_named_with_their_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "talk").write_bytes(content)
    with pytest.raises(PertokenError) as error:
        read_conversation(tmp_path / "talk")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(PertokenError, match="there is no conversation file"):
        read_conversation(tmp_path / "none")
    with pytest.raises(PertokenError, match="is a folder"):
        read_conversation(tmp_path)


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

    def apply_chat_template(
        self, messages: Any, add_generation_prompt: bool, tokenize: bool = True, **_: Any
    ) -> Any:
        parts = []
        for place, message in enumerate(messages):
            words = message["content"].strip()
            parts.append(f"<{message['role'][0]}>{words}" if self.keeps or not place else "")
        text = "".join(parts) + "<a>" * add_generation_prompt
        return {"input_ids": self.encode(text)} if tokenize else text


def test_later_turns_are_cut_behind_the_answer() -> None:
    tokenizer = Templated()
    assert tokenizer.decode(next_turn(tokenizer, " And? ")) == "<u>And?<a>"
    assert tokenizer.decode(next_turn(tokenizer, " And? ", closed=True)) == "<u>And?<a>"
    tokenizer.keeps = False
    with pytest.raises(PertokenError, match="leaves out answers or questions"):
        next_turn(tokenizer, "And?")


@pytest.mark.model
def test_the_ids_of_a_real_template_grow_to_what_it_renders_at_once(smollm2: Any) -> None:
    _, tokenizer = smollm2
    sample = read_conversation(None)
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


def test_a_text_file_is_one_message_without_a_template(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Once upon\na time", encoding="utf-8")
    messages = read_conversation(tmp_path / "a.txt")
    assert messages == [{"role": TEXT, "content": "Once upon\na time"}]
    tokenizer = Templated()
    model = tiny_model("llama", vocab_size=512)
    ids = encode_conversation(tokenizer, model, messages)
    assert ids[0].tolist() == tokenizer("Once upon\na time")["input_ids"]
    with pytest.raises(PertokenError, match="a plain text is no conversation"):
        exchanges(messages)


def test_whole_conversations_as_ids() -> None:
    model = tiny_model("llama", vocab_size=512)
    for tokenizer, text in (
        (
            ByteTokenizer(),
            "System: Be brief.\nUser: Hi\nAssistant: Hello\u2028you\nUser: And now?\n",
        ),
        (Templated(), "<s>Be brief.<u>Hi<a>Hello\u2028you<u>And now?"),
    ):
        assert tokenizer.decode(encode_conversation(tokenizer, model, TALK)[0].tolist()) == text
    short = tiny_model("llama", vocab_size=512, max_positions=16)
    with pytest.raises(PertokenError, match="does not fit the model's 16 positions"):
        encode_conversation(ByteTokenizer(), short, TALK)


@pytest.mark.model
def test_a_closed_answer_goes_on_as_the_template_does(smollm2: Any) -> None:
    model, tokenizer = smollm2
    sample = read_conversation(None)[:4]
    ids = encode_conversation(tokenizer, model, sample)[0].tolist()
    ids += next_turn(tokenizer, "And now?", closed=True)
    messages = [*sample, {"role": "user", "content": "And now?"}]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert ids == whole["input_ids"]
