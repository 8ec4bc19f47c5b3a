"""The conversation of KV-Direct's reproduction, and what is said of a model that is not there."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from pertoken.cache import make_cache
from pertoken.cache.window import WindowCache
from pertoken.errors import PertokenError
from pertoken.reproduce import kv_direct
from pertoken.reproduce._cache_conversation import converse, history, parting, questions
from pertoken.reproduce._cache_rows import exact_rows, window_rows
from pertoken.reproduce._cache_units import SECOND, Models, divergence
from pertoken.reproduce._context import Context
from pertoken.testing import ByteTokenizer, tiny_model

TURNS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]


def smoke() -> Context:
    return Context(slug="kv-direct", version=1, smoke=True)


def test_a_conversation_is_what_generate_writes_turn_by_turn() -> None:
    model = tiny_model("gemma3")
    found = converse(model, make_cache("full", model, 1), TURNS, 5)
    text = torch.empty(1, 0, dtype=torch.long)
    for number, turn in enumerate(TURNS):
        text = torch.cat((text, torch.tensor([turn])), -1)
        assert history(model, TURNS, found.answers, number) == text[0].tolist()
        mask = torch.ones_like(text)
        out = model.generate(text, attention_mask=mask, max_new_tokens=5, do_sample=False)
        assert out[0, text.shape[1] :].tolist() == found.answers[number]
        text = out
    # The last token of an answer is read with the next question.
    assert found.tokens == [4 + 4, 8 + 1 + 2 + 4, 15 + 1 + 3 + 4]
    assert found.peak_bytes == sorted(found.peak_bytes)


def test_an_answer_ends_at_a_stop_id_which_is_not_read_twice() -> None:
    model = tiny_model("llama")
    cache = make_cache("full", model, 1)
    first = converse(model, cache, TURNS[:1], 5).answers[0]
    stop = first[2]
    model.generation_config.eos_token_id = stop
    turns = [TURNS[0], [stop, 9]]
    found = converse(model, make_cache("full", model, 1), turns, 5)
    assert found.answers[0] == first[: first.index(stop) + 1]
    assert history(model, turns, found.answers, 1) == [*TURNS[0], *found.answers[0], 9]


def test_the_questions_are_the_twenty_of_the_sample() -> None:
    asked = questions(ByteTokenizer(), 20)
    assert len(asked) == 20
    assert ByteTokenizer().decode(asked[0]).startswith("User: I want to grow herbs")
    assert all(ByteTokenizer().decode(one).startswith("\nUser: ") for one in asked[1:])


def test_a_forgetful_cache_is_told_with_the_gap() -> None:
    models = Models(smoke())
    model, _ = models.get("smollm2")
    turns = models.turns("smollm2")
    right = converse(model, make_cache("full", model, 1), turns, 3).to_dict()
    own = converse(model, WindowCache(model, 4), turns, 3).to_dict()
    assert parting(right["answers"], own["answers"]) is not None
    found = divergence(models, "smollm2", "float32", right, own)
    assert found["outcome"] == "different"
    assert "gap" in found["text"]


def test_a_model_that_may_not_be_loaded_is_left_out_in_sight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(name: str, **_: Any) -> None:
        raise PertokenError(f"{name} asks for consent")

    monkeypatch.setattr(import_module("pertoken.loading"), "model_folder", refuse)
    models = Models(Context(slug="kv-direct", version=1))
    assert models.names == ["smollm2"]
    rows = kv_direct._left_out(models.left_out)
    of_second = [metric for metric in kv_direct.BARS if SECOND in metric]
    assert [row.metric for row in rows] == of_second
    assert all("asks for consent" in row.why and row.here != row.here for row in rows)


def test_rows_say_the_least_match_and_the_bytes() -> None:
    def unit(answers: list[list[int]], kv: int) -> dict[str, Any]:
        return {
            "answers": answers,
            "tokens": [10, 20],
            "peak_bytes": [kv, kv],
            "kv_bytes": [kv, kv],
            "budget": 5,
        }

    full = unit([[1, 2], [3, 4]], 100)
    found = {
        ("m", "float32", checkpoint, again, percent): unit([[1, 2], [3, 4]], 40)
        for checkpoint in ("tokens", "residual", "per_layer")
        for again in ("step", "turn")
        for percent in (5, 25)
    }
    bad = ("m", "float32", "tokens", "step", 5)
    found[bad] = unit([[1, 2], [3, 5]], 40)
    partings = {bad: {"turn": 2, "outcome": "numerical tie", "text": "step 1: …"}}
    rows = {row.metric: row for row in exact_rows("m", full, found, (5, 25), partings)}
    row = rows["tokens equal to the full cache's, m, tokens/step: least of all budgets"]
    assert row.here == 0.75
    assert row.why == "5 %: turn 2, numerical tie, step 1: …"
    # 40 bytes where a token has 10 and the budget is 5.
    held = rows["keys and values held over the budget's, m, step: greatest of all turns"]
    assert held.here == 0.8
    bytes_row = rows["peak bytes over the full cache's at the end, m, tokens/step, 25 %"]
    assert bytes_row.here == 0.4


def test_perplexities_are_over_all_tokens_of_all_texts() -> None:
    units = [
        {"tokens": 2, "full": 2.0, "128": 4.0, "64": 2.0, "32": 2.0},
        {"tokens": 2, "full": 0.0, "128": 0.0, "64": 2.0, "32": 0.0},
    ]
    rows = window_rows(units)
    assert rows[0].baseline == pytest.approx(torch.tensor(0.5).exp().item())
    assert rows[0].here == pytest.approx(torch.tensor(0.5).exp().item())
    assert rows[2].here == pytest.approx(1.0)
