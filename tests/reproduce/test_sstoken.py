"""ssToken's reproduction: what its arms learn from; the timed steps are those of training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.reproduce import _sstoken_speed as speed
from pertoken.reproduce import _worked_sums as lab
from pertoken.reproduce import sstoken as reproduction


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return lab.encode(lab.sums(6, "test"))


def nll(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return -lab.log_probs_of(model, ids)


def test_rivals_learn_from_as_many_tokens_as_sstoken(batch: Any) -> None:
    ids, labels = batch
    base, model = reproduction.base_model(True), lab.new_model(5)
    mask = labels[:, 1:] != lab.IGNORED
    losses = nll(model, ids)
    logits = model(ids).logits[:, :-1].detach().double()
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    for arm, scores in (("rho-1", losses - nll(base, ids)), ("top-entropy", entropy)):
        kept = torch.zeros_like(mask)
        for row, own in enumerate(mask):
            places = own.nonzero()[:, 0]
            count = -(-len(places) * 6 // 10)
            kept[row, places[scores[row, places].argsort(descending=True)[:count]]] = True
        found = reproduction._loss(arm, 0, base, model, ids, labels, 0, 10)
        torch.testing.assert_close(found, losses[kept].mean(), rtol=1e-5, atol=0)


def test_the_reference_has_learned_clean_answers_from_the_base() -> None:
    base, reference = reproduction.base_model(True), reproduction.reference_model(True)
    ids, labels = lab.encode(lab.sums(64, f"reference {reproduction.DEV_SEED}"))
    with torch.no_grad():
        before, after = (reproduction._mean_nll(one, ids, labels) for one in (base, reference))
    assert after < before
    assert not any(one.requires_grad for one in (*base.parameters(), *reference.parameters()))
    again = reproduction.base_model(True)  # training the reference has left it as it was
    assert all(map(torch.equal, base.parameters(), again.parameters()))


def test_the_timed_steps_are_those_of_training(batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def kept(model: Any, losses: Any, *, smoke: bool) -> dict[str, Any]:
        seen.update(losses)
        return {"noise": {}, "full": [1.0]}

    monkeypatch.setattr(reproduction, "step_times", kept)
    reproduction._step_times(smoke=True)
    ids, labels = lab.encode(lab.sums(lab.BATCH, f"time {reproduction.DEV_SEED}"))
    base, model = reproduction.base_model(True), lab.new_model(5)
    wanted = reproduction._loss("sstoken", 0, base, model, ids, labels, 9, 10)
    assert seen["in each step"](model) == seen["before training"](model) == wanted
    full = reproduction._loss("full", 0, base, model, ids, labels, 9, 10)
    assert seen["full"](model) == full


def test_losses_are_timed_on_copies() -> None:
    model = reproduction.base_model(True)
    before = copy.deepcopy(model.state_dict())
    ids, labels = lab.encode(lab.sums(2, "test"))
    found = speed.step_times(
        model,
        {name: lambda one: reproduction._mean_nll(one, ids, labels) for name in "ab"},
        smoke=True,
    )
    assert len(found["a"]) == len(found["b"]) == 1
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_no_quiet_round_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduction, "step_times", lambda *_, **__: {"noise": {}, "full": []})
    with pytest.raises(PertokenError, match="no round of the step times was quiet"):
        reproduction._step_times(smoke=True)
