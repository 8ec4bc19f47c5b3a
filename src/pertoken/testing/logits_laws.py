"""Laws for logits processors: what goes in stays as it is, what comes out is a distribution.

Every law takes `make`, a function that returns a new processor; `generate` makes none anew for
each call, but a law must, for a processor may remember what it saw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pertoken.testing.laws import LawBroken

__all__ = ["check_processor_rows", "check_processor_scores"]

MakeProcessor = Callable[[], Any]


def check_processor_scores(
    make: MakeProcessor, *, vocab_size: int = 64, batch: int = 3, time: int = 7, seed: int = 0
) -> None:
    """Scores keep shape and dtype, and every row stays a distribution; the inputs are not changed.

    Given are random ids [batch, time] and scores [batch, vocab], float32, some of them -inf as an
    earlier processor leaves them. NaN and +inf must not come out, nor a row of -inf alone. Raises
    `LawBroken`.

    >>> from transformers import TopKLogitsWarper
    >>> check_processor_scores(lambda: TopKLogitsWarper(3))
    """
    ids, scores = _drawn(vocab_size, batch, time, seed)
    given_ids, given_scores = ids.clone(), scores.clone()
    found = make()(given_ids, given_scores)
    if not torch.equal(given_ids, ids):
        raise LawBroken("the processor changed input_ids in place")
    if not torch.equal(given_scores, scores):
        raise LawBroken("the processor changed the scores it was given in place")
    if not isinstance(found, torch.Tensor) or found.shape != scores.shape:
        shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise LawBroken(f"scores must be {list(scores.shape)}, got {shape}")
    if found.dtype != scores.dtype:
        raise LawBroken(f"scores came as {scores.dtype} and went as {found.dtype}")
    if bool(found.isnan().any()) or bool((found == torch.inf).any()):
        raise LawBroken("scores are NaN or +inf")
    if bool((found == -torch.inf).all(-1).any()):
        raise LawBroken("a row has nothing left that may follow: all scores are -inf")


def check_processor_rows(
    make: MakeProcessor, *, vocab_size: int = 64, batch: int = 4, time: int = 7, seed: int = 0
) -> None:
    """A batch must give what each of its rows gives alone, to a processor of its own."""
    ids, scores = _drawn(vocab_size, batch, time, seed)
    together = make()(ids.clone(), scores.clone())
    for row in range(batch):
        alone = make()(ids[row : row + 1].clone(), scores[row : row + 1].clone())[0]
        # Sums over a batch may run in another order: the last bits are free.
        if not torch.allclose(together[row], alone, rtol=1e-5, atol=1e-6):
            raise LawBroken(f"row {row} of a batch has other scores than alone")


def _drawn(vocab: int, batch: int, time: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (batch, time), generator=draw)
    scores = torch.randn(batch, vocab, generator=draw)
    forbidden = torch.rand(batch, vocab, generator=draw) < 0.1
    return ids, scores.masked_fill(forbidden, -torch.inf)
