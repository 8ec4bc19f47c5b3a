"""Tokenizers whose tokens are whole words or whole morphemes; what is not a token is spelt out.

The vocabulary holds the special tokens, the 256 bytes, the characters, and the commonest words or
morphemes of the corpus. A word or morpheme that is not in it is spelt in characters, a character
that is not in it in bytes (ours: the paper's vocabularies have an unknown token there).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pertoken.tokenize.train import word_splits

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["whole_words"]

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
    letters: Counter[str] = Counter()
    for word, times in words.items():
        for piece in [word] if cuts is None else morphemes_of(word, cuts):
            pieces[piece] += times
        for letter in word:
            letters[letter] += times
    spelt = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*special, *spelt, *_common(letters, min_frequency), *_common(pieces, min_frequency)]
    vocab = {token: place for place, token in enumerate(list(dict.fromkeys(tokens))[:size])}
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True, ignore_merges=True))
    if cuts is not None:
        cutter = pre_tokenizers.PreTokenizer.custom(_Cutter(cuts))
        steps = pre_tokenizers.Sequence([*word_splits(), cutter])
    backend.pre_tokenizer = steps
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _common(counts: Mapping[str, int], least: int) -> list[str]:
    found = sorted(counts, key=lambda each: (-counts[each], each))
    return [each for each in found if counts[each] >= least]
