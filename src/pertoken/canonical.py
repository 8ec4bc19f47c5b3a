"""Which token sequences a tokenizer itself writes, seen byte by byte.

A sequence of tokens is *canonical* if encoding its text gives it back. A *path* here is a beginning
of a canonical sequence. For most tokenizers a path is canonical itself, but not for all: GPT-2's
rule for blanks makes "a\\n\\nb" of a, \\n, \\n, b and "a\\n\\n" of a, \\n\\n. So a text may be
written by more than one path, and at most one of them may end there.

Text of added tokens is cut out first, the longest where several begin. For what lies between them
each kind of tokenizer has its rules: `pertoken._byte_level` and `pertoken._sentencepiece`. Tests
compare all of it with encoding whole texts.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from pertoken._byte_level import ByteLevelRules
from pertoken._path import Path
from pertoken._pieces_of_text import dangling
from pertoken._sentencepiece import SentencePieceRules
from pertoken.byte_vocab import ByteVocab
from pertoken.errors import PertokenError

__all__ = ["Canonical", "Lattice", "Path", "encode"]

Bools = npt.NDArray[np.bool_]


class _Rules(Protocol):
    """How text between added tokens is encoded; texts are all bytes, paths end inside them."""

    def row(self, path: Path, text: bytes) -> Bools:
        """bool [size]: the tokens with which a path can go on."""

    def starts(self, path: Path, token: int, text: bytes) -> tuple[tuple[int, int], ...]:
        """`Path.starts` of the path with that token more; empty if it cannot go on with it."""

    def complete(self, path: Path, text: bytes) -> bool:
        """Whether the text may end where the path does; it does not end inside a character."""


class Canonical:
    """Tells how paths of a tokenizer go on. Texts are bytes from `vocab.start` on.

    Raises PertokenError for a tokenizer without a byte view.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.vocab = ByteVocab(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        make = ByteLevelRules if self.vocab.kind == "byte-level" else SentencePieceRules
        self._rules: _Rules = make(self.vocab, backend)
        self._text = np.array([spelled is not None for spelled in self.vocab.token_bytes])
        contents = [self.vocab.token_bytes[token] or b"" for token in self.vocab.added]
        self._contents = sorted(contents)
        self._longest_content = max(map(len, contents), default=0)
        if contents:
            found = re.compile(b"|".join(map(re.escape, contents)))
            for token, spelled in enumerate(self.vocab.token_bytes):
                if spelled and found.search(spelled):
                    self._text[token] = False

    def root(self) -> Path:
        """The path without tokens."""
        return Path(None, -1, 0, ((0, 0),), 0, -1)

    def row(self, path: Path, text: bytes) -> Bools:
        """bool [size]: the tokens with which a path can go on; text: its bytes, or more."""
        if path.allowed is None:
            allowed = self._rules.row(path, text) & self._text
            path.allowed = self._with_added(path, text, allowed) if self._contents else allowed
        return path.allowed

    def step(self, path: Path, token: int, text: bytes) -> Path | None:
        """The path with one token more, or None if it cannot go on with that; text: all bytes."""
        if not self.row(path, text)[token]:
            return None
        end = path.end + len(self.vocab.token_bytes[token] or b"")
        if token in self.vocab.added:
            return Path(path, token, end, ((end, end),), end, path.end)
        starts = self._rules.starts(path, token, text[:end])
        return Path(path, token, end, starts, path.segment, path.cut)

    def complete(self, path: Path, text: bytes) -> bool:
        """Whether a path is canonical, so that its text may end where it ends."""
        if path.end == len(self.vocab.start):  # the space before every text, and no text
            return not self.vocab.start or path.parent is None
        if dangling(text[path.segment : path.end]):
            return False
        return path.end == path.segment or self._rules.complete(path, text)

    def _with_added(self, path: Path, text: bytes, allowed: Bools) -> Bools:
        """Ban tokens that would complete the text of an added token; allow added tokens."""
        if self.complete(path, text):
            allowed[list(self.vocab.added)] = True
        segment = text[path.segment : path.end]
        tails = [
            segment[-count:] for count in range(1, min(self._longest_content, len(segment) + 1))
        ]
        if path.cut >= 0:  # a longer one that begins where the last one does
            tails.append(text[path.cut : path.end])
        for tail in tails:
            place = bisect_left(self._contents, tail)
            while place < len(self._contents):
                content = self._contents[place]
                if not content.startswith(tail):
                    break
                if len(content) > len(tail):
                    low, high = self.vocab.range(content[len(tail) :])
                    allowed[self.vocab.order[low:high]] = False
                place += 1
        return allowed


class Lattice:
    """All paths of a growing text, and the tokens that reach beyond its end.

    paths: for each place of the text the paths that end there. `reaching`: for each place m whose
    paths have next tokens that reach beyond the end, (m, low, high): those are
    `vocab.order[low:high]`, valid or not.

    >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    >>> backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    >>> backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> lattice = Lattice(Canonical(backend))
    >>> for byte in b"aba":
    ...     lattice.push(byte)
    >>> [path.ids for path in lattice.paths[-1]], lattice.reaching
    ([[2, 0]], [(2, 1, 2)])
    """

    def __init__(self, canonical: Canonical) -> None:
        self.canonical = canonical
        self.text = bytearray()
        self.paths: list[list[Path]] = [[canonical.root()]]
        self.reaching: list[tuple[int, int, int]] = []

    def push(self, byte: int) -> None:
        """Add one byte to the text."""
        vocab = self.canonical.vocab
        place = len(self.text)
        self.text.append(byte)
        text = bytes(self.text)
        here: list[Path] = []
        reaching = []
        for start, low, high in [*self.reaching, (place, 0, len(vocab.order))]:
            if not self.paths[start]:
                continue
            low, high = vocab.range(text[start:], low, high)
            beyond = vocab.exact(low, high, text[start:])
            for token in vocab.order[low:beyond].tolist():
                for path in self.paths[start]:
                    longer = self.canonical.step(path, token, text)
                    if longer is not None:
                        here.append(longer)
            if beyond < high:
                reaching.append((start, beyond, high))
        self.paths.append(here)
        for start in {start for start, *_ in self.reaching} - {start for start, *_ in reaching}:
            for path in self.paths[start]:
                path.allowed = None  # a row is as long as the vocabulary
        self.reaching = reaching


def encode(canonical: Canonical, text: bytes) -> list[int]:
    """The canonical tokens of a text, `vocab.start` put before it.

    Raises PertokenError for bytes that the tokenizer cannot write.
    """
    lattice = Lattice(canonical)
    for byte in canonical.vocab.start + text:
        lattice.push(byte)
    whole = [path for path in lattice.paths[-1] if canonical.complete(path, bytes(lattice.text))]
    if not whole:
        raise PertokenError(f"the tokenizer has no encoding of {text[-40:]!r}")
    return whole[0].ids
