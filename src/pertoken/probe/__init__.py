"""Measure a model: its residual stream and layers, how it adds, what it makes of words and letters.

Each probe is a function of a model that returns a result with ``.table()`` to read and
``.to_dict()`` for programs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.probe._addition_report import ArithmeticReport
    from pertoken.probe._charbench_report import CharBench, average_correlations, error_overlap
    from pertoken.probe._consistency_report import ConsistencyReport
    from pertoken.probe._geometry_result import LayerGeometry
    from pertoken.probe._sinks_report import Sinks
    from pertoken.probe.characters import charbench
    from pertoken.probe.consistency import token_consistency
    from pertoken.probe.geometry import layer_geometry
    from pertoken.probe.outliers import (
        absorb_into_norm,
        clip_dims,
        rescale_dims,
        rescale_factors,
    )
    from pertoken.probe.patching import Patching, residual_patching
    from pertoken.probe.quantization import fake_quant, quantize_int4, quantize_nvfp4
    from pertoken.probe.query_key import QueryKeyRank, query_key_rank
    from pertoken.probe.residual import (
        CacheFree,
        Reconstruction,
        cache_free_decoding,
        reconstruction_error,
    )
    from pertoken.probe.sensitivity import Sensitivity, encoding_sensitivity
    from pertoken.probe.sinks import find_sinks
    from pertoken.probe.surface_mask import SurfaceMask

__all__ = [
    "ArithmeticReport",
    "CacheFree",
    "CharBench",
    "ConsistencyReport",
    "LayerGeometry",
    "Patching",
    "QueryKeyRank",
    "Reconstruction",
    "Sensitivity",
    "Sinks",
    "SurfaceMask",
    "absorb_into_norm",
    "average_correlations",
    "cache_free_decoding",
    "charbench",
    "clip_dims",
    "encoding_sensitivity",
    "error_overlap",
    "fake_quant",
    "find_sinks",
    "layer_geometry",
    "quantize_int4",
    "quantize_nvfp4",
    "query_key_rank",
    "reconstruction_error",
    "rescale_dims",
    "rescale_factors",
    "residual_patching",
    "token_consistency",
]

_HOME = {
    "ArithmeticReport": "_addition_report",
    "CacheFree": "residual",
    "CharBench": "_charbench_report",
    "ConsistencyReport": "_consistency_report",
    "LayerGeometry": "_geometry_result",
    "Patching": "patching",
    "QueryKeyRank": "query_key",
    "Reconstruction": "residual",
    "Sensitivity": "sensitivity",
    "Sinks": "_sinks_report",
    "SurfaceMask": "surface_mask",
    "absorb_into_norm": "outliers",
    "average_correlations": "_charbench_report",
    "cache_free_decoding": "residual",
    "charbench": "characters",
    "clip_dims": "outliers",
    "encoding_sensitivity": "sensitivity",
    "error_overlap": "_charbench_report",
    "fake_quant": "quantization",
    "find_sinks": "sinks",
    "layer_geometry": "geometry",
    "quantize_int4": "quantization",
    "quantize_nvfp4": "quantization",
    "query_key_rank": "query_key",
    "reconstruction_error": "residual",
    "rescale_dims": "outliers",
    "rescale_factors": "outliers",
    "residual_patching": "patching",
    "token_consistency": "consistency",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
