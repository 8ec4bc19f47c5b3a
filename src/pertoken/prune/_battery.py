"""How prompts are compressed for the laws of `pertoken.testing`."""

from __future__ import annotations

from functools import partial

from pertoken.prune.frugalprompt import compress
from pertoken.testing.battery import Subject

__all__ = ["SUBJECTS"]

# By the decoder at hand; GlobEnc and DecompX have tests of their own on it.
SUBJECTS = (Subject("frugalprompt", "text", partial(compress, salience="self-information")),)
