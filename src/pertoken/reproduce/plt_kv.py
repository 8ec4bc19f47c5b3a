"""Reproduction of sequential KV cache compression (arXiv 2604.15356) on SmolLM2-135M-Instruct.

The paper is theory without an experiment; what it says is measured here for the first time. A
conversation as ids coded by its own model, to the bit and under damage; what the three levels cost
in bytes and in seconds beside a prefill; coding vectors as a sequence against coding each by
itself, at equal bits; the paper's ratio from measured figures, with the time it leaves out; and
sessions that share what they begin with.
"""

from __future__ import annotations

import math
from typing import Any

from pertoken.reproduce import _plt_archive, _plt_rates, _plt_sessions
from pertoken.reproduce._context import Context
from pertoken.reproduce._plt_texts import SMOKE_ROWS, pieces
from pertoken.reproduce._report import Reproduction, Row

VERSION = 1
DTYPE = "float32"

ARITHMETIC = "paper's ratio: its own arithmetic"
BARS = {
    **_plt_archive.BARS,
    **_plt_rates.BARS,
    ARITHMETIC: ">= 914000",
    **_plt_sessions.BARS,
}
REASONS: dict[str, str] = {}
_BY_STEP = "by construction: the step is chosen so that it takes a little less"
_CODE = "a check of the code, not a finding"
_DECODER = (
    "the decoder needs the ids and about as long as a prefill, which gives the cache whole from "
    "them; the predictor's weights are not counted"
)
_KIVI = (
    "the text is short: the newest rows that KIVI keeps whole are an eighth of all values, so its "
    "bits, which the other coder is given, are far above what it takes on long texts"
)
_TURBO = (
    "what the model says next is further off than behind TurboQuant (row of KL), on about a dozen "
    "texts and without an interval; the decoder needs the ids and about as long as a prefill, "
    "which gives the cache whole from them; the predictor's weights are not counted"
)
CAVEATS: dict[str, str] = {
    **dict.fromkeys((bar for bar in BARS if bar.startswith("bits per value")), _BY_STEP),
    **dict.fromkeys((bar for bar in BARS if bar.startswith(("sessions", "round trips"))), _CODE),
    **dict.fromkeys((bar for bar in BARS if "equal bits: predictive over int" in bar), _DECODER),
    **dict.fromkeys((bar for bar in BARS if "equal bits: predictive over KIVI" in bar), _KIVI),
    **dict.fromkeys((bar for bar in BARS if "equal bits: predictive over Turbo" in bar), _TURBO),
    "paper's ratio: its own arithmetic": (
        "nothing is measured: the paper's arithmetic with a shape and bits that were inferred "
        "because they fit it"
    ),
    "tokens level: bits per token, distance from the cross-entropy": (
        "a law of arithmetic coding: only a mistake could break it; header and checks, which are "
        "not in it, are longer than the payload of such a short text (their row)"
    ),
}


def run(context: Context) -> Reproduction:
    """All rows; about an hour on two slow cores."""
    _, tokenizer = context.load()
    rows = context.data("spec-bench", smoke_rows=SMOKE_ROWS)
    length = 40 if context.smoke else _plt_rates.LENGTH
    texts = pieces(tokenizer, rows, "report", length=length, per_group=1)
    if context.smoke:
        texts = dict(list(texts.items())[:1])
    levels, bits_per_token, seconds = _plt_archive.level_rows(context, texts)
    rates, bits_per_value = _plt_rates.rate_rows(context, rows)
    result = [
        *_plt_archive.trip_rows(context),
        _plt_archive.settings_row(context, next(iter(texts.values()))),
        *levels,
        *rates,
        *_ratio_rows(context, bits_per_value, bits_per_token, seconds),
        *_plt_sessions.session_rows(context, rows),
    ]
    return context.reproduction(
        result,
        texts="Spec-Bench prompts joined by group, cut into pieces; odd ids report, even ids dev",
        piece_tokens=_plt_rates.LENGTH,
        quantised_tokens=_plt_rates.CONTEXT_LENGTH,
        pieces_per_group=_plt_rates.PER_GROUP,
        pieces_per_group_of_the_predictor=_plt_rates.FITTED,
        steps_of_the_curve=list(_plt_rates.STEPS),
        share_of_bits_aimed_at=_plt_rates.MARGIN,
        round_trips=_plt_archive.TRIPS,
        damages=_plt_archive.DAMAGES,
        sessions=_plt_sessions.SESSIONS,
        block=_plt_sessions.BLOCK,
    )


def _ratio_rows(
    context: Context, bits_per_value: float, bits_per_token: float, seconds: float
) -> list[Row]:
    """A token's cache in three ways, and the paper's ratio for its model, a real one and ours.

    seconds: to restore 1,000 tokens of ids here, which the ratio counts as nothing.
    """
    from transformers import LlamaConfig

    from pertoken.cache.rate_distortion import paper_ratio, storage

    shape: dict[str, Any] = {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }
    own = context.load()[0].config
    ways = storage(own, bits_per_token=bits_per_token, bits_per_component=bits_per_value)
    time = f"restoring 1,000 tokens from ids takes {seconds:.1f} s here and is not in the ratio"
    measured = f"TurboQuant at {bits_per_value:.2f} bits over ids at {bits_per_token:.2f} bits"
    rows = [Row(f"bits per token: {name}", bits, "bits") for name, bits in ways.items()]
    rows.append(
        Row(
            ARITHMETIC,
            paper_ratio(LlamaConfig(**shape, num_key_value_heads=64), 3, 4.3),
            "x",
            paper=914_000,
            paper_setting="80 layers, 64 key-value heads of 128, 3 bits over 4.3 bits (inferred)",
        )
    )
    configs = {
        "80 layers, 64 key-value heads": LlamaConfig(**shape, num_key_value_heads=64),
        "a real 70B, 8 key-value heads": LlamaConfig(**shape, num_key_value_heads=8),
        "the model here": own,
    }
    for name, config in configs.items():
        ratio = paper_ratio(config, bits_per_value, bits_per_token)
        raw = paper_ratio(config, bits_per_value, math.log2(own.vocab_size))
        rows.append(
            Row(
                f"paper's ratio, measured bits: {name}",
                ratio,
                "x",
                paper=914_000,
                paper_setting="in theory, recompute counted as free",
                baseline=f"{raw:,.0f} with raw ids",
                why=f"{measured}; {time}",
            )
        )
    return rows
