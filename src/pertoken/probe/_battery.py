"""How probes are made for the laws of `pertoken.testing`."""

from __future__ import annotations

from functools import partial

from pertoken.probe.geometry import layer_geometry
from pertoken.probe.sinks import find_sinks
from pertoken.testing.battery import Subject

__all__ = ["SUBJECTS"]

_TEXTS = ("The cat sat on the mat.", "It slept until noon, and then it ate.")

SUBJECTS = (
    # The laws' texts are short: few neighbours.
    Subject("layer-geometry", "probe", partial(layer_geometry, neighbours=8)),
    Subject("residual-sinks", "probe", partial(find_sinks, texts=_TEXTS)),
)
