"""SMC: the posterior and the marginal against exact enumeration, where masking is wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from pertoken.decode.particles import smc
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, MockModel

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
    with pytest.raises(PertokenError, match="ids of one prompt"):
        smc(model(), Even(), torch.zeros(2, 3, dtype=torch.long))
    mock = model()
    mock.generation_config.eos_token_id = None
    with pytest.raises(PertokenError, match="MockModel has no stop token"):
        smc(mock, Even(), PROMPT)

    class Never(Even):
        def complete(self, ids: Sequence[int]) -> bool:
            return False

    with pytest.raises(PertokenError, match="no text that the constraint allows was found"):
        smc(model(), Never(), PROMPT, max_new_tokens=3, particles=4)
