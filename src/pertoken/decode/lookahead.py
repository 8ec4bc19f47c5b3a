"""Lookahead decoding (arXiv 2402.02057): draft n-grams that the model itself made on the side.

Every forward pass carries a *window* of guesses about the near future. Refining the window by
parallel fixed-point (Jacobi) steps yields n-grams; those that begin with the last token are drafted
and verified in the same pass. In the paper this needs a mask of its own. Here one token tree holds
it all (our reading), because what a window token may see is exactly a path of the tree:

    level 0, column i   hangs from level 0, column i - 1    (column 0 of level 0 is the root)
    level j, column i   hangs from level j - 1, column i

A window token's depth is its position, and an n-gram is a chain from the root. Equal tokens merge,
and a window token that happens to be right is accepted like any other: that changes nothing in the
output and only ever saves passes.

Followed from the released code (github.com/hao-ai-lab/LookaheadDecoding): random prompt tokens as
the first window, N - 2 filling steps without drafting, one window step per pass however many tokens
were accepted, per first token the G n-grams used last. Not followed: it stops one token short of a
fully accepted n-gram; and in greedy search it puts the last of several accepted tokens several
times into the text that new n-grams are read from.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pertoken.decode._edges import EdgeBook, bucket
from pertoken.decode.drafter import Drafter
from pertoken.decode.topk import NodeLogits
from pertoken.decode.tree import TokenTree
from pertoken.errors import PertokenError


class NgramPool:
    """For every token the `size` n-grams behind it that were seen last, newest last.

    >>> pool = NgramPool(2)
    >>> for ngram in [(1, 2, 3), (1, 4, 5), (1, 2, 3), (1, 6, 7)]:
    ...     pool.add(ngram[0], ngram[1:])
    >>> pool.after(1)
    [(2, 3), (6, 7)]
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._behind: dict[int, dict[tuple[int, ...], None]] = {}  # a dict keeps its order

    def add(self, token: int, ngram: tuple[int, ...]) -> None:
        """Note that `ngram` followed `token`; the one unused for longest makes place."""
        behind = self._behind.setdefault(token, {})
        behind.pop(ngram, None)
        behind[ngram] = None
        if len(behind) > self.size:
            del behind[next(iter(behind))]

    def add_text(self, tokens: list[int], length: int) -> None:
        """Add every n-gram of `length` tokens of a text."""
        for start in range(len(tokens) - length + 1):
            self.add(tokens[start], tuple(tokens[start + 1 : start + length]))

    def after(self, token: int) -> list[tuple[int, ...]]:
        """The n-grams behind a token, oldest first."""
        return list(self._behind.get(token, ()))

    def items(self) -> Iterable[tuple[int, list[tuple[int, ...]]]]:
        """All tokens with their n-grams."""
        return ((token, list(behind)) for token, behind in self._behind.items())


class Window:
    """The lookahead window: N - 1 levels of guesses, the older ones nearer to the text.

    `levels[0]` has one token less than the others: the last token of the text is its first.

    >>> window = Window(columns=3, ngram=3, first=[11, 12, 13])
    >>> window.paths()                      # where the last level's tokens stand, from the root
    [(11,), (11, 12), (11, 12, 13)]
    >>> window.step(5, [21, 22, 23])        # the model's answers there; 5 = last token of the text
    []
    >>> window.levels
    [[12, 13], [21, 22, 23]]
    >>> window.paths()
    [(21,), (12, 22), (12, 13, 23)]
    >>> window.step(6, [31, 32, 33])        # three-grams: first token and what is behind it
    [(6, (21, 31)), (12, (22, 32)), (13, (23, 33))]
    >>> window.levels
    [[22, 23], [31, 32, 33]]
    """

    def __init__(self, columns: int, ngram: int, first: list[int]) -> None:
        self.columns = columns
        self.ngram = ngram
        self.levels = [first]  # columns + ngram - 3 tokens: one is used up by every filling step

    @property
    def full(self) -> bool:
        """Whether all levels are filled; n-grams are made and drafted only then."""
        return len(self.levels) == self.ngram - 1

    def size(self) -> int:
        """Number of tokens."""
        return sum(map(len, self.levels))

    def columns_from_root(self) -> list[list[int]]:
        """For every column its tokens from the root down: level 0 up to it, then its levels."""
        first, *rest = self.levels
        if not rest:
            return [first[: i + 1] for i in range(len(first))]
        return [first[:i] + [level[i] for level in rest] for i in range(len(rest[0]))]

    def paths(self) -> list[tuple[int, ...]]:
        """The root paths that end at the last level's tokens."""
        return [tuple(path) for path in self.columns_from_root()]

    def step(self, last: int, answers: list[int]) -> list[tuple[int, tuple[int, ...]]]:
        """One Jacobi step with the model's answers behind the last level; gives the new n-grams.

        last: token of the text that the window hung from; answers: one per column.
        """
        if len(self.levels) == 1:
            self.levels = [self.levels[0][1:], answers]
            return []
        if not self.full:
            self.levels = [level[1:] for level in self.levels] + [answers[1:]]
            return []
        starts = [last, *self.levels[0]]
        behind = zip(*self.levels[1:], answers, strict=True)
        ngrams = list(zip(starts, behind, strict=True))
        self.levels = [self.levels[1][1:], *self.levels[2:], answers]
        return ngrams


class Lookahead(Drafter):
    """Drafts n-grams collected from the model's own parallel guesses (lookahead decoding).

    Args:
        window: W, columns of the window.
        ngram: N, length of the n-grams, their first token included (at least 3).
        guesses: G, n-grams kept and drafted per first token.
        pool_from_prompt: also collect n-grams from the prompt and the accepted text. The released
            code has it off unless asked and on in its examples; on is the stronger baseline.
        seed: of the random prompt tokens that the window starts with.
        budget: at most this many nodes. The window goes first, (N - 1) x W - 1 nodes; a budget
            that does not hold it leaves n-grams of the text alone. By default both fit.
        keep: the n-grams survive to the next call, and all rows of a batch share them.

    W, N, G = 7, 5, 7 are the released defaults for a 7B model (15, 5, 15 in its A100 runs).

    Example: ``model.generate(**inputs, max_new_tokens=64, custom_generate=Lookahead())``
    """

    slug = "lookahead"
    default_budget = (5 - 1) * (7 + 7) - 1
    probes = frozenset({"window"})

    def __init__(
        self,
        *,
        window: int = 7,
        ngram: int = 5,
        guesses: int = 7,
        pool_from_prompt: bool = True,
        seed: int = 0,
        budget: int | Literal["auto"] | None = None,
        keep: bool = False,
        streamer: Any = None,
        tokenizer: Any = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        least = {"window": (window, 1), "ngram": (ngram, 3), "guesses": (guesses, 1)}
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise PertokenError(f"lookahead needs {name} of at least {minimum}, not {value}")
        self.default_budget = (ngram - 1) * (window + guesses) - 1
        super().__init__(
            budget=budget,
            keep=keep,
            streamer=streamer,
            tokenizer=tokenizer,
            stop_strings=stop_strings,
        )
        self.window = window
        self.ngram = ngram
        self.guesses = guesses
        self.pool_from_prompt = pool_from_prompt
        self.seed = seed
        self._edges = EdgeBook()
        self._kept = NgramPool(guesses)
        self._windows: list[Window] = []
        self._pools: list[NgramPool] = []

    def begin(self, vocab_size: int) -> None:
        """A fresh window of prompt tokens for every row."""
        super().begin(vocab_size)
        first = self.window + self.ngram - 3
        self._windows, self._pools = [], []
        for prompt in self.contexts:
            draw = random.Random(self.seed)  # per row: a batch drafts what single runs draft
            start = [draw.choice(prompt) for _ in range(first)]
            self._windows.append(Window(self.window, self.ngram, start))
            pool = self._kept if self.keep else NgramPool(self.guesses)
            if self.pool_from_prompt:
                pool.add_text(prompt, self.ngram)
            self._pools.append(pool)

    def commit(self, row: int, tokens: list[int]) -> None:
        """Collect the n-grams that end in the new tokens."""
        super().commit(row, tokens)
        self._edges.settle(row, tokens)
        if self.pool_from_prompt:
            reach = len(tokens) + self.ngram - 1
            self._pools[row].add_text(self.contexts[row][-reach:], self.ngram)

    def propose(self, row: int, budget: int, room: int) -> TokenTree:
        """n-grams behind the last token, then the window."""
        window = self._windows[row]
        last = self.contexts[row][-1]
        tree = self._edges.open(row, TokenTree(last))
        columns = window.columns_from_root()
        # Near the end of the text a window would never pay back: room is the depth still allowed.
        fits = window.size() <= budget and max(map(len, columns)) <= room
        if window.full or not fits:
            left = budget - window.size() if fits else budget
            self._draft(row, tree, last, left, room)
        if fits:
            for column in columns:
                node = 0
                for depth, token in enumerate(column, start=1):
                    key = ("window", bucket(depth))
                    node = self._edges.add(row, node, token, "window", key, 0.02)
        return tree

    def observe(self, row: int, tree: TokenTree, path: list[int], logits: NodeLogits) -> None:
        """Move the window one step and collect the n-grams that it made."""
        window = self._windows[row]
        ends = [_descend(tree, column) for column in window.columns_from_root()]
        if min(ends) < 0:
            return  # the window, or a part of it, was not in this pass
        greedy = logits.greedy()
        for token, ngram in window.step(tree.tokens[0], [greedy[node] for node in ends]):
            self._pools[row].add(token, ngram)

    def reset(self) -> None:
        """Forget all n-grams."""
        super().reset()
        self._edges = EdgeBook()
        self._kept = NgramPool(self.guesses)

    def state_dict(self) -> dict[str, Any]:
        """The n-grams that survive from call to call."""
        state = super().state_dict()
        state["ngrams"] = [
            [token, [list(ngram) for ngram in behind]] for token, behind in self._kept.items()
        ]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take n-grams saved before."""
        super().load_state_dict(state)
        self._kept = NgramPool(self.guesses)
        for token, behind in state["ngrams"]:
            for ngram in behind:
                self._kept.add(token, tuple(ngram))

    def _draft(self, row: int, tree: TokenTree, last: int, budget: int, room: int) -> None:
        newest_first = reversed(self._pools[row].after(last))
        for rank, ngram in enumerate(newest_first, start=1):
            node = 0
            for depth, token in enumerate(ngram[:room], start=1):
                if tree.size >= budget and tree.child(node, token) < 0:
                    return
                key = ("guess", rank, depth)
                prior = 0.4 / rank if depth == 1 else 0.5
                node = self._edges.add(row, node, token, "guess", key, prior)


def _descend(tree: TokenTree, tokens: list[int]) -> int:
    """Node at the end of a path of tokens from the root, -1 where the tree lacks it."""
    node = 0
    for token in tokens:
        node = tree.child(node, token)
        if node < 0:
            return -1
    return node
