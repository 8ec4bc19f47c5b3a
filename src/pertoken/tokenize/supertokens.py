"""Supertokens: BPE whose tokens may cross words (arXiv 2505.09738, section 3.3).

Training texts are cut into chunks of random length in characters, blind to spaces, and BPE merges
inside chunks; afterwards nothing is cut any more, so that merges run over whole texts.

    lengths     a range is drawn by its weight, then a length in it, uniformly
    training    NFC; runs of a character lose groups of seven; byte-level BPE, min_frequency 2,
                max_token_length 30
    use         byte-level BPE without a pre-tokenizer's cuts

Where this differs from the authors' code. They write a separator between chunks and split at it;
here the chunks themselves are handed to the trainer, which is the same and needs no separator that
a text must not hold. Their shipped weights sum to 1.1, which their own check refuses: here they are
normalised. The last chunk of a text is what is left of it (theirs: drawn again among what fits).
Their tokenizer normalises texts to NFC whenever it is used, so that a text in another form does not
come back as it was: here only training texts are normalised, and decode(encode(x)) == x for every
text (`nfc=True`: as theirs). Long texts are cut at use (our reading): every 16,384 characters at
most, behind the last line break of the second half, else before the last space, so that a book is
not one word to BPE.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pertoken.errors import PertokenError, nearest

__all__ = ["LENGTHS", "chunks", "train_supertokens"]

Lengths = Mapping[tuple[int, int], float]

LENGTHS: dict[str, dict[tuple[int, int], float]] = {
    "bell": {
        (4, 5): 0.044,
        (6, 7): 0.091,
        (8, 9): 0.146,
        (10, 11): 0.171,
        (12, 13): 0.185,
        (14, 15): 0.171,
        (16, 17): 0.146,
        (18, 19): 0.091,
        (20, 21): 0.044,
        (22, 23): 0.011,
    },
    "wide": {(1, 5): 0.02, (6, 18): 0.70, (18, 28): 0.28},
}
"""Weights of ranges of chunk lengths in characters: "bell" is the released tokenizer's, "wide" the
training script's default."""

_RUN = r"(.)\1{6}"  # what the authors take out of training texts
_LONGEST = 16384  # characters between two cuts at use
_CUT = rf"[\s\S]{{{_LONGEST // 2},{_LONGEST}}}(?<=\n)|[\s\S]{{{_LONGEST // 2},{_LONGEST}}}(?= )"
_CUT += rf"|[\s\S]{{1,{_LONGEST}}}"


def train_supertokens(
    texts: Iterable[str],
    vocab_size: int,
    *,
    lengths: str | Lengths = "bell",
    seed: int = 0,
    min_frequency: int = 2,
    max_token_length: int = 30,
    special_tokens: Sequence[str] = ("<|endoftext|>",),
    chat_template: str | None = None,
    nfc: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Any:
    """Train a tokenizer whose tokens may hold several words; a `PreTrainedTokenizerFast`.

    texts: read once. vocab_size: tokens in all, special ones included; fewer come out where the
        texts do not give more. lengths: a name of `LENGTHS`, or weights of ranges in characters.
    max_token_length: in bytes. special_tokens: the first ends a text (its `eos_token`).
    nfc: normalise texts at use, as the authors do; then only texts in that form come back.

    Raises PertokenError for an empty corpus, and a vocabulary smaller than the 256 bytes and the
    special tokens. Source: arXiv 2505.09738, section 3.3; constants from the authors' train.yaml.

    >>> tokenizer = train_supertokens(["as soon as it can, as soon as it may. "] * 9, 300)
    >>> max(tokenizer.tokenize("as soon as"), key=len)
    'asĠsoon'
    >>> tokenizer.decode(tokenizer("As soon as it is…")["input_ids"])
    'As soon as it is…'
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    weights = _weights(lengths)
    if vocab_size < 256 + len(special_tokens):
        raise PertokenError(
            f"vocab_size {vocab_size} is smaller than the alphabet: 256 bytes and "
            f"{len(special_tokens)} special tokens"
        )
    backend = Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_RUN), behavior="removed"), letters]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        max_token_length=max_token_length,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    read = [0]
    backend.train_from_iterator(_all_chunks(texts, weights, seed, read, progress), trainer)
    if not read[0]:
        raise PertokenError("the corpus is empty: there is nothing to train a tokenizer on")
    backend.normalizer = normalizers.NFC() if nfc else None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_CUT), behavior="isolated"), letters]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=special_tokens[0] if special_tokens else None,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def _all_chunks(
    texts: Iterable[str],
    lengths: Lengths,
    seed: int,
    read: list[int],
    progress: Callable[[str, int, int], None] | None,
) -> Iterator[list[str]]:
    """The chunks of each text; `read` counts characters."""
    generator = np.random.default_rng(seed)
    total = len(texts) if isinstance(texts, Sequence) else 0
    for number, text in enumerate(texts):
        if progress is not None:
            progress("cutting texts", number, total)
        read[0] += len(text)
        if text:
            yield chunks(unicodedata.normalize("NFC", text), lengths, generator)


def chunks(text: str, lengths: Lengths, generator: np.random.Generator) -> list[str]:
    """A text cut into chunks of random length; joined they are the text.

    >>> chunks("a b c d e f", {(2, 2): 1.0}, np.random.default_rng(0))
    ['a ', 'b ', 'c ', 'd ', 'e ', 'f']
    """
    low, high = np.array(list(lengths), dtype=np.int64).T
    chances = np.array(list(lengths.values()), dtype=np.float64)
    count = len(text) // int(low.min()) + 1
    ranges = generator.choice(len(low), size=count, p=chances / chances.sum())
    ends = generator.integers(low[ranges], high[ranges] + 1).cumsum()
    inner = ends[ends < len(text)].tolist()
    return [text[begin:end] for begin, end in pairwise([0, *inner, len(text)])]


def _weights(lengths: str | Lengths) -> Lengths:
    if isinstance(lengths, str):
        if lengths not in LENGTHS:
            raise PertokenError(
                f"unknown lengths {lengths!r}{nearest(lengths, LENGTHS)}: use "
                f"{', '.join(LENGTHS)}, or weights such as {{(4, 12): 1.0}}"
            )
        return LENGTHS[lengths]
    for (low, high), weight in lengths.items():
        if not 1 <= low <= high or weight < 0:
            raise PertokenError(
                f"lengths must be ranges from 1 up with weights of 0 or more, got "
                f"({low}, {high}): {weight}"
            )
    if not sum(lengths.values()) > 0:
        raise PertokenError("lengths need a range with a weight above 0")
    return lengths
