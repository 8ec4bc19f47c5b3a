"""The byte bench measures what it says, and its bars are applied as they stand."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"
peer = pytest.importorskip("bytes_peer")


def sure_of(byte: int, chance: float) -> Sequence[float]:
    rest = (1 - chance) / 256
    return [chance if place == byte else rest for place in range(257)]


def test_hits_bits_and_seconds_of_a_walk() -> None:
    walk = iter([sure_of(97, 0.5), sure_of(98, 0.25), sure_of(120, 0.5)])
    found = peer.measure(walk, b"abc")
    assert found["bytes"] == 3
    assert found["hits"] == 2
    assert found["bits"] == pytest.approx(1 + 2 - math.log2(0.5 / 256))
    assert found["prompt_seconds"] > 0
    assert found["byte_seconds"] > 0


def test_ours_walks_as_it_would_be_asked_byte_by_byte() -> None:
    from pertoken.decode import ByteModel
    from pertoken.testing import tiny_model
    from pertoken.testing.byte_brute import six_tokens

    tokenizer = six_tokens()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    walked = list(peer.Ours(model, tokenizer).walk(b"ab", b"aab"))
    byte_model = ByteModel(model, tokenizer)
    for probs, prefix in zip(walked, [b"ab", b"aba", b"abaa", b"abaab"], strict=True):
        assert probs == pytest.approx(byte_model.next_byte_log_probs(prefix).exp().tolist())


def rows(hits: int, seconds: float) -> list[dict[str, Any]]:
    one = {"bytes": 5, "hits": hits, "bits": 4.0, "prompt_seconds": 1.0, "byte_seconds": seconds}
    return [one] * 3


def test_the_report_applies_the_bars() -> None:
    written = peer.report({"ours": rows(4, 0.5), "genlm": rows(3, 1.0)}, {"beam": 5}, {})
    here = {row["metric"]: (row["here"], row["holds"]) for row in written["comparisons"]}
    assert here == {
        "next byte right: ours minus genlm-bytes": (20.0, True),
        "seconds per byte: genlm-bytes over ours": (2.0, True),
        "seconds for the prompt: genlm-bytes over ours": (1.0, True),
    }
    assert written["figures"]["ours"]["percent_right"] == 80
    assert written["figures"]["ours"]["seconds_per_byte"] == 0.125
    worse = peer.report({"ours": rows(3, 1.0), "genlm": rows(4, 0.5)}, {}, {})
    assert [row["holds"] for row in worse["comparisons"]] == [False, False, True]
    json.dumps(written)


def test_prompts_are_short_and_followed_by_the_texts_own_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    questions = [{"question": f"Question {n}: " + "how many apples? " * 20} for n in range(4)]
    functions = [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": "def f():\n",
            "canonical_solution": "    x = 1\n" * 9,
        }
        for n in range(4)
    ]
    module = importlib.import_module("pertoken.data")
    monkeypatch.setattr(module, "data", {"gsm8k": questions, "humaneval": functions}.__getitem__)
    texts = [str(questions[n]["question"]).encode() for n in (1, 3)]
    texts += [b"def f():\n" + b"    x = 1\n" * 9] * 2
    found = peer.prompts(4, 6, 0)
    assert len(found) == 4
    for (prefix, following), text in zip(found, texts, strict=True):
        assert 0 < len(prefix) <= peer.LONGEST
        assert len(following) == 7
        assert prefix + following in text
