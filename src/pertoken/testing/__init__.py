"""Laws anyone can call, and the tiny models to call them on."""

from pertoken.testing.distribution import DistributionResult, check_distribution
from pertoken.testing.divergence import Divergence, Verdict, compare_ids
from pertoken.testing.enumeration import outcomes
from pertoken.testing.laws import LawBroken, check_batch_invariant, check_lossless
from pertoken.testing.mock import ByteTokenizer, MockModel
from pertoken.testing.models import ARCHITECTURES, EXTRA_ARCHITECTURES, tiny_model
from pertoken.testing.report import VerifyReport, VerifyRow
from pertoken.testing.trace import check_leaves_no_trace
from pertoken.testing.verify import verify

__all__ = [
    "ARCHITECTURES",
    "EXTRA_ARCHITECTURES",
    "ByteTokenizer",
    "DistributionResult",
    "Divergence",
    "LawBroken",
    "MockModel",
    "Verdict",
    "VerifyReport",
    "VerifyRow",
    "check_batch_invariant",
    "check_distribution",
    "check_leaves_no_trace",
    "check_lossless",
    "compare_ids",
    "outcomes",
    "tiny_model",
    "verify",
]
