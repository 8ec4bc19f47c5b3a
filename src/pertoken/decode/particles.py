"""Sequential Monte Carlo over constrained text: particles whose weights follow the constraint.

Each particle draws its next token by AWRS and is weighed by the estimate of the mass that the
constraint allows there (arXiv 2504.05410). When the weights grow unequal, particles are
resampled: those in a dead end make place for copies of the others. The weighted texts follow the
model given the whole constraint and, because the stop token is forced at the length limit and
weighed there, given that the text ends by then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList

from pertoken.decode.awrs import AWRS, Proposer
from pertoken.decode.constraint import Constraint
from pertoken.decode.forward import TextForward
from pertoken.decode.weighted import WeightedSamples
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Critic = Callable[[Sequence[int]], float]
"""Log-score of new tokens (nats); of a beginning it should guess what the whole will get."""


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
    logits_processor: Any = None,
    eos_token_id: int | Sequence[int] | None = None,
    tokenizer: Any = None,
    seed: int | None = None,
    **awrs: Any,
) -> WeightedSamples:
    """Weighted texts of at most `max_new_tokens` tokens and a stop token, under a constraint.

    input_ids: [1, time], the prompt. ess_threshold: resample when the particles are worth less than
    this share of their number; 0 never resamples, and the critic then speaks at the end only.
    critic: its score of a beginning is replaced by that of the longer one; at the stop token it
    counts (as in the authors' library). logits_processor: changes the model that is sampled; none
    by default. eos_token_id: the stop ids, those of the model by default; a base model ends a line
    rather than a text, so give it its newline too. tokenizer: to show texts. awrs: how a token is
    drawn and weighed, as of `AWRS`: estimator, max_accepts, max_rejects, masked, proposal.

    Raises PertokenError where every particle dies, for a model without a stop token, and as `AWRS`.

    >>> from pertoken.testing import MockModel
    >>> class Even:
    ...     def accepts(self, ids): return len(ids) < 4
    ...     def complete(self, ids): return ids.count(1) % 2 == 0
    >>> model = MockModel([[0.4, 0.4, 0.2]] * 3)
    >>> model.generation_config.eos_token_id = 2
    >>> found = smc(model, Even(), torch.tensor([[0]]), particles=100, seed=0)
    >>> all(ids.count(1) % 2 == 0 for ids in found.posterior())
    True
    """
    _check(input_ids, particles, ess_threshold, max_new_tokens, awrs)
    stops = _stop_ids(model, eos_token_id)
    if seed is not None:
        torch.manual_seed(seed)
    sampler = AWRS(constraint, **awrs)
    sampler.start(particles)
    texts = _Texts(model, input_ids, logits_processor, sampler.proposer())
    crowd = _Particles(sampler.log_weights)
    resampled = 0
    for place in range(max_new_tokens + 1):
        found = sampler.next_tokens(*texts.logits(), stops)
        step = sampler.extend if place < max_new_tokens else sampler.finish
        for row in crowd.going():
            ids = crowd.ids[row]
            crowd.done[row] = step(row, ids, found, crowd.at[row], stops) and ids[-1] in stops
            if critic is not None and (crowd.done[row] or ess_threshold > 0.0):
                crowd.twist(row, critic(ids[:-1] if crowd.done[row] else ids))
        if all(weight == -math.inf for weight in crowd.log_weights):
            raise PertokenError(
                sampler.given_up(crowd.ids, "particles")
                if place < max_new_tokens
                else f"no text was whole after {max_new_tokens} tokens: raise max_new_tokens, "
                "loosen the constraint or take more particles"
            )
        if not crowd.going():
            break
        if ess_threshold > 0.0 and _worth(crowd.log_weights) < ess_threshold * particles:
            crowd.select(_systematic(crowd.log_weights))
            resampled += 1
        going = crowd.going()
        if not going:
            break
        moved = texts.grow([(crowd.at[row], crowd.ids[row][-1]) for row in going])
        for row, text in zip(going, moved, strict=True):
            crowd.at[row] = text
    return WeightedSamples(
        ids=[ids[:-1] if whole else ids for ids, whole in zip(crowd.ids, crowd.done, strict=True)],
        log_weights=crowd.log_weights,
        log_marginal=_log_mean(crowd.log_weights),
        checks=sum(sampler.checks),
        resampled=resampled,
        decode=None if tokenizer is None else tokenizer.decode,
    )


class _Particles:
    """What each particle has written, is worth, and which text of the batch it stands behind.

    log_weights: the list that the sampler adds to. twists: what the critic last said, in nats.
    """

    def __init__(self, log_weights: list[float]) -> None:
        self.log_weights = log_weights
        self.ids: list[list[int]] = [[] for _ in log_weights]
        self.at = [0] * len(log_weights)
        self.twists = [0.0] * len(log_weights)
        self.done = [False] * len(log_weights)

    def going(self) -> list[int]:
        """The particles that are neither whole nor given up."""
        pairs = enumerate(zip(self.done, self.log_weights, strict=True))
        return [row for row, (done, weight) in pairs if not done and weight > -math.inf]

    def twist(self, row: int, score: float) -> None:
        """Replace what the critic said of a beginning by what it says of the longer one."""
        self.log_weights[row] += score - self.twists[row]
        self.twists[row] = score

    def select(self, chosen: Sequence[int]) -> None:
        """Go on with these, each of them worth the mean."""
        self.ids = [list(self.ids[i]) for i in chosen]
        self.at = [self.at[i] for i in chosen]
        self.twists = [self.twists[i] for i in chosen]
        self.done = [self.done[i] for i in chosen]
        self.log_weights[:] = [_log_mean(self.log_weights)] * len(chosen)


def _check(
    input_ids: torch.Tensor,
    particles: int,
    ess_threshold: float,
    max_new_tokens: int,
    awrs: Mapping[str, Any],
) -> None:
    if particles < 1:
        raise PertokenError(f"particles must be 1 or more, got {particles}")
    if not 0.0 <= ess_threshold <= 1.0:
        raise PertokenError(f"ess_threshold is a share from 0 to 1, got {ess_threshold}")
    if max_new_tokens < 1:
        raise PertokenError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if input_ids.dim() != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise PertokenError("smc takes the ids of one prompt, [1, time]")
    if not awrs.get("weights", True):
        raise PertokenError("smc weighs its texts; for samples without weights use AWRS by itself")


class _Texts:
    """The different texts of all particles, each once in the batch of the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: Any,
        propose: Proposer | None,
    ) -> None:
        self._forward, self._propose, self._ids = TextForward(model), propose, input_ids
        self._processors = LogitsProcessorList(logits_processor or [])

    def logits(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the model and of the proposal, behind every text: [texts, vocab]."""
        mask = torch.ones_like(self._ids)
        scores = self._processors(self._ids, self._forward(self._ids, mask))
        if self._propose is None:
            return scores, None
        return scores, self._propose(self._ids, mask, scores)

    def grow(self, ends: Sequence[tuple[int, int]]) -> list[int]:
        """Keep the texts (text, next token) of each particle; returns where each one stands now."""
        places = {end: place for place, end in enumerate(dict.fromkeys(ends))}
        kept, device = [text for text, _ in places], self._ids.device
        rows = torch.tensor(kept, device=device)
        last = torch.tensor([[token] for _, token in places], device=device)
        if kept != list(range(len(self._ids))):
            self._forward.select(rows)
            if self._propose is not None:
                self._propose.select(rows)
        self._ids = torch.cat((self._ids[rows], last), -1)
        return [places[end] for end in ends]


def _stop_ids(model: PreTrainedModel, given: int | Sequence[int] | None) -> list[int]:
    found = model.generation_config.eos_token_id if given is None else given
    if found is None or found == []:
        raise PertokenError(
            f"{type(model).__name__} has no stop token (generation_config.eos_token_id), so no "
            "text of it is ever whole; give one as eos_token_id"
        )
    return [found] if isinstance(found, int) else list(found)


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
