"""How probes are made for the laws of `pertoken.testing`."""

from __future__ import annotations

from functools import partial

from pertoken.probe.geometry import layer_geometry
from pertoken.testing.battery import Subject

__all__ = ["SUBJECTS"]

# The laws' texts are short: few neighbours.
SUBJECTS = (Subject("layer-geometry", "probe", partial(layer_geometry, neighbours=8)),)
