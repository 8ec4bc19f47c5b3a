"""Closed gates token by token agree with the losses; the page shows them and nothing foreign."""

from __future__ import annotations

import re
from typing import Any, Literal

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer
from pertoken.train import (
    cispo_loss,
    closed_gates,
    fiberpo_loss,
    gates_page,
    grpo_loss,
    gspo_loss,
)

TOKEN, TRAJECTORY = (0.8, 1.25), (0.9, 1.1)


def batch(rows: int = 6, time: int = 9) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    shift = torch.linspace(-0.3, 0.3, rows)[:, None]
    old = -1 + 0.1 * torch.randn(rows, time, generator=generator, dtype=torch.float64)
    new = old + shift + 0.2 * torch.randn(rows, time, generator=generator, dtype=torch.float64)
    mask = (torch.arange(time) < torch.arange(time - rows + 1, time + 1)[:, None]).long()
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    return new, old, advantages, mask


@pytest.mark.parametrize("variant", ["paper", "residual", "censor"])
def test_fiberpo_gates_are_those_of_the_loss(
    variant: Literal["paper", "residual", "censor"],
) -> None:
    new, old, advantages, mask = batch()
    given: dict[str, Any] = {"token": TOKEN, "trajectory": TRAJECTORY, "variant": variant}
    _, stats = fiberpo_loss(new, old, advantages, mask, **given)
    found = closed_gates(new, old, advantages, mask, **given)
    for side, closed in zip(("low", "high"), found.closed["token"], strict=True):
        assert closed.sum() / mask.sum() == pytest.approx(float(stats[f"token/closed_{side}"]))
        assert closed.any()
    for side, closed in zip(("low", "high"), found.closed["trajectory"], strict=True):
        share = float(stats[f"trajectory/closed_{side}"])
        assert closed.any(1).double().mean() == pytest.approx(share)
        assert closed.any()
    for side, drift in zip(("low", "high"), found.drift, strict=True):
        assert drift.max() == pytest.approx(float(stats[f"trajectory/drift_{side}"]))
    assert not any(bool(side[mask == 0].any()) for sides in found.closed.values() for side in sides)


def test_where_every_gate_is_closed_the_token_gets_no_gradient() -> None:
    """One token a trajectory under "censor": closed at either level means a gradient of 0."""
    new = torch.linspace(-0.6, 0.6, 13, dtype=torch.float64)[:, None].requires_grad_()
    old, mask = torch.zeros_like(new), torch.ones(13, 1)
    for sign in (-1.0, 1.0):
        advantages = torch.full((13,), sign, dtype=torch.float64)
        given: dict[str, Any] = {"token": TOKEN, "trajectory": TRAJECTORY, "variant": "censor"}
        loss, _ = fiberpo_loss(new, old, advantages, mask, **given)
        (gradient,) = torch.autograd.grad(loss, new)
        found = closed_gates(new, old, advantages, mask, **given)
        low, high = found.closed["trajectory"]
        assert torch.equal(gradient == 0, low | high)


def test_baselines_gates_are_those_of_their_losses() -> None:
    new, old, advantages, mask = batch()
    cases: tuple[tuple[str, Any, dict[str, Any], dict[str, Any]], ...] = (
        ("grpo", grpo_loss, {"token": TOKEN}, {"token": TOKEN}),
        ("gspo", gspo_loss, {"trajectory": TRAJECTORY}, {"trajectory": TRAJECTORY}),
        ("cispo", cispo_loss, {"high": 1.25}, {"token": (0.0, 1.25)}),
    )
    for method, loss, options, bounds in cases:
        _, stats = loss(new, old, advantages, mask, **options)
        found = closed_gates(new, old, advantages, mask, method=method, **bounds)
        (sides,) = found.closed.values()
        for side, closed in zip(("low", "high"), sides, strict=True):
            share = float(stats[f"closed_{side}"])
            assert closed.sum() / mask.sum() == pytest.approx(share)
        assert sides[1].any()


def test_nothing_under_the_mask_is_read_or_shown() -> None:
    new, old, advantages, mask = batch()
    ids = torch.randint(97, 122, mask.shape)
    given: dict[str, Any] = {"token": TOKEN, "trajectory": TRAJECTORY}
    plain = gates_page(ByteTokenizer(), ids, new, old, advantages, mask, **given)
    for fill in (float("nan"), float("inf"), 5.0):
        hidden = new.masked_fill(mask == 0, fill)
        other = ids.masked_fill(mask == 0, 63)
        again = gates_page(ByteTokenizer(), other, hidden, old, advantages, mask, **given)
        assert again == plain


def test_the_page_says_ratio_gate_level_and_side_of_every_token() -> None:
    new, old, advantages, mask = batch()
    ids = torch.randint(97, 122, mask.shape)
    given: dict[str, Any] = {"token": TOKEN, "trajectory": TRAJECTORY}
    page = gates_page(
        ByteTokenizer(),
        ids,
        new,
        old,
        advantages,
        mask,
        rewards=[0.0, 0.25, 0.5, 0.75, 1.0, 1.5],
        prompts=["<b>&ask"] * 6,
        **given,
    )
    found = closed_gates(new, old, advantages, mask, **given)
    for level, sides in found.closed.items():
        for side, closed in zip(("low", "high"), sides, strict=True):
            titles = re.findall(f'title="ratio [^"]*{level} gate closed, {side} side', page)
            assert len(titles) == closed.sum()
    assert len(re.findall('title="ratio ', page)) == mask.sum()
    assert "reward 0.25 · advantage " in page
    assert "&lt;b&gt;&amp;ask" in page
    assert "<b>" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "script" not in page


def test_a_colour_means_the_same_in_all_rows() -> None:
    new = torch.tensor([[0.1, 0.0], [0.9, 0.1]])
    page = gates_page(
        ByteTokenizer(),
        torch.full((2, 2), 97),
        new,
        torch.zeros(2, 2),
        torch.ones(2),
        torch.ones(2, 2),
        method="cispo",
        token=(0.0, 5.0),
    )
    assert re.findall(r'<span class="p(\d)" title', page) == ["1", "9", "1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fibrepo"}, r"unknown method 'fibrepo' \(did you mean 'fiberpo'"),
        ({"token": TOKEN}, "fiberpo needs trajectory bounds"),
        ({"method": "grpo", "token": TOKEN, "trajectory": TRAJECTORY}, "grpo has no trajectory"),
        ({"method": "gspo", "token": TOKEN}, "gspo has no token gate"),
        ({"method": "cispo", "token": TOKEN}, r"cispo has no lower bound: give \(0, 1.25\)"),
        ({"method": "grpo", "token": (1.1, 1.2)}, "token bounds are ratios around 1"),
        ({"method": "grpo", "token": TOKEN, "rewards": [1.0]}, "1 rewards for 6 rows"),
        ({"method": "grpo", "token": TOKEN, "prompts": []}, "0 prompts for 6 rows"),
        ({"method": "grpo", "token": TOKEN, "ids": torch.ones(2, 2)}, "ids must be"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], message: str) -> None:
    new, old, advantages, mask = batch()
    ids = options.pop("ids", torch.full_like(mask, 97))
    with pytest.raises(PertokenError, match=message):
        gates_page(ByteTokenizer(), ids, new, old, advantages, mask, **options)


def test_nan_is_refused() -> None:
    new, old, advantages, mask = batch()
    new[0, 0] = float("nan")
    with pytest.raises(PertokenError, match="log_probs is NaN or infinite"):
        closed_gates(new, old, advantages, mask, token=TOKEN, trajectory=TRAJECTORY)
