"""Architectures: models of transformers whose parts are changed, to be trained, saved and loaded.

Importing this package teaches transformers' Auto classes the architectures in it, so that
``AutoModelForCausalLM.from_pretrained`` reads what they saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.nets.norms import DynamicTanh, GatedNorm, PreAffine
    from pertoken.nets.rescaled import (
        GatedAttention,
        RescaledLlamaConfig,
        RescaledLlamaForCausalLM,
        with_rescaling,
    )

__all__ = [
    "DynamicTanh",
    "GatedAttention",
    "GatedNorm",
    "PreAffine",
    "RescaledLlamaConfig",
    "RescaledLlamaForCausalLM",
    "with_rescaling",
]

_HOME = {
    "DynamicTanh": "norms",
    "GatedAttention": "rescaled",
    "GatedNorm": "norms",
    "PreAffine": "norms",
    "RescaledLlamaConfig": "rescaled",
    "RescaledLlamaForCausalLM": "rescaled",
    "with_rescaling": "rescaled",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
