"""What each id of a tokenizer writes, which ids of two tokenizers write the same, and any bytes as
ids of a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pertoken.byte_vocab import ByteVocab, _spell_byte_level, _spell_sentencepiece, steps_of
from pertoken.errors import PertokenError

__all__ = ["Shared", "Splitter", "Vocabulary", "same_tokens", "special_tokens"]

Shared = Literal["bytes", "strings"]


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer by id.

    size: highest id + 1; strings: as the tokenizer stores them; spelled: the bytes, None for a
    special token and an unused id; texts: the same as text, None where the bytes are no whole
    characters; fallback: ids of `<0xNN>` by their byte; special: ids of special tokens by string;
    exact: whether the tokenizer has a byte view, so that encoding keeps every byte.

    Raises PertokenError for a slow tokenizer.
    """

    size: int
    strings: dict[str, int]
    spelled: list[bytes | None]
    texts: list[str | None]
    fallback: dict[int, int]
    special: dict[str, int]
    exact: bool

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        backend = _backend(tokenizer)
        strings: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        special = special_tokens(tokenizer)
        try:
            view = ByteVocab(tokenizer)
        except PertokenError:
            size = max(strings.values(), default=-1) + 1
            spelled = _spelled_by_marks(backend, strings, set(special.values()), size)
            fallback: dict[int, int] = {}
            exact = False
        else:
            size, spelled, fallback, exact = view.size, view.token_bytes, view.fallback, True
        return cls(
            size, strings, spelled, [_text(part) for part in spelled], fallback, special, exact
        )


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids of special tokens by string, those without a role as well."""
    added = _backend(tokenizer).get_added_tokens_decoder().items()
    found = {each.content: token for token, each in added if each.special}
    roles = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return found | dict(roles)


def _backend(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise PertokenError(
            f"{type(tokenizer).__name__} is a slow tokenizer: a fast one is needed "
            "(AutoTokenizer.from_pretrained(…, use_fast=True), or its tokenizer.json)"
        )
    return backend


def _text(part: bytes | None) -> str | None:
    if not part:
        return None
    try:
        return part.decode()
    except UnicodeDecodeError:
        return None


def _spelled_by_marks(
    backend: Any, strings: dict[str, int], special: set[int], size: int
) -> list[bytes | None]:
    """The bytes of each token where the tokenizer drops or adds some: by the marks of its make."""
    parts = json.loads(backend.to_str())
    steps = steps_of(parts["pre_tokenizer"], "pretokenizers") + steps_of(
        parts["decoder"], "decoders"
    )
    by_byte = any(step["type"] == "ByteLevel" for step in steps)
    before = parts["model"].get("continuing_subword_prefix") or ""
    after = parts["model"].get("end_of_word_suffix") or ""
    spelled: list[bytes | None] = [None] * size
    for piece, token in strings.items():
        if token not in special:
            bare = piece.removeprefix(before).removesuffix(after)
            spelled[token] = _spell_byte_level(bare) if by_byte else _spell_sentencepiece(bare)
    return spelled


def same_tokens(old: Vocabulary, new: Vocabulary, shared: Shared) -> dict[int, int]:
    """New id -> old id, for the tokens of text that both have.

    shared: "bytes" compares what tokens write, so that `Ġthe` is `▁the`; "strings" compares them as
    they are stored (the authors' rule). A `<0xNN>` prefers its like, and serves for a byte else.
    """
    if shared not in ("bytes", "strings"):
        raise PertokenError(f"shared must be 'bytes' or 'strings', got {shared!r}")
    if shared == "strings":
        return {
            token: old.strings[piece]
            for piece, token in new.strings.items()
            if new.spelled[token]
            and piece in old.strings
            and old.spelled[old.strings[piece]] is not None
        }
    plain: dict[bytes, int] = {}
    byte = {bytes([value]): token for value, token in old.fallback.items()}
    own = set(old.fallback.values())
    for token, part in enumerate(old.spelled):
        if part and token not in own:
            plain.setdefault(part, token)
    like = set(new.fallback.values())
    found: dict[int, int] = {}
    for token, part in enumerate(new.spelled):
        if not part:
            continue
        first, second = (byte, plain) if token in like else (plain, byte)
        same = first.get(part, second.get(part))
        if same is not None:
            found[token] = same
    return found


class Splitter:
    """Bytes as ids of a tokenizer that write just those bytes, where it has a byte view.

    Special tokens, prefixes and templates of the tokenizer are out of play.

    >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> backend = Tokenizer(models.BPE({"a": 0, "Ã": 1, "§": 2, "aÃ": 3}, [("a", "Ã")]))
    >>> backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    >>> Splitter(tokenizer, Vocabulary.of(tokenizer)).split([b"aa", "ç".encode(), bytes([0xA7])])
    [[0, 0], [1, 2], [2]]
    """

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary) -> None:
        from tokenizers import Tokenizer

        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        parts |= {"post_processor": None, "truncation": None, "padding": None}
        parts["added_tokens"] = [each for each in parts["added_tokens"] if not each["special"]]
        parts["normalizer"] = _without_start(parts["normalizer"])
        parts["pre_tokenizer"] = _without_start(parts["pre_tokenizer"])
        self._backend = Tokenizer.from_str(json.dumps(parts))
        self._vocabulary = vocabulary
        steps = steps_of(parts["pre_tokenizer"], "pretokenizers")
        self._by_byte = any(step["type"] == "ByteLevel" for step in steps)

    def split(self, parts: Sequence[bytes]) -> list[list[int]]:
        """The ids for each; empty where there are none that write these bytes."""
        texts = [_text(part) for part in parts]
        places = [place for place, text in enumerate(texts) if text is not None]
        encoded = self._backend.encode_batch(
            [texts[place] for place in places], add_special_tokens=False
        )
        found: list[list[int]] = [[] for _ in parts]
        for place, encoding in zip(places, encoded, strict=True):
            found[place] = encoding.ids
        if self._vocabulary.exact:
            for place, part in enumerate(parts):
                if self._written(found[place]) != part:
                    ids = self._by_fragments(part)
                    found[place] = ids if self._written(ids) == part else []
        return found

    def _written(self, ids: Sequence[int]) -> bytes:
        return b"".join(self._vocabulary.spelled[token] or b"" for token in ids)

    def _by_fragments(self, part: bytes) -> list[int]:
        """Bytes that are no text, or that the normaliser would change."""
        if self._by_byte:
            from pertoken.byte_vocab import LETTERS

            letters = {byte: letter for letter, byte in LETTERS.items()}
            word = "".join(letters[byte] for byte in part)
            return [piece.id for piece in self._backend.model.tokenize(word)]
        fallback = self._vocabulary.fallback
        return [fallback[byte] for byte in part if byte in fallback]


def _without_start(part: Any) -> Any:
    """A normaliser or pre-tokenizer that puts nothing before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    for inner in ("normalizers", "pretokenizers"):
        if inner in part:
            kept = [_without_start(step) for step in part[inner]]
            return part | {inner: [step for step in kept if step is not None]}
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if "add_prefix_space" in part:
        return part | {"add_prefix_space": False}
    return part
