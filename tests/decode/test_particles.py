"""SMC: the posterior and the marginal against exact enumeration, where masking is wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper

from pertoken.decode.particles import smc
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, MockModel, tiny_model

TABLE = [
    [0.05, 0.50, 0.30, 0.15],
    [0.80, 0.05, 0.05, 0.10],
    [0.10, 0.50, 0.10, 0.30],
    [0.25, 0.25, 0.25, 0.25],
]
STOP = 3
PROMPT = torch.tensor([[0]])


def model() -> MockModel:
    mock = MockModel(TABLE)
    mock.generation_config.eos_token_id = STOP
    return mock


class Even:
    """An even number of ones: what counts is known only at the end."""

    def accepts(self, ids: Sequence[int]) -> bool:
        return True

    def complete(self, ids: Sequence[int]) -> bool:
        return list(ids).count(1) % 2 == 0


class Grammar:
    """Some texts; (1, 2) is nearly a dead end, which a mask at the first token does not see."""

    texts = ((1, 2), (2, 1), (2,))

    def accepts(self, ids: Sequence[int]) -> bool:
        return any(text[: len(ids)] == tuple(ids) for text in self.texts)

    def complete(self, ids: Sequence[int]) -> bool:
        return tuple(ids) in self.texts

    def allowed(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([self.accepts([*ids, token]) for token in range(3)])


def exact(
    constraint: Even | Grammar, most: int, scores: bool = False
) -> dict[tuple[int, ...], float]:
    """Mass of every allowed text of at most `most` tokens and the stop token."""
    found = {}
    for length in range(most + 1):
        for text in itertools.product((0, 1, 2), repeat=length):
            if constraint.complete(text):
                path = [0, *text, STOP]
                mass = math.prod(TABLE[a][b] for a, b in itertools.pairwise(path))
                found[text] = mass * (math.exp(critic(text)) if scores else 1.0)
    return found


def critic(ids: Sequence[int]) -> float:
    return 0.7 * list(ids).count(2)


def distance(found: dict[tuple[int, ...], float], masses: dict[tuple[int, ...], float]) -> float:
    total = sum(masses.values())
    texts = found.keys() | masses.keys()
    return sum(abs(found.get(t, 0.0) - masses.get(t, 0.0) / total) for t in texts) / 2


@pytest.mark.parametrize("ess_threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("constraint", [Even(), Grammar()])
def test_the_posterior_is_the_enumerated_one(
    constraint: Even | Grammar, ess_threshold: float
) -> None:
    masses = exact(constraint, 3)
    found = smc(
        model(),
        constraint,
        PROMPT,
        particles=2000,
        max_new_tokens=3,
        ess_threshold=ess_threshold,
        seed=1,
    )
    assert set(found.posterior()) <= set(masses)
    assert distance(found.posterior(), masses) < 0.07
    assert found.log_marginal == pytest.approx(
        math.log(sum(masses.values())), abs=0.2
    )  # four of its standard errors
    if ess_threshold != 0.5:
        assert (found.resampled > 0) == (ess_threshold > 0.0)
    assert 1 <= found.effective_sample_size <= 2000


OTHER = MockModel(
    [[0.2, 0.3, 0.3, 0.2], [0.5, 0.1, 0.1, 0.3], [0.1, 0.3, 0.3, 0.3], [0.25, 0.25, 0.25, 0.25]]
)


@pytest.mark.parametrize(
    "settings",
    [
        {"masked": True},
        {"estimator": "auto", "max_accepts": 4},
        {"proposal": OTHER},
        {"proposal": [TemperatureLogitsWarper(0.7)]},
        {"masked": True, "proposal": OTHER},
    ],
)
def test_masks_proposals_and_estimators_leave_the_posterior_alone(settings: dict[str, Any]) -> None:
    masses = exact(Grammar(), 3)
    found = smc(model(), Grammar(), PROMPT, particles=1500, max_new_tokens=3, seed=4, **settings)
    assert set(found.posterior()) <= set(masses)
    assert distance(found.posterior(), masses) < 0.07
    assert found.log_marginal == pytest.approx(math.log(sum(masses.values())), abs=0.2)


@pytest.mark.parametrize("proposed", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "mistral"])
@torch.no_grad()
def test_weights_of_texts_that_share_rows_are_those_of_the_model(
    architecture: str, proposed: bool
) -> None:
    # With the mask nothing is estimated: the weight of a text is its probability over that of the
    # masked draws, whatever was copied, moved and dropped in the cache on the way.
    big = tiny_model(architecture)
    big.generation_config.eos_token_id = 63
    other = tiny_model(architecture, seed=5) if proposed else None

    class Three:
        def accepts(self, ids: Sequence[int]) -> bool:
            return len(ids) <= 14 and set(ids) <= {7, 8, 9}

        def complete(self, ids: Sequence[int]) -> bool:
            return len(ids) >= 12

        def allowed(self, ids: Sequence[int]) -> torch.Tensor:
            return torch.tensor([self.accepts([*ids, token]) for token in range(10)])

    prompt = torch.tensor([[3, 4, 5]])
    found = smc(
        big,
        Three(),
        prompt,
        particles=12,
        max_new_tokens=14,
        ess_threshold=0.0,
        masked=True,
        proposal=other,
        seed=6,
    )
    assert found.resampled == 0
    again = smc(big, Three(), prompt, particles=12, max_new_tokens=14, masked=True, seed=6)
    assert again.resampled > 0
    for ids, log_weight in zip(found.ids, found.log_weights, strict=True):
        text = torch.tensor([[3, 4, 5, *ids, 63]])
        p, q = (
            m(text).logits[0, 2:-1].float().double().log_softmax(-1) for m in (big, other or big)
        )
        expected = 0.0
        for place, token in enumerate([*ids, 63]):
            allowed = [7, 8, 9] if place < 14 else []
            inside = [*allowed, 63] if place >= 12 else allowed
            if place == 14:  # the stop token is forced and weighed by the model
                expected += float(p[place, 63])
            else:
                expected += float(q[place, inside].logsumexp(0) + p[place, token] - q[place, token])
        assert log_weight == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_equal_texts_are_one_row_of_the_batch() -> None:
    big = tiny_model("llama")
    big.generation_config.eos_token_id = 63
    rows: list[int] = []
    forward = type(big).forward

    class Counting(type(big)):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
            rows.append(len(input_ids))
            return forward(self, input_ids, **more)

    big.__class__ = Counting

    class Two:
        """One text, then another token at the fifth place."""

        def accepts(self, ids: Sequence[int]) -> bool:
            return all(token == 7 or (place == 4 and token == 8) for place, token in enumerate(ids))

        def complete(self, ids: Sequence[int]) -> bool:
            return len(ids) >= 6

    found = smc(big, Two(), torch.tensor([[3, 4]]), particles=20, max_new_tokens=6, seed=0)
    assert len(found.ids) == 20
    assert rows[:5] == [1] * 5
    assert max(rows) <= 2


@pytest.mark.parametrize("ess_threshold", [0.0, 1.0])
def test_a_critic_multiplies_the_posterior(ess_threshold: float) -> None:
    masses = exact(Even(), 3, scores=True)
    found = smc(
        model(),
        Even(),
        PROMPT,
        particles=2000,
        max_new_tokens=3,
        critic=critic,
        ess_threshold=ess_threshold,
        seed=2,
    )
    assert distance(found.posterior(), masses) < 0.07
    assert found.log_marginal == pytest.approx(math.log(sum(masses.values())), abs=0.1)


def test_the_marginal_is_unbiased_with_few_particles_and_resampling() -> None:
    mass = sum(exact(Grammar(), 2).values())
    mock = model()
    torch.manual_seed(5)
    found = []
    for _ in range(300):
        try:
            run = smc(mock, Grammar(), PROMPT, particles=3, max_new_tokens=2, ess_threshold=0.9)
            found.append(math.exp(run.log_marginal))
        except PertokenError:  # all three died: an estimate of nought
            found.append(0.0)
    mean = sum(found) / len(found)
    error = (sum((x - mean) ** 2 for x in found) / len(found)) ** 0.5 / len(found) ** 0.5
    assert abs(mean - mass) < 4 * error


def test_one_seed_one_result_and_a_table_for_people() -> None:
    runs = [
        smc(
            model(),
            Grammar(),
            PROMPT,
            particles=50,
            seed=3,
            max_new_tokens=3,
            tokenizer=ByteTokenizer(),
        )
        for _ in range(2)
    ]
    assert runs[0].ids == runs[1].ids
    table = runs[0].table(most=2)
    assert "50 particles worth" in table
    assert "… and 1 more" in table
    assert sum(runs[0].weights) == pytest.approx(1.0)


def test_mistakes_are_one_line() -> None:
    for options, message in (
        ({"particles": 0}, "particles must be 1 or more"),
        ({"ess_threshold": 2.0}, "a share from 0 to 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
    ):
        with pytest.raises(PertokenError, match=message):
            smc(model(), Even(), PROMPT, **options)
    with pytest.raises(PertokenError, match="smc weighs its texts"):
        smc(model(), Even(), PROMPT, weights=False)
    with pytest.raises(PertokenError, match="ids of one prompt"):
        smc(model(), Even(), torch.zeros(2, 3, dtype=torch.long))
    mock = model()
    mock.generation_config.eos_token_id = None
    with pytest.raises(PertokenError, match="MockModel has no stop token"):
        smc(mock, Even(), PROMPT)
    same = [
        smc(m, Even(), PROMPT, particles=20, max_new_tokens=3, seed=0, eos_token_id=given).ids
        for m, given in ((mock, STOP), (mock, [STOP]), (model(), None))
    ]
    assert same[0] == same[1] == same[2]

    class Never(Even):
        def complete(self, ids: Sequence[int]) -> bool:
            return False

    with pytest.raises(PertokenError, match="no text was whole after 3 tokens"):
        smc(model(), Never(), PROMPT, max_new_tokens=3, particles=4)

    class Short(Never):
        def accepts(self, ids: Sequence[int]) -> bool:
            return not ids

    with pytest.raises(PertokenError, match=r"no text that the constraint .* more particles"):
        smc(model(), Short(), PROMPT, max_new_tokens=3, particles=4)
