"""Prompts from a file, and prompts as ids: shared by `compare` and `verify`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pertoken.errors import PertokenError, nearest

if TYPE_CHECKING:
    import torch

__all__ = [
    "Prompt",
    "check_ids",
    "check_utf8",
    "encode_prompt",
    "positions",
    "read_prompts",
    "read_utf8",
]

_TEXT_KEYS = ("prompt", "text", "turns")


@dataclass(frozen=True)
class Prompt:
    """One prompt; category, id and the right answer are empty where the file names none."""

    text: str
    category: str = ""
    id: str = ""
    answer: str = ""


def read_prompts(path: str | Path | None, limit: int | None = None) -> list[Prompt]:
    """Prompts of a file, at most `limit` of them; the built-in sample for `None`.

    .txt: one prompt per line, blank lines skipped. .jsonl: one object per line with "prompt",
    "text" or "turns" (a list, of which the first is taken, as in Spec-Bench), and if you like
    "category", "id" or "question_id", and the right "answer". Raises `PertokenError` that names the
    file and line.
    """
    if limit is not None and limit < 1:
        raise PertokenError(f"the limit of prompts must be 1 or more, got {limit}")
    if path is None:
        from pertoken.samples import SAMPLE

        return list(SAMPLE)[:limit]
    file = Path(path)
    content = read_utf8(file, "prompt file")
    if file.suffix.lower() not in (".txt", ".jsonl"):
        raise PertokenError(f"prompts are read from .txt (one a line) or .jsonl files, not {file}")
    rows = enumerate(content.split("\n"), 1)  # JSON may hold U+2028, where splitlines cuts
    lines = [(number, line) for number, line in rows if line.strip()]
    if not lines:
        raise PertokenError(f"prompt file {file} is empty")
    if file.suffix.lower() == ".txt":
        return [Prompt(line.strip(), id=str(number)) for number, line in lines][:limit]
    # Every line is checked, also those behind the limit: a broken file is broken at once.
    return [_from_json(line, f"{file}, line {number}", number) for number, line in lines][:limit]


def encode_prompt(
    tokenizer: Any, model: Any, text: str, max_new_tokens: int, chat: bool = True
) -> torch.Tensor:
    """Ids [1, time] of a prompt on the model's device, in the chat template if there is one.

    Raises `PertokenError` for an empty prompt, broken text, a chat that the template refuses, a
    tokenizer of another model, and a prompt that, with `max_new_tokens`, is longer than the model's
    positions.
    """
    import torch

    from pertoken.conversation import templated

    if not text.strip():
        raise PertokenError("the prompt is empty")
    check_utf8(text, "the prompt")
    if chat and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": text}]
        encoded = templated(tokenizer, messages, reply=True, return_dict=True)["input_ids"]
    else:
        encoded = tokenizer(text)["input_ids"]
    if not encoded:
        raise PertokenError("the prompt is empty: the tokenizer makes no token of it")
    check_ids(model, encoded)
    room = positions(model)
    if room is not None and len(encoded) + max_new_tokens > room:
        raise PertokenError(
            f"prompt of {len(encoded)} tokens and {max_new_tokens} new ones do not fit the "
            f"model's {room} positions; shorten the prompt or --max-new-tokens"
        )
    return torch.tensor([encoded], dtype=torch.long, device=model.device)


def positions(model: Any) -> int | None:
    """Tokens the model reads at once, special ones counted; None where nothing says how many."""
    import torch

    config = model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None)
    # RoBERTa's positions begin behind the padding id, and its tables are larger by as much.
    behind = room is not None and any(
        isinstance(module, torch.nn.Embedding)
        and module.num_embeddings == room
        and module.padding_idx is not None
        for name, module in model.named_modules()
        if name.endswith("position_embeddings")
    )
    return room - config.pad_token_id - 1 if room is not None and behind else room


def check_ids(model: Any, ids: Iterable[int]) -> None:
    """Raise PertokenError for ids of a tokenizer that is not the model's: it has no rows for them.

    >>> from pertoken.testing import tiny_model
    >>> check_ids(tiny_model("llama"), [5, 63])
    """
    highest, rows = max(ids, default=0), model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise PertokenError(
            f"the tokenizer gives the id {highest}, but the model knows {rows} ids: they do not "
            "belong together"
        )


def check_utf8(text: str, what: str) -> None:
    """Raise PertokenError, with `what` it is, for a text that could not be written as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PertokenError(
            f"{what} is not UTF-8 text: its character {error.start + 1} is a broken one"
        ) from None


def read_utf8(file: Path, what: str, *, exact: bool = False) -> str:
    """The text of a file that the user named; PertokenError, with `what` it is, if there is none.

    A byte order mark at the beginning is dropped and every line break becomes "\\n"; with `exact`
    both stay as they are.
    """
    if not file.exists():
        raise PertokenError(f"there is no {what} {file}")
    if file.is_dir():
        raise PertokenError(f"{what} {file} is a folder")
    try:
        if exact:
            return file.read_bytes().decode("utf-8")
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PertokenError(
            f"{what} {file} is not UTF-8 (byte {error.start + 1}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise PertokenError(f"{what} {file} can't be read: {error.strerror}") from None


def _from_json(line: str, place: str, number: int) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PertokenError(f"{place}: not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(row, dict):
        raise PertokenError(f'{place}: an object such as {{"prompt": "…"}} is wanted')
    key = next((key for key in _TEXT_KEYS if key in row), None)
    if key is None:
        has = ", ".join(map(repr, row)) or "nothing"
        hint = next((n for n in (nearest(str(k), _TEXT_KEYS) for k in row) if n), "")
        raise PertokenError(f'{place}: no "prompt", "text" or "turns" in it, only {has}{hint}')
    text = row[key]
    if key == "turns":
        text = text[0] if isinstance(text, list) and text else text
    if not isinstance(text, str):
        raise PertokenError(f'{place}: "{key}" must hold text, not {type(text).__name__}')
    if not text.strip():
        raise PertokenError(f"{place}: the prompt is empty")
    name = row.get("id", row.get("question_id", number))
    answer = row.get("answer")
    answer = str(answer) if isinstance(answer, str | int | float) else ""
    return Prompt(text, category=str(row.get("category") or ""), id=str(name), answer=answer)
