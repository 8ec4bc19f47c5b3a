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

    from pertoken.decode.cntp import CautiousDecoding

__all__ = ["trial_by_trial"]


@torch.no_grad()
def trial_by_trial(
    method: CautiousDecoding,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    max_new_tokens: int,
    **options: Any,
) -> list[int]:
    """New ids behind one prompt [1, time]; options: further arguments of `generate`."""
    change = processors(model, input_ids, max_new_tokens=max_new_tokens, **options)
    stops, ends_trial = stop_ids(model, options), method.ends_trial()
    cap = method.cap or max_new_tokens
    prompt, new = input_ids[0].tolist(), list[int]()

    def ended(tokens: list[int]) -> bool:
        return len(tokens) == max_new_tokens or tokens[-1] in stops

    def read(cache: Any, tokens: list[int]) -> Any:
        return model(
            input_ids=torch.tensor([tokens], device=model.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def scores_of(output: Any, tokens: list[int]) -> torch.Tensor:
        text = torch.tensor([prompt + tokens], device=model.device)
        scores: torch.Tensor = change(text, output.logits[:, -1].float())[0]
        return scores

    state = read(None, prompt)
    while True:
        scores = scores_of(state, new)
        entropy = torch.distributions.Categorical(logits=scores).entropy()
        count = method.counts(entropy[None])[0]
        if count == 1:
            new.append(_token(scores, bool(options.get("do_sample"))))
            cache = state.past_key_values
        else:
            best = math.inf
            for seed in torch.randint(2**62, (count,)).tolist():
                draw = torch.Generator().manual_seed(seed)
                tokens: list[int] = []
                loss, output, behind = 0.0, state, scores
                copied = False
                while True:
                    token, surprise = _drawn(behind, draw)
                    tokens.append(token)
                    loss += surprise
                    if ends_trial(token) or ended([*new, *tokens]) or len(tokens) == cap:
                        break
                    past = output.past_key_values
                    output = read(past if copied else copy.deepcopy(past), [token])
                    copied = True
                    behind = scores_of(output, [*new, *tokens])
                if loss / len(tokens) < best:
                    best, chosen, cache = loss / len(tokens), tokens, output.past_key_values
            new += chosen
        if ended(new):
            return new
        state = read(cache, new[-1:])


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
