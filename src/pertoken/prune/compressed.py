"""What a compression gives back: the text, what was kept, what was dropped, and why."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pertoken.errors import PertokenError
from pertoken.result import Part, Result, cells
from pertoken.signal import TokenSignal

__all__ = ["Compressed", "CompressedChat", "CompressedPrompt", "Word"]

FORMAT = 1  # of the JSON form; raised when it changes


@dataclass(frozen=True)
class Word:
    """A word of the prompt: its characters start … end, and what became of it.

    score: its salience; None where it was not rated. why: of a word dropped the reason, of a word
    kept the name of the pattern that protects it, or "".
    """

    start: int
    end: int
    text: str
    score: float | None
    kept: bool
    why: str


class Compressed(Result):
    """The forms that both results have."""

    tokens_before: int | None
    tokens_after: int | None
    notes: tuple[str, ...]

    @abstractmethod
    def titled(self) -> list[tuple[str, CompressedPrompt]]:
        """The texts compressed, each with its heading."""

    def _parts(self) -> list[Part]:
        """The words, and what became of each."""
        return [Part(repr(self), cells(self.rows()), [f"note: {note}" for note in self.notes])]

    def _page(self) -> str:
        """The prompt, with what was dropped struck out."""
        from pertoken.prune._compressed_html import page

        return page(self)

    def _repr_html_(self) -> str:
        from pertoken.prune._compressed_html import fragment

        return fragment(self)


@dataclass(frozen=True, eq=False)
class CompressedPrompt(Compressed):
    """A prompt with fewer words.

    prompt: the original. text: what is left. kept: the characters of the original it is made of,
    (start, end) in order; joined they are the text, but for a blank between two words that stood
    apart only by what was dropped. words: all words of the original. salience: what rated them.
    share: of the words, asked for. tokens_before, tokens_after: for the target tokenizer; None
    where none was given. notes: what must be known, a sentence each.
    """

    prompt: str
    text: str
    kept: tuple[tuple[int, int], ...]
    words: tuple[Word, ...]
    salience: str
    share: float
    tokens_before: int | None
    tokens_after: int | None
    notes: tuple[str, ...] = ()

    @property
    def dropped(self) -> list[Word]:
        """The words that are gone, in order, each with why."""
        return [word for word in self.words if not word.kept]

    @property
    def protected(self) -> list[Word]:
        """The words that were kept whatever their score; `why` names the pattern."""
        return [word for word in self.words if word.kept and word.why]

    @property
    def signal(self) -> TokenSignal:
        """The words' scores; as `salience` of another `compress` nothing is rated again.

        Raises PertokenError where nothing was rated: by stop words, at random, and where the share
        left nothing to choose, as with keep=1, where rounding keeps every word, and where protected
        words fill it.

        >>> from pertoken.prune import compress
        >>> scores = TokenSignal("one two six", [0.1, 3.0, 2.0], [(0, 3), (3, 7), (7, 11)], "size")
        >>> signal = compress("one two six", 0.7, salience=scores).signal
        >>> signal.values.tolist(), compress("one two six", 0.4, salience=signal).text
        ([0.1, 3.0, 2.0], 'two')
        """
        scores = [word.score for word in self.words if word.score is not None]
        if len(scores) < len(self.words) or not scores:
            raise PertokenError(
                f"{self.salience} has rated no word of this prompt: it rates none, or the share "
                "and what is protected left no choice"
            )
        spans = [(word.start, word.end) for word in self.words]
        return TokenSignal(self.prompt, np.array(scores), spans, self.salience)

    def to_dict(self) -> dict[str, Any]:
        """A JSON form."""
        return {
            "format": FORMAT,
            "salience": self.salience,
            "share": self.share,
            "prompt": self.prompt,
            "text": self.text,
            "kept": [list(span) for span in self.kept],
            "words": [asdict(word) for word in self.words],
            "tokens_before": self.tokens_before,
            "tokens_after": self.tokens_after,
            "notes": list(self.notes),
        }

    def titled(self) -> list[tuple[str, CompressedPrompt]]:
        """This one, without a heading."""
        return [("", self)]

    def rows(self) -> list[dict[str, Any]]:
        """A record per word, with the fields of `Word`."""
        return [asdict(word) for word in self.words]

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        words = f"{len(self.words) - len(self.dropped)} of {len(self.words)} words"
        return f"CompressedPrompt({_tokens(self)}{words}, {self.salience})"


@dataclass(frozen=True, eq=False)
class CompressedChat(Compressed):
    """A chat with fewer words: each message compressed by itself.

    messages: as chat templates take them. parts: each message's `CompressedPrompt`, in order.
    tokens_before, tokens_after: of the whole chat in the target tokenizer's template (of the
    messages alone where it has none); None where there is no tokenizer. notes: about the chat and
    about each message.
    """

    messages: list[dict[str, str]]
    parts: tuple[CompressedPrompt, ...]
    tokens_before: int | None
    tokens_after: int | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON form."""
        return {
            "format": FORMAT,
            "messages": self.messages,
            "parts": [part.to_dict() for part in self.parts],
            "tokens_before": self.tokens_before,
            "tokens_after": self.tokens_after,
            "notes": list(self.notes),
        }

    def titled(self) -> list[tuple[str, CompressedPrompt]]:
        """Each message with its role."""
        roles = [message["role"] for message in self.messages]
        return list(zip(roles, self.parts, strict=True))

    def rows(self) -> list[dict[str, Any]]:
        """A record per word, with the number of its message in front."""
        return [
            {"message": number, **row}
            for number, part in enumerate(self.parts)
            for row in part.rows()
        ]

    def __repr__(self) -> str:
        return f"CompressedChat({_tokens(self)}{len(self.messages)} messages)"


def _tokens(result: CompressedPrompt | CompressedChat) -> str:
    if result.tokens_before is None:
        return ""
    return f"{result.tokens_after} of {result.tokens_before} tokens, "
