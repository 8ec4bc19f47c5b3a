"""Ask a chat model many things at once: a local model, an endpoint, or any function of messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pertoken.conversation import first_turn, stop_ids
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    import torch

__all__ = ["Ask", "Said", "asker"]

_NEXT_TURN = "\nUser:"  # a base model goes on with the transcript


@dataclass(frozen=True)
class Said:
    """A reply; tokens: how many were written, None where that is not told."""

    text: str
    tokens: int | None = None


Ask = Callable[[Sequence[str]], list[Said]]
"""Questions of one message each -> their replies."""


def asker(model: Any, tokenizer: Any, max_new_tokens: int, batch: int) -> Ask:
    """How a model is asked, greedily.

    model: a model of transformers with its tokenizer, an `Endpoint`, or a function that gives the
    text of the reply to a list of messages. Raises PertokenError for anything else.
    """
    if hasattr(model, "generate"):
        if tokenizer is None:
            raise PertokenError("a local model needs its tokenizer: tokenizer=…")

        def ask(texts: Sequence[str]) -> list[Said]:
            parts = [texts[at : at + batch] for at in range(0, len(texts), batch)]
            return [
                said for part in parts for said in _write(model, tokenizer, part, max_new_tokens)
            ]

        return ask
    if hasattr(model, "replies"):

        def ask_endpoint(texts: Sequence[str]) -> list[Said]:
            asked = [_messages(text) for text in texts]
            found = model.replies(asked, max_new_tokens=max_new_tokens, threads=batch)
            return [Said(reply.text, reply.tokens and len(reply.tokens)) for reply in found]

        return ask_endpoint
    if callable(model):
        return lambda texts: [_checked(model(_messages(text))) for text in texts]
    raise PertokenError(
        f"a chat model is a model of transformers, an Endpoint or a function of messages, not "
        f"{type(model).__name__}"
    )


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _checked(text: Any) -> Said:
    if not isinstance(text, str):
        raise PertokenError(f"the model's function must give text, not {type(text).__name__}")
    return Said(text)


def _write(model: Any, tokenizer: Any, texts: Sequence[str], max_new_tokens: int) -> list[Said]:
    """Replies of a local model, in one batch padded on the left."""
    import torch

    from pertoken.testing.setups import left_pad

    rows = [torch.tensor(first_turn(tokenizer, text)) for text in texts]
    config = model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None)
    longest = max(len(row) for row in rows)
    if room is not None and longest + 1 > room:
        raise PertokenError(
            f"a question with what goes before it has {longest} tokens and does not fit the "
            f"model's {room} positions: shorten it"
        )
    count = max_new_tokens if room is None else min(max_new_tokens, room - longest)
    ids, mask = left_pad(rows, tokenizer.pad_token_id or 0)
    ids, mask = ids.to(model.device), mask.to(model.device)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    stops = stop_ids(model)
    return [_reply(tokenizer, row[ids.shape[1] :], stops) for row in out]


def _reply(tokenizer: Any, new: torch.Tensor, stops: frozenset[int]) -> Said:
    written = new.tolist()
    end = next((place for place, one in enumerate(written) if one in stops), len(written))
    text = tokenizer.decode(written[:end], skip_special_tokens=True)
    if not getattr(tokenizer, "chat_template", None):
        text = text.partition(_NEXT_TURN)[0]
    return Said(text.strip(), min(end + 1, len(written)))
