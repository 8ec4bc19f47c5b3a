"""Lookahead: the window in the token tree against a plain simulation of the published steps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.decode.lookahead import Lookahead, NgramPool, Window
from pertoken.decode.tree import TokenTree
from pertoken.errors import PertokenError

NextToken = Callable[[list[int]], int]


def language(seed: int, vocabulary: int) -> NextToken:
    """A made-up deterministic model that looks at the last two tokens."""

    def following(text: list[int]) -> int:
        return random.Random(f"{seed} {text[-2:]}").randrange(vocabulary)

    return following


@dataclass
class Answers:
    """The part of NodeLogits that drafters without tables use."""

    tokens: list[int]

    def greedy(self) -> list[int]:
        return self.tokens


def verify(drafter: Lookahead, tree: TokenTree, model: NextToken) -> tuple[list[int], int]:
    """What the loop does with a tree: (accepted nodes, number of nodes), new tokens committed."""
    context = drafter.contexts[0]
    answers = []
    for node in range(len(tree)):
        path, at = [], node
        while at > 0:
            path.insert(0, tree.tokens[at])
            at = tree.parents[at]
        answers.append(model(context + path))
    accepted = [0]
    while (child := tree.child(accepted[-1], answers[accepted[-1]])) >= 0:
        accepted.append(child)
    drafter.observe(0, tree, accepted, Answers(answers))
    drafter.commit(0, [*(tree.tokens[node] for node in accepted[1:]), answers[accepted[-1]]])
    return accepted, len(tree)


def start(drafter: Lookahead, *prompts: list[int]) -> Lookahead:
    drafter.contexts = [list(prompt) for prompt in prompts]
    drafter.begin(64)
    return drafter


class Published:
    """The released code's window, step by step, with the model asked token by token."""

    def __init__(self, window: int, ngram: int, guesses: int, first: list[int]) -> None:
        self.n, self.guesses = ngram, guesses
        self.past: list[list[int]] = [list(first)]
        self.pool: dict[int, list[tuple[int, ...]]] = {}

    def step(self, context: list[int], model: NextToken) -> None:
        past, last = self.past, context[-1]
        if len(past) == 1:
            answers = [model(context + past[0][: i + 1]) for i in range(len(past[0]))]
            self.past = [past[0][1:], answers]
            return
        width = len(past[1])
        assert len(past[0]) == width - 1
        answers = [
            model(context + past[0][:i] + [level[i] for level in past[1:]]) for i in range(width)
        ]
        if len(past) < self.n - 1:
            self.past = [level[1:] for level in past] + [answers[1:]]
            return
        for i in range(width):
            key = last if i == 0 else past[0][i - 1]
            ngram = (*(level[i] for level in past[1:]), answers[i])
            known = self.pool.setdefault(key, [])
            if ngram in known:
                known.remove(ngram)
            elif len(known) == self.guesses:
                known.pop(0)
            known.append(ngram)
        self.past = [past[1][1:], *past[2:], answers]


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(1, 6),
    ngram=st.integers(3, 6),
    guesses=st.integers(1, 4),
    vocabulary=st.integers(2, 12),
    seed=st.integers(0, 1000),
)
def test_window_and_pool_equal_the_published_steps(
    window: int, ngram: int, guesses: int, vocabulary: int, seed: int
) -> None:
    model = language(seed, vocabulary)
    prompt = [random.Random(seed).randrange(vocabulary) for _ in range(8)]
    drafter = start(
        Lookahead(window=window, ngram=ngram, guesses=guesses, pool_from_prompt=False), prompt
    )
    published = Published(window, ngram, guesses, drafter._windows[0].levels[0])
    plain = list(prompt)
    for step in range(14):
        tree = drafter.propose(0, drafter.default_budget, 1000)
        assert tree.size <= drafter.default_budget
        assert ("guess" in tree.sources) <= (step >= ngram - 2)
        published.step(list(drafter.contexts[0]), model)
        verify(drafter, tree, model)
        assert drafter._windows[0].levels == published.past
        assert dict(drafter._pools[0].items()) == published.pool
    while len(plain) < len(drafter.contexts[0]):
        plain.append(model(plain))
    assert drafter.contexts[0] == plain


def test_window_tokens_see_their_column_only() -> None:
    window = Window(columns=3, ngram=4, first=[0, 0, 0, 0])
    window.levels = [[1, 2], [11, 12, 13], [21, 22, 23]]
    assert window.paths() == [(11, 21), (1, 12, 22), (1, 2, 13, 23)]
    assert window.size() == 8


def test_first_window_comes_from_the_prompt_and_shrinks_while_it_fills() -> None:
    drafter = start(Lookahead(window=4, ngram=5, guesses=2), [5, 6, 7], [8, 9])
    sizes = []
    model = language(3, 9)
    assert set(drafter._windows[0].levels[0]) <= {5, 6, 7}
    assert set(drafter._windows[1].levels[0]) <= {8, 9}
    for _ in range(5):
        sizes.append([len(level) for level in drafter._windows[0].levels])
        verify(drafter, drafter.propose(0, 200, 200), model)
    assert sizes == [[6], [5, 6], [4, 5, 5], [3, 4, 4, 4], [3, 4, 4, 4]]


def test_a_row_drafts_the_same_alone_and_in_a_batch() -> None:
    alone = start(Lookahead(), [5, 6, 7, 8])
    batch = start(Lookahead(), [1, 2, 3], [5, 6, 7, 8])
    assert alone.propose(0, 55, 99).tokens == batch.propose(1, 55, 99).tokens


def test_ngrams_of_prompt_and_accepted_text() -> None:
    drafter = start(Lookahead(ngram=3, window=1, guesses=2), [1, 2, 3, 1, 4, 5, 1, 6, 7])
    assert drafter._pools[0].after(1) == [(4, 5), (6, 7)]
    drafter.commit(0, [1, 4])
    drafter.commit(0, [5, 1])
    assert drafter._pools[0].after(7) == [(1, 4)]
    assert drafter._pools[0].after(1) == [(6, 7), (4, 5)]  # used again: newest
    tree = drafter.propose(0, 4, 99)  # window not filled yet, so nothing is drafted
    assert "guess" not in tree.sources
    tree = drafter.propose(0, 4, 0)
    assert tree.size == 0


def test_a_budget_too_small_for_the_window_leaves_the_newest_ngrams() -> None:
    drafter = start(Lookahead(ngram=3, window=8), [1, 2, 3, 1, 4, 5, 1])
    tree = drafter.propose(0, 3, 99)
    assert (tree.tokens, tree.parents) == ([1, 4, 5, 2], [-1, 0, 1, 0])
    assert set(tree.sources[1:]) == {"guess"}
    before = [list(level) for level in drafter._windows[0].levels]
    drafter.observe(0, tree, [0], Answers([0, 0, 0, 0]))
    assert drafter._windows[0].levels == before
    assert drafter.propose(0, 200, 1).depths == [0, 1, 1]


def test_a_cut_tree_leaves_the_window_alone() -> None:
    drafter = start(Lookahead(ngram=3, window=2), [1, 2, 3])
    drafter.propose(0, 50, 50)
    before = [list(level) for level in drafter._windows[0].levels]
    drafter.observe(0, TokenTree(3), [0], Answers([0]))
    assert drafter._windows[0].levels == before


def test_pool_keeps_the_last_used() -> None:
    pool = NgramPool(2)
    pool.add_text([1, 2, 1, 3, 1, 2, 1, 4], 2)
    assert pool.after(1) == [(2,), (4,)]
    assert pool.after(9) == []


def test_keep_and_state() -> None:
    drafter = start(Lookahead(ngram=3, window=8, keep=True), [1, 2, 3, 1])
    start(drafter, [5, 5, 1])
    assert drafter.propose(0, 2, 99).tokens == [1, 2, 3]
    other = Lookahead(ngram=3, window=8, keep=True)
    other.load_state_dict(drafter.state_dict())
    start(other, [5, 5, 1])
    assert other.propose(0, 2, 99).tokens == [1, 2, 3]
    drafter.reset()
    start(drafter, [5, 5, 1])
    assert drafter.propose(0, 2, 99).size == 0
    forgetful = start(Lookahead(ngram=3, window=8), [1, 2, 3, 1])
    start(forgetful, [5, 5, 1])
    assert forgetful.propose(0, 2, 99).size == 0


def test_released_defaults() -> None:
    drafter = Lookahead()
    assert (drafter.window, drafter.ngram, drafter.guesses) == (7, 5, 7)
    assert drafter.default_budget == 6 + 3 * 7 + 7 * 4


@pytest.mark.parametrize("options", [{"window": 0}, {"ngram": 2}, {"guesses": 0}])
def test_bad_options(options: dict[str, int]) -> None:
    with pytest.raises(PertokenError):
        Lookahead(**options)
