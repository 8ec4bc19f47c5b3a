"""Write behind many prompts with a local model: like lengths together, and what they share once.

Prompts of one probe begin alike (a system message, an instruction). Those tokens are read once, and
each batch goes on from a copy of their cache. Prompts of like length stand in a batch, so that
little is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from pertoken._padded import batches
from pertoken.conversation import stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["drawing", "written"]

_WORTH = 8  # tokens that must be shared before a cache is made of them

Processors = Callable[[list[int], int], list[Any]]


@contextmanager
def drawing(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Start torch's generators from a seed, and put them back."""
    import torch

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def written(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    batch: int,
    processors: Processors | None = None,
    **options: Any,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """The numbers of the prompts of a batch and the new ids of each, without their stop token.

    max_new_tokens: of all, or of each. processors: gives the logits processors of a batch, from the
    numbers of its prompts and its padded width. options: of `generate`; greedy by default.
    """
    import torch

    from pertoken.testing.setups import left_pad, pad_id

    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    shared = _shared(model, prompts, max(most, default=0))
    stops = stop_ids(model)
    order = [place for part in batches([len(row) for row in prompts], 10**9) for place in part]
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        rows = [torch.tensor(prompts[place], dtype=torch.long) for place in places]
        run = dict(options)
        if shared is None:
            ids, mask = left_pad(rows, pad_id(model))
        else:
            head, cache = shared
            tail, mask = left_pad([row[len(head) :] for row in rows], pad_id(model))
            ids = torch.cat([head.expand(len(rows), -1), tail], 1)
            mask = torch.cat([torch.ones(len(rows), len(head), dtype=mask.dtype), mask], 1)
            run["past_key_values"] = deepcopy(cache)
            run["past_key_values"].batch_repeat_interleave(len(rows))
        if processors is not None:
            run["logits_processor"] = processors(places, ids.shape[1])
        out = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(most[place] for place in places),
            **{"do_sample": False, "pad_token_id": pad_id(model), **run},
        )
        new = out[:, ids.shape[1] :].tolist()
        yield places, [_cut(row[: most[p]], stops) for p, row in zip(places, new, strict=True)]


def _cut(ids: list[int], stops: frozenset[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


def _shared(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], new: int
) -> tuple[Any, Any] | None:
    """The ids that all prompts begin with and their cache; None where that does not pay or fit.

    Pads stand behind these ids, and a sliding window counts them: texts must be shorter than it.
    """
    import torch
    from transformers import DynamicCache

    head = _beginning(prompts)
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    longest = max(map(len, prompts), default=0) + new
    if len(prompts) < 2 or len(head) < _WORTH or (window is not None and longest > window):
        return None
    if getattr(model, "_is_stateful", False):
        return None
    ids = torch.tensor(head, dtype=torch.long)
    # Without a config all layers keep all rows: sliding ones could not be gone on from twice.
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[None].to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return ids, cache


def _beginning(rows: Sequence[Sequence[int]]) -> list[int]:
    """What all rows begin with, at least one id of each left out.

    >>> _beginning([[1, 2, 3], [1, 2, 4, 5], [1, 2, 3, 3]])
    [1, 2]
    """
    if not rows:
        return []
    first, last = min(map(list, rows)), max(map(list, rows))  # the others lie between them
    most = min(map(len, rows)) - 1
    same = next((n for n in range(most) if first[n] != last[n]), most)
    return first[:same]
