"""Trains a tokenizer of any of six kinds, as a fast tokenizer of transformers.

bpe: the commonest pair of neighbours becomes a token, again and again, inside words.
superword: BPE in two stages (SuperBPE). Up to a vocabulary of `transition` · vocab_size pairs are
    joined inside words; then the splitting into words is dropped and the rest of the tokens may
    span white space. Only line breaks still part the text (our reading: a line is the unit that
    is counted, and a text of any length stays quick to encode).
unigram: a large vocabulary of substrings is pruned by what each token adds to the likelihood.
wordpiece: BPE's rule for the vocabulary, greedy longest match at use; a token that goes on inside
    a word begins with `##`.
character: one token for each of the commonest characters; the others are spelt in bytes.
supertokens: BPE over chunks cut at random, see `pertoken.tokenize.supertokens`.

All are byte-level, so that nothing is unknown: `decode(encode(x)) == x` for text in the normal
form. Words are runs of letters and marks, of numbers, or of other signs, with the space before
them; GPT-2's rule without its English contractions, and with vowel signs counted as letters, since
else most words of Burmese or Hindi are in shreds (our reading of "white-space pre-tokenization").

Byte-level BPE is that of `tokenizers`. SuperBPE: Liu et al., arXiv 2503.13423, section 2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pertoken.errors import PertokenError, nearest
from pertoken.prompts import read_utf8

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

__all__ = ["KINDS", "smallest", "train_backend", "train_tokenizer"]

KINDS = ("bpe", "unigram", "wordpiece", "character", "superword", "supertokens")
"""The kinds of tokenizer that `train_tokenizer` trains."""
NORMALIZERS = ("nfc", "nfd", "nfkc", "nfkd")
END = "<|endoftext|>"
_LINES = r"[\r\n]+"
_WORDS = r" ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
_INSIDE = 0x10000  # added to a letter that goes on inside a word, while a WordPiece is trained


def train_tokenizer(
    texts: Iterable[str | Path] | Path,
    vocab_size: int,
    kind: str = "bpe",
    *,
    transition: float = 0.9,
    seed: int = 0,
    normalizer: str | None = "nfc",
    min_frequency: int = 2,
    special_tokens: Sequence[str] = (END,),
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on texts; it saves and loads like any of transformers.

    texts: texts, or paths of UTF-8 files.
    vocab_size: tokens in all, the special ones included. Fewer come out where the texts have no
        pair left that occurs `min_frequency` times: compare ``len(tokenizer)``. (Unigram prunes by
        likelihood instead.)
    transition: share of the vocabulary that superword trains inside words.
    seed: of the random cuts of supertokens; nothing else is drawn. (The scores of a Unigram differ
        in their last digits from run to run: `tokenizers` adds them in no fixed order.)
    normalizer: "nfc", "nfd", "nfkc", "nfkd" or None.
    special_tokens: the first of them ends a text.

    Raises PertokenError for an unknown kind, an empty corpus, a file that is not UTF-8, and a
    vocabulary smaller than the alphabet: 256 bytes (511 of a WordPiece) and the special tokens.

    >>> tokenizer = train_tokenizer(["the cat and the dog and the bird"] * 2, 270, "superword")
    >>> tokenizer.convert_ids_to_tokens(tokenizer("the cat")["input_ids"])
    ['theĠ', 'cat']
    >>> train_tokenizer(["a"], 100)
    Traceback (most recent call last):
    ...
    pertoken.errors.PertokenError: a vocabulary of 100 is smaller than the alphabet of bpe: 257 ...
    """
    backend = train_backend(
        texts,
        vocab_size,
        kind,
        transition=transition,
        seed=seed,
        normalizer=normalizer,
        min_frequency=min_frequency,
        special_tokens=special_tokens,
    )
    from transformers import PreTrainedTokenizerFast

    end = special_tokens[0] if special_tokens else None
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=end,
        pad_token=end,
        additional_special_tokens=list(special_tokens[1:]),
        clean_up_tokenization_spaces=False,
    )


def train_backend(
    texts: Iterable[str | Path] | Path,
    vocab_size: int,
    kind: str = "bpe",
    *,
    transition: float = 0.9,
    seed: int = 0,
    normalizer: str | None = "nfc",
    min_frequency: int = 2,
    special_tokens: Sequence[str] = (END,),
) -> Tokenizer:
    """`train_tokenizer` without the coat of transformers, which is slow to import."""
    special = list(dict.fromkeys(special_tokens))
    least = smallest(kind, len(special))
    if not 0 <= transition <= 1:
        raise PertokenError(f"transition is a share of the vocabulary, 0 to 1, not {transition}")
    if min_frequency < 1:
        raise PertokenError(f"min_frequency must be 1 or more, got {min_frequency}")
    if vocab_size < least:
        raise PertokenError(
            f"a vocabulary of {vocab_size} is smaller than the alphabet of {kind}: {least} tokens "
            "for single bytes and special tokens"
        )
    form = _normalizer(normalizer)
    corpus = [text if form is None else form.normalize_str(text) for text in _read(texts)]
    if not any(text.strip() for text in corpus):
        raise PertokenError("the corpus is empty: there is no text to train a tokenizer on")
    backend: Tokenizer
    if kind == "supertokens":
        from pertoken.tokenize.supertokens import train_supertokens

        backend = train_supertokens(
            corpus, vocab_size, seed=seed, min_frequency=min_frequency, special_tokens=special
        ).backend_tokenizer
    elif kind == "superword":
        from pertoken.tokenize._superword import superword

        turn = round(transition * vocab_size)
        backend = superword(corpus, vocab_size, turn, min_frequency, special)
    else:
        make: dict[str, Callable[..., Tokenizer]] = {
            "bpe": bpe,
            "unigram": _unigram,
            "wordpiece": _wordpiece,
            "character": _character,
        }
        backend = make[kind](corpus, vocab_size, min_frequency, special)
    if form is not None:
        backend.normalizer = form
    backend.add_special_tokens(special)
    return backend


def smallest(kind: str, special: int = 1) -> int:
    """The least vocabulary of a kind; PertokenError for an unknown kind.

    >>> smallest("bpe"), smallest("wordpiece")
    (257, 512)
    """
    if kind not in KINDS:
        raise PertokenError(
            f"unknown kind {kind!r} of tokenizer{nearest(kind, KINDS)}: {', '.join(KINDS)}"
        )
    return special + (511 if kind == "wordpiece" else 256)


def _read(texts: Iterable[str | Path] | Path) -> list[str]:
    if isinstance(texts, str):
        raise PertokenError("texts is a list of texts, or a pathlib.Path of a file; got one string")
    given = [texts] if isinstance(texts, Path) else list(texts)
    return [read_utf8(each, "corpus file") if isinstance(each, Path) else each for each in given]


def _normalizer(name: str | None) -> Any:
    from tokenizers import normalizers

    if name is None:
        return None
    if name not in NORMALIZERS:
        raise PertokenError(
            f"unknown normalizer {name!r}{nearest(name, NORMALIZERS)}: {', '.join(NORMALIZERS)} "
            "or None"
        )
    return getattr(normalizers, name.upper())()


def alphabet() -> list[str]:
    """The 256 letters that byte-level tokenizers spell bytes in, in the order of their ids."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def splitter(*, words: bool) -> Any:
    """The pre-tokenizer: at line breaks, and where `words` into words; then bytes."""
    from tokenizers import pre_tokenizers

    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*word_splits()[: 2 if words else 1], level])


def word_splits() -> list[Any]:
    """The two steps that part a text: at line breaks, then into words with the space in front."""
    from tokenizers import Regex, pre_tokenizers

    return [
        pre_tokenizers.Split(Regex(_LINES), "isolated"),
        pre_tokenizers.Split(Regex(_WORDS), "isolated"),
    ]


def bpe(corpus: Sequence[str], size: int, min_frequency: int, special: Sequence[str]) -> Tokenizer:
    """Byte-level BPE inside words."""
    from tokenizers import Tokenizer, decoders, models, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = splitter(words=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        initial_alphabet=alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


def _unigram(
    corpus: Sequence[str], size: int, min_frequency: int, special: Sequence[str]
) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, trainers

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = splitter(words=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        initial_alphabet=alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


def _wordpiece(
    corpus: Sequence[str], size: int, min_frequency: int, special: Sequence[str]
) -> Tokenizer:
    """A WordPiece; `#` is a word by itself, so that `##` is always the mark of a continuation.

    The trainer of `tokenizers` numbers the continuing letters in an order that changes from run to
    run, and with it the ties; so BPE is trained on letters of which the continuing ones are others.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    steps = pre_tokenizers.Sequence([pre_tokenizers.Split("#", "isolated"), splitter(words=True)])

    def words() -> Iterable[list[str]]:
        for text in corpus:
            yield [_with_inside(word) for word, _ in steps.pre_tokenize_str(text)]

    inside = [chr(_INSIDE + ord(letter)) for letter in alphabet() if letter != "#"]
    learner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(special),
        min_frequency=min_frequency,
        initial_alphabet=alphabet() + inside,
        show_progress=False,
    )
    learner.train_from_iterator(words(), trainer)
    found = learner.get_vocab()
    tokens = [*special, *(_plain(token) for token in sorted(found, key=found.__getitem__))]
    vocab = {token: place for place, token in enumerate(tokens)}
    # A word of any length is one word: `tokenizers` makes those of more than 100 letters unknown.
    backend = Tokenizer(
        models.WordPiece(
            vocab,
            unk_token=special[0] if special else tokens[0],
            max_input_chars_per_word=1 << 30,
            continuing_subword_prefix="##",
        )
    )
    backend.pre_tokenizer = steps
    backend.decoder = decoders.Sequence([decoders.Replace("##", ""), decoders.ByteLevel()])
    return backend


def _with_inside(word: str) -> str:
    return word[0] + "".join(chr(_INSIDE + ord(letter)) for letter in word[1:])


def _plain(token: str) -> str:
    letters = "".join(chr(ord(sign) % _INSIDE) for sign in token)
    return "##" + letters if ord(token[0]) >= _INSIDE else letters


def _character(
    corpus: Sequence[str], size: int, min_frequency: int, special: Sequence[str]
) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    counts: Counter[str] = Counter()
    for text in corpus:
        counts.update(text)
    common = sorted(counts, key=lambda sign: (-counts[sign], sign))
    letters = [sign for sign in common if counts[sign] >= min_frequency]
    spelt = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*special, *spelt, *letters][:size]
    vocab = {token: place for place, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return backend
