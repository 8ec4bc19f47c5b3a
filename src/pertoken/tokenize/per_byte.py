"""How well a model predicts a text, in units that do not depend on its tokenizer.

Perplexity per token falls when a tokenizer cuts finer, so that of two tokenizers it says nothing.
Per byte: exp(Σ nll / bytes), with the bytes of the text itself in UTF-8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pertoken._start_token import start_token
from pertoken.errors import PertokenError
from pertoken.prompts import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["bits_per_byte", "nats_per_text", "perplexity_per_byte"]

_ROWS = 64  # of the logits that are normalised at once


def nats_per_text(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int = 512,
    stride: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[tuple[float, int]]:
    """(negative log-likelihood in nats, bytes) of each text.

    Every text is read behind the token that begins a text, or the one that ends one, so that its
    first token counts as well; where there is neither, it counts as one of equally likely ones. A
    text of more than `window` tokens is read in windows that begin `stride` tokens apart, half a
    window if not given; each token counts once, in the first window that reaches it.
    Raises PertokenError for an empty text, and where the tokenizer's ids are not the model's.

    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> tokenizer = ByteTokenizer()
    >>> model = tiny_model("llama", vocab_size=len(tokenizer), scale=0.0)     # all bytes alike
    >>> [(nats, count)] = nats_per_text(model, tokenizer, ["abc"])
    >>> round(nats / count, 6) == round(math.log(len(tokenizer)), 6)
    True
    """
    first = start_token(tokenizer)
    start = [] if first is None else [first]
    found = []
    for number, text in enumerate(texts):
        if progress is not None:
            progress("reading texts", number, len(texts))
        if not text:
            raise PertokenError("can't say the perplexity of an empty text")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        check_ids(model, ids)
        nats = _nats(model, start, ids, window, stride or window // 2)
        found.append((nats, len(text.encode("utf-8"))))
    return found


@torch.no_grad()
def _nats(
    model: PreTrainedModel, start: list[int], ids: list[int], window: int, stride: int
) -> float:
    total, done = 0.0, 0
    if not start and ids:
        total, done = math.log(model.get_input_embeddings().weight.shape[0]), 1
    while done < len(ids):
        begin = max(0, done - window + stride) if done + len(start) > 1 else 0
        part = start + ids[begin : begin + window]
        new = begin + window - done if begin + window < len(ids) else len(ids) - done
        row = torch.tensor([part], device=model.device)
        logits = model(input_ids=row, use_cache=False).logits[0, -new - 1 : -1]
        for block, wanted in zip(logits.split(_ROWS), row[0, -new:].split(_ROWS), strict=True):
            chances = block.to(torch.promote_types(block.dtype, torch.float32)).log_softmax(-1)
            total -= float(chances.gather(-1, wanted[:, None]).double().sum())
        done += new
    return total


def bits_per_byte(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], *, window: int = 512
) -> float:
    """Σ nll / bytes over all texts, in bits. See `nats_per_text`."""
    found = nats_per_text(model, tokenizer, texts, window=window)
    return sum(nats for nats, _ in found) / sum(count for _, count in found) / math.log(2)


def perplexity_per_byte(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], *, window: int = 512
) -> float:
    """exp(Σ nll / bytes) over all texts, with nll in nats. See `nats_per_text`."""
    return float(2 ** bits_per_byte(model, tokenizer, texts, window=window))
