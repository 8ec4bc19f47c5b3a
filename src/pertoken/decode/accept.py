"""Sampling from the model while walking a token tree: recursive rejection over siblings.

With drafts that are not drawn at random (all training-free drafters), child x of a node is
accepted with the probability that the model gives x after the earlier siblings were rejected and
the rest was renormalised; when all are rejected the token is drawn from what is left. The token
that comes out then has exactly the model's distribution (Miao et al., SpecInfer, arXiv 2305.09781;
Leviathan et al., arXiv 2211.17192, for one sibling).
"""

from __future__ import annotations

import torch


def acceptance(probs: torch.Tensor, children: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Acceptance probability of each child in turn, and the distribution left after the last.

    probs: [vocab], the model's distribution; children: [n] distinct token ids.
    Returns [n] (child i, given that those before it were rejected) and [vocab], summing to 1
    (all zeros when the children hold all the mass).

    >>> accept, rest = acceptance(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0, 1]))
    >>> [round(p, 6) for p in accept.tolist()], [round(p, 6) for p in rest.tolist()]
    ([0.5, 0.6], [0.0, 0.0, 1.0])
    """
    probs = probs.double() / probs.double().sum()
    drafted = probs[children]
    left = (1.0 - drafted.cumsum(0) + drafted).clamp(min=torch.finfo(torch.float64).tiny)
    accept = (drafted / left).clamp(max=1.0)
    rest = probs.index_fill(0, children, 0.0)
    mass = rest.sum()
    return accept, rest / mass if mass > 0 else rest


def recursive_rejection(probs: torch.Tensor, children: torch.Tensor) -> tuple[int, int]:
    """Draw the next token, trying the drafted children first: (token, index of the child or -1).

    probs: [vocab]; children: [n] distinct token ids. Uses torch's global generator.
    """
    accept, rest = acceptance(probs, children)
    drawn = torch.rand(accept.shape, dtype=accept.dtype, device=accept.device)
    hits = (drawn < accept).nonzero()
    if len(hits):
        index = int(hits[0, 0])
        return int(children[index]), index
    if not bool(rest.any()):  # rounding only: the children held all the mass
        index = int(probs[children].argmax())
        return int(children[index]), index
    return int(torch.multinomial(rest, 1)), -1
