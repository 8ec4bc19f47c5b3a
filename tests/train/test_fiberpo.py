"""The algebra of FiberPO in float64, to 1e-9: Jacobian, limits, budgets, hierarchy, packing."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.train import (
    fiberpo_loss,
    fiberpo_ratio,
    gate,
    gspo_loss,
    hierarchy_loss,
    log_ratio_levels,
    policy_gradient_loss,
    reduce,
)

VARIANTS = ("paper", "residual", "censor")
OPEN = (0.0, math.inf)
BOUNDS: dict[str, Any] = {"token": (0.8, 1.28), "trajectory": (0.9, 1.1)}
FOUR: dict[str, Any] = {
    **BOUNDS,
    "group": (0.93, 1.06),
    "domain": (0.95, 1.04),
    "group_ids": torch.tensor([3, 3, 8, 8, 5, 5]),
    "domain_ids": torch.tensor([1, 1, 1, 1, 0, 0]),
}


class Batch:
    """A ragged batch at some distance from the sampling policy."""

    def __init__(
        self, spread: float = 0.2, drift: float = 0.1, seed: int = 0, batch: int = 6, time: int = 9
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.old = normal(batch, time) - 3
        self.log_ratio = spread * normal(batch, time) + drift * normal(batch, 1)
        lengths = torch.randint(1, time + 1, (batch,), generator=generator)
        self.mask = torch.arange(time) < lengths[:, None]
        self.advantages = normal(batch)

    @property
    def new(self) -> torch.Tensor:
        return (self.old + self.log_ratio).requires_grad_()

    @property
    def args(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.old, self.advantages, self.mask


def gradient(loss: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    (found,) = torch.autograd.grad(loss, at)
    return found


def close(one: torch.Tensor, other: torch.Tensor, atol: float = 1e-9) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


def paper_gate(x: float, budget: float, tokens: int) -> float:
    """Eq. 4 of arXiv 2604.03044."""
    if abs(x) <= budget:
        return x
    if abs(x) < (1 + 1 / tokens) * budget:
        return math.copysign((tokens + 1) * budget, x) - tokens * x
    return 0.0


def paper_ratio(log_ratio: list[float], eps: float, up: float, down: float) -> list[float]:
    """Eq. 2-5 of arXiv 2604.03044 for one trajectory, written with ratios and a loop."""
    tokens = len(log_ratio)
    s_plus = math.exp(sum(max(x, 0) for x in log_ratio) / tokens)
    s_minus = math.exp(sum(max(-x, 0) for x in log_ratio) / tokens)

    def log_clip(ratio: float) -> float:
        return math.exp(min(max(math.log(ratio), -eps), eps))

    base = math.exp(paper_gate(math.log(s_plus), up, tokens)) / math.exp(
        paper_gate(math.log(s_minus), down, tokens)
    )
    gated = []
    for x in log_ratio:
        label = 1 if x >= 0 else -1
        same, opposite = (s_plus, s_minus) if label > 0 else (s_minus, s_plus)
        top = log_clip(same**-label * math.exp(x))
        gated.append(base * top / log_clip(opposite**-label))
    return gated


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
def test_the_ratio_is_the_papers_formula(seed: int, spread: float) -> None:
    batch = Batch(spread, drift=0.1, seed=seed)
    ratio = fiberpo_ratio(
        batch.new, *batch.args, token=(math.exp(-0.2), math.exp(0.2)), trajectory=(0.93, 1.1)
    )
    for row, keep, found in zip(batch.log_ratio, batch.mask, ratio, strict=True):
        wanted = paper_ratio(row[keep].tolist(), 0.2, math.log(1.1), -math.log(0.93))
        close(found[keep], torch.tensor(wanted, dtype=torch.float64), 1e-12)
        assert bool((found[~keep] == 1).all())


def test_the_gate_falls_back_to_zero_within_one_part_in_the_tokens() -> None:
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)
    for tokens, budget in ((1, 0.7), (4, 1.0), (50, 0.2)):
        wanted = [paper_gate(float(value), budget, tokens) for value in x]
        close(gate(x, -budget, budget, float(tokens)), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("levels", [BOUNDS, FOUR], ids=["two levels", "four levels"])
def test_the_jacobian_is_the_identity_on_policy(variant: Any, levels: dict[str, Any]) -> None:
    batch = Batch(0.0, 0.0)

    def of(new: torch.Tensor) -> torch.Tensor:
        return fiberpo_ratio(new, *batch.args, variant=variant, **levels)[batch.mask]

    jacobian = torch.autograd.functional.jacobian(of, batch.new.detach())
    count = int(batch.mask.sum())
    close(jacobian[:, batch.mask], torch.eye(count, dtype=torch.float64))
    assert bool((jacobian[:, ~batch.mask] == 0).all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_trajectories_do_not_act_on_each_other(variant: Any) -> None:
    batch = Batch(0.3, 0.2, seed=2)
    row = torch.arange(6)[:, None].expand(6, 9)

    def jacobian(levels: dict[str, Any]) -> torch.Tensor:
        def of(new: torch.Tensor) -> torch.Tensor:
            return fiberpo_ratio(new, *batch.args, variant=variant, **levels)

        found = torch.autograd.functional.jacobian(of, batch.new.detach())
        return found.reshape(54, 54)

    other = (row.flatten()[:, None] != row.flatten()[None]).double()
    assert bool((jacobian(BOUNDS) * other == 0).all())
    # Four levels couple the trajectories of a domain, and no others.
    domain = FOUR["domain_ids"][row.flatten()]
    apart = (domain[:, None] != domain[None]).double()
    assert bool((jacobian(FOUR) * apart == 0).all())
    if variant == "paper":
        assert bool((jacobian(FOUR) * other != 0).any())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
def test_the_coefficients_sum_to_what_the_channels_let_through(seed: int, spread: float) -> None:
    """sum_k c_k = A [mean(G) sum_c q_c g_c' + 1/T sum_c (1 - q_c) sum_{i in c} G_i (x_i' - y_i')].

    q_c: share of the tokens in channel c; a dash: whether a gate passes there.
    """
    batch = Batch(spread, 0.15, seed=seed)
    low, high = -0.2, 0.2
    up, down = math.log(1.1), -math.log(0.93)
    new = batch.new
    loss, _ = fiberpo_loss(
        new, *batch.args, token=(math.exp(low), math.exp(high)), trajectory=(0.93, 1.1)
    )
    found = -gradient(loss, new) * len(batch.mask)
    ratio = fiberpo_ratio(
        new, *batch.args, token=(math.exp(low), math.exp(high)), trajectory=(0.93, 1.1)
    ).detach()
    for i in range(len(batch.mask)):
        x, g = batch.log_ratio[i][batch.mask[i]], ratio[i][batch.mask[i]]
        tokens = len(x)
        sides = (x >= 0, x < 0)
        drift = [x.clamp(min=0).mean(), (-x).clamp(min=0).mean()]
        wanted = torch.zeros((), dtype=torch.float64)
        for side, (s, budget) in enumerate(zip(drift, (up, down), strict=True)):
            slope = 1.0 if s <= budget else (-tokens if s < (1 + 1 / tokens) * budget else 0.0)
            members = sides[side]
            share = members.double().mean()
            label = 1 if side == 0 else -1
            open_x = ((x - label * s >= low) & (x - label * s <= high)).double()
            y = -label * drift[1 - side]
            open_y = float(low <= y <= high)
            wanted = wanted + g.mean() * share * slope
            wanted = wanted + (1 - share) * (g * (open_x - open_y))[members].sum() / tokens
        close(found[i].sum(), batch.advantages[i] * wanted)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spread", [0.05, 0.4])
def test_only_the_trajectory_gate_moves_the_mean_of_a_signed_trajectory(
    seed: int, spread: float
) -> None:
    """sum_k c_k = A G'(s) mean(r~), whatever the token gate does."""
    batch = Batch(spread, 0.15, seed=seed)
    new = batch.new
    loss, _ = fiberpo_loss(new, *batch.args, **BOUNDS, variant="residual")
    found = -gradient(loss, new) * len(batch.mask)
    ratio = fiberpo_ratio(new, *batch.args, **BOUNDS, variant="residual").detach()
    for i in range(len(batch.mask)):
        keep, advantage = batch.mask[i], batch.advantages[i]
        s = batch.log_ratio[i][keep].mean()
        outward = (s > math.log(1.1) and advantage > 0) or (s < math.log(0.9) and advantage < 0)
        close(found[i].sum(), advantage * (0.0 if outward else 1.0) * ratio[i][keep].mean())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("levels", [BOUNDS, FOUR], ids=["two levels", "four levels"])
@pytest.mark.parametrize("how", ["sequence_mean", "token_mean", "sequence_sum", "constant"])
def test_the_closed_form_gradient_is_that_of_the_ratio(
    variant: Any, levels: dict[str, Any], how: str
) -> None:
    for seed in range(4):
        batch = Batch(0.4, 0.15, seed=seed)
        new, total = batch.new, 50 if how == "constant" else None
        loss, _ = fiberpo_loss(
            new, *batch.args, variant=variant, reduction=how, total=total, **levels
        )
        ratio = fiberpo_ratio(new, *batch.args, variant=variant, **levels)
        other = reduce(-batch.advantages[:, None] * ratio, batch.mask, how, total)
        close(loss, other, 1e-12)
        close(gradient(loss, new), gradient(other, new), 1e-12)


@pytest.mark.parametrize("variant", ["paper", "residual"])
@pytest.mark.parametrize("levels", [BOUNDS, FOUR], ids=["two levels", "four levels"])
def test_gradcheck_away_from_the_kinks(variant: Any, levels: dict[str, Any]) -> None:
    batch = Batch(0.3, 0.15, seed=1)
    assert torch.autograd.gradcheck(
        lambda new: fiberpo_loss(new, *batch.args, variant=variant, **levels)[0],
        batch.new,
        eps=1e-7,
        atol=1e-6,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_open_gates_are_the_policy_gradient(variant: Any) -> None:
    batch = Batch(0.5, 0.3)
    new = batch.new
    everything = dict.fromkeys(("token", "trajectory", "group", "domain"), OPEN)
    loss, _ = fiberpo_loss(new, *batch.args, variant=variant, **{**FOUR, **everything})
    other, _ = policy_gradient_loss(new, *batch.args)
    close(loss, other)
    close(gradient(loss, new), gradient(other, new))


@pytest.mark.parametrize("variant", VARIANTS)
def test_within_the_budgets_nothing_is_changed(variant: Any) -> None:
    batch = Batch(0.02, 0.01)
    new = batch.new
    loss, stats = fiberpo_loss(new, *batch.args, variant=variant, **BOUNDS)
    close(gradient(loss, new), gradient(policy_gradient_loss(new, *batch.args)[0], new))
    assert all(float(stats[key]) == 0 for key in stats if "closed" in key)


def test_one_token_is_ppo_in_log_space() -> None:
    """A trajectory of one token has no residual: its gate clips the log ratio."""
    batch = Batch(0.3, 0.2, time=1, batch=40)
    new, a = batch.new, batch.advantages[:, None]
    loss, _ = fiberpo_loss(new, *batch.args, variant="residual", **BOUNDS)
    x = new - batch.old
    held = torch.exp(x.clamp(math.log(0.9), math.log(1.1)))
    ppo = -torch.minimum(a * torch.exp(x), a * held).mean()
    close(loss, ppo)
    close(gradient(loss, new), gradient(ppo, new))
    # The paper's gate clips both ways, and falls back to 0 between one and two budgets.
    ratio = fiberpo_ratio(new, *batch.args, **BOUNDS)
    folded = [
        math.exp(paper_gate(float(v), math.log(1.1) if v >= 0 else -math.log(0.9), 1))
        for v in batch.log_ratio[:, 0]
    ]
    close(ratio[:, 0], torch.tensor(folded, dtype=torch.float64))


@pytest.mark.parametrize("variant", VARIANTS)
def test_flat_tokens_give_the_ratio_of_gspo(variant: Any) -> None:
    batch = Batch(0.0, 0.05, seed=3)
    ratio = fiberpo_ratio(batch.new, *batch.args, variant=variant, **BOUNDS)
    mean = torch.where(batch.mask, batch.log_ratio, 0.0).sum(1) / batch.mask.sum(1)
    close(ratio, torch.where(batch.mask, torch.exp(mean)[:, None], 1.0))


def test_a_shut_token_gate_leaves_the_loss_and_gradient_of_gspo() -> None:
    """Without room for residuals every token carries the ratio of its trajectory."""
    batch = Batch(0.3, 0.2, seed=4)
    new = batch.new
    shut, wide = (1 - 1e-13, 1 + 1e-13), (0.1, 10.0)
    loss, _ = fiberpo_loss(new, *batch.args, trajectory=wide, token=shut)
    other, _ = gspo_loss(new, *batch.args, trajectory=wide)
    close(loss, other)
    close(gradient(loss, new), gradient(other, new))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("levels", [BOUNDS, FOUR], ids=["two levels", "four levels"])
def test_the_loss_agrees_with_the_linear_one_to_first_order(
    variant: Any, levels: dict[str, Any]
) -> None:
    """The surrogate is linear in the ratio: halving the step from on-policy quarters the error."""
    batch = Batch(1.0, 0.5, seed=5)
    direction = torch.where(batch.mask, batch.log_ratio, 0.0)

    def error(step: float) -> float:
        new = batch.old + step * direction
        gated, _ = fiberpo_loss(new, *batch.args, variant=variant, **levels)
        linear = 1 + step * direction.sum(1) / batch.mask.sum(1)
        return abs(float(gated + (batch.advantages * linear).mean()))

    errors = [error(2.0**-k) for k in range(7, 12)]
    for coarse, fine in pairwise(errors):
        assert 3.9 < coarse / fine < 4.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hierarchy_of_one_level_is_the_token_clip(variant: Any) -> None:
    batch = Batch(0.4, 0.1, batch=40)
    new, a = batch.new, batch.advantages[:, None]
    loss, stats = hierarchy_loss(new, *batch.args, levels={}, token=(0.8, 1.28), variant=variant)
    ratio = torch.exp((new - batch.old).clamp(math.log(0.8), math.log(1.28)))
    values = -a * ratio
    if variant != "paper":
        values = torch.maximum(values, -a * torch.exp(new - batch.old))  # PPO's pessimism
    wanted = reduce(values, batch.mask, "sequence_mean")
    close(loss, wanted, 1e-12)
    close(gradient(loss, new), gradient(wanted, new), 1e-12)
    assert set(stats) == {
        f"token/{what}" for what in ("closed_low", "closed_high", "drift_low", "drift_high")
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hierarchy_of_two_and_four_levels_is_fiberpo(variant: Any) -> None:
    batch = Batch(0.4, 0.1)
    two, _ = hierarchy_loss(
        batch.new,
        *batch.args,
        levels={"trajectory": (None, (0.9, 1.1))},
        token=(0.8, 1.28),
        variant=variant,
    )
    assert two == fiberpo_loss(batch.new, *batch.args, variant=variant, **BOUNDS)[0]
    four, _ = hierarchy_loss(
        batch.new,
        *batch.args,
        levels={
            "domain": (FOUR["domain_ids"], FOUR["domain"]),
            "group": (FOUR["group_ids"], FOUR["group"]),
            "trajectory": (None, FOUR["trajectory"]),
        },
        token=FOUR["token"],
        variant=variant,
    )
    assert four == fiberpo_loss(batch.new, *batch.args, variant=variant, **FOUR)[0]


def test_each_budget_acts_on_its_own_level() -> None:
    """Closing one gate changes the stats of that level alone."""
    batch = Batch(0.3, 0.2, seed=7)
    wide = {
        "token": (0.01, 99.0),
        "trajectory": (0.01, 99.0),
        "group": (0.01, 99.0),
        "domain": (0.01, 99.0),
    }
    ids = {"group_ids": FOUR["group_ids"], "domain_ids": FOUR["domain_ids"]}
    for level in wide:
        bounds = {**wide, level: (0.999, 1.001)}
        _, stats = fiberpo_loss(batch.new, *batch.args, **ids, **bounds)
        closed = {key.partition("/")[0] for key in stats if "closed" in key and stats[key] > 0}
        assert closed == {level}


def test_the_levels_sum_to_the_log_ratio() -> None:
    batch = Batch(0.4, 0.3)
    parts = log_ratio_levels(
        batch.log_ratio,
        batch.mask,
        {"domain": FOUR["domain_ids"], "group": FOUR["group_ids"], "trajectory": None},
    )
    assert list(parts) == ["domain", "group", "trajectory", "token"]
    total = torch.stack(list(parts.values())).sum(0)
    close(total, torch.where(batch.mask, batch.log_ratio, 0.0), 1e-12)
    means = torch.where(batch.mask, batch.log_ratio, 0.0).sum(1) / batch.mask.sum(1)
    group = (means[0] + means[1]) / 2
    close(parts["domain"][0, 0] + parts["group"][0, 0], group, 1e-12)
    close(parts["trajectory"][0, 0], means[0] - group, 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dirt", [float("nan"), float("inf"), -1e30])
def test_padding_changes_nothing_bit_for_bit(variant: Any, dirt: float) -> None:
    batch = Batch(0.4, 0.1, seed=8)

    def run(fill: float) -> tuple[torch.Tensor, torch.Tensor]:
        new = torch.where(batch.mask, batch.old + batch.log_ratio, fill).requires_grad_()
        old = torch.where(batch.mask, batch.old, -fill)
        advantages = torch.where(batch.mask, batch.advantages[:, None], fill)
        loss, _ = fiberpo_loss(new, old, advantages, batch.mask, variant=variant, **FOUR)
        return loss, gradient(loss, new)

    loss, grad = run(0.0)
    dirty_loss, dirty_grad = run(dirt)
    assert torch.equal(loss, dirty_loss)
    assert torch.equal(grad, dirty_grad)
    assert bool((grad[~batch.mask] == 0).all())


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_may_be_permuted(variant: Any) -> None:
    batch = Batch(0.4, 0.1, seed=9)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    new = batch.new
    loss, _ = fiberpo_loss(new, *batch.args, variant=variant, **FOUR)
    shuffled = {
        **FOUR,
        "group_ids": FOUR["group_ids"][order],
        "domain_ids": FOUR["domain_ids"][order],
    }
    mixed = new.detach()[order].requires_grad_()
    other, _ = fiberpo_loss(
        mixed, *(part[order] for part in batch.args), variant=variant, **shuffled
    )
    close(loss, other, 1e-12)
    close(gradient(loss, new)[order], gradient(other, mixed), 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("how", ["sequence_mean", "token_mean", "sequence_sum", "constant"])
def test_micro_batches_give_the_gradient_of_the_batch(variant: Any, how: str) -> None:
    batch = Batch(0.4, 0.1, seed=10)
    total = {"token_mean": batch.mask.sum(), "constant": 31.0}.get(how, len(batch.mask))
    new = batch.new
    kw: dict[str, Any] = {"variant": variant, "reduction": how, "total": total, **BOUNDS}
    whole = gradient(fiberpo_loss(new, *batch.args, **kw)[0], new)
    rows = [slice(0, 1), slice(1, 4), slice(4, 6)]
    parts = sum(fiberpo_loss(new[r], *(p[r] for p in batch.args), **kw)[0] for r in rows)
    assert isinstance(parts, torch.Tensor)
    close(gradient(parts, new), whole, 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("levels", [BOUNDS, FOUR], ids=["two levels", "four levels"])
def test_a_packed_row_is_its_trajectories_in_rows_of_their_own(
    variant: Any, levels: dict[str, Any]
) -> None:
    batch = Batch(0.4, 0.15, seed=11)
    new = batch.new
    loss, stats = fiberpo_loss(new, *batch.args, variant=variant, **levels)
    grad = gradient(loss, new)[batch.mask]

    def pack(values: torch.Tensor) -> torch.Tensor:
        filled = values if values.dim() == 2 else values[:, None].expand_as(batch.mask)
        return filled[batch.mask][None]

    packed = pack(new.detach()).requires_grad_()
    ids = {key: pack(value) for key, value in levels.items() if key.endswith("_ids")}
    other, packed_stats = fiberpo_loss(
        packed,
        pack(batch.old),
        pack(batch.advantages),
        torch.ones_like(packed),
        segment_ids=pack(torch.arange(6)),
        variant=variant,
        **{**levels, **ids},
    )
    close(loss, other, 1e-12)
    close(gradient(other, packed)[0], grad, 1e-12)
    for key, value in stats.items():
        close(value.double(), packed_stats[key].double(), 1e-12)


def test_an_advantage_of_zero_gives_exactly_nothing() -> None:
    batch = Batch(0.5, 0.3, seed=12)
    advantages = batch.advantages.clone()
    advantages[2] = 0
    for variant in VARIANTS:
        new = batch.new
        loss, _ = fiberpo_loss(
            new,
            batch.old,
            advantages,
            batch.mask,
            variant=variant,
            **BOUNDS,  # type: ignore[arg-type]
        )
        assert bool((gradient(loss, new)[2] == 0).all())


def test_a_censored_trajectory_gives_no_gradient_and_a_residual_one_a_sum_of_zero() -> None:
    batch = Batch(0.05, 0.0, seed=13)
    drifted = batch.log_ratio + 0.5
    positive = batch.advantages.abs()
    new = (batch.old + drifted).requires_grad_()
    args = (batch.old, positive, batch.mask)
    censored, stats = fiberpo_loss(new, *args, variant="censor", **BOUNDS)
    assert stats["trajectory/closed_high"] == 1
    assert bool((gradient(censored, new) == 0).all())
    left = gradient(fiberpo_loss(new, *args, variant="residual", **BOUNDS)[0], new)
    assert bool((left.abs().sum(1)[batch.mask.sum(1) > 1] > 0).all())
    close(left.sum(1), torch.zeros(6, dtype=torch.float64))
    # Inward drift is never gated: with the sign of the advantage turned, everything flows.
    inward = gradient(
        fiberpo_loss(new, batch.old, -positive, batch.mask, variant="censor", **BOUNDS)[0], new
    )
    close(inward, gradient(policy_gradient_loss(new, batch.old, -positive, batch.mask)[0], new))


def test_between_one_budget_and_the_next_the_gradient_pulls_back() -> None:
    """The restorative zone of eq. 4: the common drift of a good trajectory is pushed down."""
    budget, tokens = math.log(1.1), 8
    old = torch.full((1, tokens), -2.0, dtype=torch.float64)
    advantages, mask = torch.ones(1, dtype=torch.float64), torch.ones(1, tokens)
    for drift, direction in ((0.9, 1), (1.05, -1), (1.3, 0)):
        new = (old + drift * budget).requires_grad_()
        loss, _ = fiberpo_loss(new, old, advantages, mask, token=(0.5, 2.0), trajectory=(0.9, 1.1))
        total = float(-gradient(loss, new).sum())
        assert total == pytest.approx(0, abs=1e-12) if direction == 0 else total * direction > 0


def test_bfloat16_is_computed_in_float32() -> None:
    batch = Batch(0.3, 0.1, batch=6, time=9)
    half = batch.new.detach().bfloat16().requires_grad_()
    old = batch.old.bfloat16()
    loss, _ = fiberpo_loss(half, old, batch.advantages.bfloat16(), batch.mask, **BOUNDS)
    assert loss.dtype == torch.float32
    wide = half.detach().float().requires_grad_()
    other, _ = fiberpo_loss(
        wide, old.float(), batch.advantages.bfloat16().float(), batch.mask, **BOUNDS
    )
    assert loss == other
    assert gradient(loss, half).dtype == torch.bfloat16


def test_nothing_is_left_behind() -> None:
    batch = Batch()
    before = [part.clone() for part in (batch.old, batch.log_ratio, batch.advantages, batch.mask)]
    loss, _ = fiberpo_loss(batch.new, *batch.args, **FOUR)
    loss.backward()
    after = (batch.old, batch.log_ratio, batch.advantages, batch.mask)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_bad_input_is_one_clear_error(variant: Any) -> None:
    batch = Batch(0.1, 0.1)
    good: dict[str, Any] = {
        "log_probs": batch.new,
        "old_log_probs": batch.old,
        "advantages": batch.advantages,
        "mask": batch.mask,
        "variant": variant,
        **FOUR,
    }
    row, column = (int(i) for i in batch.mask.nonzero()[3])

    def broken(name: str, value: float) -> torch.Tensor:
        copy = good[name].detach().clone()
        copy[(row, column) if copy.dim() == 2 else row] = value
        return copy

    nan, inf = float("nan"), float("inf")
    cases: list[tuple[str, Any, str]] = [
        (
            "log_probs",
            broken("log_probs", nan),
            rf"log_probs is NaN or infinite at \[{row}, {column}\]",
        ),
        ("log_probs", broken("log_probs", -inf), "log_probs is NaN or infinite"),
        ("old_log_probs", broken("old_log_probs", -inf), "old_log_probs is NaN or infinite"),
        ("advantages", broken("advantages", inf), "advantages is NaN or infinite"),
        ("advantages", batch.advantages[:2], r"advantages must be \[batch\]"),
        ("old_log_probs", batch.old[:, :3], "share the shape"),
        ("mask", torch.zeros_like(batch.mask), "hides every token"),
        ("token", (1.1, 1.3), "low < 1 < high"),
        ("trajectory", (0.9, 1.0), "low < 1 < high"),
        ("trajectory", (-0.1, 1.1), "low < 1 < high"),
        ("group_ids", None, "pass group_ids= too"),
        ("group_ids", FOUR["group_ids"][:3], r"group_ids must be \[batch\]"),
        ("group_ids", torch.tensor([3, 3, 3, 8, 5, 5]), "group 8 has a single trajectory"),
        ("domain_ids", torch.tensor([0, 1, 1, 1, 0, 0]), "levels must nest"),
        ("reduction", "mean", "unknown reduction"),
        ("variant", "papper", "did you mean 'paper'"),
        ("segment_ids", torch.zeros_like(batch.mask).long(), "one advantage per token"),
    ]
    for name, value, message in cases:
        with pytest.raises(PertokenError, match=message) as caught:
            fiberpo_loss(**{**good, name: value})
        assert "\n" not in str(caught.value)
