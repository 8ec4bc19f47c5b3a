"""Self-consistency: who votes, who wins, and that any way of decoding may write."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from pertoken.decode import CautiousDecoding, SelfConsistency, majority, self_consistency
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, MockModel

TOKENIZER = ByteTokenizer()


def digits(**chances: float) -> MockModel:
    """A model that writes one of some digits, and then stops."""
    table = torch.zeros(258, 258)
    table[:, 1] = 1.0
    start = TOKENIZER.encode("=")[0]
    table[start] = 0.0
    for name, chance in chances.items():
        table[start, TOKENIZER.encode(name[-1])[0]] = chance
    model = MockModel(table)
    model.generation_config.eos_token_id = 1
    return model


def test_the_commonest_answer_wins_and_the_first_of_equals() -> None:
    assert majority(["2", "1", "1", None, None, None]) == "1"
    assert majority(["3", "1", "1", "3"]) == "3"
    assert majority([]) is None


def test_the_most_probable_digit_is_the_answer() -> None:
    model = digits(_7=0.6, _8=0.3, _x=0.1)
    found = self_consistency(model, TOKENIZER, ["1=", "22="], draws=60, batch=50, max_new_tokens=4)
    assert found.answers == ["7", "7"]
    assert [len(texts) for texts in found.texts] == [60, 60]
    for share, row in zip(found.shares, found.rows(), strict=True):
        assert 0.4 < share < 0.8
        assert sum(row["votes"].values()) + row["without_answer"] == 60
        assert row["without_answer"] > 0
    assert "7" in found.table()
    assert json.loads(found.to_json())["prompts"][1]["texts"] == found.texts[1]


def test_any_decoder_writes_and_the_generator_stays() -> None:
    model = digits(_7=0.6, _8=0.4)
    run: dict[str, Any] = {"draws": 12, "max_new_tokens": 4, "seed": 3}
    state = torch.get_rng_state()
    plain = self_consistency(model, TOKENIZER, "1=", **run)
    assert torch.equal(torch.get_rng_state(), state)
    sure = CautiousDecoding(TOKENIZER, max_trials=1)
    assert self_consistency(model, TOKENIZER, "1=", decoder=sure, **run).texts == plain.texts
    # Of many trials one is a 7, which is the more probable one.
    many = CautiousDecoding(TOKENIZER, trials=30)
    assert self_consistency(model, TOKENIZER, "1=", decoder=many, **run).shares == [1.0]
    assert 0.2 < plain.found[0].count("7") / 12 < 1.0


def test_texts_without_an_answer_do_not_vote() -> None:
    found = self_consistency(digits(_x=1.0), TOKENIZER, "1=", draws=3, max_new_tokens=4)
    assert (found.answers, found.shares) == ([None], [0.0])
    assert "-" in found.table().splitlines()[1]
    words = self_consistency(
        digits(_x=1.0), TOKENIZER, "1=", draws=3, max_new_tokens=4, answer=str.upper
    )
    assert words.answers == ["X"]
    assert isinstance(found, SelfConsistency)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": " "}, "the prompt is empty"),
        ({"draws": 0}, "draws must be 1 or more, got 0"),
        ({"batch": 0}, "batch must be 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
    ],
)
def test_refusals(arguments: dict[str, Any], said: str) -> None:
    run: dict[str, Any] = {"prompts": "1=", **arguments}
    with pytest.raises(PertokenError, match=said):
        self_consistency(digits(_7=1.0), TOKENIZER, **run)
