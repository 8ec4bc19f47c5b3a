"""What a method gives back, and random numbers that do not depend on batching."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pertoken.errors import PertokenError


@dataclass(frozen=True, eq=False)
class Scores:
    """values: float64 [targets, time] over prompt and target, NaN where a token was not rated (it
    comes after, or is protected); notes: what the user must know about them."""

    values: torch.Tensor
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.values.isinf().any()):
            raise PertokenError("a score is infinite")


def seeded(seed: int, *numbers: int) -> torch.Generator:
    """A generator of its own for each tuple of numbers, so that targets do not share draws."""
    if seed < 0:
        raise PertokenError(f"the seed must be 0 or more, got {seed}")
    mixed = np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(mixed) >> 1)
