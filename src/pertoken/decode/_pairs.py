"""Questions with both models' answers and their quality, and a file that keeps the answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pertoken._files import check_target, write_whole
from pertoken.decode.answers import Answer
from pertoken.errors import PertokenError
from pertoken.prompts import read_utf8

__all__ = ["AnswerFile", "Pair", "Quality", "contains", "exact_match", "judged"]

Quality = Callable[[str, str], float]
"""(answer, reference) -> 0 … 1."""


@dataclass(frozen=True)
class Pair:
    """A question, both answers to it and their quality in 0 … 1; None for what was not asked.

    early: the large model's early layer on the question, for rules that read it.
    """

    prompt: str
    small: Answer
    large: Answer | None = None
    small_quality: float | None = None
    large_quality: float | None = None
    early: tuple[float, ...] = ()


def exact_match(answer: str, reference: str) -> float:
    """1 where the answer is the reference, less capitals, outer punctuation and blanks.

    >>> exact_match(" The  Hague.", "the hague"), exact_match("Hague", "the hague")
    (1.0, 0.0)
    """
    return float(_normal(answer) == _normal(reference))


def contains(answer: str, reference: str) -> float:
    """1 where the reference stands in the answer as whole words.

    >>> contains("It is The Hague, I think.", "the Hague"), contains("Haguenau", "Hague")
    (1.0, 0.0)
    """
    return float(f" {_normal(reference)} " in f" {_normal(answer)} ")


def _normal(text: str) -> str:
    words = (word.strip(".,;:!?\"'()[]*") for word in text.casefold().split())
    return " ".join(word for word in words if word)


def judged(pair: Pair, reference: str, quality: Quality) -> Pair:
    """The pair with the quality of its answers; PertokenError for one outside 0 … 1."""
    found = []
    for answer in (pair.small, pair.large):
        value = None if answer is None else float(quality(answer.text, reference))
        if value is not None and not 0 <= value <= 1:
            raise PertokenError(f"a quality is a number from 0 to 1, got {value}")
        found.append(value)
    return Pair(pair.prompt, pair.small, pair.large, found[0], found[1], pair.early)


class AnswerFile:
    """Answers kept in a file of JSON lines, so that an interrupted run asks for the rest only.

    The first line says who answered and how; a line cut short by a crash is written anew.

    Raises PertokenError for a file of other models or settings, and for one that is none.
    """

    def __init__(self, path: str | Path | None, head: dict[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self.pairs: dict[str, Pair] = {}
        if self._path is None:
            return
        text = read_utf8(self._path, "file of answers") if self._path.exists() else ""
        if not text:
            check_target(self._path)
            write_whole(self._path, json.dumps(head) + "\n")
            return
        first, *lines = text.split("\n")
        self._check(self._parse(first, "cascade"), head)
        for line in lines[:-1]:
            pair = _pair(self._parse(line, "small"))
            self.pairs[pair.prompt] = pair
        if not lines or lines[-1]:  # cut short
            write_whole(self._path, "\n".join((first, *lines[:-1], "")))

    def add(self, pairs: Sequence[Pair]) -> None:
        """Keep these too, on the disk at once."""
        self.pairs |= {pair.prompt: pair for pair in pairs}
        # In ASCII: a crash can then cut a line short, but no letter.
        rows = [json.dumps(_row(pair)) + "\n" for pair in pairs]
        if self._path is None:
            return
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(rows))
        except OSError as error:
            raise PertokenError(f"can't write {self._path}: {error.strerror}") from None

    def _parse(self, line: str, key: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or key not in row:
            raise PertokenError(f"{self._path} is no file of answers: name another one") from None
        return row

    def _check(self, found: dict[str, Any], head: dict[str, Any]) -> None:
        for name, value in head.items():
            if found.get(name) != value:
                raise PertokenError(
                    f"the answers in {self._path} were given with {name} {found.get(name)!r}, not "
                    f"{value!r}: name another file"
                )


def _row(pair: Pair) -> dict[str, Any]:
    answers = {"small": pair.small, "large": pair.large}
    kept = {name: vars(one) for name, one in answers.items() if one is not None}
    return {"prompt": pair.prompt, **kept, "early": pair.early}


def _pair(row: dict[str, Any]) -> Pair:
    small, large = (
        Answer(one["text"], tuple(one["logprobs"]), tuple(one["state"])) if one else None
        for one in (row["small"], row.get("large"))
    )
    assert small is not None
    return Pair(row["prompt"], small, large, early=tuple(row["early"]))
