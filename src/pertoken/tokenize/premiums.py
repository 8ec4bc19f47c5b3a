"""Token premiums: how many more tokens the same text takes in one language than in another.

The corpus token count (CTC) of a language is the number of tokens of its side of a parallel text,
taken line by line, without special tokens, in Unicode's normal form C for every tokenizer alike.
Its token premium is its CTC over that of the reference language; its byte premium the same in
bytes of UTF-8, which a tokenizer that knows only bytes would have. Line breaks are not counted.

Paper: Arnett et al., arXiv 2510.21909; premiums after Petrov et al., arXiv 2305.15425.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from unicodedata import normalize

from pertoken._bootstrap import Interval, bootstrap_ratio
from pertoken._extras import need
from pertoken.errors import PertokenError, nearest
from pertoken.result import Part, Result, figure

__all__ = ["Premiums", "corpus_token_counts", "token_premiums"]


def corpus_token_counts(tokenizer: Any, texts: Iterable[str]) -> list[int]:
    """Tokens of each text, line by line, without special tokens; their sum is the CTC.

    tokenizer: one of transformers, fast or not, or a `tokenizers.Tokenizer`; it is left as it was.

    >>> from pertoken.testing import ByteTokenizer
    >>> corpus_token_counts(ByteTokenizer(), ["abc", "a\\nb", ""])
    [3, 2, 0]
    """
    lines: list[str] = []
    ends = [0]
    for text in texts:
        lines += [line for line in normalize("NFC", text).split("\n") if line]
        ends.append(len(lines))
    counts = _line_counts(tokenizer, lines)
    return [sum(counts[start:end]) for start, end in pairwise(ends)]


def _line_counts(tokenizer: Any, lines: list[str]) -> list[int]:
    if not lines:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "encode_batch_fast"):  # written in Python
        return [len(ids) for ids in tokenizer(lines, add_special_tokens=False)["input_ids"]]
    padding, truncation = backend.padding, backend.truncation
    backend.no_padding()
    backend.no_truncation()
    try:
        # Fast: without offsets.
        return [len(each) for each in backend.encode_batch_fast(lines, add_special_tokens=False)]
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)


def byte_counts(texts: Iterable[str]) -> list[int]:
    """Bytes of UTF-8 of each text, counted over the same lines as the tokens.

    >>> byte_counts(["é", "a\\nb"])
    [2, 2]
    """
    return [len(normalize("NFC", text).replace("\n", "").encode()) for text in texts]


@dataclass(frozen=True)
class Premiums(Result):
    """What one tokenizer charges each language for the same texts.

    reference: the language that the premiums are over.
    tokens, bytes: for each language the counts of its texts, in the order of the texts.
    """

    reference: str
    tokens: dict[str, list[int]]
    bytes: dict[str, list[int]]

    _title = "Token premiums"

    def count(self, language: str) -> int:
        """The corpus token count."""
        return sum(self.tokens[self._known(language)])

    def premium(self, language: str) -> float:
        """Tokens over the reference's tokens."""
        return self.count(language) / self.count(self.reference)

    def byte_premium(self, language: str) -> float:
        """Bytes over the reference's bytes."""
        return sum(self.bytes[self._known(language)]) / sum(self.bytes[self.reference])

    def bytes_per_token(self, language: str) -> float:
        """How much text a token holds."""
        return sum(self.bytes[self._known(language)]) / self.count(language)

    def interval(self, language: str, seed: int = 0) -> Interval:
        """How far the premium would move with other texts: a 95 % bootstrap over the texts."""
        own = self.tokens[self._known(language)]
        return bootstrap_ratio(own, self.tokens[self.reference], seed=seed)

    def _known(self, language: str) -> str:
        if language not in self.tokens:
            hint = nearest(language, self.tokens)
            raise PertokenError(f"no text of language {language!r} was counted{hint}")
        return language

    def to_dict(self) -> dict[str, Any]:
        """The rows, and the counts of each text that they are made of."""
        return {
            "reference": self.reference,
            "rows": self.rows(),
            "tokens": self.tokens,
            "bytes": self.bytes,
        }

    def rows(self) -> list[dict[str, Any]]:
        """A record per language, the dearest first."""
        rows = [
            {
                "language": language,
                "tokens": self.count(language),
                "premium": self.premium(language),
                "byte_premium": self.byte_premium(language),
                "bytes_per_token": self.bytes_per_token(language),
            }
            for language in self.tokens
        ]
        return sorted(rows, key=lambda row: -row["premium"])

    def plot(self) -> Any:
        """Token premium over byte premium, a point per language: a plotly figure (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        rows = self.rows()
        points = graph.Scatter(
            x=[row["byte_premium"] for row in rows],
            y=[row["premium"] for row in rows],
            text=[row["language"] for row in rows],
            mode="markers",
        )
        return figure(
            points,
            title=f"premiums over {self.reference}",
            xaxis={"title": "byte premium", "rangemode": "tozero"},
            yaxis={"title": "token premium", "rangemode": "tozero"},
        )

    def _parts(self) -> list[Part]:
        """A line per language, the dearest first."""
        head = ["language", "tokens", "premium", "byte premium", "bytes per token"]
        lines = [
            [row["language"], str(row["tokens"])]
            + [f"{row[key]:.2f}" for key in ("premium", "byte_premium", "bytes_per_token")]
            for row in self.rows()
        ]
        return [Part("", [head, *lines])]


def token_premiums(
    texts: Mapping[str, Sequence[str]], tokenizer: Any, reference: str = "eng"
) -> Premiums:
    """What each language pays for the same texts, over what the reference language pays.

    texts: for each language the same texts in the same order: articles, or lines.
    tokenizer: of transformers or of `tokenizers`.

    Raises PertokenError where the reference is not among the languages, where the languages do
    not have the same number of texts, and where a language has no text.

    >>> from pertoken.testing import ByteTokenizer
    >>> texts = {"eng": ["free", "equal"], "ell": ["δωρεάν", "ίσοι"]}
    >>> found = token_premiums(texts, ByteTokenizer())
    >>> round(found.premium("ell"), 2), round(found.byte_premium("ell"), 2)
    (2.22, 2.22)
    """
    if reference not in texts:
        raise PertokenError(f"no text of the reference {reference!r}{nearest(reference, texts)}")
    wanted = len(texts[reference])
    for language, own in texts.items():
        if isinstance(own, str) or len(own) != wanted:
            number = "one string" if isinstance(own, str) else f"{len(own)} texts"
            raise PertokenError(
                f"premiums take the same texts in every language: {language} has {number}, "
                f"{reference} {wanted}"
            )
        if not any(text.strip() for text in own):
            raise PertokenError(f"there is no text of {language}")
    # All languages in one batch: a tokenizer shares the lines out over its threads.
    every = corpus_token_counts(tokenizer, [text for own in texts.values() for text in own])
    starts = range(0, len(every), wanted)
    return Premiums(
        reference,
        {name: every[at : at + wanted] for name, at in zip(texts, starts, strict=True)},
        {name: byte_counts(own) for name, own in texts.items()},
    )
