"""The second stage of SuperBPE: BPE that goes on from the merges of a first one, across words.

The trainer of `tokenizers` cannot start from merges. So the text is encoded with the merges there
are, every token is written as one private character, and BPE is trained on that text: its merges
are the next ones. Ids keep their order, so ties between pairs fall as if the training had gone on.

It is the same as going on because one string never is a token here and a pair of tokens there: a
stretch of text whose ends no merge has crossed was joined as it would have been alone. So a new
pair never spells a token that there is, and private characters count nothing twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pertoken.tokenize.train import bpe, splitter

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Merge = tuple[str, str]
_FIRST = 0x10000  # the first private character


def superword(
    corpus: Sequence[str], size: int, turn: int, min_frequency: int, special: Sequence[str]
) -> Tokenizer:
    """BPE inside words up to a vocabulary of `turn`, then across them up to `size`."""
    first = bpe(corpus, min(turn, size), min_frequency, special)
    ids = first.get_vocab()
    vocab = sorted(ids, key=ids.__getitem__)
    merges = _merges(first)
    if len(vocab) < size:
        lines = [line for text in corpus for line in re.split(r"[\r\n]+", text) if line]
        more = _further(_assemble(vocab, merges), lines, size - len(vocab), min_frequency)
        merges += more
        vocab += [left + right for left, right in more]
    return _assemble(vocab, merges)


def _further(
    backend: Tokenizer, lines: Sequence[str], count: int, min_frequency: int
) -> list[Merge]:
    """The next `count` merges, fewer where no pair is left."""
    from tokenizers import Tokenizer, models, trainers

    encoded = [encoding.ids for encoding in backend.encode_batch_fast(lines)]
    seen = sorted(set().union(*encoded))
    sign = {token: chr(_FIRST + place) for place, token in enumerate(seen)}
    learner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(seen) + count, min_frequency=min_frequency, show_progress=False
    )
    learner.train_from_iterator(("".join(map(sign.__getitem__, ids)) for ids in encoded), trainer)
    token = {sign[each]: str(backend.id_to_token(each)) for each in seen}

    def spell(signs: str) -> str:
        return "".join(map(token.__getitem__, signs))

    return [(spell(left), spell(right)) for left, right in _merges(learner)]


def _merges(backend: Tokenizer) -> list[Merge]:
    return [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]


def _assemble(vocab: Sequence[str], merges: Sequence[Merge]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    ids = {token: place for place, token in enumerate(vocab)}
    backend = Tokenizer(models.BPE(ids, list(merges)))
    backend.pre_tokenizer = splitter(words=False)
    backend.decoder = decoders.ByteLevel()
    return backend
