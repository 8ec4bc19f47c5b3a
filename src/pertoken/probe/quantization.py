"""W4A4: what 4 bits for weights and activations would do to a model, computed in its own dtype.

Every linear layer of the blocks multiplies rounded weights and rounded inputs; norms, attention
scores, embeddings and the output layer stay as they are.

    nvfp4   numbers of 4 bits (E2M1: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives). Each 16
            neighbours share a scale of 8 bits (E4M3), and these share one number in float32: one
            for a whole weight, one for every token's vector, which is known only when it comes.
    int4    whole numbers from -7 to 7 with one scale for each output channel of a weight and for
            each token.

SmoothQuant (arXiv 2211.10438, eq. 4, alpha 1/2) comes first, as in arXiv 2601.22966: a channel of
what linear layers read behind a norm is divided by s_j = sqrt(max|X_j| / max|W_j|) and their
weights multiplied by it, so that outliers of activations are shared with the weights. All layers
behind one norm share s, so that it could be folded into the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pertoken._blocks import replaced
from pertoken._replies import drawing
from pertoken.errors import PertokenError, nearest
from pertoken.probe._anatomy import anatomy
from pertoken.probe._stream import texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["fake_quant", "quantize_int4", "quantize_nvfp4"]

BLOCK = 16
_E2M1_MOST, _E4M3_MOST = 6.0, 448.0
_E4M3_LEAST = 2.0**-6  # the least normal one: smaller scales would lose their own bits
_INT4_MOST = 7.0
_OWN_ROWS, _OWN_TOKENS = 16, 32  # of the texts a model writes to be calibrated on


def quantize_nvfp4(tensor: torch.Tensor, *, per_token: bool = False) -> torch.Tensor:
    """The nearest numbers that NVFP4 has, in the tensor's shape and dtype.

    tensor: [..., channels]; blocks of 16 along the last axis, the last one may be shorter.
    per_token: one float32 scale for each row instead of one for all.
    Ties go to the even mantissa. A block's scale is 2^-6 at least, so that tiny blocks do not lose
    it (our reading; the paper names the format alone).

    >>> quantize_nvfp4(torch.tensor([6.0, -5.2, 2.4, 0.7, 0.1])).tolist()
    [6.0, -6.0, 2.0, 0.5, 0.0]
    """
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    channels = wide.shape[-1]
    blocks = nn.functional.pad(wide, (0, -channels % BLOCK)).unflatten(-1, (-1, BLOCK))
    peaks = blocks.abs().amax(-1, keepdim=True)
    whole = peaks.amax(-2, keepdim=True) if per_token else peaks.amax()
    # Scales are what a chip would keep, so they are rounded; in float64 all the rest is exact.
    whole = (whole / (_E2M1_MOST * _E4M3_MOST)).float().to(wide.dtype)
    whole = torch.where(whole > 0, whole, 1.0)
    scale = (peaks / (_E2M1_MOST * whole)).clamp(_E4M3_LEAST, _E4M3_MOST)
    scale = scale.to(torch.float8_e4m3fn).to(wide.dtype) * whole
    found = _e2m1(blocks / scale) * scale
    return found.flatten(-2)[..., :channels].to(tensor.dtype)


def _e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest number of E2M1, ties to the even mantissa, beyond 6 to 6."""
    size = x.abs().clamp(max=_E2M1_MOST)
    # Steps of 1/2 up to 2, of 1 up to 4, of 2 up to 6; torch rounds halves to even.
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    return torch.sign(x) * torch.round(size / step) * step


def quantize_int4(tensor: torch.Tensor) -> torch.Tensor:
    """The nearest of 15 evenly spaced numbers for each row [..., channels], 0 among them.

    A row is an output channel of a weight [out, in], or a token.

    >>> quantize_int4(torch.tensor([[7.0, 2.4, -0.6], [0.0, 0.0, 0.0]])).tolist()
    [[7.0, 2.0, -1.0], [0.0, 0.0, 0.0]]
    """
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    scale = (wide.abs().amax(-1, keepdim=True) / _INT4_MOST).float().to(wide.dtype)
    scale = torch.where(scale > 0, scale, 1.0)
    levels = (wide / scale).round().clamp(-_INT4_MOST, _INT4_MOST)
    return (levels * scale).to(tensor.dtype)


Rounding = Callable[[torch.Tensor], torch.Tensor]
_FORMATS: dict[str, tuple[Rounding, Rounding]] = {  # of weights [out, in], of activations
    "nvfp4": (quantize_nvfp4, lambda x: quantize_nvfp4(x, per_token=True)),
    "int4": (quantize_int4, quantize_int4),
}


@contextmanager
def fake_quant(
    model: PreTrainedModel,
    format: str = "nvfp4",
    *,
    smooth: bool = True,
    calibration: Sequence[Sequence[int] | torch.Tensor] | None = None,
) -> Iterator[None]:
    """Within the `with` weights and activations of the blocks' linear layers have 4 bits.

    format: "nvfp4" or "int4". smooth: SmoothQuant first. calibration: ids [time] of texts to find
    the activations' sizes on; texts of the model's own, 16 of 32 tokens, where not given. The paper
    takes 4,096 sequences.
    Not for training: rounding has no gradient. For as long as it lasts the rounded weights are kept
    beside the model's own.
    Raises PertokenError for an unknown format, a calibration that is empty or that the model cannot
    read, a model whose blocks are not understood or that has no linear layer in them.

    >>> from pertoken.testing import tiny_model
    >>> model, ids = tiny_model("llama"), torch.tensor([[5, 6, 7]])
    >>> plain = model(ids).logits
    >>> with fake_quant(model, "nvfp4", smooth=False):
    ...     print(bool((model(ids).logits - plain).abs().max() > 0.01))
    True
    """
    if format not in _FORMATS:
        raise PertokenError(
            f"unknown format {format!r}{nearest(format, _FORMATS)}: {', '.join(_FORMATS)}"
        )
    linears = _linears(model)
    scales = _smoothing(model, linears, calibration) if smooth else {}
    round_weight, round_input = _FORMATS[format]

    def rounded(layer: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        weight = _weight(layer)
        scale = scales.get(id(layer))
        weight = round_weight(weight if scale is None else weight * scale)
        bias: Any = layer.bias

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden if scale is None else hidden / scale
            return nn.functional.linear(round_input(hidden), weight, bias)

        return forward

    with replaced(linears, rounded):
        yield


def _weight(layer: nn.Module) -> torch.Tensor:
    """[out, in]; a Conv1D of transformers is stored the other way."""
    weight: Any = layer.weight
    return weight.detach() if isinstance(layer, nn.Linear) else weight.detach().T


def _linears(model: PreTrainedModel) -> list[nn.Module]:
    """Linear layers of the blocks, without those inside of norms."""
    from transformers.pytorch_utils import Conv1D

    parts = anatomy(model)
    inside = {id(each) for norm in parts.norms for each in norm.modules()}
    found = [
        each
        for block in parts.blocks
        for each in block.modules()
        if isinstance(each, nn.Linear | Conv1D) and id(each) not in inside
    ]
    if not found:
        raise PertokenError(f"{type(model).__name__} has no linear layer in its blocks")
    return found


@torch.no_grad()
def _smoothing(
    model: PreTrainedModel,
    linears: Sequence[nn.Module],
    calibration: Sequence[Sequence[int] | torch.Tensor] | None,
) -> dict[int, torch.Tensor]:
    """s [channels] of each linear layer that reads a norm, by its id."""
    rows = _own_texts(model) if calibration is None else calibration
    if not len(rows) or not all(len(row) for row in rows):
        raise PertokenError("calibration is empty: give ids of texts, or smooth=False")
    texts = texts_of(model, rows)
    norms: dict[int, int] = {}  # address of an output -> the norm that gave it
    alive: list[torch.Tensor] = []
    peaks: dict[int, torch.Tensor] = {}  # norm -> max|X_j|
    readers: dict[int, list[nn.Module]] = {}  # norm -> the layers behind it

    def gave(norm: nn.Module, _: Any, output: torch.Tensor) -> None:
        norms[output.data_ptr()] = id(norm)
        alive.append(output)  # so that no later tensor takes its address

    def reads(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        norm = norms.get(args[0].data_ptr())
        if norm is None:
            return
        peak = args[0].abs().flatten(0, -2).amax(0)
        peaks[norm] = torch.maximum(peaks[norm], peak) if norm in peaks else peak
        behind = readers.setdefault(norm, [])
        if not any(each is layer for each in behind):
            behind.append(layer)

    handles = [norm.register_forward_hook(gave) for norm in anatomy(model).norms]
    handles += [layer.register_forward_pre_hook(reads) for layer in linears]
    try:
        for ids in texts:
            model.get_decoder()(input_ids=ids, use_cache=False)
            norms.clear()
            alive.clear()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[int, torch.Tensor] = {}
    for norm, layers in readers.items():
        weights = torch.stack([_weight(layer).abs().amax(0) for layer in layers]).amax(0)
        scale = (peaks[norm] / weights).sqrt()
        # A channel that is never used, or that no weight reads, stays as it is.
        scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0).to(weights.dtype)
        found |= {id(layer): scale for layer in layers}
    return found


def _own_texts(model: PreTrainedModel) -> list[torch.Tensor]:
    """Rows [tokens] that the model writes behind first tokens of all kinds; always the same."""
    vocab = model.get_input_embeddings().weight.shape[0]
    with drawing(model, 0):  # to measure a model must not change what is drawn next
        first = torch.randint(1, vocab, (_OWN_ROWS, 1), device=model.device)
        written = model.generate(
            first,
            attention_mask=torch.ones_like(first),
            max_new_tokens=_OWN_TOKENS - 1,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            pad_token_id=0,
        )
    return list(written)
