"""What each quantiser of a cache costs in bits and does to the text that follows.

The cache of the first tokens of a text is quantised; the rest of the text is then read behind it,
teacher-forced, and compared with reading behind the untouched cache: the outputs of all attention
blocks and the laws of the next tokens. The rows of the rest itself are kept whole. Errors of a
layer's output hold those of the layers before it, as in use.

Below that stands what a cache costs as ids, and the paper's ratio (arXiv 2604.15356) recomputed: it
divides vectors by coded ids, so it counts rebuilding the cache by a prefill as free.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch

from pertoken._extras import need
from pertoken.cache._predictive import Predictive, cached_rows
from pertoken.cache._rows import plain_cache
from pertoken.cache.quantize import Code, Quantizer, decode_cache, encode_cache
from pertoken.errors import PertokenError
from pertoken.result import Part, Result, figure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["RateDistortion", "Tally", "measure", "paper_ratio", "rate_distortion", "storage"]


@dataclass
class Tally:
    """Sums over texts of one quantiser; add tallies to join texts.

    bits, values: of the coded caches. key, value, attention: (squared error, squared size), the
    last one per layer. kl: nats, summed over `tokens` next-token laws. Seconds are of whole caches.
    """

    bits: float = 0.0
    values: float = 0.0
    key: list[float] = field(default_factory=lambda: [0.0, 0.0])
    value: list[float] = field(default_factory=lambda: [0.0, 0.0])
    attention: list[list[float]] = field(default_factory=list)
    kl: float = 0.0
    agree: float = 0.0
    tokens: float = 0.0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def bits_per_value(self) -> float:
        """Bits of a cached number, side information included."""
        return self.bits / self.values

    @property
    def key_error(self) -> float:
        """Relative error of all keys: root of squared error over squared size."""
        return _relative(self.key)

    @property
    def value_error(self) -> float:
        """Relative error of all values."""
        return _relative(self.value)

    @property
    def attention_error(self) -> float:
        """Relative error of the attention blocks' outputs, mean over layers."""
        return sum(map(_relative, self.attention)) / len(self.attention)

    @property
    def kl_per_token(self) -> float:
        """KL(untouched ‖ quantised) of the next token, nats, mean over tokens."""
        return self.kl / self.tokens

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            **{f.name: _plus(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        )

    def to_dict(self) -> dict[str, Any]:
        """The sums as plain JSON; `Tally(**data)` reads them back."""
        return asdict(self)


@dataclass(frozen=True)
class RateDistortion(Result):
    """Figures of each quantiser by name, fewest bits first."""

    tallies: dict[str, Tally]

    _title = "What quantising a cache costs"

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Figures by quantiser."""
        return {
            name: {
                "bits_per_value": t.bits_per_value,
                "key_error": t.key_error,
                "value_error": t.value_error,
                "attention_error": t.attention_error,
                "kl_per_token": t.kl_per_token,
                "top1_agreement": t.agree / t.tokens,
                "encode_seconds": t.encode_seconds,
                "decode_seconds": t.decode_seconds,
            }
            for name, t in self.tallies.items()
        }

    def rows(self) -> list[dict[str, Any]]:
        """A record per quantiser."""
        return [{"quantiser": name, **row} for name, row in self.to_dict().items()]

    def plot(self) -> Any:
        """KL over bits, a point per quantiser: a plotly figure (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        rows = self.rows()
        points = graph.Scatter(
            x=[row["bits_per_value"] for row in rows],
            y=[row["kl_per_token"] for row in rows],
            text=[row["quantiser"] for row in rows],
            mode="markers+text",
            textposition="top center",
        )
        axis = {"title": "KL, nats per token", "rangemode": "tozero"}
        return figure(points, xaxis={"title": "bits per value"}, yaxis=axis)

    def _parts(self) -> list[Part]:
        """A line per quantiser."""
        shown = {
            "bits_per_value": ("bits/value", ".2f"),
            "key_error": ("keys", ".2%"),
            "value_error": ("values", ".2%"),
            "attention_error": ("attention", ".2%"),
            "kl_per_token": ("KL nats", ".4f"),
            "top1_agreement": ("top-1", ".1%"),
            "encode_seconds": ("encode s", ".2f"),
            "decode_seconds": ("decode s", ".2f"),
        }
        lines = [["quantiser", *(name for name, _ in shown.values())]]
        for row in self.rows():
            figures = [format(row[key], form) for key, (_, form) in shown.items()]
            lines.append([row["quantiser"], *figures])
        return [Part("", lines)]


def rate_distortion(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    quantizers: Sequence[Quantizer | Predictive],
    *,
    context: int | None = None,
) -> RateDistortion:
    """Measure quantisers on the same texts, given as lists of token ids.

    context: tokens of each text whose cache is quantised; half of the text by default. The others
        are read behind it. A quantiser with `Raw()` beside it says what 16 bits alone do.
    Raises PertokenError for a text without tokens on both sides.

    >>> from pertoken.cache.quantize import Int8, TurboQuant
    >>> from pertoken.testing import tiny_model
    >>> text = [list(range(1, 41))]
    >>> found = rate_distortion(tiny_model("llama"), text, [Int8(), TurboQuant(bits=2)])
    >>> [round(tally.bits_per_value) for tally in found.tallies.values()]
    [4, 12]
    """
    totals = {quantizer.name: Tally() for quantizer in quantizers}
    if len(totals) != len(quantizers):
        raise PertokenError("two quantisers have one name: measure each setting once")
    for text in texts:
        for name, tally in measure(model, text, quantizers, context=context).items():
            totals[name] += tally
    return RateDistortion(dict(sorted(totals.items(), key=lambda item: item[1].bits_per_value)))


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    text: Sequence[int],
    quantizers: Sequence[Quantizer | Predictive],
    *,
    context: int | None = None,
) -> dict[str, Tally]:
    """Tally of each quantiser, by name, on one text."""
    cut = len(text) // 2 if context is None else context
    if not 0 < cut < len(text):
        raise PertokenError(
            f"a text of {len(text)} tokens has none on one side of {cut}: give longer texts or "
            "another context"
        )
    ids = torch.tensor([list(text)], device=model.device)
    rows = cached_rows(model, ids[:, :cut])
    outputs, log_probs = _read(model, ids[:, cut:], plain_cache(rows))
    found = {}
    for quantizer in quantizers:
        started = time.perf_counter()
        codes: list[Code] = encode_cache(quantizer, model, ids[:, :cut], plain_cache(rows))
        encoded = time.perf_counter()
        cache = decode_cache(quantizer, model, ids[:, :cut], codes)
        decoded = time.perf_counter()
        tally = Tally(
            bits=sum(code.bits for code in codes),
            values=sum(code.values for code in codes),
            encode_seconds=encoded - started,
            decode_seconds=decoded - encoded,
        )
        for (keys, values), layer in zip(rows, cache.layers, strict=True):
            tally.key = _plus(tally.key, _error(layer.keys, keys))
            tally.value = _plus(tally.value, _error(layer.values, values))
        others, other_log_probs = _read(model, ids[:, cut:], cache)
        tally.attention = [_error(a, b) for a, b in zip(others, outputs, strict=True)]
        tally.kl = float((log_probs.exp() * (log_probs - other_log_probs)).sum())
        tally.agree = float((log_probs.argmax(-1) == other_log_probs.argmax(-1)).sum())
        tally.tokens = float(len(log_probs))
        found[quantizer.name] = tally
    return found


def storage(config: Any, *, bits_per_token: float, bits_per_component: float) -> dict[str, float]:
    """Bits of one token's cache in three ways: as id, as coded id, as quantised vectors.

    bits_per_token: measured cross-entropy of the ids; bits_per_component: of the quantiser.

    >>> from transformers import LlamaConfig
    >>> smollm2 = LlamaConfig(vocab_size=49152, hidden_size=576, num_hidden_layers=30,
    ...                       num_attention_heads=9, num_key_value_heads=3)
    >>> storage(smollm2, bits_per_token=4.3, bits_per_component=3)["quantised vectors"]
    34560
    """
    text = config.get_text_config(decoder=True)
    return {
        "raw ids": math.log2(text.vocab_size),
        "entropy-coded ids": bits_per_token,
        "quantised vectors": components(config) * bits_per_component,
    }


def paper_ratio(config: Any, bits_per_component: float, bits_per_token: float) -> float:
    """Bits of quantised vectors over bits of coded ids, the paper's figure; a prefill not counted.

    >>> from transformers import LlamaConfig
    >>> shape = dict(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64)
    >>> round(paper_ratio(LlamaConfig(**shape, num_key_value_heads=64), 3, 4.3))  # as printed
    914456
    >>> round(paper_ratio(LlamaConfig(**shape, num_key_value_heads=8), 3, 4.3))  # a real 70B
    114307
    """
    return components(config) * bits_per_component / bits_per_token


def components(config: Any) -> int:
    """Numbers that a cache holds for one token: 2 · layers · key-value heads · head dimension."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * int(text.num_hidden_layers) * int(heads) * int(size)


def _read(
    model: PreTrainedModel, ids: torch.Tensor, cache: Any
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Attention outputs by layer and log-probabilities [time, vocab] of ids [1, time]."""
    with _attention_outputs(model) as outputs:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return outputs, logits[0].float().log_softmax(-1)


@contextmanager
def _attention_outputs(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collects the outputs of the attention blocks of one forward, in order of layers."""
    found: list[torch.Tensor] = []
    handles = [
        module.register_forward_hook(lambda _, __, output: found.append(output[0]))
        for module in model.get_decoder().modules()
        if "layer_idx" in vars(module) and type(module).__name__.endswith("Attention")
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _error(found: torch.Tensor, true: torch.Tensor) -> list[float]:
    """[squared error, squared size]."""
    error = (found.double() - true.double()).square().sum()
    return [float(error), float(true.double().square().sum())]


def _relative(sums: list[float]) -> float:
    return math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0


def _plus(a: Any, b: Any) -> Any:
    """Sum of numbers, or of lists place by place; an empty list is zero."""
    if not isinstance(a, list):
        return a + b
    if not a or not b:
        return a or b
    return [_plus(x, y) for x, y in zip(a, b, strict=True)]
