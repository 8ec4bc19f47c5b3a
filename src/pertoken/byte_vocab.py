"""A tokenizer seen as bytes: what each token writes, and which tokens write a given beginning.

Two kinds of tokenizers have a byte view: those that spell bytes in GPT-2's alphabet (byte-level
BPE), and those made from SentencePiece, where `▁` is a space and `<0xNN>` a byte (BPE or Unigram).
Special tokens write nothing. A Unicode normaliser (NFC) is not applied: bytes are taken as they
are, which is the same for text in that form (our reading).
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pertoken.errors import PertokenError

__all__ = ["LETTERS", "ByteVocab"]

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space


class ByteVocab:
    """The bytes of every token id of a Hugging Face fast tokenizer.

    kind: ``"byte-level"``, ``"sentencepiece"`` (BPE) or ``"unigram"``.
    token_bytes: for each id its bytes, or None for a special token and for an unused id.
    start: bytes that the tokenizer puts before every text (SentencePiece's leading space), or none.
    added: ids of added tokens that are text, not special: they cut the text before anything else.
    fallback: ids of `<0xNN>` tokens by their byte.

    Raises PertokenError for a tokenizer without a byte view.

    >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    >>> backend = Tokenizer(models.BPE({"a": 0, "Ġ": 1, "Ġa": 2}, [("Ġ", "a")]))
    >>> backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> backend.decoder = decoders.ByteLevel()
    >>> vocab = ByteVocab(backend)
    >>> vocab.token_bytes
    [b'a', b' ', b' a']
    >>> vocab.order[slice(*vocab.range(b" "))].tolist()      # the tokens that begin with a space
    [1, 2]
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "to_str"):
            raise PertokenError(
                f"{type(tokenizer).__name__} has no byte view: a fast tokenizer of transformers "
                "(or one of tokenizers) is needed"
            )
        self.parts: dict[str, Any] = json.loads(backend.to_str())
        self.kind: Literal["byte-level", "sentencepiece", "unigram"]
        self.kind, self.start = _kind(self.parts)
        special = {entry["id"] for entry in self.parts["added_tokens"] if entry["special"]}
        special |= set(getattr(tokenizer, "all_special_ids", ()))
        text = self._added_text(special)
        self.added = frozenset(text)
        vocab = backend.get_vocab(with_added_tokens=True)
        self.size = max(vocab.values(), default=-1) + 1
        self.token_bytes: list[bytes | None] = [None] * self.size
        self.fallback: dict[int, int] = {}
        model = self.parts["model"]
        silent = special | self.added | {vocab.get(model.get("unk_token")), model.get("unk_id")}
        spell = _spell_byte_level if self.kind == "byte-level" else _spell_sentencepiece
        for piece, token in backend.get_vocab(with_added_tokens=False).items():
            if token in silent:
                continue
            self.token_bytes[token] = spell(piece)
            byte = _byte_of(piece)
            if byte is not None and model.get("byte_fallback"):
                self.token_bytes[token] = bytes([byte])
                self.fallback[byte] = token
        for token, content in text.items():
            self.token_bytes[token] = content
        self._sort()

    def _added_text(self, special: set[int]) -> dict[int, bytes]:
        """The bytes of added tokens that are text; PertokenError where they cut text by rules."""
        text = {}
        for entry in self.parts["added_tokens"]:
            if entry["id"] in special or not entry["content"]:
                continue
            if self.kind != "byte-level" and SPACE in entry["content"] and not entry["normalized"]:
                continue  # an added `▁▁` that is matched before spaces are `▁` never is
            if entry["lstrip"] or entry["rstrip"] or entry["single_word"]:
                raise PertokenError(
                    f"the added token {entry['content']!r} swallows blanks or minds its neighbours "
                    "(lstrip, rstrip, single_word), so text with it has no byte view"
                )
            text[entry["id"]] = entry["content"].encode()
        if self.start and text:
            raise PertokenError(
                "a tokenizer that puts a space before every text and has added tokens that are "
                "text has no byte view: what follows an added token would get a space as well"
            )
        return text

    def _sort(self) -> None:
        """Order the tokens by their bytes, laid end to end for `byte_at`."""
        known = [token for token, spelled in enumerate(self.token_bytes) if spelled]
        known.sort(key=lambda token: self.token_bytes[token] or b"")
        self.order: npt.NDArray[np.int64] = np.array(known, dtype=np.int64)
        self._sorted = [self.token_bytes[token] or b"" for token in known]
        if not known:
            raise PertokenError("the tokenizer has no byte view: none of its tokens is text")
        lengths = np.array([len(spelled) for spelled in self._sorted], dtype=np.int64)
        self.longest = int(lengths.max())
        self._offset = np.concatenate(([0], lengths.cumsum()[:-1]))
        self._flat = np.frombuffer(b"".join(self._sorted), dtype=np.uint8)

    def range(self, prefix: bytes, low: int = 0, high: int | None = None) -> tuple[int, int]:
        """(low, high): `order[low:high]` are the tokens whose bytes start with `prefix`.

        low, high: where to look, if the range of a beginning of `prefix` is known. The tokens that
        are the prefix and no more come first.
        """
        high = len(self._sorted) if high is None else high
        low = bisect_left(self._sorted, prefix, low, high)
        after = _successor(prefix)
        return low, high if after is None else bisect_left(self._sorted, after, low, high)

    def exact(self, low: int, high: int, prefix: bytes) -> int:
        """Where in the range of `prefix` the tokens end that are `prefix` and no more."""
        while low < high and len(self._sorted[low]) == len(prefix):
            low += 1
        return low

    def byte_at(self, place: int, low: int, high: int) -> npt.NDArray[np.uint8]:
        """The byte at a place of each token of `order[low:high]`; all must be that long."""
        return self._flat[self._offset[low:high] + place]


def _kind(
    parts: dict[str, Any],
) -> tuple[Literal["byte-level", "sentencepiece", "unigram"], bytes]:
    """The kind of a tokenizer and what it puts before every text, from its description."""
    model = parts["model"]["type"]
    steps = steps_of(parts["pre_tokenizer"], "pretokenizers")
    normal = steps_of(parts["normalizer"], "normalizers")
    if parts["model"].get("continuing_subword_prefix") or parts["model"].get("end_of_word_suffix"):
        raise PertokenError(
            f"a {model} tokenizer that marks the inside or the end of words has no byte view"
        )
    if parts["model"].get("dropout"):
        raise PertokenError("a BPE tokenizer with dropout has no canonical encoding; set it to 0")
    lossy = [step["type"] for step in normal if step["type"] not in ("NFC", "Replace", "Prepend")]
    names = {step["type"] for step in steps}
    if model == "BPE" and "ByteLevel" in names:
        lossy += [step["type"] for step in normal if step["type"] != "NFC"]
        _refuse_lossy(lossy)
        odd = names - {"ByteLevel", "Split", "Digits", "Punctuation"}
        if odd or any(step.get("behavior") == "Removed" for step in steps):
            raise PertokenError(
                f"the pre-tokenizer ({', '.join(sorted(odd or names))}) drops text: no byte view"
            )
        if any(step.get("add_prefix_space") for step in steps):
            raise PertokenError(
                "the tokenizer puts a space before texts that have none (add_prefix_space=True), "
                "so two texts share one encoding: load it with add_prefix_space=False"
            )
        return "byte-level", b""
    if model in ("BPE", "Unigram") and parts["model"].get("byte_fallback"):
        _refuse_lossy(lossy)
        if all(_harmless(step) for step in (*steps, *normal)) and _spaces(steps, normal):
            leads = any(step["type"] == "Prepend" for step in normal) or any(
                step["type"] == "Metaspace" and step["prepend_scheme"] != "never" for step in steps
            )
            start = b" " if leads else b""
            return ("sentencepiece" if model == "BPE" else "unigram"), start
    raise PertokenError(
        f"a {model} tokenizer of this make has no byte view: known are byte-level BPE (GPT-2's "
        "alphabet) and SentencePiece with byte fallback (<0xNN>)"
    )


def steps_of(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer or normalizer in order; inner: what a sequence calls them."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for below in part[inner] for step in steps_of(below, inner)]
    return [part]


def _refuse_lossy(names: list[str]) -> None:
    if names:
        raise PertokenError(
            f"the tokenizer's normalizer ({', '.join(names)}) changes text, so that not every text "
            "can be written: no byte view"
        )


def _harmless(step: dict[str, Any]) -> bool:
    """Whether a step of a SentencePiece tokenizer does no more than write spaces as `▁`."""
    kind = step["type"]
    if kind == "Replace":
        return step["pattern"] == {"String": " "} and step["content"] == SPACE
    if kind == "Prepend":
        return step["prepend"] == SPACE
    if kind == "Metaspace":
        return step["replacement"] == SPACE
    # Gemma's: spaces are `▁` by then, so there is nothing to split at.
    return kind == "Split" and step["pattern"] == {"String": " "}


def _spaces(steps: list[dict[str, Any]], normal: list[dict[str, Any]]) -> bool:
    """Whether spaces become `▁`, and before a `Split` at spaces could meet them."""
    if any(step["type"] == "Replace" for step in normal):
        return True
    return bool(steps) and steps[0]["type"] == "Metaspace"


def _byte_of(piece: str) -> int | None:
    found = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return int(found[1], 16) if found else None


def _alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones stand for themselves, the others are moved up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(rest)}


LETTERS = _alphabet()
"""The byte that each letter of GPT-2's alphabet stands for."""


def _spell_byte_level(piece: str) -> bytes | None:
    letters = [LETTERS.get(letter) for letter in piece]
    return None if None in letters else bytes(byte for byte in letters if byte is not None)


def _spell_sentencepiece(piece: str) -> bytes | None:
    return piece.replace(SPACE, " ").encode("utf-8", errors="ignore")


def _successor(prefix: bytes) -> bytes | None:
    """The first byte string behind all that start with `prefix`; None if there is none."""
    kept = prefix.rstrip(b"\xff")
    return kept[:-1] + bytes([kept[-1] + 1]) if kept else None
