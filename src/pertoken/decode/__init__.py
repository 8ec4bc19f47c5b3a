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
    from pertoken.decode.constrained import Constrained, ConstraintMask
    from pertoken.decode.deferral import DeferralCurves, deferral_curves
    from pertoken.decode.drafter import Drafter
    from pertoken.decode.goose import Goose
    from pertoken.decode.lookahead import Lookahead
    from pertoken.decode.particles import smc
    from pertoken.decode.plain import Plain
    from pertoken.decode.prompt_lookup import PromptLookup
    from pertoken.decode.speculative import SpeculativeOutput
    from pertoken.decode.stats import DecodeStats
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
    "Constrained",
    "ConstraintMask",
    "DecodeStats",
    "DeferralCurves",
    "Drafter",
    "Goose",
    "Lookahead",
    "Pair",
    "Plain",
    "PromptLookup",
    "SpeculativeOutput",
    "SuffixTree",
    "TokenRecycling",
    "TokenTree",
    "WeightedSamples",
    "deferral_curves",
    "smc",
]

_HOME = {
    "AWRS": "awrs",
    "Answer": "answers",
    "Balanced": "balanced",
    "ByteEnsemble": "byte_model",
    "ByteModel": "byte_model",
    "Cascade": "cascade",
    "CascadeRun": "cascade",
    "Constrained": "constrained",
    "ConstraintMask": "constrained",
    "DecodeStats": "stats",
    "DeferralCurves": "deferral",
    "Drafter": "drafter",
    "Goose": "goose",
    "Lookahead": "lookahead",
    "Pair": "cascade",
    "Plain": "plain",
    "PromptLookup": "prompt_lookup",
    "SpeculativeOutput": "speculative",
    "SuffixTree": "suffix",
    "TokenRecycling": "token_recycling",
    "TokenTree": "tree",
    "WeightedSamples": "weighted",
    "deferral_curves": "deferral",
    "smc": "particles",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
