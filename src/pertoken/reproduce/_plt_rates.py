"""Predictive coding against quantisers of single vectors, at the bits that each of these takes.

For each baseline the step of the predictive coder is read from a curve of bits over steps, measured
on development texts, so that it takes a little less. Predictor weights and curve see development
texts only, and figures come from report texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pertoken.reproduce._context import Context
from pertoken.reproduce._plt_texts import pieces
from pertoken.reproduce._report import Row

if TYPE_CHECKING:
    from pertoken.cache.quantize import Predictor
    from pertoken.cache.rate_distortion import Tally

LENGTH, CONTEXT_LENGTH = 384, 256  # tokens of a piece; those whose cache is quantised
FITTED, PER_GROUP = 5, 2  # pieces of each group: for the predictor, and for the figures
STEPS = (0.005, 0.02, 0.06, 0.2, 0.5, 1.0, 1.6, 2.5)
MARGIN = 0.97  # of a baseline's bits are aimed at: other texts cost other bits
LABELS = (
    "int8",
    "int4",
    "KIVI 4 bits",
    "KIVI 2 bits",
    "TurboQuant 4 bits",
    "TurboQuant 3 bits",
    "TurboQuant 2 bits",
)
ALONE_AT = "TurboQuant 3 bits"
ALONE = f"predictive without its predictor at the bits of {ALONE_AT}"
BARS = {
    f"{what}: predictive over {label}": "<= 1"
    for label in LABELS
    for what in ("attention error at equal bits", "bits per value")
}


def rate_rows(context: Context, rows: Sequence[dict[str, Any]]) -> tuple[list[Row], float]:
    """All rows, and the measured bits per value of TurboQuant at 3 bits."""
    from pertoken.cache.rate_distortion import Tally, components

    rates = _Rates(context, rows)
    size = components(rates.model.config)
    totals: dict[str, Tally] = {}
    for name in context.track(list(rates.report), "quantisers"):
        unit = context.remember(["rates", name], partial(rates.measure, name))
        for label, sums in unit.items():
            totals[label] = totals.get(label, Tally()) + Tally(**sums)
    result = []
    for label in LABELS:
        other, ours = totals[label], totals[_matched(label)]
        result += [
            Row(
                f"attention error at equal bits: predictive over {label}",
                ours.attention_error / other.attention_error,
                "x",
                paper="sequential coding goes below the per-vector limit",
                paper_setting="in theory",
                baseline=round(other.attention_error, 5),
            ),
            Row(
                f"bits per value: predictive over {label}",
                ours.bits_per_value / other.bits_per_value,
                "x",
                baseline=round(other.bits_per_value, 3),
            ),
            Row(
                f"KL at equal bits: predictive over {label}",
                ours.kl_per_token / other.kl_per_token,
                "x",
                baseline=round(other.kl_per_token, 5),
            ),
        ]
    result += [_row(label, tally, size) for label, tally in totals.items()]
    result.append(
        Row(
            "predictor weights, once per model",
            context.remember(["weights"], rates.weights) / 2**20,
            "MiB",
            why="float32; they ship with the model and are not in the bits above",
        )
    )
    return result, totals["TurboQuant 3 bits"].bits_per_value


def _row(label: str, tally: Tally, size: int) -> Row:
    """One line of the rate-distortion table; size: numbers a cache holds for a token."""
    tokens = tally.values / size / 1000
    return Row(
        f"attention error: {label}",
        100 * tally.attention_error,
        "%",
        why=(
            f"{tally.bits_per_value:.2f} bits per value; keys {tally.key_error:.2%}, values "
            f"{tally.value_error:.2%}; KL {tally.kl_per_token:.4f} nats; top-1 kept "
            f"{tally.agree / tally.tokens:.1%}; {tally.encode_seconds / tokens:.1f} s to encode "
            f"and {tally.decode_seconds / tokens:.1f} s to decode 1,000 tokens"
        ),
    )


def _matched(label: str) -> str:
    return f"predictive at the bits of {label}"


class _Rates:
    """Texts, and the predictor fitted when the first unit is not there yet."""

    def __init__(self, context: Context, rows: Sequence[dict[str, Any]]) -> None:
        self.context = context
        self.model, tokenizer = context.load()
        smoke = context.smoke
        self.length, self.cut = (40, 16) if smoke else (LENGTH, CONTEXT_LENGTH)
        fitted = 1 if smoke else FITTED
        self.fitted = pieces(tokenizer, rows, "dev", length=self.length, per_group=fitted)
        self.dev = pieces(tokenizer, rows, "dev", length=self.length, per_group=1, skip=fitted)
        self.report = pieces(
            tokenizer, rows, "report", length=self.length, per_group=1 if smoke else PER_GROUP
        )
        if smoke:
            self.report = dict(list(self.report.items())[:1])

    @cached_property
    def predictor(self) -> Predictor:
        """A few minutes; not kept, as its weights are tens of megabytes."""
        from pertoken.cache.quantize import fit_predictor

        self.context.say("plt-kv: fitting the predictor on development texts")
        return fit_predictor(self.model, list(self.fitted.values()))

    def weights(self) -> int:
        """Bytes of the predictor."""
        return self.predictor.nbytes

    @cached_property
    def baselines(self) -> dict[str, Any]:
        """Quantiser by label; groups of 32, KIVI's newest 32 rows whole."""
        from pertoken.cache.quantize import KIVI, Int4, Int8, TurboQuant

        group = 8 if self.context.smoke else 32
        return {
            "int8": Int8(group=group),
            "int4": Int4(group=group),
            "KIVI 4 bits": KIVI(bits=4, group=group, residual=group),
            "KIVI 2 bits": KIVI(bits=2, group=group, residual=group),
            **{f"TurboQuant {bits} bits": TurboQuant(bits=bits) for bits in (4, 3, 2)},
        }

    def measure(self, name: str) -> dict[str, dict[str, Any]]:
        """Sums of every quantiser on one report text."""
        from pertoken.cache.quantize import Predictive, Raw
        from pertoken.cache.rate_distortion import measure

        chosen: dict[str, Any] = {"raw, 16 bits": Raw(), **self.baselines}
        for label in LABELS:
            chosen[_matched(label)] = Predictive(step=self.steps[label], predictor=self.predictor)
        chosen[ALONE] = Predictive(step=self.steps[ALONE])
        found = measure(self.model, self.report[name], list(chosen.values()), context=self.cut)
        return {label: found[quantizer.name].to_dict() for label, quantizer in chosen.items()}

    @cached_property
    def steps(self) -> dict[str, float]:
        """Step for the bits of each baseline, and for the coder without its predictor."""
        targets = {
            label: self.context.remember(["bits", label], partial(self._bits, quantizer))
            for label, quantizer in self.baselines.items()
        }
        curve = self._curve(fitted=True)
        steps = {label: step_for(MARGIN * bits, curve) for label, bits in targets.items()}
        bits = MARGIN * targets[ALONE_AT]
        return {**steps, ALONE: step_for(bits, self._curve(fitted=False))}

    def _curve(self, fitted: bool) -> list[tuple[float, float]]:
        """(step, bits per value) of the predictive coder on development texts."""
        return [
            (step, self.context.remember(["curve", fitted, step], partial(self._try, step, fitted)))
            for step in STEPS
        ]

    def _try(self, step: float, fitted: bool) -> float:
        from pertoken.cache.quantize import Predictive

        return self._bits(Predictive(step=step, predictor=self.predictor if fitted else None))

    def _bits(self, quantizer: Any) -> float:
        """Bits per value on development texts that the predictor was not fitted to."""
        import torch

        from pertoken.cache._predictive import cached_rows
        from pertoken.cache._rows import plain_cache
        from pertoken.cache.quantize import encode_cache

        codes = []
        for text in list(self.dev.values())[:3]:
            ids = torch.tensor([text[: self.cut]], device=self.model.device)
            cache = plain_cache(cached_rows(self.model, ids))
            codes += encode_cache(quantizer, self.model, ids, cache)
        return sum(code.bits for code in codes) / sum(code.values for code in codes)


def step_for(bits: float, curve: Sequence[tuple[float, float]]) -> float:
    """The step that takes `bits`, by lines between (step, bits), steps on a logarithmic scale.

    Beyond the curve its last line goes on.

    >>> round(step_for(3.5, [(0.25, 4.0), (0.5, 3.0), (1.0, 2.0)]), 3)
    0.354
    """
    points = sorted(((b, math.log(step)) for step, b in curve), reverse=True)
    for (high, left), (low, right) in pairwise(points):
        if bits >= low or low == points[-1][0]:
            return math.exp(left + (right - left) * (high - bits) / (high - low))
    raise AssertionError("a curve has two points at least")
