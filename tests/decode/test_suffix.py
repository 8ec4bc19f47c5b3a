"""The suffix drafter: its two trees, what it keeps, and the shape of what it hands over."""

from __future__ import annotations

import pytest

from pertoken.decode.suffix import SuffixTree
from pertoken.errors import PertokenError


def start(drafter: SuffixTree, *prompts: list[int]) -> SuffixTree:
    drafter.contexts = [list(prompt) for prompt in prompts]
    drafter.begin(64)
    return drafter


def test_draft_of_the_own_text() -> None:
    drafter = start(SuffixTree(), [1, 2, 3, 4, 5, 9, 1, 2])
    tree = drafter.propose(0, 64, 64)
    assert tree.tokens == [2, 3, 4]  # two tokens match, so two are drafted
    assert tree.parents == [-1, 0, 1]
    assert tree.sources[1:] == ["suffix", "suffix"]
    drafter.commit(0, [3])
    assert drafter.propose(0, 64, 64).tokens == [3, 4, 5, 9]
    assert drafter.propose(0, 64, 1).tokens == [3, 4]
    assert drafter.propose(0, 2, 64).tokens == [3, 4, 5]
    drafter.commit(0, [7])
    assert drafter.propose(0, 64, 64).size == 0


def test_tree_mode_drafts_alternatives() -> None:
    text = [1, 2, 3, 8, 1, 2, 4, 7, 1, 2, 3, 6, 1, 2]
    chain = start(SuffixTree(max_spec_factor=2.0), text).propose(0, 64, 64)
    tree = start(SuffixTree(mode="tree", max_spec_factor=2.0), text).propose(0, 64, 64)
    assert chain.tokens[1] == 3
    assert {tree.tokens[node] for node in range(1, len(tree)) if tree.parents[node] == 0} == {3, 4}
    assert tree.child(0, 3) > 0


def test_outputs_serve_other_rows_and_later_calls() -> None:
    drafter = start(SuffixTree(keep=True), [1, 2], [3, 4])
    drafter.commit(0, [5, 6, 7, 8, 9])
    drafter.commit(1, [5, 6, 7])
    assert drafter.propose(1, 64, 64).tokens[1:] == [8, 9]
    start(drafter, [6, 7])
    assert drafter.propose(0, 64, 64).tokens[1:] == [8]  # prompts of other calls are not kept
    start(drafter, [1, 1, 2])
    assert drafter.propose(0, 64, 64).size == 0
    drafter.reset()
    start(drafter, [5, 6, 7])
    assert drafter.propose(0, 64, 64).size == 0


def test_without_keep_every_call_starts_empty() -> None:
    drafter = start(SuffixTree(), [1])
    drafter.commit(0, [5, 6, 7, 8, 9])
    start(drafter, [5, 6, 7])
    assert drafter.propose(0, 64, 64).size == 0


def test_oldest_outputs_make_place() -> None:
    drafter = SuffixTree(keep=True, max_cached_requests=2)
    for output in ([10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]):
        start(drafter, [1]).commit(0, output)
    start(drafter, [20, 21])  # this call's own output takes a place too
    assert drafter.propose(0, 64, 64).size == 0
    start(drafter, [30, 31])
    assert drafter.propose(0, 64, 64).size == 0
    none = SuffixTree(keep=True, max_cached_requests=0)
    start(none, [1]).commit(0, [10, 11, 12])
    start(none, [10, 11])
    assert none.propose(0, 64, 64).size == 0


def test_more_rows_than_places() -> None:
    drafter = start(SuffixTree(max_cached_requests=1), [1], [2])
    drafter.commit(0, [5, 6, 7])
    drafter.commit(1, [5, 6, 7, 5, 6])
    assert drafter.propose(1, 64, 64).tokens[1:] == [7, 5]
    assert drafter.propose(0, 64, 64).tokens[1:] == [5, 6]


def test_state_survives_saving() -> None:
    drafter = start(SuffixTree(keep=True), [1])
    drafter.commit(0, [5, 6, 7, 8, 9])
    other = SuffixTree(keep=True)
    other.load_state_dict(drafter.state_dict())
    start(other, [5, 6, 7])
    assert other.propose(0, 64, 64).tokens[1:] == [8, 9]


def test_learned_probability_falls_with_misses() -> None:
    drafter = start(SuffixTree(), [1, 2, 3, 4, 5, 9, 1, 2])
    before = drafter.propose(0, 64, 64).values
    for _ in range(50):
        drafter.propose(0, 64, 64)
        drafter._edges.settle(0, [99])  # never right; the text stays as it is
    assert drafter.propose(0, 64, 64).values[1] < 0.5 * before[1]


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "heap"},
        {"max_depth": 1},
        {"max_spec_factor": -1.0},
        {"min_token_prob": 2.0},
        {"max_cached_requests": -2},
    ],
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(PertokenError):
        SuffixTree(**options)
