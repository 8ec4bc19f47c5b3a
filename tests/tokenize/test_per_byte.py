"""Per-byte perplexity against the chain rule, and laws that make tokenizers comparable."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, tiny_model
from pertoken.tokenize import bits_per_byte, nats_per_text, perplexity_per_byte


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    tokenizer = ByteTokenizer()
    return tiny_model("llama", vocab_size=len(tokenizer)), tokenizer


def chain_rule(model: Any, ids: list[int], start: int) -> float:
    total = 0.0
    for place in range(1, len(ids)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[max(0, start) : place]])).logits[0, -1]
        total -= float(logits.log_softmax(-1)[ids[place]])
    return total


def test_it_is_the_chain_rule_behind_the_first_token(pair: Any) -> None:
    model, tokenizer = pair
    text = "ça va"
    [(nats, count)] = nats_per_text(model, tokenizer, [text])
    assert count == 6
    ids = [tokenizer.eos_token_id, *tokenizer.encode(text)]
    assert nats == pytest.approx(chain_rule(model, ids, 0), abs=1e-9)


def test_windows_count_each_token_once_behind_half_a_window(pair: Any) -> None:
    model, tokenizer = pair
    text = "the quick brown fox jumps"
    [(nats, _)] = nats_per_text(model, tokenizer, [text], window=8)
    ids = tokenizer.encode(text)
    wanted, done = 0.0, 0
    for begin in range(0, len(ids), 4):
        part = [tokenizer.eos_token_id, *ids[begin : begin + 8]]
        with torch.no_grad():
            chances = model(input_ids=torch.tensor([part])).logits[0].log_softmax(-1)
        for place in range(done, min(begin + 8, len(ids))):
            wanted -= float(chances[place - begin, ids[place]])
        done = min(begin + 8, len(ids))
    assert done == len(ids)
    assert nats == pytest.approx(wanted, abs=1e-9)


def test_units(pair: Any) -> None:
    model, tokenizer = pair
    texts = ["one", "and another"]
    nats, size = map(sum, zip(*nats_per_text(model, tokenizer, texts), strict=True))
    assert bits_per_byte(model, tokenizer, texts) == pytest.approx(nats / size / math.log(2))
    assert perplexity_per_byte(model, tokenizer, texts) == pytest.approx(math.exp(nats / size))


def test_bad_input_is_one_clear_line(pair: Any) -> None:
    model, tokenizer = pair
    with pytest.raises(PertokenError, match="empty text"):
        nats_per_text(model, tokenizer, ["a", ""])
    small = tiny_model("llama", vocab_size=50)
    with pytest.raises(PertokenError, match="gives the id 99, but the model knows 50 ids"):
        nats_per_text(small, tokenizer, ["a"])
