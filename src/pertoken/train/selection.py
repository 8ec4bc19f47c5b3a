"""Two other choices of tokens to learn from, which ssToken is compared with.

Both keep the best ⌈ρ n⌉ of an answer's n tokens and divide by those, as `sstoken_loss` does: only
the score differs.

- RHO-1 (Lin et al. 2024, arXiv 2404.07965, equations 3 and 4): the excess loss, that of the model
  less that of a reference model which has learned good data. A token is kept where there is
  something left to learn and the reference could learn it. ssToken's REL has the other sign.
- top entropy (Wang et al. 2025, arXiv 2506.01939): where the model is least sure what comes next.
"""

from __future__ import annotations

import torch

from pertoken.train.reducer import must_be_finite, widened
from pertoken.train.sstoken import Stats, learn_best, must_agree, retrospective_excess_loss

__all__ = ["rho1_loss", "top_entropy_loss"]


def rho1_loss(
    log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor,
    mask: torch.Tensor,
    *,
    keep: float = 0.6,
    total: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, Stats]:
    """Mean negative log-likelihood of the tokens with the largest excess loss, and what was kept.

    log_probs, reference_log_probs (of a frozen model), mask: [batch, time], column t of token
    t + 1; one answer per row. keep: the share of each row, rounded up; the paper's is 0.6 or 0.7.
    total: the tokens kept in the whole accumulated batch. The gradient goes through log_probs
    alone.

    Stats: "kept" [batch, time] bool, "scores" (the excess loss, nats) [batch, time], "place" as of
    `sstoken_loss`. PertokenError for another shape, and for NaN or infinity that is not under the
    mask.

    >>> log_probs = torch.tensor([[-1.0, -3.0, -5.0]])
    >>> reference = torch.tensor([[-1.0, -1.0, -6.0]])
    >>> loss, stats = rho1_loss(log_probs, reference, torch.ones(1, 3), keep=0.3)
    >>> float(loss), stats["scores"].tolist(), stats["kept"].tolist()
    (3.0, [[0.0, 2.0, -1.0]], [[False, True, False]])
    """
    must_agree(log_probs=log_probs, reference_log_probs=reference_log_probs, mask=mask)
    excess = retrospective_excess_loss(reference_log_probs, log_probs, mask)
    must_be_finite(excess, "log_probs or reference_log_probs")
    return learn_best(log_probs, excess, mask, keep, total)


def top_entropy_loss(
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    mask: torch.Tensor,
    *,
    keep: float = 0.6,
    total: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, Stats]:
    """Mean negative log-likelihood of the tokens that the model is least sure of, and those.

    entropy: [batch, time], of the distribution that column t of log_probs was read from:
    ``torch.special.entr(logits.softmax(-1)).sum(-1)``. keep: the share of each row, rounded up. The
    source keeps 0.2 in reinforcement learning; 0.6 is ssToken's. The rest as of `rho1_loss`.

    >>> entropy = torch.tensor([[0.1, 2.0, 0.5]])
    >>> loss, stats = top_entropy_loss(-torch.ones(1, 3), entropy, torch.ones(1, 3), keep=0.5)
    >>> stats["kept"].tolist()
    [[False, True, True]]
    """
    must_agree(log_probs=log_probs, entropy=entropy, mask=mask)
    scores = torch.where(mask.bool(), widened(entropy.detach()), 0.0)
    must_be_finite(scores, "entropy")
    return learn_best(log_probs, scores, mask, keep, total)
