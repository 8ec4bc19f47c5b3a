"""Which modules of a decoder read its residual stream, and which write to it, found by watching.

A forward of a few tokens is watched: what each part of each block was given, and what it gave. A
part whose input is no other part's output reads the stream; a part whose output no other part reads
writes to it. So nothing here knows the names of an architecture. That the parts are understood is
checked by adding up: a block's output must be its input and what its writers gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pertoken.errors import PertokenError
from pertoken.probe._stream import blocks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS = 4  # of the forward that is watched


@dataclass(frozen=True)
class Anatomy:
    """The parts of a decoder that touch its residual stream.

    readers: per block the norms on the stream; writers: per block what adds to it. final: the norm
    behind the last block.

    >>> from pertoken.testing import tiny_model
    >>> parts = anatomy(tiny_model("gemma3"))
    >>> parts.names[:3]
    ['0.input_layernorm', '0.pre_feedforward_layernorm', '1.input_layernorm']
    """

    blocks: list[nn.Module]
    readers: list[list[nn.Module]]
    writers: list[list[nn.Module]]
    final: nn.Module
    names: list[str]
    """Of all norms, in the order of `norms`."""

    @property
    def norms(self) -> list[nn.Module]:
        """All norms on the stream, the final one last."""
        return [*(norm for block in self.readers for norm in block), self.final]


@dataclass
class _Call:
    part: nn.Module
    name: str
    given: torch.Tensor
    gave: torch.Tensor


@torch.no_grad()
def anatomy(model: PreTrainedModel) -> Anatomy:
    """Watch a model read a few tokens.

    Raises PertokenError for models without hidden states or with blocks whose parts do not add up.
    """
    blocks = blocks_of(model)
    decoder = model.get_decoder()
    inside = {id(each) for block in blocks for each in block.modules()}
    beside = [(n, m) for n, m in decoder.named_children() if not isinstance(m, nn.ModuleList)]
    calls: list[list[_Call]] = [[] for _ in blocks]
    whole: list[_Call] = []
    outer: list[_Call] = []
    ids = torch.arange(1, 1 + _TOKENS, device=model.device)[None]
    ids = ids.clamp(max=model.get_input_embeddings().weight.shape[0] - 1)
    with (
        _watched([(str(place), block) for place, block in enumerate(blocks)], whole),
        _watched([(n, m) for n, m in beside if id(m) not in inside], outer),
        _all_watched(blocks, calls),
    ):
        decoder(input_ids=ids, use_cache=False)
    readers, writers, names = [], [], []
    for place, own in enumerate(calls):
        check_finite(model, place, whole[place].gave)
        read, written = _roles(own)
        if not read or not _adds_up(whole[place], own, written):
            raise PertokenError(
                f"{type(model).__name__}: block {place} ({type(blocks[place]).__name__}) is not "
                "understood: it must be norms that read the stream and parts that add to it"
            )
        readers.append([each.part for each in read])
        writers.append(list(dict.fromkeys(each.part for each in written)))
        names += [f"{place}.{each.name}" for each in read]
    behind = [each for each in outer if _same(each.given, whole[-1].gave)]
    if not behind:
        raise PertokenError(
            f"{type(model).__name__} has no norm behind its last block that could be read"
        )
    return Anatomy(blocks, readers, writers, behind[0].part, [*names, behind[0].name])


def check_finite(model: PreTrainedModel, block: int, hidden: torch.Tensor) -> None:
    """Raise PertokenError that names the block whose output is not finite."""
    if not bool(hidden.isfinite().all()):
        raise PertokenError(
            f"block {block} of {type(model).__name__} gives NaN or infinite numbers: check the "
            "weights, or load the model in float32"
        )


def _roles(calls: Sequence[_Call]) -> tuple[list[_Call], list[_Call]]:
    """Calls that read the stream, and calls that write to it."""
    read, written = [], []
    for place, call in enumerate(calls):
        fed = any(_same(call.given, before.gave) for before in calls[:place])
        used = any(_same(after.given, call.gave) for after in calls[place + 1 :])
        if not fed and used:
            read.append(call)
        elif not used:
            written.append(call)
    return read, written


def _adds_up(block: _Call, calls: Sequence[_Call], written: Sequence[_Call]) -> bool:
    total = block.given + sum(call.gave.reshape_as(block.given) for call in written)
    scale = float(block.gave.abs().max()) or 1.0
    rough = block.gave.dtype in (torch.bfloat16, torch.float16)
    return bool(((total - block.gave).abs() <= (0.05 if rough else 1e-4) * scale).all())


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same numbers in memory; all that is watched is kept alive."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


@contextmanager
def _watched(parts: Sequence[tuple[str, nn.Module]], seen: list[_Call]) -> Iterator[None]:
    def hook(part: nn.Module, args: Any, kwargs: Any, output: Any, name: str) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        gave = output[0] if isinstance(output, tuple) else output
        if _states(given) and _states(gave):
            seen.append(_Call(part, name, given, gave))

    def bound(name: str) -> Any:
        return lambda part, args, kwargs, output: hook(part, args, kwargs, output, name)

    handles = [p.register_forward_hook(bound(name), with_kwargs=True) for name, p in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _all_watched(blocks: Sequence[nn.Module], calls: list[list[_Call]]) -> Iterator[None]:
    with ExitStack() as stack:
        for block, seen in zip(blocks, calls, strict=True):
            stack.enter_context(_watched(list(block.named_children()), seen))
        yield


def _states(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@torch.no_grad()
def gain(norm: nn.Module) -> torch.Tensor | None:
    """λ of an RMSNorm or LayerNorm, float64 [hidden]; None for any other module.

    Asked of the module itself, since some store λ - 1.

    >>> gain(nn.LayerNorm(3)).tolist(), gain(nn.Tanh())
    ([1.0, 1.0, 1.0], None)
    """
    weight = next((p for p in norm.parameters() if p.dim() == 1), None)
    if isinstance(norm, nn.LayerNorm):
        own = norm.weight if weight is not None else torch.ones(norm.normalized_shape)
        return own.double()
    if weight is None or sum(1 for _ in norm.parameters()) != 1:
        return None
    # So large that the norm's own small number under the root does not count; float16 holds it
    # and its square.
    large = torch.full((len(weight),), 1e2, dtype=torch.float32, device=weight.device)
    found: torch.Tensor = norm.forward(large.to(weight.dtype)).double()
    draw = torch.Generator().manual_seed(0)
    x = (10 * torch.randn(len(weight), generator=draw)).to(weight)
    wanted = found * x.double() * x.double().square().mean().rsqrt()
    off = (norm.forward(x).double() - wanted).abs().max()
    return found if off <= 0.05 * wanted.abs().max() else None


def centred(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What the norm divides by its length: `hidden`, for LayerNorm less its mean."""
    if isinstance(norm, nn.LayerNorm):
        return hidden - hidden.mean(-1, keepdim=True)
    return hidden
