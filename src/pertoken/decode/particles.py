"""Sequential Monte Carlo over constrained text: particles whose weights follow the constraint.

Each particle draws its next token by AWRS and is weighed by the estimate of the mass that the
constraint allows there (arXiv 2504.05410). When the weights grow unequal, particles are
resampled: those in a dead end make place for copies of the others. The weighted texts follow the
model given the whole constraint and, because the stop token is forced at the length limit and
weighed there, given that the text ends by then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, LogitsProcessorList

from pertoken.decode.awrs import AWRS, Estimator
from pertoken.decode.constraint import Constraint
from pertoken.decode.forward import text_logits
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Critic = Callable[[Sequence[int]], float]
"""Log-score of new tokens (nats); of a beginning it should guess what the whole will get."""


@dataclass(frozen=True)
class WeightedSamples:
    """Texts with importance weights: together they stand for the constrained distribution.

    ids: new tokens of each particle, without the stop token; log_weights: nats, -inf for particles
    that died; log_marginal: estimate of the log-probability that the model satisfies the constraint
    (and of the critic's mean there), whose exponential is unbiased; checks: questions to the
    constraint; resampled: how often the particles were.
    """

    ids: list[list[int]]
    log_weights: list[float]
    log_marginal: float
    checks: int
    resampled: int
    decode: Callable[[Sequence[int]], str] | None = None

    @property
    def weights(self) -> list[float]:
        """Weights that sum to 1."""
        return torch.tensor(self.log_weights, dtype=torch.float64).softmax(0).tolist()

    @property
    def effective_sample_size(self) -> float:
        """1 / sum of squared weights: how many equal particles these are worth."""
        return 1.0 / sum(weight**2 for weight in self.weights)

    def posterior(self) -> dict[tuple[int, ...], float]:
        """Probability by text, the weights of equal texts summed, greatest first."""
        found: dict[tuple[int, ...], float] = {}
        for ids, weight in zip(self.ids, self.weights, strict=True):
            if weight > 0.0:
                found[tuple(ids)] = found.get(tuple(ids), 0.0) + weight
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def table(self, most: int = 10) -> str:
        """The most probable texts, a line each, and what the run was worth."""
        lines = [f"{chance:7.2%}  {self._shown(ids)}" for ids, chance in self.posterior().items()]
        if len(lines) > most:
            lines = [*lines[:most], f"         … and {len(lines) - most} more"]
        lines.append(
            f"{len(self.ids)} particles worth {self.effective_sample_size:.1f}; log-probability of "
            f"the constraint {self.log_marginal:.2f} nats; {self.checks} checks of it"
        )
        return "\n".join(lines)

    def _shown(self, ids: Sequence[int]) -> str:
        return repr(self.decode(list(ids))) if self.decode else " ".join(map(str, ids))


@torch.no_grad()
def smc(
    model: PreTrainedModel,
    constraint: Constraint,
    input_ids: torch.Tensor,
    *,
    particles: int = 10,
    max_new_tokens: int = 64,
    critic: Critic | None = None,
    ess_threshold: float = 0.5,
    estimator: Estimator = "recursive",
    max_rejects: int = 1000,
    logits_processor: Any = None,
    tokenizer: Any = None,
    seed: int | None = None,
) -> WeightedSamples:
    """Weighted texts of at most `max_new_tokens` tokens and a stop token, under a constraint.

    input_ids: [1, time], the prompt. ess_threshold: resample when the particles are worth less than
    this share of their number; 0 never resamples, and the critic then speaks at the end only.
    critic: its score of a beginning is replaced by that of the longer one; at the stop token it
    counts (as in the authors' library). logits_processor: changes the model that is sampled; none
    by default.
    tokenizer: to show texts in `table`.

    Raises PertokenError where every particle dies, for a model without a stop token, and as `AWRS`.
    """
    if particles < 1:
        raise PertokenError(f"particles must be 1 or more, got {particles}")
    if not 0.0 <= ess_threshold <= 1.0:
        raise PertokenError(f"ess_threshold is a share from 0 to 1, got {ess_threshold}")
    if max_new_tokens < 1:
        raise PertokenError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise PertokenError("smc takes the ids of one prompt, [1, time]")
    stops = _stop_ids(model)
    if seed is not None:
        torch.manual_seed(seed)
    awrs = AWRS(constraint, estimator=estimator, max_rejects=max_rejects)
    awrs.start(particles)
    new: list[list[int]] = [[] for _ in range(particles)]
    twists, done = [0.0] * particles, [False] * particles
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    text = input_ids.repeat(particles, 1)
    feed, resampled = text, 0
    processors = LogitsProcessorList(logits_processor or [])
    for place in range(max_new_tokens + 1):
        logits = text_logits(model, feed, torch.ones_like(text), cache)[:, -1].float()
        log_probs = processors(text, logits).double().log_softmax(-1)
        for row, ids in enumerate(new):
            if done[row] or awrs.log_weights[row] == -math.inf:
                continue
            if place == max_new_tokens:
                done[row] = awrs.finish(row, ids, log_probs[row], stops)
            else:
                done[row] = awrs.extend(row, ids, log_probs[row], stops) and ids[-1] in stops
            if critic is not None and (done[row] or ess_threshold > 0.0):
                score = critic(ids[:-1] if done[row] else ids)
                awrs.log_weights[row] += score - twists[row]
                twists[row] = score
        if all(weight == -math.inf for weight in awrs.log_weights):
            raise PertokenError(awrs.given_up(new))
        if all(map(_or, done, awrs.log_weights)):
            break
        if ess_threshold > 0.0 and _worth(awrs.log_weights) < ess_threshold * particles:
            chosen = _systematic(awrs.log_weights)
            resampled += 1
            new, twists = [list(new[i]) for i in chosen], [twists[i] for i in chosen]
            done = [done[i] for i in chosen]
            awrs.log_weights = [_log_mean(awrs.log_weights)] * particles
            cache.reorder_cache(torch.tensor(chosen, device=text.device))
            text = text[chosen]
        last = [ids[-1] if ids else int(text[0, -1]) for ids in new]
        feed = torch.tensor(last, device=text.device).unsqueeze(-1)
        text = torch.cat((text, feed), -1)
    return WeightedSamples(
        ids=[ids[:-1] if whole else ids for ids, whole in zip(new, done, strict=True)],
        log_weights=awrs.log_weights,
        log_marginal=_log_mean(awrs.log_weights),
        checks=sum(awrs.checks),
        resampled=resampled,
        decode=None if tokenizer is None else tokenizer.decode,
    )


def _stop_ids(model: PreTrainedModel) -> list[int]:
    found = model.generation_config.eos_token_id
    if found is None:
        raise PertokenError(
            f"{type(model).__name__} has no stop token (generation_config.eos_token_id), so no "
            "text of it is ever whole"
        )
    return [found] if isinstance(found, int) else list(found)


def _or(done: bool, log_weight: float) -> bool:
    return done or log_weight == -math.inf


def _log_mean(log_weights: Sequence[float]) -> float:
    found = torch.tensor(log_weights, dtype=torch.float64)
    return float(found.logsumexp(0)) - math.log(len(log_weights))


def _worth(log_weights: Sequence[float]) -> float:
    """Effective sample size."""
    weights = torch.tensor(log_weights, dtype=torch.float64).softmax(0)
    return 1.0 / float(weights.square().sum())


def _systematic(log_weights: Sequence[float]) -> list[int]:
    """Ancestors by systematic resampling: one draw, then equal steps through the weights.

    >>> _systematic([0.0, float("-inf"), 0.0, float("-inf")])
    [0, 0, 2, 2]
    """
    count = len(log_weights)
    ends = torch.tensor(log_weights, dtype=torch.float64).softmax(0).cumsum(0)
    steps = (torch.arange(count, dtype=torch.float64) + torch.rand((), dtype=torch.float64)) / count
    found = torch.searchsorted(ends, steps * float(ends[-1]), right=True)
    return found.clamp(max=count - 1).tolist()
