"""Worked answers to learn from: read from a file, checked, and turned into ids and labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pertoken.conversation import check_messages
from pertoken.errors import PertokenError
from pertoken.prompts import check_utf8, read_utf8

__all__ = [
    "Lesson",
    "Pair",
    "data_hash",
    "encode_lesson",
    "prompt_ids",
    "read_lessons",
    "read_pairs",
]

IGNORED = -100  # the label of what is not learned
_PROMPTS, _ANSWERS = ("prompt", "question"), ("completion", "answer")


@dataclass(frozen=True)
class Lesson:
    """A prompt and the answer to be learned.

    place: where it was read, for errors. messages: the turns before the answer where the file has
    some, else the prompt is one. weights: numbers for the answer's tokens, None for none.
    """

    prompt: str
    answer: str
    place: str = "a lesson"
    messages: Sequence[dict[str, str]] = ()
    weights: Sequence[float] | None = None


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer; place: where it was read, for errors."""

    prompt: str
    chosen: str
    rejected: str
    place: str = "a pair"


def read_lessons(
    path: str | Path, limit: int | None = None, weights: str | None = None
) -> list[Lesson]:
    """The lessons of a .jsonl file, at most `limit` of them.

    A line is {"prompt", "completion"}, {"question", "answer"}, or {"messages"} that end with the
    assistant's, which is learned. weights: the name of a further field, a list of numbers.
    PertokenError names the file and line: not JSON, a field that is missing or no text, an answer
    that is empty.
    """
    rows = _rows(path, "lessons", '{"prompt": "…", "completion": "…"}')
    return [_lesson(row, place, weights) for row, place in rows][:limit]


def read_pairs(path: str | Path, limit: int | None = None) -> list[Pair]:
    """The pairs of a .jsonl file of {"prompt" or "question", "chosen", "rejected"} lines.

    PertokenError as of `read_lessons`, and for two answers that are the same.
    """
    found = []
    for row, place in _rows(path, "pairs", '{"prompt": "…", "chosen": "…", "rejected": "…"}'):
        prompt = _text(row, _PROMPTS, place)
        chosen, rejected = (_text(row, [side], place) for side in ("chosen", "rejected"))
        found.append(Pair(prompt, chosen, rejected, place))
        if found[-1].chosen == found[-1].rejected:
            raise PertokenError(f"{place}: chosen and rejected are the same text")
    return found[:limit]


def data_hash(rows: Sequence[Lesson | Pair]) -> str:
    """16 hexadecimal digits (of sha256) of what lessons or pairs say, wherever they were read.

    >>> data_hash([Lesson("1+1=", "2", "here")]) == data_hash([Lesson("1+1=", "2", "there")])
    True
    """
    told = json.dumps([{**asdict(one), "place": None} for one in rows])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def encode_lesson(
    lesson: Lesson, tokenizer: Any, *, chat: bool = True, max_length: int | None = None
) -> tuple[list[int], list[int]]:
    """Ids and labels [time] of a lesson: prompt, answer, stop token; labels of the prompt are -100.

    chat: in the chat template, if the tokenizer has one. max_length: tokens that stay, from the
    beginning. PertokenError for messages without a template, and where no token of the answer is
    left.

    >>> from pertoken.testing import ByteTokenizer
    >>> ids, labels = encode_lesson(Lesson("1+1=", "2"), ByteTokenizer())
    >>> len(ids), labels[:4], labels[4:] == ids[4:]
    (6, [-100, -100, -100, -100], True)
    """
    before = prompt_ids(lesson, tokenizer, chat=chat)
    answer = tokenizer(lesson.answer, add_special_tokens=False)["input_ids"]
    answer = [*answer, tokenizer.eos_token_id]
    ids = [*before, *answer][:max_length]
    if len(ids) <= len(before):
        raise PertokenError(
            f"{lesson.place}: the prompt alone has {len(before)} tokens, and {max_length} stay: no "
            "token of the answer is left to learn; raise max_length, or leave it out"
        )
    return ids, [IGNORED] * len(before) + ids[len(before) :]


def prompt_ids(lesson: Lesson, tokenizer: Any, *, chat: bool = True) -> list[int]:
    """Ids [time] of what stands before the answer; arguments and errors as of `encode_lesson`."""
    if chat and getattr(tokenizer, "chat_template", None):
        messages = list(lesson.messages) or [{"role": "user", "content": lesson.prompt}]
        found = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )["input_ids"]
    elif lesson.messages:
        raise PertokenError(
            f'{lesson.place}: messages need a chat template; give "prompt" and "completion"'
        )
    else:
        found = tokenizer(lesson.prompt)["input_ids"]
    if not found:
        raise PertokenError(f"{lesson.place}: the prompt is empty: no token can be predicted by it")
    return list(found)


def _rows(path: str | Path, what: str, form: str) -> list[tuple[dict[str, Any], str]]:
    """The objects of a .jsonl file, and where each stands."""
    file = Path(path)
    content = read_utf8(file, "data file")
    if file.suffix.lower() != ".jsonl":
        raise PertokenError(f"{what} are read from .jsonl files, not {file}")
    found = []
    for number, line in enumerate(content.split("\n"), 1):  # JSON may hold U+2028
        place = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PertokenError(f"{place}: not JSON ({error.msg}, column {error.colno})") from None
        if not isinstance(row, dict):
            raise PertokenError(f"{place}: an object such as {form} is wanted")
        found.append((row, place))
    if not found:
        raise PertokenError(f"data file {file} is empty")
    return found


def _lesson(row: dict[str, Any], place: str, weights: str | None) -> Lesson:
    numbers = None if weights is None else _weights(row, weights, place)
    if "messages" in row:
        return _conversation(row["messages"], place, numbers)
    prompt, answer = (_text(row, names, place) for names in (_PROMPTS, _ANSWERS))
    return Lesson(prompt, answer, place, weights=numbers)


def _text(row: dict[str, Any], names: Sequence[str], place: str) -> str:
    name = next((one for one in names if one in row), None)
    if name is None:
        has = ", ".join(map(repr, row)) or "nothing"
        wanted = " or ".join(f'"{one}"' for one in names)
        raise PertokenError(f"{place}: no {wanted} in it, only {has}")
    text = row[name]
    if not isinstance(text, str) or not text.strip():
        raise PertokenError(f'{place}: "{name}" must hold some text')
    check_utf8(text, f'{place}: "{name}"')
    return text


def _conversation(given: Any, place: str, weights: list[float] | None) -> Lesson:
    if not isinstance(given, list) or not given:
        raise PertokenError(f'{place}: "messages" must be a list of {{"role", "content"}}')
    rows = [(f"{place}, message {number}", one) for number, one in enumerate(given, 1)]
    messages = check_messages(rows, place)
    if messages[-1]["role"] != "assistant":
        raise PertokenError(f"{place}: the last message must be the assistant's, to be learned")
    before = messages[:-1]
    return Lesson(before[-1]["content"], messages[-1]["content"], place, before, weights)


def _weights(row: dict[str, Any], name: str, place: str) -> list[float]:
    given = row.get(name)
    if not isinstance(given, list) or not all(type(one) in (int, float) for one in given):
        raise PertokenError(f'{place}: "{name}" must be a list of numbers, one per answer token')
    return [float(one) for one in given]
