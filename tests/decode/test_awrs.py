"""AWRS: every estimator against exact enumeration of all its random choices."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from functools import partial

import pytest
import torch

from pertoken.decode import AWRS
from pertoken.decode.awrs import Drawn, GumbelDraws, geometric, paper, recursive
from pertoken.errors import PertokenError
from pertoken.testing import ARCHITECTURES, MockModel, check_distribution, tiny_model

ESTIMATORS = {
    "recursive": recursive,
    "geometric": geometric,
    "geometric, 3 accepts": partial(geometric, max_accepts=3),
    "paper": paper,
}


class Scripted:
    """Randomness that follows a script of choices, and behind it takes the first of each."""

    def __init__(self, probs: list[float], script: list[int], cap: int) -> None:
        self.probs, self.script, self.cap = probs, script, cap
        self.taken: list[tuple[int, int]] = []  # (choice, number of choices)
        self.chance = 1.0

    def choose(self, chances: list[float]) -> int:
        place = len(self.taken)
        choice = self.script[place] if place < len(self.script) else 0
        self.taken.append((choice, len(chances)))
        self.chance *= chances[choice] / sum(chances)
        return choice

    def order(self, rejected: Collection[int]) -> Iterator[int]:
        left = [token for token, p in enumerate(self.probs) if p > 0 and token not in rejected]
        while left:
            yield left.pop(self.choose([self.probs[token] for token in left]))

    def skipped(self, rejected_mass: float) -> int:
        # Beyond the cap of rejections all counts are the same.
        chances = [(1 - rejected_mass) * rejected_mass**n for n in range(self.cap)]
        return self.choose([*chances, rejected_mass**self.cap])


def expectation(
    probs: list[float], allowed: set[int], estimate: Callable[..., Drawn], cap: int
) -> tuple[dict[int, float], float]:
    """Exact expectation of weight by token, and the probability of all paths."""
    found: dict[int, float] = defaultdict(float)
    total = 0.0
    script: list[int] = []
    while True:
        draws = Scripted(probs, script, cap)
        drawn = estimate(probs.__getitem__, draws, allowed.__contains__, cap)
        found[drawn.token] += draws.chance * drawn.weight
        total += draws.chance
        taken = draws.taken
        while taken and taken[-1][0] == taken[-1][1] - 1:
            taken.pop()
        if not taken:
            return found, total
        script = [choice for choice, _ in taken]
        script[-1] += 1


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("cap", [2, 3, 4])
def test_weights_are_unbiased_for_every_token(name: str, cap: int) -> None:
    draw = random.Random(cap)
    for _ in range(12):
        raw = [draw.choice([0.0, 0.02, 0.3, 1.0, 4.0]) * draw.random() for _ in range(4)]
        if sum(raw) == 0:
            continue
        probs = [x / sum(raw) for x in raw]
        allowed = {token for token in range(4) if draw.random() < 0.5}
        found, total = expectation(probs, allowed, ESTIMATORS[name], cap)
        assert total == pytest.approx(1.0, abs=1e-12)
        for token in range(4):
            expected = probs[token] if token in allowed else 0.0
            assert found.get(token, 0.0) == pytest.approx(expected, abs=1e-12)


def test_draws_without_replacement_follow_the_probabilities() -> None:
    torch.manual_seed(0)
    probs = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    draws = GumbelDraws(probs.log())
    counts: dict[tuple[int, ...], int] = defaultdict(int)
    for _ in range(6000):
        counts[tuple(draws.order(()))] += 1
    assert set(map(len, counts)) == {3}  # a token without mass never comes
    for order, count in counts.items():
        first, second = (float(probs[token]) for token in order[:2])
        expected = 6000 * first * second / (1 - first)
        assert abs(count - expected) < 5 * expected**0.5
    assert list(draws.order({0, 2})) == [1]
    skipped = sum(draws.skipped(0.75) for _ in range(4000)) / 4000
    assert skipped == pytest.approx(3.0, abs=0.3)


def test_a_long_order_is_whole() -> None:
    log_probs = torch.full((500,), 1 / 500, dtype=torch.float64).log()
    assert sorted(GumbelDraws(log_probs).order({7})) == [n for n in range(500) if n != 7]


class Grammar:
    """Texts over ids: those in a set, and their beginnings."""

    def __init__(self, *texts: tuple[int, ...]) -> None:
        self.texts = set(texts)
        self.starts = {text[:n] for text in texts for n in range(len(text) + 1)}

    def accepts(self, ids: list[int]) -> bool:
        return tuple(ids) in self.starts

    def complete(self, ids: list[int]) -> bool:
        return tuple(ids) in self.texts


class Anything:
    def accepts(self, ids: list[int]) -> bool:
        return True

    def complete(self, ids: list[int]) -> bool:
        return True


@pytest.mark.parametrize("estimator", ["auto", "recursive", "geometric", "paper"])
def test_without_a_constraint_it_is_the_model(estimator: str) -> None:
    model = tiny_model("llama", vocab_size=8, seed=1)
    sampler = AWRS(Anything(), estimator=estimator)  # type: ignore[arg-type]
    check_distribution(sampler, model, [1, 2, 3], draws=4000, steps=2, top_k=0)
    assert sampler.log_weights == [0.0] * len(sampler.log_weights)


@pytest.mark.parametrize("estimator", ["recursive", "geometric", "paper"])
def test_weighted_texts_follow_the_model_given_the_whole_constraint(estimator: str) -> None:
    # 1 leads to a dead end nine times in ten, which masking token by token does not see.
    model = MockModel(
        [[0.0, 0.5, 0.3, 0.2], [0.9, 0.0, 0.1, 0.0], [0.1, 0.5, 0.0, 0.4], [0.25] * 4]
    )
    model.generation_config.eos_token_id = 3
    grammar = Grammar((1, 2), (2, 1), (2,))
    rows = 6000
    torch.manual_seed(1)
    sampler = AWRS(grammar, estimator=estimator, max_rejects=3)  # type: ignore[arg-type]
    out = model.generate(
        torch.zeros(rows, 1, dtype=torch.long),
        do_sample=True,
        top_k=0,
        max_new_tokens=4,
        custom_generate=sampler,
    )
    exact = {(1, 2): 0.5 * 0.1 * 0.4, (2, 1): 0.3 * 0.5 * 0.0, (2,): 0.3 * 0.4}
    weights = torch.tensor(sampler.log_weights, dtype=torch.float64).exp()
    found: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for ids, weight, whole in zip(
        out[:, 1:].tolist(), weights.tolist(), sampler.completed, strict=True
    ):
        if weight:
            assert whole
            text = tuple(ids[: ids.index(3)])
            assert text in grammar.texts
            found[text].append(weight)
    for text, chance in exact.items():
        got = found.get(text, [])
        mean = sum(got) / rows
        spread = (sum(w * w for w in got) / rows - mean**2) ** 0.5 / rows**0.5
        assert abs(mean - chance) <= 4.5 * spread + 1e-12
    # Masking alone has (1, 2) at 5/8; given the constraint it is 1/7.
    share = sum(found[1, 2]) / sum(map(sum, found.values()))
    assert share == pytest.approx(1 / 7, abs=0.03)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_rows_of_a_padded_batch_are_texts_of_their_own(architecture: str) -> None:
    model = tiny_model(architecture)
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    only = Grammar((11, 12, 13, 14))
    sampler = AWRS(only)
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        max_new_tokens=4,
        custom_generate=sampler,
    )
    assert out[:, 4:].tolist() == [[11, 12, 13, 14]] * 2
    for row, prompt in enumerate([[5, 6], [7, 8, 9, 10]]):
        text = torch.tensor([[*prompt, 11, 12, 13, 14]])
        log_probs = model(text).logits[0].double().log_softmax(-1)
        # One token is allowed at each place, so the estimate is its probability: no chance in it.
        exact = sum(float(log_probs[len(prompt) - 1 + i, 11 + i]) for i in range(4))
        assert sampler.log_weights[row] == pytest.approx(exact, abs=1e-5)
    assert sampler.completed == [False, False]


def test_a_row_that_is_given_up_has_no_weight_and_others_go_on() -> None:
    model = MockModel([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    torch.manual_seed(0)
    sampler = AWRS(Grammar((1, 1), (2, 2)))
    out = model.generate(
        torch.zeros(40, 1, dtype=torch.long),
        do_sample=True,
        max_new_tokens=2,
        custom_generate=sampler,
    )
    dead = [weight == float("-inf") for weight in sampler.log_weights]
    assert any(dead)
    assert not all(dead)
    for ids, gone, weight in zip(out[:, 1:].tolist(), dead, sampler.log_weights, strict=True):
        # The mock's zeros are 1e-40: a row may come through a dead end with next to no weight.
        assert ids[0] == 1 if gone else ids == [2, 2] or weight < -60


def given_up(constraint: object, **options: object) -> str:
    model = MockModel([[0.5, 0.5], [0.5, 0.5]])
    with pytest.raises(PertokenError) as error:
        model.generate(
            torch.tensor([[0]]),
            max_new_tokens=3,
            custom_generate=AWRS(constraint),  # type: ignore[arg-type]
            **{"do_sample": True, **options},
        )
    assert "\n" not in str(error.value)
    return str(error.value)


def test_mistakes_are_one_line() -> None:
    class Broken(Anything):
        def accepts(self, ids: list[int]) -> bool:
            return len(ids) < 1 or 1 // 0 > 0

    class Vague(Anything):
        def accepts(self, ids: list[int]) -> bool:
            return None  # type: ignore[return-value]

    assert "refuses every text" in given_up(Nothing())
    assert "no text that the constraint allows was found" in given_up(Grammar((5,)))
    assert "raised ZeroDivisionError" in given_up(Broken())
    assert "must answer True or False, got NoneType" in given_up(Vague())
    assert "do_sample=True" in given_up(Anything(), do_sample=False)
    assert "beam" in given_up(Anything(), num_beams=2)
    with pytest.raises(PertokenError, match="estimator must be"):
        AWRS(Anything(), estimator="best")  # type: ignore[arg-type]
    with pytest.raises(PertokenError, match="max_rejects must be at least 2"):
        AWRS(Anything(), max_rejects=1)


class Nothing(Anything):
    def accepts(self, ids: list[int]) -> bool:
        return False
