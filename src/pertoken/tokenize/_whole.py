"""Tokenizers whose tokens are whole words or whole morphemes; what is not a token is unknown.

The vocabulary holds the special tokens, the unknown one, and the commonest words or morphemes of
the corpus. As in the paper, a word or morpheme that is not in it is cut off all the same and
becomes one unknown token: the borders are right, and what stood there is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pertoken.tokenize.train import word_splits

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["UNKNOWN", "whole_words"]

UNKNOWN = "<unk>"
Cuts = Mapping[str, Sequence[str]]


class _Cutter:
    """A pre-tokenizer that cuts words it knows into their morphemes; it cannot be saved.

    The space in front of a word stays with its first morpheme.
    """

    def __init__(self, cuts: Cuts) -> None:
        self.cuts = cuts

    def pre_tokenize(self, text: Any) -> None:
        text.split(self._split)

    def _split(self, number: int, piece: Any) -> list[Any]:
        found, start = [], 0
        for part in morphemes_of(str(piece), self.cuts):
            found.append(piece[start : start + len(part)])
            start += len(part)
        return found


def morphemes_of(word: str, cuts: Cuts) -> list[str]:
    """A word of a text, a space in front of it or not, in its morphemes; whole if unknown.

    >>> morphemes_of(" evler", {"evler": ["ev", "ler"]}), morphemes_of("xyz", {})
    ([' ev', 'ler'], ['xyz'])
    """
    inner = word.lstrip(" ")
    parts = list(cuts.get(inner, [inner]))
    return [word[: len(word) - len(inner)] + parts[0], *parts[1:]]


def whole_words(
    corpus: Sequence[str],
    size: int,
    min_frequency: int,
    special: Sequence[str],
    cuts: Cuts | None = None,
) -> Tokenizer:
    """A tokenizer of words, or of morphemes where `cuts` gives them by word.

    >>> backend = whole_words(["evler evler"], 300, 1, [], {"evler": ["ev", "ler"]})
    >>> backend.encode(" evler").tokens
    [' ev', 'ler']
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words: Counter[str] = Counter()
    steps = pre_tokenizers.Sequence(word_splits())
    for text in corpus:
        words.update(word for word, _ in steps.pre_tokenize_str(text))
    pieces: Counter[str] = Counter()
    for word, times in words.items():
        for piece in [word] if cuts is None else morphemes_of(word, cuts):
            pieces[piece] += times
    common = sorted(pieces, key=lambda each: (-pieces[each], each))
    kept = [piece for piece in common if pieces[piece] >= min_frequency]
    tokens = list(dict.fromkeys([*special, UNKNOWN, *kept]))[:size]
    vocab = {token: place for place, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    if cuts is not None:
        cutter = pre_tokenizers.PreTokenizer.custom(_Cutter(cuts))
        steps = pre_tokenizers.Sequence([*word_splits(), cutter])
    backend.pre_tokenizer = steps
    backend.decoder = decoders.Fuse()
    return backend
