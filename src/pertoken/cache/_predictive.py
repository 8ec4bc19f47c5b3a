"""A cache coded as a sequence: each vector as its difference from a prediction.

The middle points between storing ids and storing vectors (arXiv 2604.15356, layer two; the paper
has no experiment, so the predictor is ours): the keys before the rotary embedding and the values of
a layer are predicted from the same layer's previous vector, as the decoder has it, and from the
embedding of the token,

    x̂_i = x̃_{i-1} A + e(token_i) B + c,    x̃_i = x̂_i + s · step · round((x_i - x̂_i) / (s · step))

with s the spread of each channel's residual. The rounded residuals go through a range coder under a
Laplace law whose scale follows each channel. A, B, c, s are fitted by ridge regression on other
texts and ship with the model, as TurboQuant's rotation does; `Predictor.nbytes` says their size.

The decoder repeats the encoder's own arithmetic, so what it gives back is bit for bit what the
encoder predicted from, on the same machine with the same thread count and batch. Elsewhere the last
bits of predictions may differ; the laws of the coder are functions of the integers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pertoken._extras import need
from pertoken._shown import Shown
from pertoken.cache._code import Code, Kind, check, half
from pertoken.cache._rotation import Rotation
from pertoken.cache._rows import Rows, plain_rows
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LIMIT = 16383  # greatest residual in steps; the closed loop catches up behind a larger one
_MEMORY = 5  # the scale of a channel is a mean that forgets by 1/32 a token
_POINT = 8  # binary places of that mean


@dataclass(frozen=True)
class Predictor:
    """Weights of the prediction of each stream: keys of layer 0, values of layer 0, keys of 1, …

    previous: [streams, width, width]; tokens: [streams, embedding, width]; constant, scale:
    [streams, width], with width = heads · dim. All float32.
    """

    previous: torch.Tensor
    tokens: torch.Tensor
    constant: torch.Tensor
    scale: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, which every decoder of this model needs once."""
        tensors = (self.previous, self.tokens, self.constant, self.scale)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Predictive(Shown):
    """Closed-loop prediction, uniform quantiser, adaptive range coder (extra `archive`).

    step: width of the quantiser in spreads of the residual; larger is coarser.
    predictor: from `fit_predictor`. Without one the prediction is zero and the spreads are those
        of the tensor itself, stored with it: a plain quantiser with an entropy coder.

    >>> x = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    >>> plain = Predictive(step=0.5)
    >>> code = plain.encode(x)
    >>> 2 < code.bits / code.values < 5
    True
    >>> bool((plain.decode(code) - x).abs().max() < 0.4)  # half a step of a spread of about 1
    True
    """

    def __init__(self, *, step: float = 0.5, predictor: Predictor | None = None) -> None:
        if not step > 0:
            raise PertokenError(f"step must be above 0, got {step}")
        self.step = step
        self.predictor = predictor

    @property
    def name(self) -> str:
        """Name in tables."""
        return f"predictive, step {self.step:.3g}" + ("" if self.predictor else ", no predictor")

    def encode(self, tensor: torch.Tensor, kind: Kind = "keys") -> Code:
        """Code of one tensor [batch, heads, time, dim] without a predictor.

        Raises PertokenError where there is one: it is for all layers, see `encode_cache`.
        """
        if self.predictor is not None:
            raise PertokenError(
                "this Predictive was fitted to all layers of a model: use encode_cache(quantizer, "
                "model, input_ids, cache), or Predictive(step=step) without a predictor"
            )
        tensor = check(tensor)
        parts = self._encode(_merge(tensor)[None], None)
        return Code(parts, tuple(tensor.shape), tensor.dtype, kind)

    def decode(self, code: Code) -> torch.Tensor:
        """The tensor a code of `encode` stands for, in the dtype it had."""
        batch, heads, time, dim = code.shape
        found = self._decode(code.parts, (1, batch, time, heads * dim), None)
        return _split(found[0], heads).to(code.dtype)

    def encode_cache(self, model: PreTrainedModel, input_ids: torch.Tensor, rows: Rows) -> Code:
        """Code of all layers at once; input_ids: [batch, time]; rows: (keys, values) per layer."""
        streams = _streams(_rotation(model), rows)
        self._fits(model, streams)
        first = rows[0][0]
        parts = self._encode(streams, _embed(model, input_ids))
        return Code(parts, (len(streams), *first.shape), first.dtype)

    def decode_cache(
        self, model: PreTrainedModel, input_ids: torch.Tensor, code: Code
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(keys, values) of each layer, as `encode_cache` was given them up to the step."""
        streams, batch, heads, time, dim = code.shape
        shape = (streams, batch, time, heads * dim)
        found = self._decode(code.parts, shape, _embed(model, input_ids))
        rotation = _rotation(model)
        rows = []
        for layer in range(streams // 2):
            keys = turned_keys(rotation, _split(found[2 * layer], heads), layer)
            values = _split(found[2 * layer + 1], heads)
            rows.append((keys.to(code.dtype), values.to(code.dtype)))
        return rows

    def _fits(self, model: PreTrainedModel, streams: torch.Tensor) -> None:
        if self.predictor is not None:
            expected = (self.predictor.constant.shape[0], self.predictor.constant.shape[1])
            if expected != (streams.shape[0], streams.shape[-1]):
                raise PertokenError(
                    f"the predictor is for {expected[0]} streams of {expected[1]}, the cache of "
                    f"{type(model).__name__} has {streams.shape[0]} of {streams.shape[-1]}: fit "
                    "one with fit_predictor(model, texts)"
                )

    def _encode(
        self, streams: torch.Tensor, tokens: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Stored parts of [streams, batch, time, width] with token embeddings [batch, time, e]."""
        if not bool(torch.isfinite(streams).all()):
            raise PertokenError("keys or values are infinite or NaN: this cache cannot be coded")
        if not streams.numel():
            raise PertokenError("there are no rows to code: run the model on the tokens first")
        parts: dict[str, torch.Tensor] = {}
        if self.predictor is None:
            parts["scale"] = half(streams.std((1, 2), correction=0), "spreads of channels")
        width = self._width(parts)
        symbols: list[torch.Tensor] = []

        def quantise(time: int, predicted: torch.Tensor) -> torch.Tensor:
            found = ((streams[:, :, time] - predicted) / width).round().clamp(-_LIMIT, _LIMIT)
            symbols.append(found)
            return found

        self._walk(tuple(streams.shape), tokens, width, quantise)
        coded = torch.stack(symbols).to(torch.int32).flatten(1).numpy()
        return {**parts, "stream": torch.from_numpy(_range_code(coded, self.step))}

    def _decode(
        self, parts: Any, shape: tuple[int, ...], tokens: torch.Tensor | None
    ) -> torch.Tensor:
        """[streams, batch, time, width] from the stored parts."""
        width = self._width(parts)
        reader = _RangeReader(parts["stream"].numpy(), shape[0] * shape[1] * shape[3], self.step)

        def read(time: int, predicted: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(reader.next()).view(predicted.shape).float()

        return self._walk(shape, tokens, width, read)

    def _width(self, parts: Any) -> torch.Tensor:
        """Width of the quantiser of each channel, [streams, 1, width]."""
        scale = parts["scale"].float() if self.predictor is None else self.predictor.scale
        return (torch.where(scale > 0, scale, 1.0) * self.step)[:, None]

    def _walk(
        self,
        shape: tuple[int, ...],
        tokens: torch.Tensor | None,
        width: torch.Tensor,
        symbols: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The closed loop, the same for both sides; `symbols(time, predicted)` gives residuals.

        All streams go through time together; the part of the prediction that hangs on tokens alone
        is made before.
        """
        streams, batch, time, size = shape
        decoded = torch.zeros(shape)
        known = self.predictor
        if known is not None and tokens is not None:
            for stream in range(streams):
                decoded[stream] = tokens @ known.tokens[stream] + known.constant[stream]
        row = torch.zeros(streams, batch, size)
        for now in range(time):
            predicted = decoded[:, :, now]
            if known is not None:
                predicted = torch.baddbmm(predicted, row, known.previous)
            row = predicted + symbols(now, predicted) * width
            decoded[:, :, now] = row
        return decoded


def fit_predictor(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], *, ridge: float = 1e-3
) -> Predictor:
    """Ridge regression of every stream on its previous vector and the token's embedding.

    texts: token ids of texts other than those to be coded, with more tokens than a channel has
    weights (width + embedding + 1; some times as many are better). ridge: penalty of a weight, as a
    share of its input's own power. Fitted on the true previous vectors (our reading).
    Raises PertokenError for too few tokens.
    """
    if not texts:
        raise PertokenError("fit_predictor needs texts: a list of lists of token ids")
    # Moments of (token, 1), which all streams share, and of (before, now) with everything.
    shared = own = cross = torch.zeros(())
    count = 0
    for text in texts:
        ids = torch.tensor([list(text)], device=model.device)
        now = _streams(_rotation(model), cached_rows(model, ids))[:, 0]
        before = torch.cat([torch.zeros_like(now[:, :1]), now[:, :-1]], 1)
        both = torch.cat([before, now], -1)
        known = torch.nn.functional.pad(_embed(model, ids)[0], (0, 1), value=1.0)
        shared = shared + (known.T @ known).double()
        own = own + (both.transpose(1, 2) @ both).double()
        cross = cross + (both.transpose(1, 2) @ known).double()
        count += len(known)
    size = own.shape[-1] // 2
    free = count - size - len(shared)
    if free < 1:
        raise PertokenError(
            f"the texts hold {count} tokens, and a channel has {size + len(shared)} weights to "
            "fit: give more or longer texts"
        )
    weights, scales = [], []
    for moments, mixed in zip(own, cross, strict=True):
        inputs = torch.cat(
            [
                torch.cat([moments[:size, :size], mixed[:size]], 1),
                torch.cat([mixed[:size].T, shared], 1),
            ]
        )
        targets = torch.cat([moments[:size, size:], mixed[size:].T])
        penalty = ridge * inputs.diagonal() + 1e-9 * inputs.diagonal().mean()
        penalty[-1] = 0.0  # the constant is free
        weight = torch.linalg.solve(inputs + penalty.diag(), targets)
        left = moments[size:, size:].diagonal() - 2 * (weight * targets).sum(0)
        left = left + (weight * (inputs @ weight)).sum(0)
        weights.append(weight.float())
        scales.append((left.clamp(min=0) / free).sqrt().float())
    weight = torch.stack(weights)
    return Predictor(
        weight[:, :size].contiguous(),
        weight[:, size:-1].contiguous(),
        weight[:, -1].contiguous(),
        torch.stack(scales),
    )


@torch.no_grad()
def cached_rows(
    model: PreTrainedModel, input_ids: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(keys, values) of each layer behind a plain prefill of ids [batch, time]."""
    from transformers import DynamicCache

    cache = DynamicCache()
    model(input_ids=input_ids, past_key_values=cache, use_cache=True)
    return plain_rows(cache, input_ids.shape[1])


@torch.no_grad()
def _embed(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Embeddings [batch, time, hidden] at unit root mean square, as a first norm leaves them."""
    found = model.get_input_embeddings()(input_ids).float()
    power = found.square().mean(-1, keepdim=True)
    return (found * torch.rsqrt(power + torch.finfo(torch.float32).tiny)).cpu()


def _rotation(model: PreTrainedModel) -> Rotation:
    return Rotation(model, "Predictive")


def turned_keys(
    rotation: Rotation, keys: torch.Tensor, layer: int, *, back: bool = False
) -> torch.Tensor:
    """Keys [batch, heads, time, dim] turned from place 0 to their places 0, 1, …, or back, float32.

    The rotation is linear and known from the position: turned back, keys are as the projection (and
    the norm behind it) made them. Keys that a model does not rotate stay as they are.
    """
    keys = keys.float()
    if not rotation.turns[layer]:
        return keys
    places = torch.arange(keys.shape[2], device=keys.device)[None]
    return rotation.turned(layer, keys, rotation.angles(-places if back else places, keys))


def _streams(rotation: Rotation, rows: Rows) -> torch.Tensor:
    """[2 · layers, batch, time, heads · dim] in float32, keys without their rotation."""
    shapes = {tuple(tensor.shape) for pair in rows for tensor in pair}
    if len(shapes) > 1:
        raise PertokenError(
            f"Predictive needs layers of one shape, this cache has {sorted(shapes)}: use KIVI or "
            "TurboQuant"
        )
    found = []
    for layer, (keys, values) in enumerate(rows):
        found += [_merge(turned_keys(rotation, keys, layer, back=True)).cpu(), _merge(values).cpu()]
    return torch.stack(found)


def _merge(tensor: torch.Tensor) -> torch.Tensor:
    """[batch, heads, time, dim] as [batch, time, heads · dim], float32."""
    return tensor.float().transpose(1, 2).flatten(2)


def _split(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `_merge`."""
    return tensor.unflatten(2, (heads, -1)).transpose(1, 2)


class _Scales:
    """Scale of the Laplace law of each channel, from its past residuals alone.

    Kept in integers, so that no rounding can part a decoder from its encoder.
    """

    def __init__(self, channels: int, step: float) -> None:
        start = round(2 ** (_POINT + _MEMORY) * min(max(0.75 / step, 0.05), _LIMIT))
        self._sums = np.full(channels, start, dtype=np.int64)

    def now(self) -> Any:
        """float64 [channels]: the law whose rounded values have the mean size seen so far."""
        mean = np.maximum(self._sums, 64) / 2 ** (_POINT + _MEMORY)
        return 0.5 / np.arcsinh(0.5 / mean)

    def add(self, symbols: Any) -> None:
        """Take in the residuals of one token, int32 [channels]."""
        sizes = np.abs(symbols).astype(np.int64)
        self._sums += (sizes << _POINT) - (self._sums >> _MEMORY)


def _range_code(symbols: Any, step: float) -> Any:
    """int32 words of residuals [time, channels]."""
    coding = need("constriction", "archive")
    scales = _Scales(symbols.shape[1], step)
    encoder = coding.stream.queue.RangeEncoder()
    family = coding.stream.model.QuantizedLaplace(-_LIMIT, _LIMIT)
    middle = np.zeros(symbols.shape[1])
    for row in symbols:
        encoder.encode(row, family, middle, scales.now())
        scales.add(row)
    return encoder.get_compressed().view(np.int32)


class _RangeReader:
    """Gives the residuals back, a token at a time."""

    def __init__(self, words: Any, channels: int, step: float) -> None:
        coding = need("constriction", "archive")
        self._scales = _Scales(channels, step)
        self._decoder = coding.stream.queue.RangeDecoder(words.view(np.uint32))
        self._family = coding.stream.model.QuantizedLaplace(-_LIMIT, _LIMIT)
        self._middle = np.zeros(channels)

    def next(self) -> Any:
        """int32 [channels]."""
        row = self._decoder.decode(self._family, self._middle, self._scales.now())
        self._scales.add(row)
        return row
