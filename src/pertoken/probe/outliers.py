"""What a model loses without its outlier dimensions: cut them, rescale the rest, or move them.

arXiv 2601.22966: a norm divides by the length of the stream, and a huge dimension is most of that
length. So it makes all the others small, while it hardly appears behind the norm itself, whose
weight for it is tiny. Three experiments on a model as it is, each for the length of a `with`:

    clip_dims           every norm reads the dimensions cut to ±at: the others come out too large
    rescale_dims        the same, and the others are made as small as they were
    absorb_into_norm    the stream holds the dimensions divided by a factor, which every norm
                        multiplies again, as a learned λ1 of PreAffine would: nothing changes

Cut is what the norms read, not the stream (our reading): in a decoder whose norms stand in front of
all its parts nothing else reads it. Dimensions are numbers of the hidden state, from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pertoken.errors import PertokenError
from pertoken.probe._anatomy import Anatomy, anatomy, centred, gain
from pertoken.probe._stream import Progress, changed_input, texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["absorb_into_norm", "clip_dims", "rescale_dims", "rescale_factors"]


@contextmanager
def clip_dims(model: PreTrainedModel, dims: Sequence[int], at: float) -> Iterator[None]:
    """Within the `with` every norm on the stream reads these dimensions cut to -at … at.

    at: infinity changes nothing, 0 takes the dimensions out.
    Raises PertokenError for dimensions the model does not have, a limit below 0, and a model whose
    blocks are not understood.

    >>> from pertoken.testing import tiny_model
    >>> model, ids = tiny_model("llama"), torch.tensor([[5, 6, 7]])
    >>> plain = model(ids).logits
    >>> with clip_dims(model, [3], at=0.0):
    ...     print(torch.equal(model(ids).logits, plain))
    False
    >>> torch.equal(model(ids).logits, plain)
    True
    """
    parts, places = _checked(model, dims, at)
    with ExitStack() as stack:
        for norm in parts.norms:
            stack.enter_context(changed_input(norm, _cutting(places, at)))
        yield


@contextmanager
def rescale_dims(
    model: PreTrainedModel,
    dims: Sequence[int],
    at: float = 0.0,
    *,
    factors: Sequence[float] | None = None,
) -> Iterator[None]:
    """`clip_dims`, with what the norms give for the other dimensions scaled back.

    factors: one constant for each norm, in the order in which a token meets them, such as
        `rescale_factors` finds; by default the right one for every token, sqrt(1 - r²) with r the
        share of what was cut, so that the other dimensions come out as if nothing had been cut. So
        what is lost then is what the outliers contribute by themselves.
    Raises PertokenError as `clip_dims` does, for a number of factors that is not the norms', and
    for norms that are neither RMSNorm nor LayerNorm.

    >>> from pertoken.testing import tiny_model
    >>> model, ids = tiny_model("llama"), torch.tensor([[5, 6, 7]])
    >>> plain = model(ids).logits
    >>> with rescale_dims(model, [3], at=float("inf")):
    ...     print(torch.equal(model(ids).logits, plain))
    True
    """
    parts, places = _checked(model, dims, at)
    gains = _gains(model, parts) if factors is None else []
    if factors is not None and len(factors) != len(parts.norms):
        raise PertokenError(
            f"factors are one for each of the {len(parts.norms)} norms on the stream, got "
            f"{len(factors)}"
        )
    with ExitStack() as stack:
        for place, norm in enumerate(parts.norms):
            if factors is None:
                stack.enter_context(_changed_output(norm, _exact(gains[place], places, at)))
                continue
            stack.enter_context(changed_input(norm, _cutting(places, at)))
            stack.enter_context(_changed_output(norm, _constant(float(factors[place]))))
        yield


@torch.no_grad()
def rescale_factors(
    model: PreTrainedModel,
    dims: Sequence[int],
    rows: Sequence[Sequence[int] | torch.Tensor],
    at: float = 0.0,
    *,
    progress: Progress | None = None,
) -> list[float]:
    """For each norm the constant that `rescale_dims` needs, from texts.

    It is the mean, over all tokens but the first of each text, of the length of what the norm would
    read when cut over the length of what it reads. First tokens are left out, since massive
    activations make theirs another number.
    rows: ids [time] of texts, without pads. progress: called with (what, texts done, in all).
    Raises PertokenError as `clip_dims` does, where no text has a second token, and for a text that
    the model cannot read.

    >>> from pertoken.testing import tiny_model
    >>> factors = rescale_factors(tiny_model("llama"), [], [[5, 6, 7]])
    >>> [round(factor, 6) for factor in factors]
    [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    parts, places = _checked(model, dims, at)
    _gains(model, parts)
    texts = texts_of(model, rows)
    tell = progress or (lambda what, done, total: None)
    sums = [0.0 for _ in parts.norms]
    count = 0

    def note(place: int, norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        def look(hidden: torch.Tensor) -> torch.Tensor:
            whole = hidden.flatten(0, -2)[1:].double()  # OPT gives some norms [time, hidden]
            shares = centred(norm, _cut(whole, places, at)).norm(dim=-1) / centred(
                norm, whole
            ).norm(dim=-1)
            sums[place] += float(shares.sum())
            return hidden

        return look

    with ExitStack() as stack:
        for place, norm in enumerate(parts.norms):
            stack.enter_context(changed_input(norm, note(place, norm)))
        for done, ids in enumerate(texts):
            tell("factors of the norms", done, len(texts))
            model.get_decoder()(input_ids=ids, use_cache=False)
            count += ids.shape[1] - 1
    if not count:
        raise PertokenError("factors need texts of two tokens or more")
    return [total / count for total in sums]


@contextmanager
def absorb_into_norm(
    model: PreTrainedModel, dims: Sequence[int], by: float = 8.0
) -> Iterator[None]:
    """Within the `with` the stream holds these dimensions divided by `by`, and the norms undo it.

    This is where a trained PreAffine ends up (λ1 near 7 in the sink dimension): all that is written
    to the stream is divided, every norm multiplies what it reads, and the model computes what it
    did. With a power of 2 that is exact to the last bit.
    by: above 0. Raises PertokenError as `clip_dims` does.

    >>> from pertoken.testing import tiny_model
    >>> model, ids = tiny_model("llama"), torch.tensor([[5, 6, 7]])
    >>> plain = model(ids).logits
    >>> with absorb_into_norm(model, [3]):
    ...     print(torch.equal(model(ids).logits, plain))
    True
    """
    if not (by > 0 and math.isfinite(by)):
        raise PertokenError(f"by must be a number above 0, got {by}")
    parts, places = _checked(model, dims, 0.0)

    def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
        found = tensor.clone()
        found[..., places] *= factor
        return found

    with ExitStack() as stack:
        stack.enter_context(changed_input(parts.blocks[0], lambda h: scaled(h, 1 / by)))
        for writers in parts.writers:
            for writer in writers:
                stack.enter_context(_changed_output(writer, lambda _, __, out: scaled(out, 1 / by)))
        for norm in parts.norms:
            stack.enter_context(changed_input(norm, lambda h: scaled(h, by)))
        yield


def _checked(model: PreTrainedModel, dims: Sequence[int], at: float) -> tuple[Anatomy, list[int]]:
    """The parts of the model and the dimensions as a list."""
    if not at >= 0:
        raise PertokenError(f"at must be 0 or more, got {at}")
    parts = anatomy(model)
    places = [int(dim) for dim in dims]
    hidden = model.config.get_text_config(decoder=True).hidden_size
    for place in places:
        if not 0 <= place < hidden:
            raise PertokenError(f"dims go from 0 to {hidden - 1} in this model, got {place}")
    return parts, places


def _gains(model: PreTrainedModel, parts: Anatomy) -> list[torch.Tensor]:
    """λ of every norm; PertokenError where one has none."""
    found = []
    for name, norm in zip(parts.names, parts.norms, strict=True):
        weight = gain(norm)
        if weight is None:
            raise PertokenError(
                f"{type(model).__name__}: {name} is a {type(norm).__name__}, neither RMSNorm nor "
                "LayerNorm: how it rescales is not known"
            )
        found.append(weight)
    return found


def _cut(hidden: torch.Tensor, places: list[int], at: float) -> torch.Tensor:
    found = hidden.clone()
    found[..., places] = found[..., places].clamp(-at, at)
    return found


def _cutting(places: list[int], at: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda hidden: _cut(hidden, places, at)


Change = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]
"""(module, what it read, what it gave) -> what it is to give."""


def _exact(weight: torch.Tensor, places: list[int], at: float) -> Change:
    """The norm's output for the whole vector, less what it held of the part that is cut.

    A norm is linear but for its divisor, and that stays.
    """

    def change(norm: nn.Module, hidden: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        taken = hidden[..., places] - hidden[..., places].clamp(-at, at)
        if not bool(taken.any()):
            return output
        wide = torch.promote_types(hidden.dtype, torch.float32)
        read = centred(norm, hidden.to(wide))
        length = (read.square().mean(-1, keepdim=True) + _small(norm)).sqrt()
        found = output.clone()
        less = weight[places].to(wide) * taken.to(wide) / length
        found[..., places] -= less.to(output.dtype)
        return found

    return change


def _constant(factor: float) -> Change:
    def change(norm: nn.Module, _: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        # LayerNorm's bias is no part of what was divided.
        bias = getattr(norm, "bias", None)
        return output * factor if bias is None else (output - bias) * factor + bias

    return change


def _small(norm: nn.Module) -> float:
    """The number that a norm adds under its root."""
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)))


@contextmanager
def _changed_output(part: nn.Module, change: Change) -> Iterator[None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = args[0] if args else kwargs.get("hidden_states")
        if isinstance(output, tuple):
            return (change(module, given, output[0]), *output[1:])
        return change(module, given, output)

    handle = part.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
