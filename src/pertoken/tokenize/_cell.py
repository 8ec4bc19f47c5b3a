"""One cell of a sweep: a language, a kind and a vocabulary; trained, and counted on other text."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pertoken.tokenize._texts import Texts, facts, lines, similarity

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["measure"]


def measure(
    language: str,
    vocabulary: int,
    kind: str,
    texts: Texts,
    train: Path | None,
    folds: int,
    transition: float,
    seed: int,
) -> dict[str, Any]:
    """The counts of one cell, as plain JSON values.

    texts: what is counted. train: what the tokenizer is trained on; None for the texts themselves
    in `folds` parts, each counted by a tokenizer that was trained on the others.

    tokens: the corpus token count. size: tokens that the tokenizer came out with, the mean over
    folds. token_length: mean number of characters of the different tokens that were used.
    """
    from pertoken.tokenize.train import train_backend

    began = time.perf_counter()
    own = lines(texts, language)
    if train is None:
        parts = [
            ([text for at, text in enumerate(own) if at % folds != fold], own[fold::folds])
            for fold in range(folds)
        ]
    else:
        parts = [(lines(train, language), own)]
    tokens, sizes, used, similar = 0, [], [], []
    for seen, counted in parts:
        backend = train_backend(seen, vocabulary, kind, transition=transition, seed=seed)
        found = backend.encode_batch_fast(
            [line for text in counted for line in text.split("\n") if line],
            add_special_tokens=False,
        )
        tokens += sum(map(len, found))
        sizes.append(backend.get_vocab_size())
        used.append(_mean_length(backend, kind, {each for one in found for each in one.ids}))
        similar.append(similarity(seen, counted))
    return {
        "tokens": tokens,
        "size": sum(sizes) / len(sizes),
        "token_length": sum(used) / len(used),
        "similarity": sum(similar) / len(similar),
        **facts(own),
        "seconds": round(time.perf_counter() - began, 3),
    }


def _mean_length(backend: Tokenizer, kind: str, ids: set[int]) -> float:
    """Characters that begin in each token, on average."""
    tokens = [str(backend.id_to_token(each)) for each in ids]
    if kind == "character":
        return sum(len(token) == 1 for token in tokens) / max(len(tokens), 1)
    if kind == "wordpiece":
        tokens = [token.removeprefix("##") for token in tokens]
    inside = _continuing()
    return sum(letter not in inside for token in tokens for letter in token) / max(len(tokens), 1)


@cache
def _continuing() -> frozenset[str]:
    """The letters of byte-level tokenizers for bytes that go on a character (0x80 to 0xBF)."""
    from tokenizers import pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # U+0080 to U+00BF are 0xC2 and the byte itself.
    return frozenset(level.pre_tokenize_str(chr(byte))[0][0][1] for byte in range(0x80, 0xC0))
