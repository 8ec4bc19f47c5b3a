"""Goose: the published recipe by examples worked by hand, and the optimal shape by brute force."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pertoken.decode import Goose, TokenTree
from pertoken.decode import _chances as chance
from pertoken.decode.tables import Continuations, Places, Successors
from pertoken.decode.topk import NodeLogits
from pertoken.errors import PertokenError
from pertoken.testing import tiny_model


def started(prompt: Sequence[int], **options: Any) -> Goose:
    drafter = Goose(**{"shape": "paper", **options})
    drafter.contexts = [list(prompt)]
    drafter.begin(1000)
    return drafter


def teach(drafter: Goose, context: tuple[int, ...], guesses: dict[int, float]) -> None:
    drafter._table.tiers[len(context) - 1][context] = (list(guesses), list(guesses.values()))


# Where copies come from.


def first_place(text: list[int], lengths: Sequence[int]) -> tuple[int, bool]:
    """By definition: the longest n-gram with a place before, its oldest one, and consensus."""
    for n in lengths:
        places = [i for i in range(n, len(text)) if text[i - n : i] == text[len(text) - n :]]
        if len(text) >= n and places:
            return places[0], len(places) >= 2 and len({text[i] for i in places}) == 1
    return -1, False


def test_places_are_the_oldest_of_the_longest_ngram() -> None:
    chance = random.Random(0)
    for _ in range(200):
        places, text = Places(), []
        for _ in range(chance.randrange(1, 8)):
            more = [chance.randrange(3) for _ in range(chance.randrange(1, 7))]
            text += more
            places.extend(more)
            assert places.find(text[-5:]) == first_place(text, (5, 4, 3))


FRESH = count(10_000)  # tokens that stand nowhere else


def copied(length: int, *, times: int = 1, same: bool = False) -> list[int]:
    """A prompt that ends on an n-gram which stood before, `length` tokens before the end."""
    text = [1, 2, 3]
    text += [100 + i for i in range(length - 3)]
    if times == 2:
        text += [1, 2, 3, 100 if same else 99]
    return [*text, 1, 2, 3]


# Confidence (section 4.3).


@pytest.mark.parametrize(
    ("prompt", "confidence", "length"),
    [
        ([1, 2, 3, 4, 5, 6], 0.0, 0),
        (copied(4), 0.6 * 4 / 8, 4),
        (copied(7), 0.6 * 7 / 8, 7),
        (copied(8), 0.7, 8),
        (copied(9), 0.7 + 0.2 / 12, 9),
        (copied(20), 0.9, 20),
        (copied(40), 0.9, 20),
        (copied(6, times=2), 0.6 * 8 / 8 * 0 + 0.7 + 0.2 * 2 / 12, 10),
        (copied(6, times=2, same=True), 1.0, 10),
    ],
)
def test_confidence(prompt: list[int], confidence: float, length: int) -> None:
    drafter = started(prompt)
    chain, found = drafter._chain(0, grow=False)
    assert found == pytest.approx(confidence)
    assert len(chain) == length
    assert chain == prompt[3 : 3 + length][:20]


def test_without_consensus_agreement_counts_as_one_place() -> None:
    prompt = copied(6, times=2, same=True)
    chain, found = started(prompt, consensus=False)._chain(0, grow=False)
    assert found == pytest.approx(0.7 + 0.2 * (len(chain) - 8) / 12)
    assert started(prompt, spine=False)._chain(0) == ([], 0.0)


# Growth of the chain.


def test_a_doubtful_chain_does_not_grow() -> None:
    prompt = copied(7)  # c = 0.525
    assert len(started(prompt)._chain(0)[0]) == 7


def test_a_trusted_chain_grows_to_a_hundred_times_its_confidence() -> None:
    prompt = copied(200)  # c = 0.9: at least floor(90) tokens, in pieces of 20
    chain, confidence = started(prompt)._chain(0)
    assert confidence == 0.9
    assert chain == prompt[3:103]


def test_a_chain_grows_round_the_end_of_the_text() -> None:
    prompt = copied(12)  # after 12 copied tokens the end of the text matches again
    chain, confidence = started(prompt)._chain(0)
    assert len(chain) >= int(100 * confidence)
    assert chain[:24] == (prompt[3:] * 3)[:24]


def test_a_unanimous_chain_stops_behind_the_first_proposal_that_is_not() -> None:
    # 1 2 3 twice with the same 20 tokens, which end differently: the next match is not unanimous.
    body = [100 + i for i in range(20)]
    prompt = [1, 2, 3, *body, 7, 8, 9, *range(300, 340), 1, 2, 3, *body, 11, 12, 1, 2, 3]
    drafter = started(prompt)
    chain, confidence = drafter._chain(0)
    assert confidence == 1.0
    assert chain == prompt[3:43]  # 20 unanimous, 20 that are not, and no more


# Tree.


def paper_tree(drafter: Goose, budget: int = 59, room: int = 1000) -> TokenTree:
    return drafter.propose(0, budget, room)


def shape_of(tree: TokenTree) -> tuple[int, int]:
    return tree.sources.count("spine"), tree.sources.count("branch")


def fill(drafter: Goose, tokens: Sequence[int], score: float = 0.1) -> None:
    """Ten guesses behind each token, all new, so that nothing merges; their scores fall."""
    for token in tokens:
        teach(drafter, (token,), {next(FRESH): score - 1e-4 * i for i in range(10)})


def test_the_budget_and_the_spines_share() -> None:
    # c = 0.3: 60 + floor(12) nodes, ratio 0.5 + 0.3 x 0.5 = 0.65, spine min(4, 46) = 4.
    drafter = started(copied(4))
    fill(drafter, [3, 100, 1, 2])
    tree = paper_tree(drafter)
    assert tree.tokens[1:5] == [100, 1, 2, 3]
    # left = 72 - 1 - 4 = 67; 33 for the spine's branches by 1/i over 2.083: 15, 7, 5, 3 (10 at
    # most exist); the root has 34 places and 10 guesses.
    counts = [
        len([i for i in tree.children(node) if tree.sources[i] == "branch"]) for node in range(5)
    ]
    assert counts == [10, 10, 7, 5, 3]


def test_shares_that_are_not_used_are_not_passed_on() -> None:
    """The second spine node has its own share, though the first has no guesses."""
    drafter = started(copied(4))
    fill(drafter, [3, 1, 2])  # nothing behind 100
    tree = paper_tree(drafter)
    counts = [
        len([i for i in tree.children(node) if tree.sources[i] == "branch"]) for node in range(5)
    ]
    assert counts == [10, 0, 7, 5, 3]


@pytest.mark.parametrize(("rate", "ratio"), [(0.1, 0.15), (0.3, 0.30), (0.4, 0.50), (0.9, 0.50)])
def test_the_share_follows_past_acceptance_in_three_steps(rate: float, ratio: float) -> None:
    drafter = started(copied(200))
    fill(drafter, [3])
    drafter._accept_rate = rate
    # c = 0.9: 96 nodes; the chain is long enough for any share.
    spine, _ = shape_of(paper_tree(drafter))
    assert spine == int(96 * (ratio + 0.9 * (1 - ratio)))


def test_full_confidence_is_one_chain_of_a_hundred() -> None:
    body = [200 + i for i in range(150)]
    prompt = [1, 2, 3, *body] * 3 + [1, 2, 3]
    for rate in (0.1, 0.3, 0.5):
        drafter = started(prompt)
        drafter._accept_rate = rate
        fill(drafter, prompt)
        tree = paper_tree(drafter)
        assert shape_of(tree) == (100, 0)
        assert tree.tokens[1:] == body[:100]


def test_no_chain_is_a_tree_of_branches() -> None:
    drafter = started([1, 2, 3])
    fill(drafter, [3])
    for token in list(drafter._table.tiers[0][(3,)][0]):
        fill(drafter, [token])
    tree = paper_tree(drafter)
    assert tree.sources.count("spine") == 0
    assert len(tree.children(0)) == 10
    # remaining 49: width of the first branch ceil(49 x 0.1) = 5, of the second ceil(44 x 0.0999).
    widths = [len(tree.children(node)) for node in range(1, 11)]
    assert widths == [5, 5, 4, 4, 4, 3, 3, 3, 2, 2]
    assert tree.size == 10 + sum(widths)


def test_widths_are_capped_and_depth_ends_at_six() -> None:
    drafter = started([1, 2, 3])
    tokens = [3]
    for _ in range(8):  # sure guesses: a chain, with nine poor ones beside each
        following = {next(FRESH): 0.9, **{next(FRESH): 0.02 for _ in range(9)}}
        teach(drafter, (tokens[-1],), following)
        tokens.append(next(iter(following)))
    tree = paper_tree(drafter)
    node, widths = 0, []
    for token in tokens[1:]:
        node = tree.child(node, token)
        if node < 0:
            break
        widths.append(len(tree.children(node)))
    # Below depth d at most floor(10 / d): 10, 5, 3, 2, 2; nothing grows at depth 6.
    assert widths == [10, 5, 3, 2, 2, 0]
    assert max(tree.depths) == 6


def test_guesses_below_one_percent_and_the_spines_next_token_are_left_out() -> None:
    drafter = started(copied(4))  # spine 100, 1, 2, 3
    teach(drafter, (3,), {100: 0.9, 50: 0.05, 51: 0.009, 52: 0.5})
    teach(drafter, (100,), {1: 0.6, 60: 0.3})
    tree = paper_tree(drafter)
    assert [tree.tokens[i] for i in tree.children(0)] == [100, 50]
    assert [tree.tokens[i] for i in tree.children(1)] == [1, 60]
    assert tree.sources[tree.child(1, 1)] == "spine"


def test_the_pair_is_asked_before_the_token() -> None:
    for bigram in (True, False):
        drafter = started([1, 2, 3], bigram=bigram)
        teach(drafter, (3,), {40: 0.9})
        if bigram:
            teach(drafter, (2, 3), {41: 0.9})
        assert paper_tree(drafter).tokens[1] == 40 + bigram


@pytest.mark.parametrize("room", [1, 2, 3, 5])
def test_nothing_is_deeper_than_the_room(room: int) -> None:
    drafter = started(copied(4))
    fill(drafter, [3, 100, 1, 2])
    for _ in range(3):
        for ids, _ in list(drafter._table.tiers[0].values()):
            fill(drafter, ids[:3])
    assert max(paper_tree(drafter, room=room).depths) == room


# Routes, and what is learned.


def test_nothing_to_branch_to_is_the_copy_alone_and_does_not_grow() -> None:
    drafter = started(copied(200))
    tree = paper_tree(drafter)
    assert shape_of(tree) == (20, 0)
    assert paper_tree(drafter, budget=7).size == 7
    assert paper_tree(started([1, 2, 3])).size == 0


def logits_at(tree: TokenTree, vocab: int = 1000) -> NodeLogits:
    return NodeLogits(torch.randn(len(tree), vocab, generator=torch.Generator().manual_seed(0)))


def test_past_acceptance_is_averaged_over_trees_with_a_spine() -> None:
    drafter = started(copied(4))
    assert drafter._accept_rate == 0.5
    paper_tree(drafter)  # a plain chain: no tree, not averaged
    chain = TokenTree(3)
    chain.add_chain(0, [100, 1, 2, 3], source="spine")
    drafter.observe(0, chain, [0], logits_at(chain))
    assert drafter._accept_rate == 0.5
    fill(drafter, [3])
    tree = paper_tree(drafter)
    drafter.observe(0, tree, [0, 1, 2], logits_at(tree))
    assert drafter._accept_rate == pytest.approx(0.5 + 0.3 * (2 / 4 - 0.5))
    drafter.observe(0, tree, [0, 1, 2, 3, 4], logits_at(tree))
    assert drafter._accept_rate == pytest.approx(0.7 * 0.5 + 0.3)
    before = drafter._accept_rate
    without = TokenTree(3)
    without.add(0, 77, source="branch")
    drafter.observe(0, without, [0], logits_at(without))
    assert drafter._accept_rate == before


def test_every_node_is_noted_and_pairs_run_through_parents() -> None:
    drafter = started([1, 2, 3])
    fill(drafter, [3])
    tree = paper_tree(drafter)
    found = logits_at(tree)
    drafter.observe(0, tree, [0], found)
    ids, values = found.top(10)
    one, two = drafter._table.tiers
    for node in range(len(tree)):
        parent = tree.parents[node]
        guess = (ids[node].tolist(), values[node].softmax(-1).tolist())
        assert one[(tree.tokens[node],)] == guess
        assert sum(guess[1]) == pytest.approx(1.0)
        if parent >= 0:
            assert two[(tree.tokens[parent], tree.tokens[node])] == guess
    assert (2, 3) not in two  # the root of a tree is noted by itself alone


def test_the_root_of_a_plain_step_is_noted_with_its_past() -> None:
    drafter = started([1, 2, 3])
    tree = paper_tree(drafter)
    assert tree.size == 0
    drafter.observe(0, tree, [0], logits_at(tree))
    assert (2, 3) in drafter._table.tiers[1]


def test_the_prompt_is_noted_and_the_last_of_repeated_tokens_wins() -> None:
    table = Successors(10, 2)
    raw = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    table.write_text([5, 6, 5, 6], NodeLogits(raw), None)
    ids = raw.topk(10).indices.tolist()
    assert table.after([6])[:2] == (1, ids[3])
    assert table.after([5, 6])[:2] == (2, ids[3])
    assert table.after([6, 5])[:2] == (2, ids[2])
    table.write_text([9], NodeLogits(raw[:1]), 6)
    assert table.after([6, 9])[:2] == (2, ids[0])
    assert table.after([7]) == (0, [], [])


def test_the_table_forgets_the_older_half_when_full() -> None:
    table = Successors(2, orders=1, limit=4)
    raw = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    for token in range(5):
        table.write_text([token], NodeLogits(raw), None)
    assert [bool(table.after([token])[0]) for token in range(5)] == [False, False, True, True, True]


@given(
    match=st.integers(0, 8),
    share=st.floats(0, 1),
    tier=st.integers(1, 3),
    score=st.floats(0, 1),
)
def test_chances_are_probabilities_and_grow_with_the_evidence(
    match: int, share: float, tier: int, score: float
) -> None:
    for found in (chance.both(match, share, tier, score), chance.copy(match, share)):
        assert 0 < found < 1
    assert chance.both(match, share, tier, score) <= chance.both(match + 1, share, tier, score)
    assert chance.copy(match, share) <= chance.copy(match + 1, share)
    first, second = (chance.table(tier, rank, score, copies=False) for rank in (0, 1))
    assert 0 < chance.table(tier, 0, score, copies=True) < first < 1
    assert second < first <= chance.table(tier, 0, min(1.0, score + 0.1), copies=False)


# Never worse than either source alone, on the same tree.


def walked(tree: TokenTree, best: list[int], kinds: set[str]) -> int:
    node, count = 0, 0
    while True:
        node = tree.child(node, best[node])
        if node < 0 or tree.sources[node] not in kinds:
            return count
        count += 1


@pytest.mark.parametrize("shape", ["paper", "optimal"])
def test_each_step_accepts_at_least_what_either_source_would(shape: Any) -> None:
    steps: list[tuple[int, int, int]] = []

    class Watched(Goose):
        def observe(self, row: int, tree: TokenTree, path: list[int], logits: NodeLogits) -> None:
            best = logits.greedy()
            one = walked(tree, best, {"spine"})
            other = walked(tree, best, {"branch"})
            both = walked(tree, best, {"spine", "branch"})
            steps.append((both, one, other))
            assert len(path) - 1 == both
            super().observe(row, tree, path, logits)

    model = tiny_model("llama", vocab_size=12, layers=1)
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]])
    drafter = Watched(shape=shape)
    model.generate(ids, max_new_tokens=120, do_sample=False, custom_generate=drafter)
    assert all(both >= max(one, other) for both, one, other in steps)
    assert any(one for _, one, _ in steps)
    assert any(other for _, _, other in steps)


# The optimal shape.


def reference_best(drafter: Goose, budget: int, room: int) -> list[float]:
    """Values of the best `budget` nodes among all candidates down to `room`, by expansion."""
    counts: Continuations = drafter._counts[0]
    estimate = drafter._edges.calibrator.p
    values: list[float] = []
    level = [(1.0, tuple(drafter.contexts[0]), -1)]
    for _ in range(room):
        below = []
        for value, text, agreed in level:
            tail = text[-counts.longest :]
            for token, _, key, prior, agreement in drafter._candidates(counts, tail, agreed):
                chance = value * estimate(key, prior)
                if chance > 1e-3:
                    below.append((chance, (*text, token), agreement))
        values += [value for value, _, _ in below]
        level = below
    return sorted(values, reverse=True)[:budget]


@pytest.mark.parametrize("budget", [1, 7, 30, 59])
@pytest.mark.parametrize("room", [1, 3, 5])
def test_the_optimal_tree_is_the_best_of_its_candidates(budget: int, room: int) -> None:
    model = tiny_model("llama", vocab_size=12, layers=1)
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]])
    drafter = Goose(shape="optimal", keep=True)
    for length in (1, 10, 40):
        model.generate(ids, max_new_tokens=length, do_sample=False, custom_generate=drafter)
        tree = drafter.propose(0, budget, room)
        wanted = reference_best(drafter, budget, room)
        assert tree.size == len(wanted) <= budget
        assert max(tree.depths) <= room
        for node in range(1, len(tree)):
            assert 0.0 < tree.values[node] <= tree.values[tree.parents[node]]
        assert sorted(tree.values[1:], reverse=True) == pytest.approx(wanted)


def test_the_optimal_shape_learns_from_what_came() -> None:
    drafter = started([1, 2, 3, 4, 5, 1, 2, 3], shape="optimal")
    assert drafter.propose(0, 5, 5).tokens[1:] == [4, 5, 1, 2, 3]
    drafter.commit(0, [4, 5, 9])  # two right, one wrong, two never tried
    found = drafter._edges.calibrator.counts
    assert sum(hits for hits, _ in found.values()) == 2
    assert sum(seen for _, seen in found.values()) == 3


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(PertokenError, match="'star'"):
        Goose(shape="star")  # type: ignore[arg-type]
