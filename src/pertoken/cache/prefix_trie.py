"""One store for the caches of many sessions, in which common beginnings are held once.

A trie over token ids whose edges carry -log2 P_M(token | prefix) (Probabilistic Language Tries,
arXiv 2604.06228; layer one of arXiv 2604.15356). Keys and values lie in blocks of a fixed number of
tokens, counted by the sessions that use them. Sessions share a block while their tokens agree, and
the first token that differs starts a block of the other's own, with the common rows before it in
that block copied. Nothing in a block is ever written again.

The paper prints d(s, s') = -log2 P_M(s ∧ s') as a metric, with ∧ the longest common prefix. It
grows with what two sessions share and d(s, s) is not 0: it is a similarity, S, in bits of shared
information, for which S(a, c) >= min(S(a, b), S(b, c)). The distance that goes with it is an
ultrametric: 2^-S between different sessions, 0 between equal ones (ours).

Sharing is exact: same tokens *and* the same bits in every row, so a session's cache comes back as
it was put in. Two runs over one prefix in different shapes may differ in last bits and are then
stored twice; continue from `lookup` and they are not. The paper's sharing of "semantically
equivalent" prefixes would change the text that follows; instead, `canonical_text` may be applied
before the model sees the text at all.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pertoken._shown import Shown
from pertoken.cache._ids import check_room
from pertoken.cache._rows import Rows, plain_cache, plain_rows
from pertoken.cache._trie import Block, Node, form, joined, same
from pertoken.errors import PertokenError
from pertoken.prompts import check_ids

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

__all__ = ["PrefixTrie", "TrieStats", "canonical_text"]

_CHUNK = 256  # tokens of a prefill at once: the laws of a whole long text would not fit


@dataclass(frozen=True)
class TrieStats:
    """What a trie holds.

    nodes: distinct prefixes. bytes_held: of keys and values; bytes_unshared: what the sessions
    would hold each by itself. hits, misses: of `lookup`.
    """

    sessions: int
    nodes: int
    blocks: int
    bytes_held: int
    bytes_unshared: int
    hits: int
    misses: int

    @property
    def dedup_ratio(self) -> float:
        """Bytes without sharing over bytes held; 1 where nothing is held."""
        return self.bytes_unshared / self.bytes_held if self.bytes_held else 1.0


class PrefixTrie(Shown):
    """Caches of sessions that begin alike, in shared blocks.

    model: fills the cache where `add` is given none, and says the bits of each token.
    block: tokens of a block. capacity: bytes of keys and values; beyond it `add` evicts.
    One session is one row: no batches, no padding. All caches are of one model.

    >>> from pertoken.testing import tiny_model
    >>> trie = PrefixTrie(tiny_model("llama"), block=4)
    >>> first = trie.add([5, 6, 7, 8, 9, 10])
    >>> second = trie.add([5, 6, 7, 8, 9, 11])
    >>> trie.stats().blocks, round(trie.stats().dedup_ratio, 2)  # 12 rows in 4 + 2 + 2
    (3, 1.5)
    >>> cache, length = trie.lookup([5, 6, 7, 8, 1])
    >>> length, cache.get_seq_length()
    (4, 4)
    >>> trie.release(first), trie.release(second), trie.stats().bytes_held
    (None, None, 0)
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        *,
        block: int = 16,
        capacity: int | None = None,
    ) -> None:
        if block < 1:
            raise PertokenError(f"block must be 1 or more tokens, got {block}")
        if capacity is not None and capacity < 0:
            raise PertokenError(f"capacity must be 0 or more bytes, got {capacity}")
        self.model = model
        self.block = block
        self.capacity = capacity
        self._root = Node(None, -1, 0.0)
        self._sessions: dict[int, list[Block]] = {}
        self._blocks: dict[Block, None] = {}  # in order of making, for ties
        self._next = self._bytes = 0
        self._hits = self._misses = 0

    def add(
        self,
        ids: Sequence[int] | torch.Tensor,
        cache: Any = None,
        *,
        bits: Sequence[float] | None = None,
    ) -> int:
        """Store the cache of a session and return its number.

        ids: [time]. cache: a plain one with a row for each id, or for all but the last (as
            `generate` leaves it; that id is then not stored). Without one the model fills it,
            behind the longest prefix that is stored.
        bits: -log2 P of each id; the model's own where it fills the cache, else every new token
            counts log2 of the vocabulary (1 without a model).
        Raises PertokenError for empty ids, ids that the model is to read and cannot, a cache of
        another length or of a kind that does not hold all rows, and where there is neither cache
        nor model.
        """
        tokens = _tokens(ids)
        if cache is None:
            rows, bits = self._prefill(tokens)
        else:
            rows = plain_rows(cache)
            held = rows[0][0].shape[2]
            if held not in (len(tokens), len(tokens) - 1):
                raise PertokenError(
                    f"the cache holds {held} rows for {len(tokens)} ids: give the ids it was "
                    "filled with"
                )
            tokens = tokens[:held]
        if rows[0][0].shape[0] != 1:
            raise PertokenError(
                f"the cache has a batch of {rows[0][0].shape[0]}: add one session at a time"
            )
        if self._blocks and form(rows) != form(next(iter(self._blocks)).rows):
            raise PertokenError(
                "the cache has other layers, heads or dtypes than those stored: one trie holds the "
                "caches of one model"
            )
        if bits is not None and len(bits) < len(tokens):
            raise PertokenError(f"bits has {len(bits)} numbers for {len(tokens)} ids")
        prices = [self._unknown()] * len(tokens) if bits is None else [float(b) for b in bits]
        path: list[Block] = []
        for start in range(0, len(tokens), self.block):
            path.append(self._share_or_make(path, tokens, rows, start, prices))
        session, self._next = self._next, self._next + 1
        self._sessions[session] = path
        if self.capacity is not None:
            self.evict(self.capacity)
        return session

    def lookup(self, ids: Sequence[int] | torch.Tensor) -> tuple[DynamicCache, int]:
        """A cache of the longest stored prefix of ids, and its length; a copy, free to be used.

        `generate` must be left a token to read: look up ``ids[:-1]`` before it.
        """
        block, length = self._longest(_tokens(ids))
        if block is None:
            self._misses += 1
            return plain_cache([]), 0
        self._hits += 1
        path = block.path()
        for used in path:
            used.hits += 1
        return plain_cache(joined(path, length)), length

    def read(self, session: int) -> DynamicCache:
        """The cache of a session as it was put in, up to where it was evicted; a copy."""
        path = self._path(session)
        return plain_cache(joined(path, path[-1].end) if path else [])

    def length(self, session: int) -> int:
        """Rows of a session that are held."""
        path = self._path(session)
        return path[-1].end if path else 0

    def release(self, session: int) -> None:
        """Forget a session; blocks that no other session uses are freed."""
        for block in reversed(self._path(session)):
            block.users -= 1
            if not block.users:
                self._free(block)
        del self._sessions[session]

    def evict(self, most: int) -> int:
        """Free blocks until `most` bytes are held; returns the bytes freed.

        The end with the smallest S · hits goes first: S = -log2 P_M(prefix) bits are what would be
        rebuilt, hits how often it was wanted (being added counts as one). Sessions that used it
        keep their beginning.
        """
        if most < 0:
            raise PertokenError(f"cannot evict down to {most} bytes: name 0 or more")
        freed = 0
        while self._bytes > most:
            ends = [block for block in self._blocks if not block.followers]
            block = min(ends, key=lambda block: block.nodes[-1].total * block.hits)
            freed += block.nbytes
            for path in self._sessions.values():
                if path and path[-1] is block:
                    path.pop()
            self._free(block)
        return freed

    def shared_bits(self, a: int, b: int) -> float:
        """S of two sessions: -log2 P_M of their longest common prefix that is held, in bits."""
        ours, theirs = self._nodes(a), self._nodes(b)
        common = 0.0
        for node, other in zip(ours, theirs, strict=False):
            if node is not other:
                break
            common = node.total
        return common

    def distance(self, a: int, b: int) -> float:
        """The ultrametric 2^-S, 0 for sessions of equal tokens; below 2^-1074 it is 0 as well."""
        ours, theirs = self._nodes(a), self._nodes(b)
        return 0.0 if ours == theirs else 2.0 ** -self.shared_bits(a, b)

    def stats(self) -> TrieStats:
        """Counts and bytes."""
        nodes = {node for block in self._blocks for node in block.nodes}
        return TrieStats(
            sessions=len(self._sessions),
            nodes=len(nodes),
            blocks=len(self._blocks),
            bytes_held=self._bytes,
            bytes_unshared=sum(b.nbytes for path in self._sessions.values() for b in path),
            hits=self._hits,
            misses=self._misses,
        )

    def _path(self, session: int) -> list[Block]:
        if session not in self._sessions:
            raise PertokenError(
                f"no session {session!r} in this trie: it was released or never was"
            )
        return self._sessions[session]

    def _nodes(self, session: int) -> list[Node]:
        return [node for block in self._path(session) for node in block.nodes]

    def _longest(self, tokens: Sequence[int]) -> tuple[Block | None, int]:
        """A block that covers the last token of the longest stored prefix, and its length."""
        node, length = self._root, 0
        for token in tokens:
            if token not in node.children:
                break
            node, length = node.children[token], length + 1
        return (node.blocks[0], length) if length else (None, 0)

    def _share_or_make(
        self,
        path: list[Block],
        tokens: Sequence[int],
        rows: Rows,
        start: int,
        prices: Sequence[float],
    ) -> Block:
        """The block of tokens[start : start + block] behind `path`."""
        end = min(start + self.block, len(tokens))
        before = path[-1] if path else None
        own = [(keys[:, :, start:end], values[:, :, start:end]) for keys, values in rows]
        node = before.nodes[-1] if before else self._root
        nodes = []
        for place in range(start, end):
            if tokens[place] not in node.children:
                node.children[tokens[place]] = Node(node, tokens[place], prices[place])
            node = node.children[tokens[place]]
            nodes.append(node)
        for block in node.blocks:
            if block.before is before and block.end == end and same(block.rows, own):
                block.users += 1
                block.hits += 1
                return block
        made = Block(before, nodes, [(k.clone(), v.clone()) for k, v in own], end)
        self._blocks[made] = None
        self._bytes += made.nbytes
        return made

    def _unknown(self) -> float:
        """Bits of a token whose law is not known."""
        if self.model is None:
            return 1.0
        return math.log2(self.model.config.get_text_config(decoder=True).vocab_size)

    def _free(self, block: Block) -> None:
        del self._blocks[block]
        self._bytes -= block.nbytes
        if block.before is not None:
            block.before.followers -= 1
        for node in reversed(block.nodes):
            node.blocks.remove(block)
            if not node.blocks and node.parent is not None:
                del node.parent.children[node.token]

    @torch.no_grad()
    def _prefill(self, tokens: Sequence[int]) -> tuple[Rows, list[float]]:
        """Rows of all tokens, the stored ones as they are, and the bits of each token."""
        if self.model is None:
            raise PertokenError("add needs the cache of the ids, or PrefixTrie(model) to fill it")
        if min(tokens) < 0:
            raise PertokenError(f"ids must be 0 or more, got {min(tokens)}")
        check_ids(self.model, tokens)
        check_room(self.model, len(tokens))
        block, stored = self._longest(tokens)
        known = joined(block.path(), stored) if block else []
        bits = [self._unknown()] * len(tokens)  # also of the first token, which has no law
        if stored == len(tokens):
            return known, bits
        # The law of the first new token comes from reading the last stored one again.
        again = max(stored - 1, 0)
        cache = plain_cache([(k[:, :, :again], v[:, :, :again]) for k, v in known] if again else [])
        ids = torch.tensor([list(tokens)], device=self.model.device)
        for start in range(again, len(tokens), _CHUNK):
            part = ids[:, start : start + _CHUNK]
            logits = self.model(input_ids=part, past_key_values=cache, use_cache=True).logits[0]
            following = ids[0, start + 1 : start + 1 + part.shape[1]]
            laws = logits[: len(following)].float().log_softmax(-1) / -math.log(2)
            found = laws.gather(1, following[:, None])[:, 0]
            bits[start + 1 : start + 1 + len(following)] = found.tolist()
        rows = plain_rows(cache, len(tokens))
        if known:
            rows = [
                (torch.cat([k, new_k[:, :, stored:]], 2), torch.cat([v, new_v[:, :, stored:]], 2))
                for (k, v), (new_k, new_v) in zip(known, rows, strict=True)
            ]
        return rows, bits


def canonical_text(text: str) -> str:
    """Unicode NFC, without blanks at the ends of lines and of the text.

    Opt-in, before tokenisation: prompts that differ only so then become the same tokens, and share.

    >>> canonical_text("Cafe\\u0301  \\nopen ")
    'Café\\nopen'
    """
    lines = unicodedata.normalize("NFC", text).split("\n")
    return "\n".join(line.rstrip() for line in lines).rstrip()


def _tokens(ids: Sequence[int] | torch.Tensor) -> list[int]:
    found = torch.as_tensor(ids).reshape(-1).tolist()
    if not found:
        raise PertokenError("ids are empty: give at least one token")
    return [int(token) for token in found]
