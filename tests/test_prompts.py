"""Prompt files: what is read, and every mistake in one line that names the place."""

import json
from pathlib import Path

import pytest

from pertoken.errors import PertokenError
from pertoken.prompts import Prompt, encode_prompt, positions, read_prompts
from pertoken.testing import ByteTokenizer, tiny_model


def write(folder: Path, text: str | bytes, name: str = "prompts.jsonl") -> Path:
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def test_text_file_is_one_prompt_per_line(tmp_path: Path) -> None:
    file = write(tmp_path, "\ufeffeins\n\n zwei \r\n", "p.txt")
    assert read_prompts(file) == [Prompt("eins", id="1"), Prompt("zwei", id="3")]
    assert read_prompts(str(file), limit=1) == [Prompt("eins", id="1")]


def test_json_lines_in_three_spellings(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "category": "qa", "id": 7},
        {"text": "b"},
        {"question_id": 81, "category": "writing", "turns": ["c\nd", "then"]},
    ]
    file = write(tmp_path, "\n".join(map(json.dumps, rows)) + "\n")
    assert read_prompts(file) == [
        Prompt("a", "qa", "7"),
        Prompt("b", "", "2"),
        Prompt("c\nd", "writing", "81"),
    ]


def test_a_separator_inside_of_json_ends_no_line(tmp_path: Path) -> None:
    file = write(tmp_path, '{"prompt": "a\u2028b"}\r\n{"prompt": "c"}\n')
    assert [one.text for one in read_prompts(file)] == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ('{"prompt": "a"}\n{"prompt"', "line 2: not JSON"),
        ('{"prompt": "a"}\n\n["a"]', "line 3: an object"),
        ('{"promt": "a"}', r"line 1: no \"prompt\".*'promt'.*did you mean 'prompt'"),
        ('{"prompt": "  "}', "line 1: the prompt is empty"),
        ('{"prompt": 3}', "must hold text, not int"),
        ('{"turns": []}', "must hold text, not list"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(PertokenError, match=message) as caught:
        read_prompts(write(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_a_broken_line_behind_the_limit_counts(tmp_path: Path) -> None:
    with pytest.raises(PertokenError, match="line 2"):
        read_prompts(write(tmp_path, '{"prompt": "a"}\nnonsense'), limit=1)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(PertokenError, match="there is no prompt file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(PertokenError, match="is a folder"):
        read_prompts(tmp_path)
    with pytest.raises(PertokenError, match=r"\.txt .* or \.jsonl"):
        read_prompts(write(tmp_path, "a,b", "p.csv"))
    with pytest.raises(PertokenError, match="1 or more, got 0"):
        read_prompts(None, limit=0)


def test_prompt_becomes_ids() -> None:
    tokenizer, model = ByteTokenizer(), tiny_model("llama", vocab_size=258, max_positions=32)
    ids = encode_prompt(tokenizer, model, "hello", max_new_tokens=27)
    assert ids.tolist() == [tokenizer.encode("hello")]
    with pytest.raises(PertokenError, match="5 tokens and 28 new ones do not fit the model's 32"):
        encode_prompt(tokenizer, model, "hello", max_new_tokens=28)
    with pytest.raises(PertokenError, match="empty"):
        encode_prompt(tokenizer, model, " \n", max_new_tokens=1)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(PertokenError, match="the model knows 64 ids"):
        encode_prompt(ByteTokenizer(), tiny_model("llama"), "hello", 1)


def test_chat_template_is_used_unless_told_not_to() -> None:
    class Chatty(ByteTokenizer):
        chat_template = "{{ messages }}"

        def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> object:
            return {"input_ids": self.encode(f"<{messages[0]['content']}>")}

    model, tokenizer = tiny_model("llama", vocab_size=258), Chatty()
    assert tokenizer.decode(encode_prompt(tokenizer, model, "hi", 4)[0]) == "<hi>"
    assert tokenizer.decode(encode_prompt(tokenizer, model, "hi", 4, chat=False)[0]) == "hi"


def test_positions_of_a_table_that_begins_behind_the_padding() -> None:
    """RoBERTa's table has 40 rows, of which those up to the padding id stand for no token."""
    from transformers import RobertaConfig, RobertaForCausalLM

    config = RobertaConfig(
        vocab_size=258,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
        pad_token_id=1,
        is_decoder=True,
    )
    model = RobertaForCausalLM(config).eval()
    assert positions(model) == 38
    text = "a" * 37
    ids = encode_prompt(ByteTokenizer(), model, text, 1)
    assert model(ids).logits.shape == (1, 37, 258)
    with pytest.raises(PertokenError, match="38 tokens and 1 new ones do not fit"):
        encode_prompt(ByteTokenizer(), model, f"{text}a", 1)
