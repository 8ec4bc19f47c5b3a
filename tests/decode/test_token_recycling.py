"""Token Recycling: the published tree, and a matrix with the published meaning."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from pertoken.decode import TokenRecycling, TokenTree
from pertoken.decode.token_recycling import tree_paths
from pertoken.decode.topk import NodeLogits
from pertoken.testing import tiny_model

PROMPT = [1, 2, 3, 4, 1, 2, 3]


def started(vocab: int = 50, prompt: list[int] = PROMPT, **options: Any) -> TokenRecycling:
    drafter = TokenRecycling(**options)
    drafter.contexts = [list(prompt)]
    drafter.begin(vocab)
    return drafter


def test_the_published_tree() -> None:
    paths = tree_paths()
    assert len(paths) == len(set(paths)) == 80
    assert Counter(map(len, paths)) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    assert [len(path) for path in paths] == sorted(len(path) for path in paths)
    for place, path in enumerate(paths):
        assert len(path) == 1 or path[:-1] in paths[:place]
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in paths[:place]
    below = Counter(path[:-1] for path in paths)
    assert [below[(rank,)] for rank in range(8)] == [8, 4, 3, 2, 1, 1, 1, 1]
    assert [below[(0, rank)] for rank in range(8)] == [8, 3, 2, 1, 1, 1, 1, 1]
    assert [below[(0, 0, rank)] for rank in range(5)] == [5, 2, 1, 1, 1]
    assert [below[(0, 0, 0, rank)] for rank in range(3)] == [3, 1, 1]
    assert {path for path in paths if len(path) == 6} == {
        (0, 0, 0, 0, 0, 0),
        (0, 0, 0, 0, 0, 1),
        (0, 0, 0, 1, 0, 0),
    }


@pytest.mark.parametrize(("budget", "room"), [(80, 99), (60, 99), (7, 99), (80, 2), (80, 1)])
def test_the_tree_is_a_gather_from_the_matrix(budget: int, room: int) -> None:
    drafter = started()
    assert drafter.matrix is not None
    drafter.matrix[:] = np.random.default_rng(0).integers(0, 50, (50, 8))
    tree = drafter.propose(0, budget, room)
    wanted = set()
    for path in tree_paths()[:budget]:
        if len(path) <= room:
            words = [PROMPT[-1]]
            for rank in path:
                words.append(int(drafter.matrix[words[-1], rank]))
            wanted.add(tuple(words))
    found = {tuple(tree.tokens[i] for i in tree.path(node)) for node in range(1, len(tree))}
    assert found == wanted  # rows that repeat a token give one node
    assert tree.size == len(wanted)


def test_distinct_rows_give_all_eighty_nodes() -> None:
    drafter = started(vocab=1000)
    assert drafter.matrix is not None
    drafter.matrix[:] = (np.arange(1000)[:, None] * 8 + np.arange(1, 9)) % 1000
    tree = drafter.propose(0, 80, 99)
    assert tree.size == 80
    assert Counter(tree.depths[1:]) == {1: 8, 2: 21, 3: 25, 4: 15, 5: 8, 6: 3}
    assert set(tree.sources[1:]) == {"recycled"}


def test_a_matrix_of_zeros_proposes_token_zero() -> None:
    tree = started().propose(0, 80, 99)
    assert tree.tokens == [3, 0, 0, 0, 0, 0, 0]
    assert tree.depths == list(range(7))


def test_every_node_is_written_and_the_last_of_repeated_tokens_wins() -> None:
    drafter = started()
    tree = TokenTree(3)
    tree.add_chain(0, [5, 6])
    tree.add_chain(0, [6, 5])  # 5 and 6 twice
    raw = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    drafter.observe(0, tree, [0], NodeLogits(raw))
    assert drafter.matrix is not None
    best = raw.topk(8).indices.numpy()
    assert drafter.matrix[3].tolist() == best[0].tolist()
    assert drafter.matrix[6].tolist() == best[3].tolist()
    assert drafter.matrix[5].tolist() == best[4].tolist()
    assert set(np.flatnonzero(drafter.matrix.any(-1))) == {3, 5, 6}


def test_a_vocabulary_of_fewer_than_eight_tokens() -> None:
    model = tiny_model("llama", vocab_size=5)
    ids = torch.tensor([[1, 2, 3]])
    plain = model.generate(ids, max_new_tokens=30, do_sample=False)
    drafter = TokenRecycling()
    assert torch.equal(
        model.generate(ids, max_new_tokens=30, do_sample=False, custom_generate=drafter), plain
    )
    assert drafter.stats.accepted.total() > 5


def test_the_prompt_is_noted_only_if_asked_for() -> None:
    model = tiny_model("llama", vocab_size=50)
    options = {"max_new_tokens": 1, "do_sample": False}  # no pass behind the prefill
    for harvest in (False, True):
        drafter = TokenRecycling(harvest_prompt=harvest)
        model.generate(torch.tensor([PROMPT]), custom_generate=drafter, **options)
        assert drafter.matrix is not None
        written = set(np.flatnonzero(drafter.matrix.any(-1)))
        assert written == (set(PROMPT) if harvest else set())
    logits = model(torch.tensor([PROMPT])).logits[0]
    assert drafter.matrix[2].tolist() == logits[5].topk(8).indices.tolist()  # the later 2


def test_keep_is_a_hot_start() -> None:
    model = tiny_model("llama", vocab_size=16)
    ids = torch.tensor([PROMPT])
    run = {"max_new_tokens": 40, "do_sample": False}
    cold, hot = TokenRecycling(), TokenRecycling(keep=True)
    forwards: dict[bool, list[int]] = {False: [], True: []}
    for drafter in (cold, hot):
        for _ in range(2):
            model.generate(ids, custom_generate=drafter, **run)
            forwards[drafter.keep].append(drafter.stats.forwards)
    assert forwards[False][0] == forwards[False][1] == forwards[True][0]
    # The first call's matrix is there from the first step of the second.
    assert forwards[True][1] != forwards[True][0]
    assert cold.matrix is not None
    assert hot.matrix is not None
    known = hot.matrix.copy()
    for drafter in (cold, hot):
        drafter.begin(16)
    assert not cold.matrix.any()
    assert known.any()
    assert (hot.matrix == known).all()


@pytest.mark.parametrize(
    ("vocab", "size"), [(32_000, 1_024_000), (49_152, 1_572_864), (151_936, 4_861_952)]
)
def test_storage(vocab: int, size: int) -> None:
    drafter = started(vocab=vocab)
    assert drafter.storage_bytes == vocab * 8 * 4 == size
    drafter.reset()
    assert drafter.storage_bytes == 0
