"""How probes are made for the laws of `pertoken.testing`."""

from __future__ import annotations

from functools import partial

from pertoken.probe.characters import charbench
from pertoken.probe.consistency import token_consistency
from pertoken.probe.geometry import layer_geometry
from pertoken.probe.sinks import find_sinks
from pertoken.testing.battery import Subject

__all__ = ["SUBJECTS"]

_TEXTS = ("The cat sat on the mat.", "It slept until noon, and then it ate.")

# A word of each length.
_WORDS = ("four", "seven", "eleven", "letters", "language", "character", "strawberry")

SUBJECTS = (
    # The laws' models are random: short replies, and no text of theirs is one word again.
    Subject(
        "charbench",
        "probe",
        partial(charbench, words=_WORDS, each=1, tasks=["count_unique_chars"], max_new_tokens=2),
    ),
    # The laws' texts are short: few neighbours.
    Subject("layer-geometry", "probe", partial(layer_geometry, neighbours=8)),
    Subject("residual-sinks", "probe", partial(find_sinks, texts=_TEXTS)),
    Subject(
        "token-consistency",
        "probe",
        partial(token_consistency, texts=_TEXTS, mask=True, max_new_tokens=4),
    ),
)
