"""What the reproduction of AWRS computes by itself, against the code it speaks of."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch

from pertoken.decode import AWRS
from pertoken.decode.rejection import geometric
from pertoken.reproduce import _dead_ends as dead_ends
from pertoken.reproduce import awrs
from pertoken.reproduce._constraint_cases import KINDS, cases, growing_words, one_sentence
from pertoken.testing import ByteTokenizer, MockModel, outcomes


def test_the_enumerated_masking_is_what_masking_samples() -> None:
    model = MockModel(dead_ends.TABLE)
    model.generation_config.eos_token_id = dead_ends.STOP
    rows, longest = 4000, dead_ends.LONGEST
    torch.manual_seed(0)
    out = model.generate(
        torch.zeros(rows, 1, dtype=torch.long),
        do_sample=True,
        top_k=0,
        max_new_tokens=longest + 1,
        custom_generate=AWRS(dead_ends.DeadEnds(), weights=False),
    )[:, 1:].tolist()
    whole = [tuple(ids[: ids.index(3)]) for ids in out if 3 in ids]
    counts = Counter(whole)
    exact = dead_ends.masking()
    assert set(counts) <= set(exact)
    for text, chance in exact.items():
        spread = (chance * (1 - chance) / len(whole)) ** 0.5
        assert abs(counts[text] / len(whole) - chance) < 5 * spread + 1e-3
    assert sum(dead_ends.posterior().values()) == pytest.approx(1.0)
    assert dead_ends.total_variation(exact, exact) == 0.0
    assert dead_ends.total_variation({(1,): 1.0}, {(2,): 1.0}) == 1.0


@pytest.mark.parametrize("accepts", [2, 3])
def test_the_variance_of_the_geometric_estimator_is_the_enumerated_one(accepts: int) -> None:
    # A cap of rejections that is hardly ever met, and one token to reject.
    found = outcomes(partial(geometric, max_accepts=accepts), [0.7, 0.3], {0}, 20)
    pairs = [(chance, drawn.weight) for chance, drawn in found]
    mean = sum(chance * weight for chance, weight in pairs)
    variance = sum(chance * (weight - mean) ** 2 for chance, weight in pairs)
    assert awrs._geometric_variance(0.7, accepts) == pytest.approx(variance, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_cases_are_split_and_their_constraints_can_begin(kind: str) -> None:
    if kind == "schema":
        pytest.importorskip("llguidance")
    dev, report = cases(kind, "dev"), cases(kind, "report")
    assert len(dev) == len(report) == 4
    assert not {case.prompt for case in dev} & {case.prompt for case in report}
    for case in dev + report:
        assert case.make(ByteTokenizer()).accepts([])


def test_predicates_read_beginnings() -> None:
    assert growing_words("a big h")  # the last word may still grow
    assert not growing_words("a big h ")
    assert not growing_words("big a dog")
    assert one_sentence("Rain falls.")
    assert not one_sentence("Rain. Falls")
