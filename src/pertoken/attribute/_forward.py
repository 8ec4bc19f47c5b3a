"""Next-token logits of many rows, in forwards of a bounded number of tokens.

Rows may be of different lengths (left padding); only the last position goes through the head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LONG = 1024
"""Tokens above which what a gradient needs of the blocks is computed twice rather than kept."""
Read = Callable[[torch.Tensor, slice], torch.Tensor]
"""`(logits [rows, vocab], which rows) -> [rows, …]`."""

_names: dict[type[Any], frozenset[str]] = {}


def most_tokens(model: PreTrainedModel) -> int:
    """Tokens of one forward: a processor gains nothing from more, an accelerator does."""
    return 2048 if model.device.type == "cpu" else 32768


def twice(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A block's output; what its gradient needs is computed again when it is asked for."""
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def last_logits(
    model: PreTrainedModel,
    *,
    input_ids: torch.Tensor | None = None,
    embeds: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [rows, vocab] behind whole rows, in float32 or better; PertokenError if one is NaN.

    input_ids: [rows, time], or embeds: [rows, time, hidden] in their place; mask: bool [rows,
    time], False for left padding; None where there is none.
    """
    kind = type(model)
    if kind not in _names:
        _names[kind] = frozenset(inspect.signature(kind.forward).parameters)
    tokens = input_ids if input_ids is not None else embeds
    assert tokens is not None
    given: dict[str, Any] = {"use_cache": False, "return_dict": True}
    if input_ids is not None:
        given["input_ids"] = input_ids
    else:
        given["inputs_embeds"] = embeds
    if mask is not None:
        given["attention_mask"] = mask.long()
    if "position_ids" in _names[kind]:
        rows, time = tokens.shape[:2]
        whole = torch.ones(rows, time, dtype=torch.long, device=tokens.device)
        real = whole if mask is None else mask.long()
        given["position_ids"] = (real.cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in _names[kind]:
        given["logits_to_keep"] = 1
    logits: torch.Tensor = model(**given).logits[:, -1]
    if bool(logits.isnan().any()):
        raise PertokenError(f"the logits of {kind.__name__} are NaN: load it in float32")
    return logits if logits.dtype == torch.float64 else logits.float()


@torch.no_grad()
def read_rows(model: PreTrainedModel, groups: Sequence[torch.Tensor], read: Read) -> torch.Tensor:
    """What `read` makes of the logits of all rows, [rows, …]; PertokenError if that is NaN.

    groups: ids [rows, time], each group with its own time; rows are counted through all groups.
    """
    rows, mask = left_padded(groups)
    step = max(1, most_tokens(model) // max(1, rows.shape[1]))
    parts = []
    for begin in range(0, len(rows), step):
        part = slice(begin, min(begin + step, len(rows)))
        seen = None if mask is None else mask[part]
        parts.append(read(last_logits(model, input_ids=rows[part], mask=seen), part))
    found = torch.cat(parts)
    if bool(found.isnan().any()):
        raise PertokenError("the quantity of a text is NaN: explain another one")
    return found


def left_padded(groups: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All rows in one tensor [rows, width], and which tokens are real; None where all are.

    >>> left_padded([torch.tensor([[5, 6]]), torch.tensor([[7]])])[0].tolist()
    [[5, 6], [0, 7]]
    """
    width = max(group.shape[1] for group in groups)
    if all(group.shape[1] == width for group in groups):
        return torch.cat(list(groups)), None
    padded = [torch.nn.functional.pad(group, (width - group.shape[1], 0)) for group in groups]
    real = [
        torch.arange(width, device=group.device).expand(len(group), -1) >= width - group.shape[1]
        for group in groups
    ]
    return torch.cat(padded), torch.cat(real)
