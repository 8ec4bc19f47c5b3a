"""Questions with both models' answers and their quality, and a file that keeps the answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

    The first line says who answered and how. Each further one holds a question with the small
    model's answer, the large one's, or both. A line cut short by a crash is dropped.

    Raises PertokenError for a file of other models or settings, and for one that is none.
    """

    def __init__(self, path: str | Path | None, head: dict[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._head = head
        self.pairs: dict[str, Pair] = {}
        if self._path is None:
            return
        text = read_utf8(self._path, "file of answers") if self._path.exists() else ""
        if not text:
            check_target(self._path)
            return
        first, *lines = text.split("\n")
        self._check(self._parse(first, "cascade"))
        for line in lines[:-1]:
            self._take(self._parse(line, "prompt"))
        if not lines or lines[-1]:  # cut short
            write_whole(self._path, "\n".join((first, *lines[:-1], "")))

    def add(self, pairs: Sequence[Pair]) -> None:
        """Keep these too, on the disk at once; of what is known the large model's answer alone."""
        # In ASCII: a crash can then cut a line short, but no letter.
        rows = [json.dumps(_row(pair, pair.prompt in self.pairs)) + "\n" for pair in pairs]
        self.pairs |= {pair.prompt: pair for pair in pairs}
        if self._path is None:
            return
        if not self._path.exists():
            write_whole(self._path, json.dumps(self._head) + "\n")
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(rows))
        except OSError as error:
            raise PertokenError(f"can't write {self._path}: {error.strerror}") from None

    @contextmanager
    def hinting(self) -> Iterator[None]:
        """Adds to an error of the models how to go on behind what is kept."""
        try:
            yield
        except PertokenError as error:
            if not self.pairs:
                raise
            hint = "are lost: give a file (path=, --answers), and a second run goes on"
            if self._path is not None:
                hint = f"are in {self._path}: run it again to go on"
            raise PertokenError(f"{error}; {len(self.pairs)} questions {hint}") from None

    def _take(self, row: dict[str, Any]) -> None:
        try:
            known = self.pairs.get(row["prompt"])
            small = _answer(row["small"]) if known is None else known.small
            large = _answer(row["large"]) if "large" in row else None
            early = tuple(row["early"]) if known is None else known.early
        except (KeyError, TypeError):
            raise PertokenError(f"{self._path} is no file of answers: name another one") from None
        self.pairs[row["prompt"]] = Pair(row["prompt"], small, large, early=early)

    def _parse(self, line: str, key: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or key not in row:
            raise PertokenError(f"{self._path} is no file of answers: name another one") from None
        return row

    def _check(self, found: dict[str, Any]) -> None:
        for name, value in self._head.items():
            if found.get(name) != value:
                raise PertokenError(
                    f"the answers in {self._path} were given with {name} {found.get(name)!r}, not "
                    f"{value!r}: name another file (path=, --answers)"
                )


def _row(pair: Pair, known: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": pair.prompt}
    if not known:
        row |= {"small": vars(pair.small), "early": pair.early}
    return row if pair.large is None else row | {"large": vars(pair.large)}


def _answer(row: dict[str, Any]) -> Answer:
    return Answer(row["text"], tuple(row["logprobs"]), tuple(row["state"]))
