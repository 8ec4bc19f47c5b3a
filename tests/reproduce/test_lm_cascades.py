"""The two pairs of the cascades' reproduction: halves apart, and an accuracy that is known."""

from __future__ import annotations

import numpy as np
import pytest

from pertoken.decode.deferral import rank_correlation
from pertoken.reproduce._cascade_tasks import SMOKE, questions
from pertoken.reproduce.lm_cascades import LARGE, _chance, _synthetic


def test_the_halves_share_no_problem_and_the_answer_begins_the_text() -> None:
    halves = [questions(SMOKE, split, 99) for split in ("dev", "report")]
    prompts = [{prompt for prompt, _ in half} for half in halves]
    assert len(prompts[0]) == len(prompts[1]) == 30
    assert not prompts[0] & prompts[1]
    for prompt, first in halves[0] + halves[1]:
        assert f"Text: {first} Ann has" in prompt
    broken = [{"question": "There are 9 plants in Mrs. Smith's garden. How many?", "answer": ""}]
    assert questions(broken, "dev", 9) == []


def test_the_synthetic_pair_is_right_as_often_as_it_says() -> None:
    pairs = _synthetic(4000, seed=7)
    chances = np.array([_chance(pair.small.logprobs) for pair in pairs])
    right = np.array([pair.small_quality for pair in pairs])
    for low in (0.0, 0.25, 0.5, 0.75):  # five standard errors of about 1,000
        some = (chances >= low) & (chances < low + 0.25)
        assert right[some].mean() == pytest.approx(chances[some].mean(), abs=0.08)
    assert np.mean([pair.large_quality for pair in pairs]) == pytest.approx(LARGE, abs=0.037)
    lengths = [len(pair.small.logprobs) for pair in pairs]
    assert rank_correlation(lengths, chances.tolist()) == pytest.approx(0, abs=0.15)
