"""AWRS in `generate`: texts and weights against the model's own distribution."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper

from pertoken.decode import AWRS
from pertoken.errors import PertokenError
from pertoken.testing import ARCHITECTURES, MockModel, check_distribution, tiny_model


class Grammar:
    """Texts over ids: those in a set, and their beginnings."""

    def __init__(self, *texts: tuple[int, ...]) -> None:
        self.texts = set(texts)
        self.starts = {text[:n] for text in texts for n in range(len(text) + 1)}

    def accepts(self, ids: list[int]) -> bool:
        return tuple(ids) in self.starts

    def complete(self, ids: list[int]) -> bool:
        return tuple(ids) in self.texts

    def allowed(self, ids: list[int]) -> torch.Tensor:
        return torch.tensor([self.accepts([*ids, token]) for token in range(3)])


class Known(Grammar):
    """A grammar that says which tokens its texts are made of."""

    vocabulary = torch.tensor([False, True, True])


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


# 1 leads to a dead end nine times in ten, which masking token by token does not see.
TABLE = [[0.0, 0.5, 0.3, 0.2], [0.9, 0.0, 0.1, 0.0], [0.1, 0.5, 0.0, 0.4], [0.25] * 4]
TEXTS = ((1, 2), (2, 1), (2,))
EXACT = {(1, 2): 0.5 * 0.1 * 0.4, (2, 1): 0.3 * 0.5 * 0.0, (2,): 0.3 * 0.4}
OTHER = MockModel([[0.1, 0.2, 0.5, 0.2], [0.3, 0.2, 0.3, 0.2], [0.2, 0.3, 0.3, 0.2], [0.25] * 4])
SETTINGS: dict[str, dict[str, Any]] = {
    "recursive": {},
    "geometric": {"estimator": "geometric"},
    "geometric, 4 accepts": {"estimator": "geometric", "max_accepts": 4},
    "auto": {"estimator": "auto"},
    "auto, 3 accepts": {"estimator": "auto", "max_accepts": 3},
    "paper": {"estimator": "paper"},
    "masked": {"masked": True},
    "proposal of a model": {"proposal": OTHER},
    "proposal of a processor": {"proposal": TemperatureLogitsWarper(3.0)},
    "masked, proposal of a model": {"masked": True, "proposal": OTHER},
}


def sample(sampler: AWRS, rows: int) -> dict[tuple[int, ...], list[float]]:
    """Weights by text over many rows, with the stop id 3 behind a whole text."""
    model = MockModel(TABLE)
    model.generation_config.eos_token_id = 3
    torch.manual_seed(1)
    out = model.generate(
        torch.zeros(rows, 1, dtype=torch.long),
        attention_mask=torch.ones(rows, 1, dtype=torch.long),
        do_sample=True,
        top_k=0,
        max_new_tokens=4,
        custom_generate=sampler,
    )
    found: dict[tuple[int, ...], list[float]] = defaultdict(list)
    weights = torch.tensor(sampler.log_weights, dtype=torch.float64).exp().tolist()
    for ids, weight, whole in zip(out[:, 1:].tolist(), weights, sampler.completed, strict=True):
        if weight:
            assert whole
            found[tuple(ids[: ids.index(3)])].append(weight)
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, Grammar) for name in SETTINGS),
        *((name, Known) for name in ("recursive", "geometric", "proposal of a model")),
    ],
)
def test_weighted_texts_follow_the_model_given_the_whole_constraint(
    name: str, kind: type[Grammar]
) -> None:
    rows = 1500
    found = sample(AWRS(kind(*TEXTS), max_rejects=3, **SETTINGS[name]), rows)
    assert set(found) <= set(TEXTS)
    for text, chance in EXACT.items():
        got = found.get(text, [])
        mean = sum(got) / rows
        spread = (sum(w * w for w in got) / rows - mean**2) ** 0.5 / rows**0.5
        assert abs(mean - chance) <= 4.5 * spread + 1e-12
    # Masking alone has (1, 2) at 5/8; given the constraint it is 1/7.
    share = sum(found[1, 2]) / sum(map(sum, found.values()))
    assert share == pytest.approx(1 / 7, abs=0.06)


@pytest.mark.parametrize("masked", [False, True])
def test_without_weights_it_is_masking_token_by_token(masked: bool) -> None:
    rows = 1500
    sampler = AWRS(Grammar(*TEXTS), weights=False, masked=masked)
    found = sample(sampler, rows)
    assert {weight for weights in found.values() for weight in weights} == {1.0}
    assert abs(len(found[1, 2]) / rows - 5 / 8) < 5 * (15 / 64 / rows) ** 0.5
    if not masked:
        asked = sum(sampler.checks)
        weighted = AWRS(Grammar(*TEXTS))
        sample(weighted, rows)
        assert asked < sum(weighted.checks)


def test_more_accepts_are_the_geometric_estimator_under_auto() -> None:
    sampler = AWRS(Grammar((1,), (3,)), estimator="auto", max_accepts=5)
    model = MockModel([[0.4, 0.3, 0.2, 0.1]] * 4)
    torch.manual_seed(0)
    model.generate(
        torch.zeros(50, 1, dtype=torch.long),
        attention_mask=torch.ones(50, 1, dtype=torch.long),
        do_sample=True,
        top_k=0,
        max_new_tokens=1,
        custom_generate=sampler,
    )
    for log_weight in sampler.log_weights:
        draws = 4 / torch.tensor(log_weight).double().exp()  # accepts + rejects - 1
        assert draws >= 4
        assert float(draws) == pytest.approx(round(float(draws)), abs=1e-6)


def test_tokens_outside_the_vocabulary_are_not_asked_about() -> None:
    asked: list[int] = []

    class Watched(Known):
        def accepts(self, ids: list[int]) -> bool:
            asked.extend(ids[-1:])
            return super().accepts(ids)

    sample(AWRS(Watched(*TEXTS)), 500)
    assert set(asked) == {1, 2}


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
        attention_mask=torch.ones(40, 1, dtype=torch.long),
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


def given_up(
    constraint: Any, generate: dict[str, Any] | None = None, model: Any = None, **settings: Any
) -> str:
    model = model or MockModel([[0.5, 0.5], [0.5, 0.5]])
    with pytest.raises(PertokenError) as error:
        model.generate(
            torch.tensor([[0]]),
            attention_mask=torch.tensor([[1]]),
            custom_generate=AWRS(constraint, **settings),
            **{"do_sample": True, "max_new_tokens": 3, **(generate or {})},
        )
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("estimator", ["auto", "recursive", "geometric", "paper"])
def test_no_mass_in_the_vocabulary_is_said(estimator: Any) -> None:
    class First:
        vocabulary = torch.tensor([True, False, False])

        def accepts(self, ids: list[int]) -> bool:
            return True

        complete = accepts

    chances = torch.tensor([0.0, 1.0, 0.0]).expand(3, 3)
    assert "no text that the constraint allows" in given_up(
        First(), {"max_new_tokens": 2, "top_k": 1}, model=MockModel(chances), estimator=estimator
    )


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
    assert "do_sample=True" in given_up(Anything(), {"do_sample": False})
    assert "beam" in given_up(Anything(), {"num_beams": 2})
    with pytest.raises(PertokenError, match="estimator must be"):
        AWRS(Anything(), estimator="best")  # type: ignore[arg-type]
    with pytest.raises(PertokenError, match="max_rejects must be at least 2"):
        AWRS(Anything(), max_rejects=1)
    with pytest.raises(PertokenError, match="max_accepts must be at least 2"):
        AWRS(Anything(), max_accepts=1)
    with pytest.raises(PertokenError, match="recursive estimator has no max_accepts"):
        AWRS(Anything(), max_accepts=3)
    with pytest.raises(PertokenError, match=r"masked=True needs a constraint with allowed\(ids\)"):
        AWRS(Anything(), masked=True)


def test_masks_and_proposals_that_do_not_fit_are_one_line() -> None:
    class Wrong(Anything):
        def allowed(self, ids: list[int]) -> Any:
            return [True, False]

    class Odd(Anything):
        vocabulary = torch.tensor([1, 1])

    class Broken(Anything):
        def allowed(self, ids: list[int]) -> Any:
            raise KeyError("state")

    assert "allowed(ids) must be a bool tensor [vocab], got list" in given_up(Wrong(), masked=True)
    assert "vocabulary must be a bool tensor" in given_up(Odd())
    assert "raised KeyError" in given_up(Broken(), masked=True)
    other = MockModel([[0.5, 0.3, 0.2]] * 3)
    assert "the proposal has 3 tokens and the model 2" in given_up(Anything(), proposal=other)


class Nothing(Anything):
    def accepts(self, ids: list[int]) -> bool:
        return False
