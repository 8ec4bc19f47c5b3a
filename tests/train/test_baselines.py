"""The baselines are their published formulas, restated here as TRL 1.16 computes them.

Where TRL itself is installed the same tensors go through `GRPOTrainer._compute_loss` too.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.train import (
    cispo_loss,
    dapo_loss,
    dr_grpo_loss,
    grpo_loss,
    gspo_loss,
    policy_gradient_loss,
    ppo_clip_loss,
)

LOW, HIGH = 0.2, 0.28
LONGEST = 14
NAMES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(5, 12, generator=generator).mul(4)
    lengths = torch.tensor([12, 3, 7, 1, 9])
    return {
        "log_probs": (old + 0.5 * torch.randn(5, 12, generator=generator)).requires_grad_(),
        "old_log_probs": old,
        "advantages": torch.randn(5, generator=generator),
        "mask": (torch.arange(12) < lengths[:, None]).float(),
    }


def ours(name: str, given: dict[str, torch.Tensor]) -> torch.Tensor:
    bounds: Any = (1 - LOW, 1 + HIGH)
    calls: dict[str, Any] = {
        "grpo": lambda: grpo_loss(**given, token=bounds),
        "dr_grpo": lambda: dr_grpo_loss(**given, token=bounds, max_length=LONGEST),
        "dapo": lambda: dapo_loss(**given, token=bounds),
        "gspo": lambda: gspo_loss(**given, trajectory=bounds),
        "cispo": lambda: cispo_loss(**given, high=1.6),
    }
    loss: torch.Tensor = calls[name]()[0]
    return loss


def restated(name: str, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """With loops and ratios: one number per token, then the sum the paper writes."""
    rows, tokens, sequences = [], int(given["mask"].sum()), len(given["mask"])
    for new, old, a, keep in zip(*given.values(), strict=True):
        new, old = new[keep > 0], old[keep > 0]
        ratio = new.exp() / old.exp()
        if name == "gspo":
            ratio = (ratio.log().mean().exp()).expand(len(new))
        if name == "cispo":
            rows.append(-ratio.detach().clamp(max=1.6) * a * new)
            continue
        cut = ratio.clamp(1 - LOW, 1 + HIGH)
        rows.append(-torch.stack([ratio * a, cut * a]).amin(0))
    if name in ("grpo", "gspo"):
        return torch.stack([row.mean() for row in rows]).mean()
    whole = torch.cat(rows).sum()
    return whole / (sequences * LONGEST if name == "dr_grpo" else tokens)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_are_the_published_ones(name: str, seed: int) -> None:
    given = tensors(seed)
    loss, wanted = ours(name, given), restated(name, given)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-6)
    new = given["log_probs"]
    one, two = (torch.autograd.grad(value, new)[0] for value in (loss, wanted))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


class _Accelerator:
    num_processes, sync_gradients = 1, True

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        return value


def trl_loss(name: str, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """`GRPOTrainer._compute_loss` on these very tensors, without a model."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    from collections import defaultdict

    kept = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (
            given["log_probs"],
            torch.zeros_like(given["mask"]),
            None,
        ),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence" if name == "gspo" else "token",
        beta=0.0,
        loss_type={"gspo": "grpo"}.get(name, name),
        epsilon_low=LOW,
        epsilon_high=1.6 if name == "cispo" else HIGH,
        args=SimpleNamespace(delta=None, steps_per_generation=1),
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=LONGEST,
        accelerator=_Accelerator(),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros_like(given["mask"]).long()
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": given["mask"],
        "advantages": given["advantages"],
        "old_per_token_logps": given["old_log_probs"],
        "num_items_in_batch": given["mask"].sum(),
    }
    loss: torch.Tensor = trainer.GRPOTrainer._compute_loss(kept, None, inputs)
    return loss


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_are_those_of_trl(name: str, seed: int) -> None:
    given = tensors(seed)
    theirs = trl_loss(name, given)
    loss = ours(name, given)
    torch.testing.assert_close(loss, theirs, rtol=0, atol=1e-6)
    new = given["log_probs"]
    one, two = (torch.autograd.grad(value, new)[0] for value in (loss, theirs))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


def test_on_policy_every_objective_has_the_same_gradient_direction() -> None:
    given = tensors()
    given["old_log_probs"] = given["log_probs"].detach()
    new = given["log_probs"]
    wanted = torch.autograd.grad(policy_gradient_loss(**given)[0], new)[0]
    for loss in (
        ppo_clip_loss(**given)[0],
        gspo_loss(**given, trajectory=(0.9, 1.1))[0],
        cispo_loss(**given, reduction="sequence_mean")[0],
    ):
        torch.testing.assert_close(torch.autograd.grad(loss, new)[0], wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dirt", [float("nan"), float("inf")])
def test_padding_changes_nothing_bit_for_bit(name: str, dirt: float) -> None:
    def run(fill: float) -> tuple[torch.Tensor, torch.Tensor]:
        given = tensors(7)
        keep = given["mask"] > 0
        new = torch.where(keep, given["log_probs"].detach(), fill).requires_grad_()
        old = torch.where(keep, given["old_log_probs"], fill)
        loss = ours(name, {**given, "log_probs": new, "old_log_probs": old})
        return loss, torch.autograd.grad(loss, new)[0]

    for clean, dirty in zip(run(0.0), run(dirt), strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_are_rows(name: str) -> None:
    given = tensors(3)
    keep = given["mask"] > 0

    def pack(values: torch.Tensor) -> torch.Tensor:
        return values.expand_as(keep)[keep][None]

    new = pack(given["log_probs"].detach()).requires_grad_()
    bounds: Any = (1 - LOW, 1 + HIGH)
    more: dict[str, Any] = {
        "grpo": {"token": bounds},
        "dr_grpo": {"token": bounds, "max_length": LONGEST},
        "dapo": {"token": bounds},
        "gspo": {"trajectory": bounds},
        "cispo": {"high": 1.6},
    }[name]
    functions: dict[str, Any] = {
        "grpo": grpo_loss,
        "dr_grpo": dr_grpo_loss,
        "dapo": dapo_loss,
        "gspo": gspo_loss,
        "cispo": cispo_loss,
    }
    loss, _ = functions[name](
        new,
        pack(given["old_log_probs"]),
        pack(given["advantages"][:, None]),
        torch.ones_like(new),
        segment_ids=pack(torch.arange(5)[:, None]),
        **more,
    )
    wanted = ours(name, given)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        torch.autograd.grad(loss, new)[0][0],
        torch.autograd.grad(wanted, given["log_probs"])[0][keep],
        rtol=0,
        atol=1e-6,
    )


def test_the_shares_count_the_sides_apart() -> None:
    log_ratio = torch.tensor([[0.5, -0.5, 0.0, 0.5]])
    old, mask = torch.zeros(1, 4), torch.tensor([[1, 1, 1, 0]])
    _, up = ppo_clip_loss(log_ratio, old, torch.tensor([1.0]), mask)
    _, down = ppo_clip_loss(log_ratio, old, torch.tensor([-1.0]), mask)
    assert (float(up["closed_high"]), float(up["closed_low"])) == pytest.approx((1 / 3, 0))
    assert (float(down["closed_high"]), float(down["closed_low"])) == pytest.approx((0, 1 / 3))


def test_mistakes_are_named() -> None:
    given = tensors()
    with pytest.raises(PertokenError, match="low < 1 < high"):
        gspo_loss(**given, trajectory=(1.0, 1.1))
    with pytest.raises(PertokenError, match="low < 1 < high"):
        cispo_loss(**given, high=0.5)
    with pytest.raises(PertokenError, match="advantages is NaN"):
        grpo_loss(**{**given, "advantages": given["advantages"] * math.nan})
