"""ssToken: fine-tune on the tokens that the model learns, or that look at the question.

Two scores per answer token, put together and cut at a share (arXiv 2510.18250, section 3):

- the retrospective excess loss, by how much the model's loss has fallen since an earlier state of
  itself, REL = L_history - L = log p - log p_history: a token that never gets better is noise;
- how much of the token's attention in the last block lies on the prompt.

    score = γ · minmax(REL) + (1 - γ) · attention,   keep the best ⌈ρ n⌉ of an answer's n tokens

RHO-1's excess loss has the other sign and needs a reference model; here the model is its own. At
the start REL is 0 everywhere, and then the attention alone selects. Attention on the prompt falls
with the place in the answer (uniform attention gives P / place), so it prefers the beginning.

The trainer is `SSTokenSFT` (`pertoken.train.SSTokenSFT`); RHO-1 is in `selection`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from pertoken.errors import PertokenError, nearest
from pertoken.select import rounded_up, top_share
from pertoken.train.reducer import must_be_finite, weighted_nll, widened

__all__ = ["retrospective_excess_loss", "ss_scores", "sstoken_loss"]

Stats = dict[str, torch.Tensor]
Normalize = Literal["minmax", "rank"]
"""How REL comes to [0, 1] within an answer, see `ss_scores`."""


def retrospective_excess_loss(
    log_probs: torch.Tensor, history_log_probs: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """By how much the loss of each token has fallen since the history model, in nats.

    log_probs, history_log_probs, mask: [batch, time], column t of token t + 1. Positive where the
    model has become better, 0 under the mask; without gradient. Section 3.1 of the paper.

    >>> mask = torch.tensor([[True, True]])
    >>> retrospective_excess_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-3.0, -1.5]]), mask)
    tensor([[ 2.0000, -0.5000]])
    """
    must_agree(log_probs=log_probs, history_log_probs=history_log_probs, mask=mask)
    gap = widened(log_probs.detach()) - widened(history_log_probs.detach())
    return torch.where(mask.bool(), gap, 0.0)


def ss_scores(
    rel: torch.Tensor,
    attention: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 0.5,
    *,
    normalize: Normalize = "minmax",
) -> torch.Tensor:
    """γ · minmax(REL) + (1 - γ) · attention of each token [batch, time], 0 under the mask.

    rel: of `retrospective_excess_loss`; attention: of `prompt_attention`, in [0, 1]. REL goes to
    [0, 1] within each row; where all of it is one number, it is 0. gamma: in [0, 1], the paper's
    0.5. normalize: "minmax" is the paper's, which one outlier makes flat; "rank" (our reading) is
    the share of the row's other tokens that have a lower REL.

    >>> mask = torch.tensor([[True, True, True, False]])
    >>> rel, attention = torch.tensor([[1.0, 3.0, 2.0, 9.0]]), torch.tensor([[0.2, 0.0, 1.0, 1.0]])
    >>> [round(one, 4) for one in ss_scores(rel, attention, mask)[0].tolist()]
    [0.1, 0.5, 0.75, 0.0]
    """
    if not 0 <= gamma <= 1:
        raise PertokenError(f"gamma is the share of the excess loss, 0 to 1, got {gamma}")
    must_agree(rel=rel, attention=attention, mask=mask)
    scaled = _scaled(rel, mask.bool(), normalize)
    both = gamma * scaled + (1 - gamma) * attention.to(scaled)
    return torch.where(mask.bool(), both, 0.0)


def _scaled(rel: torch.Tensor, mask: torch.Tensor, normalize: str) -> torch.Tensor:
    """REL in [0, 1] within each row, 0 under the mask."""
    check_word("normalize", normalize, get_args(Normalize))
    last = rel.masked_fill(~mask, torch.inf)
    if normalize == "rank":
        lower = torch.searchsorted(last.sort(1).values, last).to(rel)
        return torch.where(mask, lower / (mask.sum(1, keepdim=True) - 1).clamp(min=1), 0.0)
    low = last.amin(1, keepdim=True)
    reach = rel.masked_fill(~mask, -torch.inf).amax(1, keepdim=True) - low
    return torch.where(mask & (reach > 0), (rel - low) / reach, 0.0)


def sstoken_loss(
    log_probs: torch.Tensor,
    history_log_probs: torch.Tensor,
    attention: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float = 0.5,
    keep: float = 0.6,
    normalize: Normalize = "minmax",
    total: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, Stats]:
    """Mean negative log-likelihood of the tokens that ssToken keeps, and what it kept.

    log_probs, history_log_probs, attention, mask: [batch, time]; one answer per row. gamma,
    normalize: see `ss_scores`; keep: the share ρ of each answer, the paper's 0.6, rounded up.
    total: the tokens kept in the whole accumulated batch, ⌈ρ n⌉ summed over its rows. The gradient
    goes through log_probs alone. keep=1 is the ordinary mean.

    Stats: "kept" [batch, time] bool, "scores", "rel" [batch, time], and "place", how far into their
    answers the kept tokens stand on average (0 the first token, 1 the last, 0.5 no preference).
    PertokenError for another shape, and for NaN or infinity that is not under the mask.

    >>> log_probs = torch.tensor([[-1.0, -1.0, -4.0]])
    >>> ones = torch.ones(1, 3)
    >>> loss, stats = sstoken_loss(log_probs, -3 * ones, 0 * ones, ones, gamma=1.0)
    >>> round(float(loss), 4), stats["kept"].tolist()
    (1.0, [[True, True, False]])
    """
    rel = retrospective_excess_loss(log_probs, history_log_probs, mask)
    must_be_finite(rel, "log_probs or history_log_probs")
    scores = ss_scores(rel, attention, mask, gamma, normalize=normalize)
    loss, stats = learn_best(log_probs, scores, mask, keep, total)
    return loss, {**stats, "rel": rel}


def learn_best(
    log_probs: torch.Tensor,
    scores: torch.Tensor,
    mask: torch.Tensor,
    keep: float,
    total: float | torch.Tensor | None,
) -> tuple[torch.Tensor, Stats]:
    """Mean loss of the best tokens of each row, with "kept", "scores" and "place"."""
    kept = top_share(scores, keep, mask.bool())
    loss = weighted_nll(log_probs, kept, mask, "weights", total=total)
    return loss, {"kept": kept, "scores": scores, "place": place(kept, mask)}


def place(kept: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How far into its answer a kept token stands on average: 0 the first token, 1 the last."""
    mask = mask.bool()
    number = mask.cumsum(1) - 1
    share = number / (mask.sum(1, keepdim=True) - 1).clamp(min=1)
    return share[kept].mean()


def kept_by_place(kept: torch.Tensor, mask: torch.Tensor, parts: int = 10) -> torch.Tensor:
    """The share of each part of the answers that is kept, [parts]: as `place`, a part at a time.

    kept, mask: [batch, time]; the parts of an answer are equally long, those of all answers count
    together. NaN where no answer is long enough to have a token.

    >>> kept = torch.tensor([[True, True, False, True]])
    >>> kept_by_place(kept, torch.ones(1, 4), 2)
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    mask = mask.bool()
    part = (mask.cumsum(1) - 1) * parts // mask.sum(1, keepdim=True).clamp(min=1)
    counts = part[mask].bincount(minlength=parts)
    return part[mask & kept.bool()].bincount(minlength=parts).double() / counts


def kept_total(mask: torch.Tensor, keep: float) -> torch.Tensor:
    """How many tokens ssToken keeps of a batch, known before the model has run."""
    return rounded_up(mask.sum(1), keep).sum()


def check_choice(keep: float, normalize: str, **shares: float) -> None:
    """Raise PertokenError for a share to keep, a way to normalize or other shares that are none."""
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise PertokenError(f"{name} is a share, 0 to 1, got {value}")
    if not 0 < keep <= 1:
        raise PertokenError(f"keep must be above 0 and at most 1, got {keep}")
    check_word("normalize", normalize, get_args(Normalize))


def check_word(name: str, word: str, known: Sequence[str]) -> None:
    """Raise PertokenError for a word that is not known, with the nearest that is."""
    if word not in known:
        raise PertokenError(
            f"unknown {name} {word!r}{nearest(word, known)}; there is: {', '.join(known)}"
        )


def must_agree(**given: torch.Tensor) -> None:
    """Raise PertokenError where tensors of these names have not one shape."""
    shapes = [list(one.shape) for one in given.values()]
    if any(shape != shapes[0] for shape in shapes):
        *names, last = given
        raise PertokenError(
            f"{', '.join(names)} and {last} must share the shape [batch, time], got "
            f"{', '.join(map(str, shapes[:-1]))} and {shapes[-1]}"
        )
