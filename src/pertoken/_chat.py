"""Ask a chat model many things at once: a local model, an endpoint, or any function of messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pertoken._replies import written
from pertoken.conversation import first_turn
from pertoken.errors import PertokenError
from pertoken.prompts import positions

__all__ = ["Ask", "Said", "asker"]

_NEXT_TURN = "\nUser:"  # a base model goes on with the transcript


@dataclass(frozen=True)
class Said:
    """A reply; tokens: how many were written, None where that is not told."""

    text: str
    tokens: int | None = None


Ask = Callable[[Sequence[str]], list[Said]]
"""Questions of one message each -> their replies."""


def asker(model: Any, tokenizer: Any, max_new_tokens: int, batch: int, *, chat: bool = True) -> Ask:
    """How a model is asked, greedily; chat: False lets a local model go on with the text itself.

    model: a model of transformers with its tokenizer, an `Endpoint`, or a function that gives the
    text of the reply to a list of messages. Raises PertokenError for anything else.
    """
    if hasattr(model, "generate"):
        if tokenizer is None:
            raise PertokenError("a local model needs its tokenizer: tokenizer=…")

        return lambda texts: _write(model, tokenizer, texts, max_new_tokens, batch, chat)
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


def _write(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    max_new_tokens: int,
    batch: int,
    chat: bool,
) -> list[Said]:
    """Replies of a local model."""
    rows = [
        first_turn(tokenizer, text) if chat else list(tokenizer(text)["input_ids"])
        for text in texts
    ]
    room = positions(model)
    longest = max(map(len, rows), default=0)
    if room is not None and longest + 1 > room:
        raise PertokenError(
            f"a question with what goes before it has {longest} tokens and does not fit the "
            f"model's {room} positions: shorten it"
        )
    most = [max_new_tokens if room is None else min(max_new_tokens, room - len(r)) for r in rows]
    found: list[Said] = [Said("")] * len(rows)
    for places, new in written(model, rows, max_new_tokens=most, batch=batch):
        for place, ids in zip(places, new, strict=True):
            found[place] = _reply(tokenizer, ids, most[place])
    return found


def _reply(tokenizer: Any, ids: list[int], most: int) -> Said:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if not getattr(tokenizer, "chat_template", None):
        text = text.partition(_NEXT_TURN)[0]
    return Said(text.strip(), len(ids) + (len(ids) < most))  # the stop token is one too
