"""FiberPO under verl's signature, against a registry like verl's and the pure function."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.train import fiberpo_loss
from pertoken.train.verl import fiberpo_policy_loss, register

GATES = {"fiberpo_trajectory": [0.9, 1.1], "fiberpo_token": [0.8, 1.28]}


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(4, 7, generator=generator)
    new = (old + 0.3 * torch.randn(4, 7, generator=generator)).requires_grad_()
    advantages = torch.randn(4, 1, generator=generator).expand(4, 7)
    return old, new, advantages, (torch.arange(7) < torch.tensor([[7], [2], [5], [1]])).float()


def config(**more: Any) -> Any:
    return SimpleNamespace(policy_loss=GATES, **more)


def test_it_enters_a_registry_like_verls() -> None:
    registry: dict[str, Any] = {}

    def register_policy_loss(name: str) -> Callable[[Any], Any]:
        def keep(function: Any) -> Any:
            registry[name] = function
            return function

        return keep

    register(register_policy_loss)
    assert registry == {"fiberpo": fiberpo_policy_loss}


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        ("token-mean", "token_mean"),
        ("seq-mean-token-mean", "sequence_mean"),
        ("seq-mean-token-sum", "sequence_sum"),
    ],
)
def test_loss_and_gradient_are_those_of_the_pure_function(mode: str, how: str) -> None:
    old, new, advantages, mask = batch()
    loss, metrics = fiberpo_policy_loss(old, new, advantages, mask, mode, config())
    wanted, stats = fiberpo_loss(
        new, old, advantages, mask, token=(0.8, 1.28), trajectory=(0.9, 1.1), reduction=how
    )
    assert loss == wanted
    one, two = (torch.autograd.grad(value, new)[0] for value in (loss, wanted))
    assert torch.equal(one, two)
    assert metrics["actor/fiberpo/trajectory/closed_high"] == stats["trajectory/closed_high"]
    drift = (new - old).detach()[mask > 0]
    assert metrics["actor/ppo_kl"] == pytest.approx(float(-drift.mean()), abs=1e-6)


def test_the_normaliser_of_the_whole_batch_makes_micro_batches_one() -> None:
    old, new, advantages, mask = batch()
    whole, _ = fiberpo_policy_loss(old, new, advantages, mask, "token-mean", config())
    info = {"dp_size": 1, "batch_num_tokens": int(mask.sum()), "global_batch_size": 4}
    parts = [
        fiberpo_policy_loss(
            old[r], new[r], advantages[r], mask[r], "token-mean", config(global_batch_info=info)
        )[0]
        for r in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-6)


def test_what_is_not_carried_is_refused_by_name() -> None:
    old, new, advantages, mask = batch()
    with pytest.raises(PertokenError, match="loss_agg_mode='seq-mean-token-sum-norm'"):
        fiberpo_policy_loss(old, new, advantages, mask, "seq-mean-token-sum-norm", config())
    with pytest.raises(PertokenError, match="rollout_is_weights"):
        fiberpo_policy_loss(
            old, new, advantages, mask, config=config(), rollout_is_weights=torch.ones(4, 7)
        )
    with pytest.raises(PertokenError, match="fiberpo_trajectory"):
        fiberpo_policy_loss(old, new, advantages, mask, config=SimpleNamespace(policy_loss={}))
