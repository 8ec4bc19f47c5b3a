"""A small loop of reinforcement learning, to train a policy with one objective after another.

A batch is a few prompts and a group of sampled answers to each. Answers are judged by a program,
advantages are the rewards standardised within their group, and the batch is then used for `steps`
whole-batch steps of Adam. The first of them is on-policy: the sampling policy is the one that takes
it, so ratios are 1 and all objectives have the same gradient. From the second step on the batch is
stale.

A prompt is read once for its whole group, and what all prompts begin with once for all of them, by
a cache through which the gradient flows: with prompts longer than answers that is most of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pertoken._forward import text_logits
from pertoken.reproduce._fiberpo_methods import Loss

SPIKE = 0.01  # nats a token: a step that moves the policy by more is counted
Prompts = tuple[torch.Tensor, torch.Tensor]  # ids and mask, [prompts, time], padded on the left


@dataclass(frozen=True)
class Quiz:
    """What is asked and how it is judged.

    ask(split, count, seed): prompts and the right answers. reward(ids, answer): of one completion,
    its stop id included where it has one. stops: ids that end a completion; new_tokens: its length
    at most. fresh: a split that is never trained on, how many of its problems are looked at, and
    answers sampled to each.
    """

    ask: Callable[[str, int, int], tuple[Prompts, list[Any]]]
    reward: Callable[[list[int], Any], float]
    stops: frozenset[int]
    new_tokens: int
    fresh: tuple[str, int, int]


@dataclass(frozen=True)
class Batch:
    """Prompts [prompts, time], the completions of their groups and what they count.

    written, mask: [prompts * group, time]; advantages: [prompts * group].
    """

    prompts: Prompts
    written: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor


def train(
    model: Any,
    quiz: Quiz,
    loss: Loss,
    *,
    steps: int,
    step_size: float,
    budget: int,
    seed: int,
    prompts: int = 16,
    group: int = 8,
    every: int = 2,
    spike: float = SPIKE,
) -> dict[str, Any]:
    """Train until `budget` completion tokens have been sampled; what happened, as plain JSON.

    tokens, reward: of every batch, before its steps. fresh: [tokens sampled so far, mean reward of
    answers to fresh problems], at the start, behind every `every` batches and at the end.
    spikes, steps: steps whose KL divergence, old to new policy in nats a token, is above `spike`,
    and all of them; largest: of these divergences. broken: a gradient was not finite and training
    ended; what was not sampled then counts as reward 0.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=step_size)
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    rewards: list[float] = []
    moved: list[float] = []
    fresh = [[0, fresh_reward(model, quiz, seed)]]
    broken = False
    while sum(tokens) < budget and not broken:
        asked, answers = quiz.ask("train", prompts, 10_000 * seed + len(tokens))
        written, mask = sample(model, asked, group, quiz.new_tokens, quiz.stops, generator)
        right = [answer for answer in answers for _ in range(group)]
        reward = judged(quiz, written, mask, right)
        tokens.append(int(mask.sum()))
        rewards.append(float(reward.mean()))
        batch = Batch(asked, written, mask, group_advantages(reward, group))
        kls, broken = improve(model, batch, loss, optimizer, steps)
        moved += kls
        if len(tokens) % every == 0 and not broken:
            fresh.append([sum(tokens), fresh_reward(model, quiz, seed)])
    if fresh[-1][0] != sum(tokens) or broken:
        fresh.append([sum(tokens), 0.0 if broken else fresh_reward(model, quiz, seed)])
    return {
        "tokens": tokens,
        "reward": rewards,
        "fresh": fresh,
        "spikes": sum(kl > spike for kl in moved),
        "steps": len(moved),
        "largest": max(moved, default=0.0),
        "broken": broken,
    }


def improve(
    model: Any, batch: Batch, loss: Loss, optimizer: torch.optim.Optimizer, steps: int
) -> tuple[list[float], bool]:
    """Take `steps` steps on one batch; the divergence of each, and whether a gradient broke."""
    moved: list[float] = []
    old: torch.Tensor | None = None
    before: torch.Tensor | None = None
    for step in range(steps + 1):
        last = step == steps  # a look at the policy behind the last step
        with torch.set_grad_enabled(not last):
            table = log_probs(model, batch)
        if before is not None:
            moved.append(divergence(before, table.detach(), batch.mask))
        if last:
            break
        before = table.detach()
        new = _taken(table, batch)
        old = new.detach() if old is None else old
        optimizer.zero_grad()
        loss(new, old, batch.advantages, batch.mask)[0].backward()
        if not _finite(model.parameters()):
            return moved, True
        optimizer.step()
    return moved, False


def teach(
    model: Any,
    prompts: Prompts,
    answers: Sequence[Sequence[int]],
    optimizer: torch.optim.Optimizer,
) -> None:
    """One step of supervised learning: the mean log-probability of the answers' tokens goes up.

    answers: ids of one right answer to each prompt, its stop id included.
    """
    time = max(map(len, answers))
    written = torch.tensor([[*one, *[0] * (time - len(one))] for one in answers])
    mask = torch.tensor([[column < len(one) for column in range(time)] for one in answers])
    batch = Batch(prompts, written, mask, torch.ones(len(answers)))
    optimizer.zero_grad()
    (-_taken(log_probs(model, batch), batch)[mask].mean()).backward()
    optimizer.step()


def log_probs(model: Any, batch: Batch) -> torch.Tensor:
    """Log-probabilities of every token at every place of the completions: [rows, time, vocab].

    With gradient, also through the prompts.
    """
    ids, mask = batch.prompts
    group = len(batch.written) // len(ids)
    logits, cache = _read(model, ids, mask, group)
    if batch.written.shape[1] > 1:
        seen = torch.cat([mask.repeat_interleave(group, 0), batch.mask[:, :-1].to(mask)], 1)
        rest = text_logits(model, batch.written[:, :-1], seen, cache, all_logits=True)
        logits = torch.cat([logits, rest], 1)
    return logits.float().log_softmax(-1)


@torch.no_grad()
def sample(
    model: Any,
    prompts: Prompts,
    group: int,
    new_tokens: int,
    stops: Iterable[int],
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`group` completions of every prompt and their mask, [prompts * group, time].

    At temperature 1, or greedily without a generator. A stop id belongs to its completion; behind
    it ids are 0 and the mask is false.
    """
    ids, mask = prompts
    ends = torch.tensor(sorted(stops), dtype=torch.long)
    logits, cache = _read(model, ids, mask, group)
    seen = mask.repeat_interleave(group, 0)
    alive = torch.ones(len(seen), dtype=torch.bool)
    written: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    while True:
        chances = logits[:, -1].float().softmax(-1)
        if generator is None:
            token = chances.argmax(-1)
        else:
            token = torch.multinomial(chances, 1, generator=generator)[:, 0]
        written.append(token * alive)
        kept.append(alive)
        alive = alive & ~torch.isin(token, ends)
        if len(written) == new_tokens or not bool(alive.any()):
            return torch.stack(written, 1), torch.stack(kept, 1)
        seen = torch.cat([seen, kept[-1][:, None].to(seen)], 1)
        logits = text_logits(model, written[-1][:, None], seen, cache)


def judged(
    quiz: Quiz, written: torch.Tensor, mask: torch.Tensor, answers: Sequence[Any]
) -> torch.Tensor:
    """Reward of every completion: [rows]."""
    return torch.tensor(
        [
            quiz.reward(row[keep].tolist(), answer)
            for row, keep, answer in zip(written, mask, answers, strict=True)
        ]
    )


def fresh_reward(model: Any, quiz: Quiz, seed: int) -> float:
    """Mean reward of sampled answers to fresh problems, the same ones at every look of a seed."""
    split, count, each = quiz.fresh
    asked, answers = quiz.ask(split, count, seed)
    generator = torch.Generator().manual_seed(seed)
    written, mask = sample(model, asked, each, quiz.new_tokens, quiz.stops, generator)
    right = [answer for answer in answers for _ in range(each)]
    return float(judged(quiz, written, mask, right).mean())


def group_advantages(rewards: torch.Tensor, group: int) -> torch.Tensor:
    """Rewards [rows] less their group's mean, over its standard deviation (GRPO, 2402.03300).

    0 in a group whose answers are all alike.

    >>> found = group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), 2)
    >>> [round(float(one), 3) for one in found]
    [0.707, -0.707, 0.0, 0.0]
    """
    table = rewards.view(-1, group)
    centred = table - table.mean(1, keepdim=True)
    return (centred / (table.std(1, keepdim=True) + 1e-4)).flatten()


def divergence(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean over unmasked places of KL(before, after) in nats, of log-probabilities [.., vocab].

    >>> halves, other = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.25, 0.75]]]).log()
    >>> round(divergence(halves, other, torch.tensor([[True]])), 4)
    0.1438
    """
    return float((before.exp() * (before - after)).sum(-1)[mask].mean())


def area(tokens: Sequence[int], rewards: Sequence[float], budget: int) -> float:
    """Mean reward over the first `budget` sampled tokens; what was not sampled counts as 0.

    >>> area([10, 10, 10], [0.0, 0.5, 1.0], 25)
    0.4
    """
    total, left = 0.0, budget
    for count, reward in zip(tokens, rewards, strict=True):
        total += min(count, left) * reward
        left -= min(count, left)
    return total / budget


def tokens_until(fresh: Sequence[Sequence[float]], share: float) -> float | None:
    """Tokens sampled before the reward on fresh problems was first seen to be `share`.

    >>> tokens_until([[0, 0.2], [100, 0.6], [200, 0.5]], 0.6)
    100.0
    """
    return next((float(tokens) for tokens, right in fresh if right >= share), None)


def collapsed(fresh: Sequence[Sequence[float]]) -> bool:
    """Whether the last reward on fresh problems is below half of the best on the way.

    >>> collapsed([[0, 0.2], [100, 0.6], [200, 0.25]])
    True
    """
    return fresh[-1][1] < max(right for _, right in fresh) / 2


def _taken(table: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probabilities of the tokens that were written: [rows, time]."""
    return table.gather(-1, batch.written[..., None])[..., 0]


def _read(model: Any, ids: torch.Tensor, mask: torch.Tensor, group: int) -> tuple[Any, Any]:
    """Read the prompts: the logits behind them, once for each of a group, and their cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    alike = (ids == ids[0]).all(0) & mask.bool().all(0)
    common = min(int(alike.cumprod(0).sum()), ids.shape[1] - 1)
    if len(ids) > 1 and common:
        text_logits(model, ids[:1, :common], mask[:1, :common], cache)
        cache.batch_repeat_interleave(len(ids))
        ids = ids[:, common:]
    logits = text_logits(model, ids, mask, cache)
    if group > 1:
        logits = logits.repeat_interleave(group, 0)
        cache.batch_repeat_interleave(group)
    return logits, cache


def _finite(parameters: Iterable[torch.nn.Parameter]) -> bool:
    gradients = [each.grad for each in parameters if each.grad is not None]
    return bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
