"""Conversations: read from a file, checked, and turned into ids that only ever grow.

A chat template sees the whole history, and some templates render earlier turns differently as the
history grows (they drop reasoning, or trim). A cache cannot follow that: its tokens are read. So
the first question is rendered by the template, and later ones are cut out of a rendering behind an
answer and appended: what was read stays as it was.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pertoken.errors import PertokenError, nearest
from pertoken.prompts import positions, read_utf8

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = [
    "ROLES",
    "TEXT",
    "Exchange",
    "as_jsonl",
    "check_messages",
    "encode_conversation",
    "exchanges",
    "first_turn",
    "follow",
    "next_turn",
    "parse_conversation",
    "read_conversation",
    "stop_ids",
    "templated",
]

ROLES = ("system", "user", "assistant")
"""The roles that a message may have."""
TEXT = "text"
"""The role of a plain text file's one message: it goes to the model without a chat template."""

Message = dict[str, str]  # "role" and "content", as chat templates take them

_ANSWER = "an-answer-0b5e"  # where the later part of a rendering begins


@dataclass(frozen=True)
class Exchange:
    """One question and its answer, None where the conversation has none."""

    question: str
    answer: str | None = None


def read_conversation(path: str | Path | None) -> list[Message]:
    """Messages of a file: JSON lines of {"role", "content"}, one JSON list of them, or a .txt file.

    A .txt file is one message of the role `TEXT`. None is the built-in sample of 20 turns. Raises
    PertokenError that names the file and the line (in a list: the message): not UTF-8, not JSON,
    an unknown role, an empty or broken text, an answer without a question, a system message that
    is not the first, no question at all.
    """
    if path is None:
        from pertoken.samples import CONVERSATION

        return [dict(message) for message in CONVERSATION]
    file = Path(path)
    text = read_utf8(file, "conversation file")
    if file.suffix.lower() == ".txt" and text.strip():
        return [{"role": TEXT, "content": text}]
    return parse_conversation(text, f"conversation file {file}")


def parse_conversation(text: str, name: str) -> list[Message]:
    """Messages of a text: JSON lines, or one JSON list; errors as of `read_conversation`.

    name: what the text is, for the errors.
    """
    if not text.strip():
        raise PertokenError(f"{name} is empty")
    return check_messages(_rows(text, name), name)


def check_messages(rows: Iterable[tuple[str, Any]], name: str) -> list[Message]:
    """The messages that `rows` (place, value) hold; errors as of `read_conversation`.

    >>> check_messages([("message 1", {"role": "user", "content": ""})], "the chat")
    Traceback (most recent call last):
    pertoken.errors.PertokenError: message 1: the message is empty
    """
    messages: list[Message] = []
    for place, row in rows:
        messages.append(_message(row, place, messages))
    if not any(message["role"] == "user" for message in messages):
        raise PertokenError(f"{name} has no message of the user")
    return messages


def exchanges(messages: Sequence[Message]) -> tuple[str | None, list[Exchange]]:
    """The system message, if there is one, and the questions with their answers.

    PertokenError for a plain text, which has none.

    >>> exchanges([{"role": "user", "content": "Hi"}, {"role": "user", "content": "Hello?"}])
    (None, [Exchange(question='Hi', answer=None), Exchange(question='Hello?', answer=None)])
    """
    system: str | None = None
    found: list[Exchange] = []
    if messages[0]["role"] == TEXT:
        raise PertokenError(
            'a plain text is no conversation: give a .jsonl file of {"role", "content"} lines'
        )
    for message in messages:
        if message["role"] == "system":
            system = message["content"]
        elif message["role"] == "user":
            found.append(Exchange(message["content"]))
        else:
            found[-1] = Exchange(found[-1].question, message["content"])
    return system, found


def as_jsonl(messages: Sequence[Message]) -> str:
    """The messages as JSON lines, as `read_conversation` reads them."""
    return "".join(json.dumps(message, ensure_ascii=False) + "\n" for message in messages)


def encode_conversation(
    tokenizer: Any, model: PreTrainedModel, messages: Sequence[Message]
) -> torch.Tensor:
    """Ids [1, time] of a whole conversation on the model's device.

    In the chat template if there is one, else as a transcript; a plain text as it is. Raises
    PertokenError for messages that the template refuses, and for more tokens than the model has
    positions.
    """
    import torch

    if messages[0]["role"] == TEXT:
        ids = tokenizer(messages[0]["content"])["input_ids"]
    elif getattr(tokenizer, "chat_template", None):
        ids = templated(tokenizer, messages, return_dict=True)["input_ids"]
    else:
        lines = (f"{message['role'].capitalize()}: {message['content']}\n" for message in messages)
        ids = tokenizer("".join(lines))["input_ids"]
    if not ids:
        raise PertokenError("the conversation is empty: the tokenizer makes no token of it")
    room = positions(model)
    if room is not None and len(ids) > room:
        raise PertokenError(
            f"a conversation of {len(ids)} tokens does not fit the model's {room} positions"
        )
    return torch.tensor([ids], dtype=torch.long, device=model.device)


def first_turn(tokenizer: Any, question: str, system: str | None = None) -> list[int]:
    """Ids up to where the first answer begins: by the chat template, or as a transcript.

    A tokenizer without a chat template gets lines of "User: …" and "Assistant:".
    """
    if not getattr(tokenizer, "chat_template", None):
        head = f"{system}\n\n" if system else ""
        return list(tokenizer(f"{head}User: {question}\nAssistant:")["input_ids"])
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return list(templated(tokenizer, messages, reply=True, return_dict=True)["input_ids"])


def next_turn(tokenizer: Any, question: str, *, closed: bool = False) -> list[int]:
    """Ids from the end of an answer to the beginning of the next: its closing tokens included.

    closed: the closing tokens have been read already, as behind `encode_conversation`.
    """
    if getattr(tokenizer, "chat_template", None):
        roles = ("user", "assistant", "user")
        contents = ("a question", _ANSWER, question)
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        text = templated(tokenizer, messages, reply=True, tokenize=False)
        before, answer, text = text.partition(_ANSWER)
        if closed:
            head = templated(tokenizer, messages[:2], tokenize=False)
            closing = head.removeprefix(before + answer)
            answer = answer if text.startswith(closing) else ""
            text = text.removeprefix(closing)
        if not answer or question.strip() not in text:
            raise PertokenError(
                "the tokenizer's chat template leaves out answers or questions of a conversation"
            )
    else:
        text = ("" if closed else "\n") + f"User: {question}\nAssistant:"
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def follow(answer: Sequence[int], turn: Sequence[int], stops: Collection[int]) -> list[int]:
    """The ids of a turn behind an answer: without its stop token where the answer brought it.

    >>> follow([7, 8, 2], [2, 5, 6], stops={2})
    [5, 6]
    >>> follow([7, 8], [2, 5, 6], stops={2})  # cut at its length limit
    [2, 5, 6]
    """
    doubled = bool(answer) and answer[-1] in stops and list(turn[:1]) == [answer[-1]]
    return list(turn[1:] if doubled else turn)


def stop_ids(model: PreTrainedModel) -> frozenset[int]:
    """The ids that end an answer, as the model's generation settings name them."""
    found = model.generation_config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list | tuple) else [int(found)])


def templated(
    tokenizer: Any, messages: Sequence[Message], *, reply: bool = False, **options: Any
) -> Any:
    """What the chat template makes of messages; PertokenError where it refuses them.

    reply: up to the opening of an answer. options: of `apply_chat_template`.
    """
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=reply, **options)
    except TemplateError as error:
        raise PertokenError(f"the chat template refuses the conversation: {error}") from None


def _rows(text: str, name: str) -> list[tuple[str, Any]]:
    """Each message, unchecked, and the place to name when it is wrong."""
    file = name.removeprefix("conversation file ")
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise PertokenError(
                f"{file}, line {error.lineno}: not JSON ({error.msg}, column {error.colno})"
            ) from None
        return [(f"{file}, message {number}", row) for number, row in enumerate(rows, 1)]
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            found.append((place, json.loads(line)))
        except json.JSONDecodeError as error:
            raise PertokenError(f"{place}: not JSON ({error.msg}, column {error.colno})") from None
    return found


def _message(row: Any, place: str, before: Sequence[Message]) -> Message:
    if not isinstance(row, dict) or not {"role", "content"} <= row.keys():
        raise PertokenError(f'{place}: {{"role": "user", "content": "…"}} is wanted')
    role, content = row["role"], row["content"]
    if role not in ROLES:
        hint = nearest(str(role), ROLES)
        raise PertokenError(f"{place}: the role is one of {', '.join(ROLES)}, not {role!r}{hint}")
    if not isinstance(content, str):
        raise PertokenError(f'{place}: "content" must hold text, not {type(content).__name__}')
    if not content.strip():
        raise PertokenError(f"{place}: the message is empty")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PertokenError(f"{place}: its character {error.start + 1} is a broken one") from None
    if role == "system" and before:
        raise PertokenError(f"{place}: a system message can only be the first")
    if role == "assistant" and (not before or before[-1]["role"] != "user"):
        raise PertokenError(f"{place}: an answer of the assistant without a question before it")
    return {"role": role, "content": content}
