"""The training loop of the FiberPO reproduction: what it samples, judges, counts and learns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pertoken.reproduce import _fiberpo_rl as rl
from pertoken.reproduce import _fiberpo_rl_rows as rows
from pertoken.reproduce import _fiberpo_rl_tiny as tiny
from pertoken.reproduce._fiberpo_methods import FIBERPO, PEERS, losses
from pertoken.reproduce._fiberpo_rl_task import padded
from pertoken.testing import tiny_model

LOSSES = losses((0.8, 1.28), 0.1, reduction="sequence_mean")
STOPS = range(7, 30)


def batch(model: Any, group: int = 3) -> rl.Batch:
    """Completions of two prompts of unlike lengths, some of them ended early."""
    prompts = padded([[5, 6, 9], [11]])
    generator = torch.Generator().manual_seed(3)
    written, mask = rl.sample(model, prompts, group, 6, STOPS, generator)
    advantages = torch.linspace(-1, 1, len(written), dtype=torch.float64)
    return rl.Batch(prompts, written, mask, advantages)


def taken(model: Any, given: rl.Batch) -> torch.Tensor:
    table = rl.log_probs(model, given)
    return table.gather(-1, given.written[..., None])[..., 0]


def test_log_probs_and_their_gradient_are_those_of_each_text_alone() -> None:
    model = tiny_model("llama")
    given = batch(model)
    assert given.mask.sum(1).unique().numel() > 1
    found = torch.where(given.mask, taken(model, given), 0.0)
    weights = torch.arange(found.numel(), dtype=found.dtype).view_as(found)
    (found * weights).sum().backward()
    gradients = [each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    ids, shown = given.prompts
    for row, (completion, keep) in enumerate(zip(given.written, given.mask, strict=True)):
        prompt = ids[row // 3][shown[row // 3].bool()]
        text = torch.cat([prompt, completion[keep]])[None]
        table = model(input_ids=text).logits.float().log_softmax(-1)[0, len(prompt) - 1 : -1]
        wanted = table.gather(-1, completion[keep][:, None])[:, 0]
        torch.testing.assert_close(found[row, keep], wanted)
        (wanted * weights[row, keep]).sum().backward()
    for gradient, each in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, each.grad, rtol=1e-4, atol=1e-4)


def test_what_prompts_begin_with_is_read_once_and_counts_for_each() -> None:
    model = tiny_model("llama")
    prompts = padded([[5, 6, 9, 12], [5, 6, 8, 12], [5, 6, 9, 13]])
    written, mask = rl.sample(model, prompts, 2, 3, [], torch.Generator().manual_seed(1))
    given = rl.Batch(prompts, written, mask, torch.ones(6))
    texts = torch.cat([prompts[0].repeat_interleave(2, 0), written], 1)
    table = model(input_ids=texts).logits.float().log_softmax(-1)[:, 3:-1]
    wanted = table.gather(-1, written[..., None])[..., 0]
    found = taken(model, given)
    torch.testing.assert_close(found, wanted)
    embedding = model.get_input_embeddings().weight
    gradients = [torch.autograd.grad(each.sum(), embedding)[0] for each in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_teaching_raises_the_answers() -> None:
    model = tiny.untrained(0)
    prompts, asked = tiny.quiz("dev").ask("train", 8, 0)
    answers = [tiny.encode(tiny.answer(problem)) for problem in asked]
    answers[0] = answers[0][:2]  # answers need not be alike in length
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rl.teach(model, prompts, answers, optimizer)
    found = [each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    total = sum(map(len, answers))
    for prompt, answer in zip(prompts[0], answers, strict=True):
        ids = torch.cat([prompt, torch.tensor(answer)])[None]
        table = model(input_ids=ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        (-table.gather(-1, torch.tensor(answer)[:, None]).sum() / total).backward()
    for gradient, each in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, each.grad, rtol=1e-4, atol=1e-6)


def test_a_stop_belongs_to_its_completion_and_nothing_behind_it_does() -> None:
    given = batch(tiny_model("llama"), group=20)
    lengths = given.mask.sum(1)
    assert 1 <= int(lengths.min()) < int(lengths.max())
    for completion, keep, length in zip(given.written, given.mask, lengths, strict=True):
        assert keep.tolist() == [True] * int(length) + [False] * (len(keep) - int(length))
        assert not any(token in STOPS for token in completion[: length - 1].tolist())
        assert int(completion[length - 1]) in STOPS or length == 6
        assert completion[length:].eq(0).all()


def test_sampling_follows_the_model() -> None:
    model = tiny_model("llama", vocab_size=6, scale=0.1)
    prompts = padded([[2, 3]])
    generator = torch.Generator().manual_seed(0)
    written, _ = rl.sample(model, prompts, 4000, 2, [], generator)
    table = model(input_ids=prompts[0]).logits[0, -1].softmax(-1)
    shares = torch.bincount(written[:, 0], minlength=6) / len(written)
    # Five standard errors: one in a million runs of one symbol is further off.
    assert bool(((shares - table).abs() < 5 * (table * (1 - table) / len(written)).sqrt()).all())
    greedy, _ = rl.sample(model, prompts, 1, 1, [])
    assert int(greedy) == int(table.argmax())


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    found = rl.group_advantages(rewards, 3)
    spread = math.sqrt(1 / 3)
    high, low = (2 / 3) / (spread + 1e-4), (-1 / 3) / (spread + 1e-4)
    torch.testing.assert_close(found, torch.tensor([high, low, low, 0.0, 0.0, 0.0]))


def test_divergence_counts_unmasked_places_only() -> None:
    before = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log()
    after = torch.tensor([[[0.2, 0.8], [0.1, 0.9]]]).log()
    wanted = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    found = rl.divergence(before, after, torch.tensor([[True, False]]))
    assert found == pytest.approx(wanted, rel=1e-6)


def test_the_first_step_on_a_batch_is_the_same_for_all_objectives() -> None:
    first: dict[str, torch.Tensor] = {}
    for name in (*PEERS, *FIBERPO):
        model = tiny_model("llama")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rl.improve(model, batch(model), LOSSES[name], optimizer, 1)
        first[name] = torch.cat([each.detach().flatten() for each in model.parameters()])
    start = torch.cat([each.detach().flatten() for each in tiny_model("llama").parameters()])
    assert float((first["GRPO"] - start).abs().max()) > 1e-3
    for name, weights in first.items():
        torch.testing.assert_close(weights, first["GRPO"], rtol=0, atol=1e-7, msg=name)


def test_later_steps_are_taken_against_the_policy_that_sampled() -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def loss(new: torch.Tensor, old: torch.Tensor, *rest: torch.Tensor) -> Any:
        seen.append((new.detach(), old))
        return LOSSES["policy gradient"](new, old, *rest)

    model = tiny_model("llama")
    given = batch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moved, broken = rl.improve(model, given, loss, optimizer, 3)
    assert (len(seen), len(moved), broken) == (3, 3, False)
    assert torch.equal(seen[0][0], seen[0][1])
    assert all(torch.equal(old, seen[0][1]) for _, old in seen)
    assert not torch.allclose(seen[2][0], seen[2][1])
    assert min(moved) > 0


def test_a_broken_gradient_ends_the_run_before_it_is_applied() -> None:
    def loss(new: torch.Tensor, *_: torch.Tensor) -> Any:
        return new.sum() * torch.inf, {}

    model = tiny.untrained(0)
    start = [each.clone() for each in model.parameters()]
    found = rl.train(model, tiny.quiz("dev", 2), loss, steps=2, step_size=1.0, budget=10**6, seed=0)
    assert found["broken"]
    assert found["fresh"][-1] == [sum(found["tokens"]), 0.0]
    assert all(
        torch.equal(one, other) for one, other in zip(start, model.parameters(), strict=True)
    )


def test_a_run_is_decided_by_its_seed() -> None:
    def run(seed: int) -> dict[str, Any]:
        return rl.train(
            tiny.untrained(4),
            tiny.quiz("dev", 2),
            LOSSES["FiberPO"],
            steps=2,
            step_size=1e-2,
            budget=200,
            seed=seed,
            prompts=2,
            group=4,
        )

    first = run(1)
    assert first == run(1) != run(2)
    assert sum(first["tokens"][:-1]) < 200 <= sum(first["tokens"])
    assert first["steps"] == 2 * len(first["tokens"])
    assert first["fresh"][0][0] == 0
    assert first["fresh"][-1][0] == sum(first["tokens"])


@pytest.mark.parametrize("name", ["GRPO", "GSPO", "CISPO", "FiberPO"])
def test_what_is_rewarded_becomes_likely(name: str) -> None:
    """A reward for ending at once is learned within a few batches."""
    quiz = tiny.quiz("dev", 4)
    short = rl.Quiz(quiz.ask, lambda ids, _: float(len(ids) == 1), quiz.stops, 4, quiz.fresh)
    found = rl.train(
        tiny.untrained(0),
        short,
        LOSSES[name],
        steps=2,
        step_size=1e-2,
        budget=400,
        seed=0,
        prompts=4,
        group=8,
        every=100,
    )
    assert found["reward"][0] < 0.3
    assert found["fresh"][-1][1] > 0.8


def test_problems_are_parted_and_judged_by_their_last_result() -> None:
    splits = tiny.problems()
    assert sum(map(len, splits.values())) == len(set().union(*splits.values())) == 7**3 * 4
    assert tiny.answer("0-1?-6?") == "0-16-60$"
    right = tiny.encode("0-16-60$")
    assert tiny.reward(right, "0-1?-6?") == 1
    assert tiny.reward(tiny.encode("0-12-60$"), "0-1?-6?") == 1
    assert tiny.reward(tiny.encode("0-16-61$"), "0-1?-6?") == 0
    assert tiny.reward(right[:-1], "0-1?-6?") == 0
    assert tiny.reward([*right[:-1], *right[-2:]], "0-1?-6?") == 0


def unit(rewards: list[float], fresh: list[list[float]]) -> rows.Unit:
    tokens = [50] * len(rewards)
    few = {"spikes": 1, "steps": 4, "largest": 0.1, "broken": False}
    return {"tokens": tokens, "reward": rewards, "fresh": fresh, **few}


def test_rows_compare_with_the_best_peer_and_count_what_fell() -> None:
    good = unit([0.4, 0.8], [[0, 0.4], [50, 0.7], [100, 0.8]])
    weak = unit([0.4, 0.5], [[0, 0.4], [50, 0.5], [100, 0.2]])
    runs = {name: [weak, weak] for name in (*PEERS, *FIBERPO)}
    runs |= {"FiberPO": [good, good], "GSPO": [good, weak]}
    found = {row.metric: row for row in rows.tiny_rows(runs, 4, 100, 0)}
    best = found["tiny policy, 4 steps: area of FiberPO over the best of GRPO, GSPO, CISPO"]
    assert best.here == pytest.approx(0.6 / 0.525)
    assert best.baseline == "0.525 (GSPO)"
    assert found["tiny policy, 4 steps: GRPO, collapses"].here == 2
    assert found["tiny policy, 4 steps: FiberPO, KL spikes"].here == 2
    # GSPO reaches it at 50 and never, which counts as 100; GRPO never.
    assert found["tiny policy, 4 steps: tokens until 60% of FiberPO over GSPO's"].here == 50 / 75
    assert found["tiny policy, 4 steps: tokens until 60% of FiberPO over GRPO's"].here == 0.5
    swapped = {**runs, "FiberPO": [weak, weak], "GRPO": [weak, weak]}
    found = {row.metric: row for row in rows.tiny_rows(swapped, 4, 100, 0)}
    ratio = found["tiny policy, 4 steps: tokens until 60% of FiberPO over GRPO's"].here
    assert math.isnan(ratio)  # two that never got there are not equal


def test_every_objective_has_a_choice_of_its_own() -> None:
    assert set(rows.CHOSEN) == {("policy gradient", 1)} | {
        (name, steps) for name in (*PEERS, "FiberPO") for steps in (4, 16)
    }
    assert {budgets for _, budgets in rows.CHOSEN.values()} <= set(rows.BUDGETS)
    assert rows.chosen("FiberPO censor", 16) == rows.chosen("FiberPO", 16)
    assert rows.chosen("GSPO", 1) == rows.chosen("policy gradient", 1)
