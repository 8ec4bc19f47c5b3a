"""Laws anyone can call, and the tiny models to call them on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pertoken.testing.cache_laws import (
    check_cache_batch,
    check_cache_crop,
    check_cache_equals_full,
    check_cache_reorder,
    check_cache_restores,
    check_cache_turns,
)
from pertoken.testing.distribution import DistributionResult, check_distribution
from pertoken.testing.divergence import Divergence, Verdict, compare_ids
from pertoken.testing.enumeration import outcomes
from pertoken.testing.laws import LawBroken, check_batch_invariant, check_lossless
from pertoken.testing.logits_laws import check_processor_rows, check_processor_scores
from pertoken.testing.loss_laws import (
    check_loss_gradient,
    check_loss_mask,
    check_loss_micro_batches,
    check_loss_order,
)
from pertoken.testing.method import LawResult, MethodReport, check_method
from pertoken.testing.mock import ByteTokenizer, MockModel
from pertoken.testing.models import ARCHITECTURES, EXTRA_ARCHITECTURES, tiny_model
from pertoken.testing.report import VerifyReport, VerifyRow
from pertoken.testing.text_laws import (
    TEXTS,
    check_deterministic,
    check_keeps_all,
    check_saves_and_loads,
    check_tokenizer_batch,
    check_tokenizer_round_trip,
    check_tokenizer_saves,
    tiny_tokenizer,
)
from pertoken.testing.trace import check_leaves_no_trace
from pertoken.testing.verify import verify

if TYPE_CHECKING:
    from pertoken.testing.compose import PairResult, check_pair, compositions

__all__ = [
    "ARCHITECTURES",
    "EXTRA_ARCHITECTURES",
    "TEXTS",
    "ByteTokenizer",
    "DistributionResult",
    "Divergence",
    "LawBroken",
    "LawResult",
    "MethodReport",
    "MockModel",
    "PairResult",
    "Verdict",
    "VerifyReport",
    "VerifyRow",
    "check_batch_invariant",
    "check_cache_batch",
    "check_cache_crop",
    "check_cache_equals_full",
    "check_cache_reorder",
    "check_cache_restores",
    "check_cache_turns",
    "check_deterministic",
    "check_distribution",
    "check_keeps_all",
    "check_leaves_no_trace",
    "check_loss_gradient",
    "check_loss_mask",
    "check_loss_micro_batches",
    "check_loss_order",
    "check_lossless",
    "check_method",
    "check_pair",
    "check_processor_rows",
    "check_processor_scores",
    "check_saves_and_loads",
    "check_tokenizer_batch",
    "check_tokenizer_round_trip",
    "check_tokenizer_saves",
    "compare_ids",
    "compositions",
    "outcomes",
    "tiny_model",
    "tiny_tokenizer",
    "verify",
]


def __getattr__(name: str) -> Any:
    """What combines methods is loaded when it is used: it is run as a program too."""
    if name not in ("PairResult", "check_pair", "compositions"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pertoken.testing import compose

    return getattr(compose, name)
