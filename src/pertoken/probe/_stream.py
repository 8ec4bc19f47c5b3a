"""The residual stream of a decoder: its blocks, what each of them reads, and changing that.

Here also what all probes of this folder share: refusing models without such a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pertoken.errors import PertokenError
from pertoken.loading import is_encoder
from pertoken.prompts import check_ids, positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]
"""Called with (what goes on now, steps done, steps in all)."""


def refuse_unfit(model: Any, *, attention: bool = True) -> None:
    """Raise PertokenError for what is not a decoder-only model, with keys and values if needed."""
    name = type(model).__name__
    if not hasattr(model, "get_decoder") or not hasattr(model, "config"):
        raise PertokenError(
            f"the probe needs a causal language model of transformers, got {name}: load one with "
            "pertoken.load"
        )
    if model.config.is_encoder_decoder:
        raise PertokenError(
            f"{name} is an encoder-decoder model; the probe needs a decoder-only model"
        )
    if is_encoder(model.config):
        raise PertokenError(f"{name} is an encoder; the probe needs a decoder-only model")
    if attention and getattr(model, "_is_stateful", False):
        raise PertokenError(
            f"{name} keeps a recurrent state instead of keys and values; the probe needs attention "
            "in every block"
        )


def blocks_of(model: PreTrainedModel, *, attention: bool = True) -> list[torch.nn.Module]:
    """The blocks of the decoder, in order; attention: whether each must have keys and values."""
    from pertoken._blocks import Blocks

    refuse_unfit(model, attention=attention)
    refuse_compiled(model)
    return Blocks(model).modules


def refuse_compiled(model: PreTrainedModel) -> None:
    """Raise PertokenError for a model that is compiled, also in part: it runs past hooks."""
    for module in model.modules():
        if (
            module._compiled_call_impl is not None  # module.compile()
            or hasattr(module, "_orig_mod")  # torch.compile(module)
            or hasattr(module.forward, "_torchdynamo_orig_callable")  # its forward alone
        ):
            raise PertokenError(
                f"{type(model).__name__} is compiled, and compiled code runs past what a probe "
                "watches or changes: load the model anew, without torch.compile"
            )


def one_text(model: PreTrainedModel, input_ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """Ids [1, time] on the model's device, from [time] or [1, time]."""
    ids = torch.as_tensor(input_ids, device=model.device)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise PertokenError(
            f"the probe takes the ids of one text that is not empty, got shape {list(ids.shape)}"
        )
    if ids.dtype != torch.long:
        raise PertokenError(f"input_ids must be whole numbers (torch.long), got {ids.dtype}")
    vocab = model.get_input_embeddings().weight.shape[0]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        raise PertokenError(
            f"input_ids must lie in 0 … {vocab - 1}, the model's vocabulary; got "
            f"{low if low < 0 else high}"
        )
    return ids


def refuse_unread(model: PreTrainedModel, ids: Sequence[int], new: int = 0) -> None:
    """Raise PertokenError for ids that a model has no rows for, or more than it has positions.

    ids: of one text, behind which `new` tokens are to be written.
    """
    check_ids(model, ids)
    room = positions(model)
    if room is not None and len(ids) + new > room:
        more = f" and {new} new ones" if new else ""
        raise PertokenError(
            f"{len(ids)} tokens{more} are more than the {room} positions of "
            f"{type(model).__name__}: give a shorter text"
        )


def texts_of(
    model: PreTrainedModel, rows: Sequence[Sequence[int] | torch.Tensor]
) -> list[torch.Tensor]:
    """Ids [1, time] of every text, all of which the model can read."""
    texts = [one_text(model, row) for row in rows]
    for ids in texts:
        refuse_unread(model, ids[0].tolist())
    return texts


@contextmanager
def block_inputs(blocks: Sequence[torch.nn.Module]) -> Iterator[list[torch.Tensor]]:
    """What the blocks read, [batch, time, hidden] each, of the forwards within the `with`."""
    seen: list[torch.Tensor] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def changed_input(
    block: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Within the `with` the block reads ``change(hidden)`` instead of `hidden`."""

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = block.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def spread_out(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers 0 … count - 1, evenly spread, first and last among them.

    >>> spread_out(30, 4), spread_out(2, 4)
    ([0, 10, 19, 29], [0, 1])
    """
    if count <= wanted:
        return list(range(count))
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)]
