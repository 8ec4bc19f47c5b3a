"""SIFT: answers that stick to the facts of the question (arXiv 2502.14922, Algorithms 1 and 2).

The model writes a sticker, a list of the question's conditions and the question in one sentence,
and answers twice: from the sticker alone, and from question and sticker. Do the answers agree, the
second is the answer (consensus prediction, CP). If not, the sticker is made better against the
question (forward optimization, FO), and then made anew from the prediction (inverse generation, IG)
and made better again; each time the two answers are asked for. Without a consensus at the end the
answer is the one to the question alone; there is no vote.

    S1 = SG(Q);            CP(Q, S1)        stage 1
    S2 = FO(Q, S1);        CP(Q, S2)        stage 2
    S3 = FO(Q, IG(P2));    CP(Q, S3)        stage 3, P2: the text of the second answer of stage 2
    LLM(Q)

That is 3, 6, 10 or 11 calls. Every call sees its own message and no history. The authors' prompts
are not used: ours stand in `WORDING`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pertoken._answers import answer_of, equivalent, number_of
from pertoken._chat import Said, asker
from pertoken.decode._sift_wording import HEADING, WORDING, Wording
from pertoken.errors import PertokenError
from pertoken.result import Part, Result, plain

__all__ = ["WORDING", "SiftStep", "Sifted", "SiftedAll", "Wording", "clean", "sift", "sift_all"]

Progress = Callable[[str, int, int], None]
DIRECT = "no consensus: the direct answer"


@dataclass(frozen=True)
class SiftStep:
    """One call.

    what: "sticker", "from sticker", "from both", "forward", "inverse" or "direct". text: the reply,
    of a sticker cleaned. answer: of a prediction. tokens: written, None where that is not known.
    """

    stage: int
    what: str
    text: str
    answer: str | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Sifted(Result):
    """What came of a question: the answer, why it ended there, and every call."""

    question: str
    answer: str | None
    """None where the last text held none."""
    ended: str
    """"consensus at stage 1", 2 or 3, or that there was none."""
    steps: tuple[SiftStep, ...]

    _title = "A question, sifted"

    @property
    def stage(self) -> int | None:
        """The stage of the consensus, None without one."""
        return None if self.ended == DIRECT else self.steps[-1].stage

    @property
    def stickers(self) -> list[str]:
        """The stickers in the order they were made."""
        return [one.text for one in self.steps if one.what in ("sticker", "forward", "inverse")]

    @property
    def calls(self) -> int:
        """How often the model was asked."""
        return len(self.steps)

    @property
    def tokens(self) -> int | None:
        """Tokens written, None where they are not known."""
        known = [one.tokens for one in self.steps if one.tokens is not None]
        return sum(known) if len(known) == len(self.steps) else None

    def rows(self) -> list[dict[str, Any]]:
        """A record per call."""
        return [plain(asdict(step)) for step in self.steps]

    def to_dict(self) -> dict[str, Any]:
        """Question, answer, why it ended, and the calls as `steps`."""
        found = {"question": self.question, "answer": self.answer, "ended": self.ended}
        return {**found, "calls": self.calls, "tokens": self.tokens, "steps": self.rows()}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Sifted:
        """What `to_dict` gave; KeyError or TypeError for anything else."""
        steps = tuple(SiftStep(**step) for step in found["steps"])
        return cls(found["question"], found["answer"], found["ended"], steps)

    def _parts(self) -> list[Part]:
        lines = [["stage", "what", "answer"]]
        lines += [[str(one.stage), one.what, one.answer or ""] for one in self.steps]
        return [Part("", lines, [f"{self.answer or 'no answer'} ({self.ended})"])]


@dataclass(frozen=True)
class SiftedAll(Result):
    """Many questions. answers: the right ones, None where they are not known."""

    found: tuple[Sifted, ...]
    answers: tuple[str | None, ...] = ()

    _title = "Questions, sifted"

    @property
    def without_number(self) -> int:
        """Questions whose answer is no number."""
        return sum(number_of(one.answer) is None for one in self.found)

    @property
    def accuracy(self) -> float | None:
        """Share of right answers among the questions whose answer is known; None without one."""
        judged = [one["right"] for one in self.rows() if one["right"] is not None]
        return sum(judged) / len(judged) if judged else None

    def rows(self) -> list[dict[str, Any]]:
        """A record per question."""
        answers = self.answers or (None,) * len(self.found)
        return [
            {
                "question": one.question,
                "answer": one.answer,
                "right": None if answer is None else equivalent(one.answer, answer),
                "ended": one.ended,
                "calls": one.calls,
                "tokens": one.tokens,
            }
            for one, answer in zip(self.found, answers, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The questions with all their calls, and the counts over them."""
        return {
            "questions": [one.to_dict() for one in self.found],
            "ended": self.ended,
            "without_number": self.without_number,
            "accuracy": self.accuracy,
        }

    @property
    def ended(self) -> dict[str, int]:
        """How many questions ended where."""
        return dict(sorted(Counter(one.ended for one in self.found).items()))

    def _parts(self) -> list[Part]:
        lines = [["question", "answer", "ended", "calls", "tokens"]]
        for one in self.found:
            short = " ".join(one.question.split())
            short = short if len(short) <= 50 else f"{short[:49]}…"
            tokens = "-" if one.tokens is None else str(one.tokens)
            lines.append([short, one.answer or "-", one.ended, str(one.calls), tokens])
        notes = [f"{ended}: {count}" for ended, count in self.ended.items()]
        notes.append(f"answers without a number: {self.without_number} of {len(self.found)}")
        if self.accuracy is not None:
            notes.append(f"right: {self.accuracy:.1%}")
        return [Part("", lines, notes)]


def sift(
    question: str,
    model: Any,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 1024,
    wording: Wording = WORDING,
) -> Sifted:
    """Answer a question through stickers (arXiv 2502.14922), greedily.

    model: a model of transformers with its `tokenizer`, an `Endpoint`, or a function of messages
        ({"role", "content"}) that gives the text of the reply.
    max_new_tokens: of each reply; the paper's is 1024.
    Raises PertokenError for an empty question and for a model that cannot be asked.

    >>> replies = iter(["**Conditions:**\\\\n1. 2 cats", r"\\boxed{2}", "There are 2."])
    >>> found = sift("There are 2 cats. How many?", lambda messages: next(replies))
    >>> found.answer, found.ended, found.calls
    ('2', 'consensus at stage 1', 3)
    """
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": max_new_tokens}
    return sift_all([question], model, wording=wording, **options).found[0]


def sift_all(
    questions: Sequence[str],
    model: Any,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 1024,
    batch: int = 8,
    wording: Wording = WORDING,
    progress: Progress | None = None,
) -> SiftedAll:
    """`sift` for many questions, which go through the stages together.

    batch: messages that a local model answers at once, or requests to an endpoint at a time.
    progress: called with (what, questions done, questions in all).
    Raises PertokenError as `sift`.
    """
    for place, question in enumerate(questions, 1):
        if not question.strip():
            raise PertokenError(f"question {place} is empty")
    ask = asker(model, tokenizer, max_new_tokens, batch)
    runs = [_run(question, wording) for question in questions]
    wanted = [next(run) for run in runs]
    found: list[Sifted | None] = [None] * len(runs)
    while open_runs := [place for place, one in enumerate(found) if one is None]:
        if progress is not None:
            progress("questions", len(found) - len(open_runs), len(found))
        replies = iter(ask([text for place in open_runs for text in wanted[place]]))
        for place in open_runs:
            try:
                wanted[place] = runs[place].send([next(replies) for _ in wanted[place]])
            except StopIteration as end:
                found[place] = end.value
    return SiftedAll(tuple(one for one in found if one is not None))


_Run = Generator[list[str], list[Said], Sifted]
"""Gives messages that may be asked at once, takes their replies, and returns what came of it."""


def _run(question: str, wording: Wording) -> _Run:
    """The algorithm for one question."""
    steps: list[SiftStep] = []

    def sticker(stage: int, what: str, text: str) -> Generator[list[str], list[Said], str]:
        (said,) = yield [text]
        steps.append(SiftStep(stage, what, clean(said.text), tokens=said.tokens))
        return steps[-1].text

    def predict(stage: int, texts: dict[str, str]) -> Generator[list[str], list[Said], None]:
        said = yield [wording.predict.format(text=text) for text in texts.values()]
        for what, one in zip(texts, said, strict=True):
            steps.append(SiftStep(stage, what, one.text, answer_of(one.text), one.tokens))

    note = yield from sticker(1, "sticker", wording.sticker.format(question=question))
    for stage in (1, 2, 3):
        if stage == 3:
            inverse = wording.inverse.format(prediction=steps[-1].text)
            note = yield from sticker(3, "inverse", inverse)
        if stage > 1:
            forward = wording.forward.format(question=question, sticker=note)
            note = yield from sticker(stage, "forward", forward)
        both = wording.both.format(question=question, sticker=note)
        yield from predict(stage, {"from sticker": note, "from both": both})
        if equivalent(steps[-2].answer, steps[-1].answer):
            ended = f"consensus at stage {stage}"
            return Sifted(question, steps[-1].answer, ended, tuple(steps))
    yield from predict(3, {"direct": question})
    return Sifted(question, steps[-1].answer, DIRECT, tuple(steps))


def clean(text: str) -> str:
    """A sticker out of a reply: from its conditions to the fence behind them, else all of it.

    >>> clean("Here it is:\\n```\\n**Conditions:**\\n1. A\\n```\\nBye"), clean(" none ")
    ('**Conditions:**\\n1. A', 'none')
    """
    _, heading, rest = text.partition(HEADING)
    if not heading:
        return text.strip()
    rest = re.split(f"```|{re.escape(HEADING)}", rest)[0]
    return f"{heading}{rest}".strip()
