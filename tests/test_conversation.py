"""Conversations from files: what is read, and the line that a broken file gets."""

import json
from pathlib import Path
from typing import Any

import pytest

from pertoken.conversation import TEXT, encode_conversation, encode_turn, read_conversation
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, tiny_model

MESSAGES = [{"role": "user", "content": "Hi\u2028there"}, {"role": "assistant", "content": "Yes."}]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_lines_and_a_list_are_the_same_conversation(tmp_path: Path) -> None:
    lines = "\n\n".join(json.dumps(message, ensure_ascii=False) for message in MESSAGES)
    assert read_conversation(write(tmp_path, "a.jsonl", lines + "\n")) == MESSAGES
    assert read_conversation(write(tmp_path, "a.json", json.dumps(MESSAGES))) == MESSAGES


def test_a_text_file_is_one_message_without_a_template(tmp_path: Path) -> None:
    messages = read_conversation(write(tmp_path, "a.txt", "Once upon\na time"))
    assert messages == [{"role": TEXT, "content": "Once upon\na time"}]
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=512)
    ids = encode_conversation(tokenizer, model, messages)
    assert ids[0].tolist() == tokenizer("Once upon\na time")["input_ids"]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.jsonl", '{"role": "user", "content": "x"}\n{"role": "us', "line 2: not JSON"),
        ("a.jsonl", '["x"]', 'line 1: {"role"'),
        ("a.jsonl", '\n{"role": "user"}', 'line 2: no "content" in the message'),
        ("a.jsonl", '{"role": "user", "content": 3}', 'line 1: no text as "content"'),
        ("a.jsonl", '{"role": "usr", "content": "x"}', "did you mean 'user'?"),
        ("a.jsonl", '{"role": "user", "content": "a\\ud800"}', "character 2 of the content"),
        ("a.json", '[{"role": "user",\n "content": x}]', "line 2: not JSON"),
        ("a.json", '{"role": "user", "content": "x"}', "must be a list of messages"),
        ("a.json", "[]", "holds no message"),
        ("a.jsonl", " \n", "is empty"),
        ("a.txt", "", "is empty"),
        ("a.csv", "x", ".jsonl (one message a line), .json or .txt"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str, line: str) -> None:
    with pytest.raises(PertokenError) as error:
        read_conversation(write(tmp_path, name, text))
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(PertokenError, match="there is no conversation"):
        read_conversation(tmp_path / "none.txt")
    path = tmp_path / "latin.txt"
    path.write_bytes(b"a\xe9b")
    with pytest.raises(PertokenError, match=r"not UTF-8 \(byte 1\)"):
        read_conversation(path)
    folder = tmp_path / "folder.txt"
    folder.mkdir()
    with pytest.raises(PertokenError, match="is a folder"):
        read_conversation(folder)


class Templated:
    """A tokenizer whose template wants a user first, as Gemma's does."""

    chat_template = "…"

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        from jinja2 import TemplateError

        if messages[0]["role"] != "user":
            raise TemplateError("Conversation roles must alternate")
        return {"input_ids": [1, 2] + [3] * options["add_generation_prompt"]}


def test_the_chat_template_is_used_and_its_refusal_is_one_line() -> None:
    model = tiny_model("llama")
    assert encode_conversation(Templated(), model, MESSAGES).tolist() == [[1, 2]]
    assert encode_conversation(Templated(), model, MESSAGES, reply=True).tolist() == [[1, 2, 3]]
    with pytest.raises(PertokenError, match="template refuses this: Conversation roles must"):
        encode_conversation(Templated(), model, MESSAGES[::-1])


def test_more_tokens_than_positions_are_refused() -> None:
    model = tiny_model("llama", vocab_size=512, max_positions=16)
    with pytest.raises(PertokenError, match="does not fit the model's 16 positions"):
        encode_conversation(ByteTokenizer(), model, [{"role": "user", "content": "x" * 40}])


@pytest.mark.model
def test_a_turn_is_what_the_template_adds_to_the_conversation(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    turn = {"role": "user", "content": "And then?"}
    before = encode_conversation(tokenizer, model, MESSAGES)[0].tolist()
    whole = encode_conversation(tokenizer, model, [*MESSAGES, turn], reply=True)[0].tolist()
    assert before + encode_turn(tokenizer, "And then?") == whole
    bare = tokenizer("And then?", add_special_tokens=False)["input_ids"]
    assert encode_turn(tokenizer, "And then?", chat=False) == bare


def test_a_turn_without_a_template_is_its_text() -> None:
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=512)
    assert encode_turn(tokenizer, "Why?") == tokenizer.encode("Why?")
    with pytest.raises(PertokenError, match="no text to continue with"):
        encode_turn(tokenizer, "")
    assert encode_conversation(tokenizer, model, MESSAGES)[0].tolist() == tokenizer.encode(
        "user: Hi\u2028there\nassistant: Yes.\n"
    )
