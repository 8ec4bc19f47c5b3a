"""Laws for KV caches: what a full cache gives, alone and in a batch, over turns and beams.

Every law takes `make`, a function of the model that returns a new, empty cache:

    check_cache_equals_full(lambda model: KVDirectCache(model, budget=8), tiny_model("llama"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from pertoken.errors import PertokenError
from pertoken.testing.divergence import first_difference
from pertoken.testing.laws import LawBroken, Prompts, check_batch_invariant
from pertoken.testing.setups import as_prompts, forward_parameters, left_pad, pad_id, random_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

__all__ = [
    "check_cache_batch",
    "check_cache_crop",
    "check_cache_equals_full",
    "check_cache_reorder",
    "check_cache_restores",
    "check_cache_turns",
]

MakeCache = Callable[["PreTrainedModel"], "Cache"]
RoundTrip = Callable[["PreTrainedModel", torch.Tensor, "Cache"], "Cache"]
_REFUSALS = (PertokenError, NotImplementedError, ValueError)


def check_cache_equals_full(
    make: MakeCache,
    model: PreTrainedModel,
    prompts: Prompts | None = None,
    *,
    max_new_tokens: int = 16,
    atol: float | None = None,
) -> None:
    """Greedy tokens and their logits must be those of transformers' full cache.

    For a cache that evicts give `make` a budget beyond the text. prompts: as in `check_lossless`.
    atol: how far logits may differ; by default what rounding explains in the model's dtype.
    Raises `LawBroken`.

    >>> from transformers import DynamicCache
    >>> from pertoken.testing import tiny_model
    >>> check_cache_equals_full(lambda model: DynamicCache(), tiny_model("llama"))
    """
    for index, prompt in enumerate(as_prompts(model, prompts)):
        full, wanted = _written(model, prompt[None], max_new_tokens, None)
        mine, found = _written(model, prompt[None], max_new_tokens, make(model))
        step = first_difference(full, mine)
        if step is not None:
            raise LawBroken(
                f"not the full cache: prompt {index} ({len(prompt)} tokens), step {step}: expected "
                f"{full[step : step + 1]}, got {mine[step : step + 1]}"
            )
        _same_logits(found, wanted, f"not the full cache: prompt {index}", atol)


def check_cache_batch(
    make: MakeCache,
    model: PreTrainedModel,
    prompts: Prompts | None = None,
    *,
    max_new_tokens: int = 12,
) -> None:
    """A batch of left-padded prompts must give what each prompt gives with a cache of its own."""
    check_batch_invariant(_Fresh(make, model), model, prompts, max_new_tokens=max_new_tokens)


def check_cache_turns(make: MakeCache, model: PreTrainedModel, *, seed: int = 0) -> None:
    """Two calls of `generate` with one cache must give what one call gives."""
    ids = _ids(model, 1, 20, seed)
    once, twice = make(model), make(model)
    wanted = _greedy(model, ids, 10, past_key_values=once)
    half = _greedy(model, ids, 4, past_key_values=twice)
    found = _greedy(model, half, 6, past_key_values=twice)
    step = first_difference(wanted[0, 20:].tolist(), found[0, 20:].tolist())
    if step is not None:
        raise LawBroken(f"a second turn does not go on where the first ended: step {step} differs")


@torch.no_grad()
def check_cache_reorder(make: MakeCache, model: PreTrainedModel, *, seed: int = 0) -> str | None:
    """After `reorder_cache`, as beam search calls it, every row must go on as in its old place.

    A cache may refuse with an error that names itself or the call: the law returns its line, and
    None where it works. Raises `LawBroken`.
    """
    order = torch.tensor([2, 0, 2], device=model.device)
    prompts = [row.to(model.device) for row in random_prompts(_vocab(model), (14, 9, 11), seed)]
    ids, mask = left_pad(prompts, pad_id(model))
    moved, other = make(model), make(model)
    _read(model, moved, ids, mask)
    if refusal := _refusal(moved, "reorder_cache", order):
        return refusal
    _read(model, other, ids[order], mask[order])
    mask = mask[order]
    for step in range(3):
        token = torch.full((3, 1), 1 + step, device=model.device)
        mask = torch.cat((mask, mask.new_ones(3, 1)), 1)
        found, wanted = (_read(model, cache, token, mask) for cache in (moved, other))
        _same_logits(found, wanted, f"rows are mixed up by reorder_cache: step {step}")
    return None


@torch.no_grad()
def check_cache_crop(make: MakeCache, model: PreTrainedModel, *, seed: int = 0) -> str | None:
    """After `crop(-n)`, which takes the newest n tokens back, all must be as if never read.

    Returns the line of a refusal, as `check_cache_reorder` does.
    """
    ids = _ids(model, 1, 20, seed)
    mask = torch.ones_like(ids)
    cropped, other = make(model), make(model)
    _read(model, cropped, ids[:, :12], mask[:, :12])
    for end in range(13, 17):
        _read(model, cropped, ids[:, end - 1 : end], mask[:, :end])
    if refusal := _refusal(cropped, "crop", -4):
        return refusal
    _read(model, other, ids[:, :12], mask[:, :12])
    length = cropped.get_seq_length()
    if length != 12:
        raise LawBroken(f"crop(-4) of 16 tokens left {length}, expected 12")
    found, wanted = (_read(model, c, ids[:, 16:18], mask[:, :14]) for c in (cropped, other))
    _same_logits(found, wanted, "tokens that were cropped still have a say")
    return None


@torch.no_grad()
def check_cache_restores(round_trip: RoundTrip, model: PreTrainedModel, *, seed: int = 0) -> None:
    """A cache that was stored and read again must go on as the one that was not, bit by bit.

    round_trip: stores a full cache that has seen `ids` [1, time], and returns what it restores.
    """
    ids = _ids(model, 1, 16, seed)
    mask = torch.ones_like(ids)
    kept, stored = _full(model), _full(model)
    for cache in (kept, stored):
        _read(model, cache, ids[:, :12], mask[:, :12])
    restored = round_trip(model, ids[:, :12], stored)
    found, wanted = (_read(model, c, ids[:, 12:], mask) for c in (restored, kept))
    if not torch.equal(found, wanted):
        gap = float((found - wanted).abs().max())
        raise LawBroken(f"a restored cache is another one: logits differ by {gap:.3g}")


class _Fresh(Mapping[str, Any]):
    """The argument `past_key_values` of `generate`, with a new cache every time it is looked up."""

    def __init__(self, make: MakeCache, model: PreTrainedModel) -> None:
        self._new = lambda: make(model)

    def __getitem__(self, name: str) -> Any:
        if name != "past_key_values":
            raise KeyError(name)
        return self._new()

    def __iter__(self) -> Iterator[str]:
        return iter(("past_key_values",))

    def __len__(self) -> int:
        return 1


def _greedy(model: PreTrainedModel, ids: torch.Tensor, count: int, **options: Any) -> Any:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        **options,
    )


def _written(
    model: PreTrainedModel, ids: torch.Tensor, count: int, cache: Cache | None
) -> tuple[list[int], torch.Tensor]:
    """New greedy ids, and the logits [tokens, vocab] of the head, which `generate` would round."""
    logits = []

    def keep(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        logits.append(output[:, -1])

    head = model.get_output_embeddings()
    handle = head.register_forward_hook(keep)
    try:
        given = {} if cache is None else {"past_key_values": cache}
        text = _greedy(model, ids, count, **given)
    finally:
        handle.remove()
    return text[0, ids.shape[1] :].tolist(), torch.cat(logits)


def _read(
    model: PreTrainedModel, cache: Cache, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Logits [batch, time, vocab] of new tokens; mask: [batch, all tokens so far]."""
    given: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache, "use_cache": True}
    if "position_ids" in forward_parameters(model):
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(ids, **given).logits


def _refusal(cache: Any, call: str, argument: Any) -> str | None:
    """What a cache says where it refuses a call; LawBroken where it does not say what."""
    try:
        getattr(cache, call)(argument)
    except _REFUSALS as error:
        line = str(error)
        if call.removesuffix("_cache") in line or type(cache).__name__ in line:
            return line
        raise LawBroken(
            f"{call} is refused without a name: {type(error).__name__}: {line or '(no text)'}"
        ) from error
    return None


def _same_logits(
    found: torch.Tensor, wanted: torch.Tensor, what: str, atol: float | None = None
) -> None:
    if atol is None:
        # Rounding adds up over layers: a thousand last bits of the greatest logit.
        atol = 1000 * torch.finfo(wanted.dtype).eps * max(1.0, float(wanted.abs().max()))
    gap = float((found - wanted).abs().max())
    if not gap <= atol:
        raise LawBroken(f"{what}: logits differ by {gap:.3g} (at most {atol:.3g})")


def _full(model: PreTrainedModel) -> Cache:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _vocab(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _ids(model: PreTrainedModel, batch: int, time: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(1, _vocab(model), (batch, time), generator=draw).to(model.device)
