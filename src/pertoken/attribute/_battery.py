"""How the attributions are made for the laws of `pertoken.testing`."""

from __future__ import annotations

from functools import partial

from pertoken.attribute.api import attribute
from pertoken.testing.battery import Subject

__all__ = ["SUBJECTS"]

# Few probes and steps: the laws ask whether it is the same twice, not whether it has converged.
_reagent = partial(attribute, target="!", method="reagent", probes=2, max_steps=20)

SUBJECTS = (Subject("reagent", "text", _reagent),)
