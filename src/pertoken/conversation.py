"""Conversations from a file, and conversations as ids: shared by the commands about caches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pertoken.errors import PertokenError, nearest

if TYPE_CHECKING:
    import torch

__all__ = ["TEXT", "encode_conversation", "encode_turn", "read_conversation"]

TEXT = "text"
"""The role of a plain text file's one message: it goes to the model without a chat template."""

_ROLES = ("system", "user", "assistant", "tool")


def read_conversation(path: str | Path) -> list[dict[str, str]]:
    """Messages {"role", "content"} of a file, in order.

    .jsonl: one message per line, blank lines skipped; .json: a list of messages; .txt: the whole
    file as one message of the role `TEXT`. Raises PertokenError that names the file and the line.
    """
    file = Path(path)
    kind = file.suffix.lower()
    if kind not in (".jsonl", ".json", ".txt"):
        raise PertokenError(
            f"a conversation is read from a .jsonl (one message a line), .json or .txt file, "
            f"not {file}"
        )
    content = _read(file)
    if not content.strip():
        raise PertokenError(f"conversation {file} is empty")
    if kind == ".txt":
        return [{"role": TEXT, "content": content}]
    if kind == ".json":
        rows = _parse(content, str(file), 0)
        if not isinstance(rows, list):
            raise PertokenError(f"conversation {file} must be a list of messages, or a .jsonl file")
        placed = [(row, f"{file}, message {number}") for number, row in enumerate(rows, 1)]
    else:
        placed = [  # not splitlines: a JSON string may hold other line separators as they are
            (_parse(line, str(file), number), f"{file}, line {number}")
            for number, line in enumerate(content.split("\n"), 1)
            if line.strip()
        ]
    if not placed:
        raise PertokenError(f"conversation {file} holds no message")
    return [_message(row, place) for row, place in placed]


def encode_conversation(
    tokenizer: Any, model: Any, messages: list[dict[str, str]], *, reply: bool = False
) -> torch.Tensor:
    """Ids [1, time] of a conversation on the model's device, in the chat template if there is one.

    reply: end with the template's opening of the assistant's turn. Without a template a message is
    a line "role: content". Raises PertokenError for messages that the template refuses, and for
    more tokens than the model has positions.
    """
    import torch
    from jinja2 import TemplateError

    if messages[0]["role"] == TEXT:
        ids = tokenizer("".join(message["content"] for message in messages))["input_ids"]
    elif getattr(tokenizer, "chat_template", None):
        try:
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=reply, return_dict=True
            )["input_ids"]
        except TemplateError as error:
            raise PertokenError(f"the model's chat template refuses this: {error}") from None
    else:
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        ids = tokenizer("".join(lines) + ("assistant:" if reply else ""))["input_ids"]
    if not ids:
        raise PertokenError("the conversation is empty: the tokenizer makes no token of it")
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and len(ids) > room:
        raise PertokenError(
            f"a conversation of {len(ids)} tokens does not fit the model's {room} positions"
        )
    return torch.tensor([ids], dtype=torch.long, device=model.device)


def encode_turn(tokenizer: Any, text: str, *, chat: bool = True) -> list[int]:
    """Ids of a user's next message, behind a conversation that the model has read already.

    In the chat template, up to the opening of the answer; the text alone without one, or with
    chat=False. Raises PertokenError where nothing is left of it.
    """
    if chat and getattr(tokenizer, "chat_template", None):
        # What the template writes for a message depends on whether it is the first.
        before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        after = [*before, {"role": "user", "content": text}]
        head = tokenizer.apply_chat_template(before, tokenize=False)
        whole = tokenizer.apply_chat_template(after, tokenize=False, add_generation_prompt=True)
        if not whole.startswith(head):
            raise PertokenError(
                "the model's chat template rewrites earlier messages, so a message can't be added"
            )
        text = whole[len(head) :]
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise PertokenError("there is no text to continue with")
    return ids


def _read(file: Path) -> str:
    if file.is_dir():
        raise PertokenError(f"conversation {file} is a folder")
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise PertokenError(f"there is no conversation {file}") from None
    except UnicodeDecodeError as error:
        raise PertokenError(
            f"conversation {file} is not UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise PertokenError(f"conversation {file} can't be read: {error.strerror}") from None


def _parse(text: str, file: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{file}, line {line or error.lineno}"
        raise PertokenError(f"{place}: not JSON ({error.msg}, column {error.colno})") from None


def _message(row: Any, place: str) -> dict[str, str]:
    if not isinstance(row, dict):
        raise PertokenError(f'{place}: {{"role": "user", "content": "…"}} is wanted')
    for key in ("role", "content"):
        if not isinstance(row.get(key), str):
            what = "no" if key not in row else "no text as"
            raise PertokenError(f'{place}: {what} "{key}" in the message')
    if row["role"] not in _ROLES:
        raise PertokenError(
            f"{place}: unknown role {row['role']!r}{nearest(row['role'], _ROLES)}; "
            f"known: {', '.join(_ROLES)}"
        )
    try:
        row["content"].encode("utf-8")
    except UnicodeEncodeError as error:
        raise PertokenError(
            f"{place}: character {error.start + 1} of the content is a broken one"
        ) from None
    return {"role": row["role"], "content": row["content"]}
