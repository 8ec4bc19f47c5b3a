"""How much each word of a text matters, from what rates tokens or from a model's surprise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pertoken._forward import text_logits
from pertoken._padded import batches, right_padded
from pertoken._start_token import first_token, start_token
from pertoken.errors import PertokenError
from pertoken.loading import is_encoder
from pertoken.prompts import check_ids, positions
from pertoken.prune._text import Span, add_up

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Rate", "by_sentence", "by_surprise"]

Rate = Callable[["PreTrainedModel", torch.Tensor, torch.Tensor], torch.Tensor]
"""`(model, input_ids [batch, time], attention_mask [batch, time]) -> scores [batch, time]`."""

_LOGITS = 2**25  # numbers of a forward's output, 128 MiB in float32


def by_sentence(
    text: str,
    spans: Sequence[Span],
    parts: Sequence[range],
    rate: Rate,
    model: PreTrainedModel,
    tokenizer: Any,
) -> tuple[list[float], list[str]]:
    """A score for each word, and notes; tokens are rated sentence by sentence.

    parts: the words of each sentence. Scores of a sentence's tokens, special ones among them, are
    brought to 0 … 1; those of a word's own tokens are added up. A sentence longer than the model
    is rated in pieces. For a decoder whose tokenizer puts no token in front, one that begins a text
    stands there: the first word would draw the attention that falls on it.
    """
    fast_only(tokenizer)
    front = _front(model, tokenizer)
    begins = [spans[part.start][0] for part in parts]
    given = tokenizer(
        [text[begin : spans[p.stop - 1][1]] for begin, p in zip(begins, parts, strict=True)],
        truncation=True,
        max_length=_room(model, tokenizer) - len(front),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    rows: list[list[int]] = [[*front, *ids] for ids in given["input_ids"]]
    check_ids(model, [max(row) for row in rows])
    scores = [0.0] * len(spans)
    most = 2048 if model.device.type == "cpu" else 32768
    for batch in batches([len(row) for row in rows], most):
        texts = [torch.tensor(rows[row], device=model.device) for row in batch]
        ids, real = right_padded(texts, tokenizer.pad_token_id or 0)
        mask = torch.ones_like(ids) if real is None else real.long()
        rated = rate(model, ids, mask).detach()
        if rated.shape != ids.shape:
            raise PertokenError(
                f"the salience gave scores {list(rated.shape)} for tokens {list(ids.shape)}"
            )
        values = unit(rated.double(), mask.bool()).tolist()
        for row, found in zip(batch, values, strict=True):
            begin = begins[given["overflow_to_sample_mapping"][row]]
            own = [
                ((begin + start, begin + end), value)
                for (start, end), special, value in zip(
                    given["offset_mapping"][row],
                    given["special_tokens_mask"][row],
                    found[len(front) : len(rows[row])],
                    strict=True,
                )
                if not special
            ]
            add_up(spans, [offset for offset, _ in own], [value for _, value in own], scores)
    room, total = _room(model, tokenizer), sum(len(row) for row in rows)
    notes = []
    if len(rows) > len(parts):
        notes.append(
            f"a sentence is longer than the {room} tokens that the salience model reads at once: "
            f"{len(parts)} sentences were rated in {len(rows)} pieces"
        )
    elif total > room:
        notes.append(
            f"the prompt is longer than the {room} tokens that the salience model reads at once: "
            "it was rated sentence by sentence"
        )
    return scores, notes


def unit(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scores [batch, time] brought to 0 … 1 in each row; 0 where the mask is False.

    A row whose scores are all the same gets zeros. Raises PertokenError for a NaN.

    >>> unit(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[True, True, False]])).tolist()
    [[0.0, 1.0, 0.0]]
    """
    if not bool(torch.isfinite(scores[mask]).all()):
        raise PertokenError(
            "the salience model gave a score that is NaN or infinite: load it in float32"
        )
    low = scores.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    high = scores.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    span = (high - low).clamp(min=torch.finfo(scores.dtype).tiny)
    return ((scores - low) / span).masked_fill(~mask, 0.0)


@torch.no_grad()
def by_surprise(
    text: str, spans: Sequence[Span], model: PreTrainedModel, tokenizer: Any
) -> tuple[list[float], list[str]]:
    """−log p of each word under a decoder, in nats, and notes; of a word's tokens the sum.

    The first token follows the model's start token; where there is none it gets the mean of the
    others. A text longer than the model is read in windows that know nothing of each other.
    """
    from transformers import DynamicCache

    fast_only(tokenizer)
    # verbose: without its own warning about long texts, which are read in windows.
    given = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    check_ids(model, given["input_ids"])
    ids = torch.tensor(given["input_ids"], dtype=torch.long, device=model.device)
    start = start_token(tokenizer)
    room = positions(model) or len(ids) + 1
    width = max(1, room - 1)
    step = max(16, min(512, _LOGITS // model.config.get_text_config().vocab_size))
    values = torch.full((len(ids),), torch.nan, dtype=torch.float64)
    for begin in range(0, len(ids), width):
        window = ids[begin : begin + width]
        if start is not None:
            window = torch.cat([window.new_tensor([start]), window])
        cache = DynamicCache(config=model.config)
        for low in range(0, len(window) - 1, step):
            part = window[low : min(low + step, len(window) - 1)]
            mask = torch.ones(1, low + len(part), dtype=torch.long, device=ids.device)
            logits = text_logits(model, part[None], mask, cache, all_logits=True)[0]
            following = window[low + 1 : low + 1 + len(part), None]
            chances = logits.float().log_softmax(-1).gather(-1, following)[:, 0]
            first = begin + low + (start is None)
            values[first : first + len(part)] = -chances.double().cpu()
    if start is None:  # nothing stands before the first token of a window
        unread = torch.arange(len(ids)) % width == 0
        rest = values[~unread]
        values[unread] = rest.mean() if len(rest) else 0.0
    if not bool(torch.isfinite(values).all()):
        raise PertokenError(
            "the salience model gave a score that is NaN or infinite: load it in float32"
        )
    scores = [0.0] * len(spans)
    add_up(spans, given["offset_mapping"], values.tolist(), scores)
    notes = []
    if len(ids) > width:
        notes.append(
            f"the prompt of {len(ids)} tokens is longer than the salience model's {room} "
            f"positions: it was read in {-(-len(ids) // width)} windows apart"
        )
    return scores, notes


def fast_only(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot say which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise PertokenError(
            f"{type(tokenizer).__name__} does not say which characters a token stands for: a fast "
            "tokenizer is needed"
        )


def _front(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """What is to stand in front of a sentence that a decoder reads, if not there already."""
    start = start_token(tokenizer)
    there = start is None or first_token(tokenizer) is not None
    return [] if start is None or there or is_encoder(model.config) else [start]


def _room(model: PreTrainedModel, tokenizer: Any) -> int:
    """Tokens the model reads at once, special ones counted."""
    return min(positions(model) or 512, int(tokenizer.model_max_length))
