"""The embedded model is the one it should be: its losses, its greedy words, its tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import pertoken
from pertoken.loading import EMBEDDED

pytestmark = pytest.mark.model

DICKENS = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the "
    "age of foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the "
    "season of Light, it was the season of Darkness, it was the spring of hope, it was the winter "
    "of despair."
)
BIOLOGY = (
    "The mitochondrion is the powerhouse of the cell. It produces most of the chemical energy "
    "needed to power the cell's biochemical reactions."
)
SCRIPTS = {
    "Latin": "Hello, world! naïve œuvre",
    "Turkish": "Merhaba dünya, ığşçöü İI",
    "Cyrillic": "Привет, мир",
    "Greek": "Γειά σου Κόσμε",
    "Hebrew": "שלום עולם",
    "Arabic": "مرحبا بالعالم ١٢٣",
    "Devanagari": "नमस्ते दुनिया १२",
    "Thai": "สวัสดีชาวโลก",
    "Han": "你好，世界",
    "Kana": "こんにちは、カタカナ",
    "Hangul": "안녕하세요 세계",
    "Ethiopic": "ሰላም ልዑል",
    "emoji and control": "👩‍👩‍👧 \t\x00\n  x  7\r\n",
}


@pytest.mark.parametrize(("text", "tokens", "nats"), [(DICKENS, 74, 1.624), (BIOLOGY, 26, 2.892)])
def test_loss_per_token(smollm2: tuple[Any, Any], text: str, tokens: int, nats: float) -> None:
    # A wrong row order of queries or keys, or a wrong rotary base, costs whole nats here.
    model, tokenizer = smollm2
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.shape[1] == tokens
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(nats, abs=0.01)


def test_greedy_words(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(ids[0, inputs.input_ids.shape[1] :]) == " Paris."


def test_chat_ends_by_itself(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    question = "What is the capital of France? Answer in one sentence."
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(ids[0, inputs.input_ids.shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize("script", SCRIPTS)
def test_text_round_trip(smollm2: tuple[Any, Any], script: str) -> None:
    _, tokenizer = smollm2
    assert tokenizer.decode(tokenizer(SCRIPTS[script]).input_ids) == SCRIPTS[script]


def test_digits_stand_alone(smollm2: tuple[Any, Any]) -> None:
    _, tokenizer = smollm2
    assert tokenizer.tokenize("x  7") == ["x", "ĠĠ", "7"]
    assert tokenizer.tokenize("In 2024") == ["In", "Ġ", "2", "0", "2", "4"]


def test_what_the_caller_gets(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert model.dtype == torch.float32
    assert not model.training
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.num_parameters() == 134_515_008
    assert (tokenizer.padding_side, tokenizer.pad_token_id, tokenizer.eos_token_id) == (
        "left",
        2,
        2,
    )
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 2
    files = list(EMBEDDED["smollm2"].folder.iterdir())
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)
    assert not [path for path in files if path.suffix == ".gguf"]


def test_bfloat16(smollm2: tuple[Any, Any]) -> None:
    model, _ = pertoken.load("smollm2", dtype="bfloat16")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.lm_head.weight, smollm2[0].lm_head.weight.bfloat16())


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("PERTOKEN_TEST_GEMMA"), reason="set PERTOKEN_TEST_GEMMA=1: 239 MB, own terms"
)
def test_gemma(tmp_path: Path) -> None:
    model, tokenizer = pertoken.load("gemma3-270m")
    ids = tokenizer(DICKENS, return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(0.928, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trees_are_verified_in_both_types(dtype: torch.dtype) -> None:
    # In bfloat16 the logits of a tree differ from those of plain text by much more than those of
    # a tiny model do: by up to a fifth of their spread behind an unusual text.
    from pertoken.decode import Goose
    from pertoken.testing import compare_ids

    model, tokenizer = pertoken.load("smollm2", dtype=dtype)
    text = "Repeat: one two three, one two three, one two three, one"
    inputs = tokenizer(text, return_tensors="pt")
    length = inputs.input_ids.shape[1]
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    plain = model.generate(**inputs, **options)[0, length:].tolist()
    goose = Goose(budget=8)
    fast = model.generate(**inputs, **options, custom_generate=goose)[0, length:].tolist()
    verdict = compare_ids(model, inputs.input_ids[0], plain, fast, max_new_tokens=12)
    assert verdict.outcome in ("identical", "numerical tie"), verdict
    assert goose.stats.accepted_per_forward > 1.5


def test_the_encoder_knows_what_is_alike() -> None:
    model, tokenizer = pertoken.load("minilm", kind="encoder")
    texts = ["A man is eating food.", "Someone is having a meal.", "The stock market fell sharply."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    mask = inputs.attention_mask[..., None]
    with torch.no_grad():
        mean = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    cosine = torch.nn.functional.cosine_similarity(mean[:1], mean[1:])
    assert cosine.tolist() == pytest.approx([0.689, -0.004], abs=0.001)
    assert model.num_parameters() == 22_713_216
