"""Decoding methods: losslessly faster `generate` for any decoder-only model.

Each name is an object to hand to `generate`: ``custom_generate=Goose()``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.decode.answers import Answer
    from pertoken.decode.awrs import AWRS
    from pertoken.decode.balanced import Balanced
    from pertoken.decode.byte_model import ByteEnsemble, ByteModel
    from pertoken.decode.cascade import Cascade, CascadeRun, Pair
    from pertoken.decode.cntp import CautiousDecoding, CautiousOutput, CautiousStats
    from pertoken.decode.consistency import SelfConsistency, majority, self_consistency
    from pertoken.decode.constrained import Constrained, ConstraintMask
    from pertoken.decode.deferral import DeferralCurves, deferral_curves
    from pertoken.decode.drafter import Drafter
    from pertoken.decode.goose import Goose
    from pertoken.decode.knn_analysis import knn_evaluation
    from pertoken.decode.knn_datastore import KNNDatastore
    from pertoken.decode.knn_lm import KNNMemory, fit_temperature
    from pertoken.decode.knn_writing import knn_continuations
    from pertoken.decode.lookahead import Lookahead
    from pertoken.decode.ngram_style import NGramStyle
    from pertoken.decode.particles import smc
    from pertoken.decode.plain import Plain
    from pertoken.decode.prompt_lookup import PromptLookup
    from pertoken.decode.speculative import SpeculativeOutput
    from pertoken.decode.stats import DecodeStats
    from pertoken.decode.style_figures import StyleSweep, style_sweep
    from pertoken.decode.suffix import SuffixTree
    from pertoken.decode.token_recycling import TokenRecycling
    from pertoken.decode.tree import TokenTree
    from pertoken.decode.weighted import WeightedSamples

__all__ = [
    "AWRS",
    "Answer",
    "Balanced",
    "ByteEnsemble",
    "ByteModel",
    "Cascade",
    "CascadeRun",
    "CautiousDecoding",
    "CautiousOutput",
    "CautiousStats",
    "Constrained",
    "ConstraintMask",
    "DecodeStats",
    "DeferralCurves",
    "Drafter",
    "Goose",
    "KNNDatastore",
    "KNNMemory",
    "Lookahead",
    "NGramStyle",
    "Pair",
    "Plain",
    "PromptLookup",
    "SelfConsistency",
    "SpeculativeOutput",
    "StyleSweep",
    "SuffixTree",
    "TokenRecycling",
    "TokenTree",
    "WeightedSamples",
    "deferral_curves",
    "fit_temperature",
    "knn_continuations",
    "knn_evaluation",
    "majority",
    "self_consistency",
    "smc",
    "style_sweep",
]

_HOME = {
    "AWRS": "awrs",
    "Answer": "answers",
    "Balanced": "balanced",
    "ByteEnsemble": "byte_model",
    "ByteModel": "byte_model",
    "Cascade": "cascade",
    "CascadeRun": "cascade",
    "CautiousDecoding": "cntp",
    "CautiousOutput": "cntp",
    "CautiousStats": "cntp",
    "Constrained": "constrained",
    "ConstraintMask": "constrained",
    "DecodeStats": "stats",
    "DeferralCurves": "deferral",
    "Drafter": "drafter",
    "Goose": "goose",
    "KNNDatastore": "knn_datastore",
    "KNNMemory": "knn_lm",
    "Lookahead": "lookahead",
    "NGramStyle": "ngram_style",
    "Pair": "cascade",
    "Plain": "plain",
    "PromptLookup": "prompt_lookup",
    "SelfConsistency": "consistency",
    "SpeculativeOutput": "speculative",
    "StyleSweep": "style_figures",
    "SuffixTree": "suffix",
    "TokenRecycling": "token_recycling",
    "TokenTree": "tree",
    "WeightedSamples": "weighted",
    "deferral_curves": "deferral",
    "fit_temperature": "knn_lm",
    "knn_continuations": "knn_writing",
    "knn_evaluation": "knn_analysis",
    "majority": "consistency",
    "self_consistency": "consistency",
    "smc": "particles",
    "style_sweep": "style_figures",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
