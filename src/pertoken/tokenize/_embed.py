"""Vectors of short strings: the auxiliary space in which tokens are compared.

The paper takes nomic-embed-text-v2-moe. Here the default is the model itself, which needs nothing
else, and any function from strings to vectors will do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from pertoken._blocks import Blocks
from pertoken._start_token import start_token
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Embedder", "EncoderEmbedder", "SelfEmbedder", "find", "unit_vectors"]

Embedder = Callable[[Sequence[str]], torch.Tensor]
Tell = Callable[[str, int, int], None]

_BATCH = 512  # tokens of a forward; more of them leave the cache of a processor
_CHUNK = 8192  # strings between two words about progress
_SAMPLE = 1024  # tokens that tell the mean state


class _Done(Exception):
    """Ends a forward behind the block that was asked for."""


class SelfEmbedder:
    """Mean of a model's own middle-layer states over the tokens of a string (our reading).

    Each string stands behind the token that begins a text, or ends one: the first position of a
    decoder holds next to nothing of its token (an attention sink). States of a decoder share a
    large common part and a few large coordinates, so the mean over a sample of the vocabulary is
    taken off, and each coordinate divided by its standard deviation there.

    layer: how many blocks the states have gone through; half of them by default.

    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> tokenizer = ByteTokenizer()
    >>> embed = SelfEmbedder(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer)
    >>> embed(["a", "bc"]).shape
    torch.Size([2, 32])
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, *, layer: int | None = None) -> None:
        blocks = Blocks(model).modules
        self.layer = max(1, len(blocks) // 2) if layer is None else layer
        if not 1 <= self.layer <= len(blocks):
            raise PertokenError(f"layer must be between 1 and {len(blocks)}, got {layer}")
        self._model, self._tokenizer = model, tokenizer
        self._block = blocks[self.layer - 1]
        self._start = start_token(tokenizer)
        self._mean, self._deviation = self._sample()

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        encoded = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return (self._states(encoded) - self._mean) / self._deviation

    def _sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._model.get_input_embeddings().weight.shape[0]
        size = min(rows, len(self._tokenizer))
        ids = torch.linspace(0, size - 1, min(size, _SAMPLE)).long().tolist()
        states = self._states([[token] for token in ids])
        return states.mean(0), states.std(0).clamp(min=1e-6)

    @torch.no_grad()
    def _states(self, encoded: Sequence[Sequence[int]]) -> torch.Tensor:
        """float32 [strings, hidden]; zero for a string without tokens."""
        config = self._model.config.get_text_config()
        found = torch.zeros(len(encoded), config.hidden_size)
        prefix = self._prefix()
        for places in _batches([len(ids) for ids in encoded]):
            longest = max(len(encoded[place]) for place in places)
            ids = torch.zeros(len(places), longest, dtype=torch.long)
            mask = torch.zeros(len(places), longest)
            for row, place in enumerate(places):
                ids[row, : len(encoded[place])] = torch.tensor(encoded[place])
                mask[row, : len(encoded[place])] = 1
            hidden = self._run(ids.to(self._model.device), mask.to(self._model.device), prefix)
            weights = mask.to(hidden)[..., None]
            mean = (hidden * weights).sum(1) / weights.sum(1)
            found[places] = mean.to("cpu", torch.float32)
        return found

    def _prefix(self) -> Any:
        if self._start is None:
            return None
        ids = torch.tensor([[self._start]], device=self._model.device)
        return self._model(input_ids=ids, use_cache=True).past_key_values

    def _run(self, ids: torch.Tensor, mask: torch.Tensor, prefix: Any) -> torch.Tensor:
        """States behind the block, [batch, time, hidden]."""
        cache = copy.deepcopy(prefix)
        if cache is not None:
            cache.batch_repeat_interleave(len(ids))
            mask = functional.pad(mask, (1, 0), value=1)
        seen: list[torch.Tensor] = []

        def note(_: Any, __: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)
            raise _Done

        handle = self._block.register_forward_hook(note)
        try:
            self._model(
                input_ids=ids,
                attention_mask=mask.long(),
                past_key_values=cache,
                use_cache=cache is not None,
            )
        except _Done:
            pass
        finally:
            handle.remove()
        return seen[0]


class EncoderEmbedder:
    """Mean of an encoder's last states over a string, as sentence encoders such as `minilm` do."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self._model, self._tokenizer = model, tokenizer

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        found = torch.zeros(len(texts), self._model.config.hidden_size)
        encoded = self._tokenizer(list(texts), truncation=True)["input_ids"]
        for places in _batches([len(ids) for ids in encoded]):
            batch = self._tokenizer.pad(
                {"input_ids": [encoded[place] for place in places]}, return_tensors="pt"
            ).to(self._model.device)
            hidden = self._model(**batch).last_hidden_state
            weights = batch["attention_mask"].to(hidden)[..., None]
            found[places] = ((hidden * weights).sum(1) / weights.sum(1)).to("cpu", torch.float32)
        return found


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of rows of about one length, at most `_BATCH` tokens together; empty ones nowhere."""
    order = sorted((place for place, n in enumerate(lengths) if n), key=lengths.__getitem__)
    while order:
        # The longest row of a batch is its last, so the first ones tell how many there may be.
        count = max(1, _BATCH // lengths[order[0]])
        while count > 1 and lengths[order[min(count, len(order)) - 1]] * count > _BATCH:
            count = max(1, count * 3 // 4)
        yield order[:count]
        order = order[count:]


def find(embedder: str | Embedder, model: PreTrainedModel, tokenizer: Any) -> Embedder:
    """An embedder by name: "self" or "minilm"; a function as it is."""
    check(embedder)
    if callable(embedder):
        return embedder
    if embedder == "self":
        return SelfEmbedder(model, tokenizer)
    from pertoken.loading import load

    return EncoderEmbedder(*load("minilm", device=str(model.device), kind="encoder"))


def check(embedder: str | Embedder) -> None:
    """Refuse a name that `find` does not know."""
    if not callable(embedder) and embedder not in ("self", "minilm"):
        raise PertokenError(
            f"unknown embedder {embedder!r}: give 'self', 'minilm', or a function from strings to "
            "vectors [strings, width]"
        )


def unit_vectors(embed: Embedder, texts: Sequence[str], what: str, tell: Tell) -> torch.Tensor:
    """float32 [strings, width], each of length 1 (0 where the embedder gives nothing); there must
    be one string at least."""
    found = []
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    for begin in range(0, len(order), _CHUNK):
        tell(what, begin, len(order))
        chunk = [texts[place] for place in order[begin : begin + _CHUNK]]
        vectors = torch.as_tensor(embed(chunk)).to("cpu", torch.float32)
        if vectors.ndim != 2 or len(vectors) != len(chunk) or not vectors.isfinite().all():
            raise PertokenError(
                f"the embedder must give finite vectors [{len(chunk)}, width] for {len(chunk)} "
                f"strings, got {list(vectors.shape)}"
            )
        found.append(functional.normalize(vectors, dim=-1))
    tell(what, len(order), len(order))
    return torch.cat(found)[torch.tensor(order).argsort()]
