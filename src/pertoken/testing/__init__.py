"""Laws anyone can call, and the tiny models to call them on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pertoken.testing.distribution import DistributionResult, check_distribution
from pertoken.testing.divergence import Divergence, Verdict, compare_ids
from pertoken.testing.enumeration import outcomes
from pertoken.testing.laws import LawBroken, check_batch_invariant, check_lossless
from pertoken.testing.mock import ByteTokenizer, MockModel
from pertoken.testing.models import ARCHITECTURES, EXTRA_ARCHITECTURES, tiny_model
from pertoken.testing.report import VerifyReport, VerifyRow
from pertoken.testing.trace import check_leaves_no_trace
from pertoken.testing.verify import verify

if TYPE_CHECKING:
    from pertoken.testing.compose import PairResult, check_pair, compositions

__all__ = [
    "ARCHITECTURES",
    "EXTRA_ARCHITECTURES",
    "ByteTokenizer",
    "DistributionResult",
    "Divergence",
    "LawBroken",
    "MockModel",
    "PairResult",
    "Verdict",
    "VerifyReport",
    "VerifyRow",
    "check_batch_invariant",
    "check_distribution",
    "check_leaves_no_trace",
    "check_lossless",
    "check_pair",
    "compare_ids",
    "compositions",
    "outcomes",
    "tiny_model",
    "verify",
]


def __getattr__(name: str) -> Any:
    """What combines methods is loaded when it is used: it is run as a program too."""
    if name not in ("PairResult", "check_pair", "compositions"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pertoken.testing import compose

    return getattr(compose, name)
