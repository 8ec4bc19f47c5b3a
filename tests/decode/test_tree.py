"""Token trees against brute force: tries, values, the best part, who sees whom."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.decode.tree import TokenTree, ancestor_mask

# (parent as a fraction of the nodes that exist, token, probability)
edges = st.lists(
    st.tuples(st.floats(0, 0.999), st.integers(0, 3), st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
    max_size=9,
)


def grown(parts: list[tuple[float, int, float]]) -> TokenTree:
    tree = TokenTree(7)
    for place, token, probability in parts:
        tree.add(int(place * len(tree)), token, source=f"s{token}", probability=probability)
    return tree


def words(tree: TokenTree) -> list[tuple[int, ...]]:
    return [tuple(tree.tokens[i] for i in tree.path(node)) for node in range(len(tree))]


def test_a_root_alone() -> None:
    tree = TokenTree(5)
    assert (len(tree), tree.size, tree.parents, tree.depths) == (1, 0, [-1], [0])
    assert tree.values == [1.0]
    assert tree.child(0, 5) == -1
    assert tree.best(0) is tree
    assert tree.path(0) == [0]


@given(parts=edges)
def test_a_tree_is_a_trie(parts: list[tuple[float, int, float]]) -> None:
    tree = grown(parts)
    assert len(set(words(tree))) == len(tree)
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        assert parent < node
        assert tree.depths[node] == tree.depths[parent] + 1
        assert tree.child(parent, tree.tokens[node]) == node
        assert tree.values[node] <= tree.values[parent]
        assert node in tree.children(parent)
    assert sum(len(tree.children(node)) for node in range(len(tree))) == tree.size


def test_a_guess_that_is_there_is_merged_and_keeps_source_and_value() -> None:
    tree = TokenTree(1)
    first = tree.add(0, 2, source="spine", probability=0.5)
    assert tree.add(0, 2, source="branch", probability=0.9) == first
    assert tree.add(first, 2) != first  # the same token one level lower is another node
    assert (tree.sources[first], tree.values[first]) == ("spine", 0.5)


def test_a_chain_merges_into_what_is_there() -> None:
    tree = TokenTree(1)
    end = tree.add_chain(0, [2, 3, 4], source="a", probabilities=[0.5, 0.5, 0.5])
    other = tree.add_chain(0, [2, 3, 5], source="b")
    assert tree.size == 4
    assert tree.parents[end] == tree.parents[other]
    assert tree.values == [1.0, 0.5, 0.25, 0.125, 0.25]
    assert tree.path(other) == [0, 1, 2, 4]


@settings(deadline=None)
@given(parts=edges, size=st.integers(0, 9))
def test_best_is_closed_under_parents_and_as_good_as_any_part(
    parts: list[tuple[float, int, float]], size: int
) -> None:
    tree = grown(parts)
    best = tree.best(size)
    assert best.size == min(size, tree.size)
    assert set(words(best)) <= set(words(tree))
    for node in range(1, len(best)):
        same = words(tree).index(words(best)[node])
        assert best.sources[node] == tree.sources[same]
        assert best.values[node] == pytest.approx(tree.values[same], abs=1e-12)
    most = max(
        sum(tree.values[node] for node in chosen)
        for chosen in itertools.combinations(range(1, len(tree)), best.size)
        if all(tree.parents[node] in (0, *chosen) for node in chosen)
    )
    assert sum(best.values[1:]) == pytest.approx(most)


def test_only_keeps_the_named_nodes() -> None:
    tree = TokenTree(1)
    tree.add_chain(0, [2, 3], probabilities=[0.5, 0.5])
    tree.add(1, 4, source="branch", probability=0.25)
    part = tree.only([1, 3])
    assert (part.tokens, part.parents) == ([1, 2, 4], [-1, 0, 1])
    assert part.sources == ["root", "draft", "branch"]
    assert part.values == [1.0, 0.5, 0.125]


@pytest.mark.parametrize("nodes", [1, 2, 7, 8, 9, 63, 64, 65, 200])
def test_ancestor_mask_is_the_definition(nodes: int) -> None:
    chance = random.Random(nodes)
    parents = [-1] + [chance.randrange(node) for node in range(1, nodes)]
    for size in (nodes, nodes + 3):
        mask = ancestor_mask(parents, size)
        assert mask.dtype == torch.bool
        assert mask.shape == (size, size)
        for node in range(nodes):
            above, seen = node, set()
            while above >= 0:
                seen.add(above)
                above = parents[above]
            assert set(mask[node].nonzero().flatten().tolist()) == seen
        # Padding of a batch sees itself alone, and nobody sees it.
        assert torch.equal(mask[nodes:], torch.eye(size, dtype=torch.bool)[nodes:])
        assert not mask[:nodes, nodes:].any()
