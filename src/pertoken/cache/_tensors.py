"""A cache's keys and values as bytes, chunk of tokens by chunk, and as a cache again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pertoken.cache._format import LayerShape
from pertoken.cache._int8 import dequantize_int8, quantize_int8
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["Rows", "empty_cache", "layer_shapes", "pack_rows"]


def empty_cache(model: PreTrainedModel) -> Cache:
    """The cache that `generate` makes for a model; PertokenError where it isn't keys and values."""
    from transformers import DynamicCache

    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise PertokenError(f"{name} is an encoder-decoder model; archives hold decoder-only ones")
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    if getattr(model, "_is_stateful", False) or not all(map(_known, cache.layers)):
        raise PertokenError(
            f"{name} keeps a state beside keys and values, which an archive can't hold"
        )
    return cache


def layer_shapes(cache: Cache, model: PreTrainedModel, tokens: int) -> tuple[LayerShape, ...]:
    """What each layer of a cache of `tokens` or one token less holds.

    Raises PertokenError, which names it, for a cache that does not keep all that plain decoding
    would: one of a fixed size, quantised, evicting, of several rows, or of another text.
    """
    from transformers import DynamicCache

    layers = list(getattr(cache, "layers", []))
    unknown = next((f" with {type(each).__name__}" for each in layers if not _known(each)), "")
    if type(cache) is not DynamicCache or unknown:  # a subclass may keep less than its layers show
        raise PertokenError(
            f"a {type(cache).__name__}{unknown} can't be archived: give a DynamicCache, or no "
            "cache to have the keys and values computed"
        )
    if len(layers) != len(empty_cache(model).layers):
        raise PertokenError(
            f"the cache has {len(layers)} layers, {type(model).__name__} fills "
            f"{len(empty_cache(model).layers)}: it belongs to another model"
        )
    lengths = {int(layer.get_seq_length()) for layer in layers}
    rows = lengths.pop()
    if lengths or rows not in (tokens, tokens - 1):
        raise PertokenError(
            f"the cache holds {rows} tokens and the conversation has {tokens}: give the ids that "
            "the cache has seen, and at most one more"
        )
    if rows == 0:
        return ()
    batch = layers[0].keys.shape[0]
    if batch != 1:
        raise PertokenError(f"an archive holds one conversation, the cache has {batch} rows")
    dtypes = sorted({str(t.dtype)[6:] for each in layers for t in (each.keys, each.values)})
    if len(dtypes) > 1:
        raise PertokenError(f"the cache mixes dtypes: {', '.join(dtypes)}")
    return tuple(_shape(layer, rows) for layer in layers)


def pack_rows(
    cache: Cache, layers: tuple[LayerShape, ...], span: tuple[int, int], int8: bool
) -> bytes:
    """Payload of the keys and values of the tokens [start, end)."""
    parts: list[bytes] = []
    for layer, shape in zip(cache.layers, layers, strict=True):
        first = max(span[0], shape.start)
        count = span[1] - first
        if count <= 0:
            continue
        for name, state, dim in (("keys", layer.keys, -2), ("values", layer.values, -1)):
            skipped = state.shape[-2] - (_end(layer) - first)  # rows before `first`
            rows = state[0, :, skipped : skipped + count]
            if not int8:
                parts.append(_bytes(rows))
                continue
            codes, scale = quantize_int8(rows, dim)
            if not bool(scale.isfinite().all()):
                raise PertokenError(
                    f'{name} of the cache are not finite and have no int8 code; use level="raw"'
                )
            parts += (_bytes(scale), _bytes(codes))
    return b"".join(parts)


class Rows:
    """Keys and values read back, filled from the first token on."""

    def __init__(self, layers: tuple[LayerShape, ...], rows: int, dtype: str) -> None:
        self.shapes = layers
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.states = [
            [
                torch.empty(shape.heads, rows - shape.start, dim, dtype=self.dtype)
                for dim in (shape.key_dim, shape.value_dim)
            ]
            for shape in layers
        ]

    def put(self, span: tuple[int, int], payload: bytes, int8: bool) -> bool:
        """Fill in the tokens [start, end); False where the payload has another size."""
        buffer, at = bytearray(payload), 0
        wanted: list[tuple[torch.Tensor, torch.dtype, tuple[int, ...]]] = []
        for shape, states in zip(self.shapes, self.states, strict=True):
            first = max(span[0], shape.start)
            if span[1] <= first:
                continue
            for index, state in enumerate(states):
                rows = state[:, first - shape.start : span[1] - shape.start]
                if int8:
                    heads, count, dim = rows.shape
                    scale = (heads, 1, dim) if index == 0 else (heads, count, 1)
                    wanted += [(rows, torch.float32, scale), (rows, torch.int8, (*rows.shape,))]
                else:
                    wanted.append((rows, self.dtype, (*rows.shape,)))
        if len(buffer) != sum(torch.Size(s).numel() * d.itemsize for _, d, s in wanted):
            return False
        scales = torch.empty(0)
        for rows, dtype, size in wanted:
            end = at + torch.Size(size).numel() * dtype.itemsize
            # A copy, because scales behind an odd number of codes are not aligned.
            read = torch.frombuffer(buffer[at:end], dtype=dtype).view(size)
            at = end
            if int8 and dtype == torch.float32:
                scales = read
            else:
                rows.copy_(dequantize_int8(read, scales) if int8 else read)
        return True

    def usable(self, rows: int, whole: int) -> int:
        """How many first tokens can be taken where `rows` of `whole` were read.

        A sliding layer holds only its last rows, which are of no use to a shorter text.
        """
        return rows if rows == whole or all(shape.start == 0 for shape in self.shapes) else 0

    def fill(self, cache: Cache, rows: int, device: torch.device) -> None:
        """Put the first `rows` tokens into an empty cache of the model."""
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        for index, (shape, states) in enumerate(zip(self.shapes, self.states, strict=True)):
            layer: Any = cache.layers[index]
            if shape.window != int(getattr(layer, "sliding_window", 0) or 0):
                # The cache was not made from the model's configuration, e.g. DynamicCache().
                layer = DynamicSlidingWindowLayer(shape.window) if shape.window else DynamicLayer()
                cache.layers[index] = layer
            if rows == 0:
                continue
            keys, values = (s[None, :, : rows - shape.start].to(device) for s in states)
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            if shape.window:
                layer.cumulative_length = rows


def _known(layer: Any) -> bool:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def _end(layer: Any) -> int:
    return int(layer.get_seq_length())


def _shape(layer: Any, rows: int) -> LayerShape:
    window = int(getattr(layer, "sliding_window", 0) or 0)
    held = layer.keys.shape[-2]
    if window and rows >= window:
        held = min(held, window - 1)  # more while a past is recorded
    _, heads, _, key_dim = layer.keys.shape
    return LayerShape(heads, key_dim, layer.values.shape[-1], rows - held, window)


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
