"""Measure a model: what its residual stream holds, what its layers do to it, and how it adds.

Each probe is a function of a model that returns a result with ``.table()`` to read and
``.to_dict()`` for programs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.probe._addition_report import ArithmeticReport
    from pertoken.probe._geometry_result import LayerGeometry
    from pertoken.probe.geometry import layer_geometry
    from pertoken.probe.patching import Patching, residual_patching
    from pertoken.probe.query_key import QueryKeyRank, query_key_rank
    from pertoken.probe.residual import (
        CacheFree,
        Reconstruction,
        cache_free_decoding,
        reconstruction_error,
    )

__all__ = [
    "ArithmeticReport",
    "CacheFree",
    "LayerGeometry",
    "Patching",
    "QueryKeyRank",
    "Reconstruction",
    "cache_free_decoding",
    "layer_geometry",
    "query_key_rank",
    "reconstruction_error",
    "residual_patching",
]

_HOME = {
    "ArithmeticReport": "_addition_report",
    "CacheFree": "residual",
    "LayerGeometry": "_geometry_result",
    "Patching": "patching",
    "QueryKeyRank": "query_key",
    "Reconstruction": "residual",
    "cache_free_decoding": "residual",
    "layer_geometry": "geometry",
    "query_key_rank": "query_key",
    "reconstruction_error": "residual",
    "residual_patching": "patching",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
