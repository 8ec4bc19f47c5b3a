"""Cautious decoding as it is published: one trial after the other, each on a copy of the cache.

Written from the paper, with nothing of `pertoken.decode._trials` but where randomness comes from:
a token of a sure place from torch's own generator, and those of a trial from one seeded by it.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch

from pertoken.testing.setups import processors, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["trial_by_trial"]

_Read = tuple[Any, torch.Tensor]
"""The cache of a text, and the processed scores [vocab] behind it."""


@torch.no_grad()
def trial_by_trial(
    method: Any,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    **options: Any,
) -> list[int]:
    """New ids behind one prompt [1, time], as a `CautiousDecoding` writes them.

    options: further arguments of `generate`.
    """
    text = _Text(method, model, input_ids, max_new_tokens, options)
    state = text.read(None, input_ids[0].tolist())
    while True:
        entropy = torch.distributions.Categorical(logits=state[1]).entropy()
        count = method.counts(entropy[None])[0]
        if count > 1:
            cache, tokens = _best_trial(text, state, count)
        else:
            cache, tokens = state[0], [_token(state[1], bool(options.get("do_sample")))]
        text.new += tokens
        if text.ended([]):
            return text.new
        state = text.read(cache, tokens[-1:])


def _best_trial(text: _Text, state: _Read, count: int) -> tuple[Any, list[int]]:
    """The cache and tokens of the trial of lowest perplexity, the first of equals."""
    best, chosen = math.inf, (None, list[int]())
    for seed in torch.randint(2**62, (count,)).tolist():
        draw = torch.Generator().manual_seed(seed)
        cache, scores = state
        tokens: list[int] = []
        loss = 0.0
        while True:
            token, surprise = _drawn(scores, draw)
            tokens.append(token)
            loss += surprise
            if text.ended(tokens):
                break
            own = copy.deepcopy(cache) if len(tokens) == 1 else cache
            cache, scores = text.read(own, [token], tokens)
        if loss / len(tokens) < best:
            best, chosen = loss / len(tokens), (cache, tokens)
    return chosen


class _Text:
    """A prompt, what was written behind it, and what ends it or a trial."""

    def __init__(
        self, method: Any, model: Any, ids: torch.Tensor, most: int, options: dict[str, Any]
    ) -> None:
        self.model, self.prompt, self.most = model, ids[0].tolist(), most
        self.new: list[int] = []
        self.change = processors(model, ids, max_new_tokens=most, **options)
        self.stops, self.ends_trial = stop_ids(model, options), method.ends_trial()
        self.cap: int = method.cap or most

    def read(self, cache: Any, tokens: list[int], trial: list[int] | None = None) -> _Read:
        """Read tokens behind a cache; trial: what stands behind the committed text then."""
        output = self.model(
            input_ids=torch.tensor([tokens], device=self.model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        text = torch.tensor([self.prompt + self.new + (trial or [])], device=self.model.device)
        return output.past_key_values, self.change(text, output.logits[:, -1].float())[0]

    def ended(self, trial: list[int]) -> bool:
        """Whether a trial ends behind these tokens; of none, whether the text does."""
        text = self.new + trial
        over = len(text) == self.most or text[-1] in self.stops
        return over or bool(trial and (self.ends_trial(trial[-1]) or len(trial) == self.cap))


def _token(scores: torch.Tensor, sample: bool) -> int:
    """What `generate` takes of scores [vocab]."""
    if not sample:
        return int(scores.argmax())
    return int(torch.multinomial(scores.softmax(-1)[None], num_samples=1))


def _drawn(scores: torch.Tensor, draw: torch.Generator) -> tuple[int, float]:
    """A token by one uniform number, and its surprise in nats; scores: [vocab]."""
    log_probs = scores.log_softmax(-1)
    ends = log_probs.exp().double().cumsum(-1)
    point = torch.rand((), dtype=torch.float64, generator=draw) * ends[-1]
    token = int((ends <= point).sum().clamp(max=len(ends) - 1))
    return token, -float(log_probs[token])
