"""SIFT's control flow against a scripted model: what needs no real one, and must hold exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pertoken.decode._sift_file import sift_into, sifted_in
from pertoken.decode.sift import Wording, sift, sift_all

__all__ = ["branches", "in_lockstep", "resumed"]

WORDING = Wording(
    sticker="SG {question}",
    forward="FO {question} {sticker}",
    inverse="IG {prediction}",
    both="{question} {sticker}",
    predict="{text}",
)
WAYS = list(product((True, False), repeat=3))
"""Whether the two answers agree at each of the three stages."""
_BATCH = 3  # questions together; does not divide their number, so that the last part is shorter
_STRIDE = 101  # bytes from one place at which a file is cut off to the next


class Scripted:
    """A model, as a function of messages, that answers by its script; down after so many calls."""

    def __init__(self, replies: Mapping[str, str], down_after: int | None = None) -> None:
        self._replies, self._down_after = replies, down_after
        self.asked: list[str] = []

    def __call__(self, messages: Any) -> str:
        if len(self.asked) == self._down_after:
            raise KeyboardInterrupt
        self.asked.append(messages[0]["content"])
        return self._replies[self.asked[-1]]


def script(question: str, agree: Sequence[bool]) -> dict[str, str]:
    """Message -> reply of a question, in the order of the algorithm; each names the question."""
    replies = {f"SG {question}": f"{question}S1"}
    for stage, one in enumerate(agree, 1):
        note, before = f"{question}S{stage}", f"{question}S{stage - 1}"
        if stage == 3:
            replies[f"IG {question} is 12"] = before = f"{question}S"
        if stage > 1:
            replies[f"FO {question} {before}"] = note
        replies[note] = f"by its note {question} is {10 + stage if one else 8}"
        replies[f"{question} {note}"] = f"{question} is {10 + stage}"
    return {**replies, question: f"{question} is 9"}


def scripts() -> dict[str, dict[str, str]]:
    """Two questions for each of the `WAYS`, in turns, and their scripts.

    A question and its replies hold a separator of lines, which JSON writes as it is.
    """
    ways = [WAYS[3 * place % 8] for place in range(2 * len(WAYS))]
    names = [f"{chr(97 + place)}\u2028" for place in range(len(ways))]
    return {name: script(name, agree) for name, agree in zip(names, ways, strict=True)}


def merged(some: Mapping[str, dict[str, str]]) -> dict[str, str]:
    """The replies of all questions."""
    return {message: reply for one in some.values() for message, reply in one.items()}


def branches() -> float:
    """Share of the ways that three agreements can go whose calls are the algorithm's."""
    good = 0
    for agree in WAYS:
        replies = script("Q", agree)
        model = Scripted(replies)
        sift("Q", model, wording=WORDING)
        stage = next((place for place, one in enumerate(agree) if one), 3)
        good += model.asked == list(replies)[: (3, 6, 10, 11)[stage]]
    return good / len(WAYS)


def in_lockstep() -> float:
    """Share of questions whose whole trace is the same in company as alone."""
    some = scripts()
    together = sift_all(list(some), Scripted(merged(some)), wording=WORDING).found
    alone = [sift(name, Scripted(own), wording=WORDING) for name, own in some.items()]
    return sum(one == other for one, other in zip(together, alone, strict=True)) / len(some)


def resumed() -> float:
    """Share of interruptions behind which a file becomes what it is when written at once.

    The model goes down at every one of its calls, and the file is cut off at places all over it, as
    by a kill. What goes on may ask nothing about a question whose whole line is there.
    """
    some = scripts()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "sifted.jsonl"
        calls = len(_go_on(path, some))
        whole = path.read_bytes()
        starts = [whole[:size] for size in range(0, len(whole), _STRIDE)]
        for call in range(calls):
            path.unlink(missing_ok=True)
            try:
                _go_on(path, some, call)
            except KeyboardInterrupt:
                starts.append(path.read_bytes() if path.exists() else b"")
        good = 0
        for start in starts:
            path.write_bytes(start)
            asked = set(_go_on(path, some))
            finished = list(some.values())[: start.count(b"\n")]
            again = any(asked & set(own) for own in finished)
            good += path.read_bytes() == whole and not again
    return good / len(starts)


def _go_on(
    path: Path, some: Mapping[str, dict[str, str]], down_after: int | None = None
) -> list[str]:
    """Write into a file what it lacks; the messages that were asked."""
    about = {"model": "scripted", "max_new_tokens": 1024}
    model = Scripted(merged(some), down_after)
    done = sifted_in(path, about)
    left = [name for name in some if name not in done]
    sift_into(path, left, model, done, about, batch=_BATCH, wording=WORDING)
    return model.asked
