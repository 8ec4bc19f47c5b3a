"""The tiny adders: same problems in every direction, nothing held out is trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pertoken.probe._addition import problem_set
from pertoken.reproduce import number_tokenization as reproduction
from pertoken.reproduce._addition_training import (
    codes,
    encode,
    number_tokenizer,
    train,
    training_problems,
)
from pertoken.tokenize.numbers import DIRECTIONS, Direction, grouping_of


@pytest.mark.parametrize(("direction", "group"), [("r2l", 2), ("l2r", 2), ("single", 1)])
def test_each_tokenizer_has_its_direction_and_the_same_vocabulary(
    direction: Direction, group: int
) -> None:
    tokenizer = number_tokenizer(direction)
    assert grouping_of(tokenizer) == (direction, group)
    assert tokenizer.get_vocab() == number_tokenizer("r2l").get_vocab()
    ids = tokenizer.encode("123+4567=4690")
    assert tokenizer.decode(ids) == "123+4567=4690"


def test_nothing_held_out_is_trained_on_and_all_lengths_are() -> None:
    held_out = problem_set([(1, 1, 1), (1, 1, 2)], 30, 0)
    rng = np.random.default_rng(0)
    pairs = training_problems([(1, 1, 1), (1, 1, 2), (3, 3, 4)], 3000, held_out, rng)
    assert pairs.shape == (3000, 2)
    tested = {(problem.first, problem.second) for problem in held_out}
    assert not tested & {tuple(pair) for pair in pairs.tolist()}
    assert (pairs.sum(-1) > 999).sum() >= 1000
    assert len(set(codes(pairs).tolist())) == len({tuple(pair) for pair in pairs.tolist()})


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_only_the_answer_and_the_end_are_learned(direction: Direction) -> None:
    tokenizer = number_tokenizer(direction)
    ids, labels = encode(tokenizer, np.array([[123, 4567], [1, 2]]))
    for row, wanted, answer in zip(ids, labels, ("4690", "3"), strict=True):
        learned = wanted[wanted != -100]
        assert tokenizer.decode(learned.tolist()) == answer + tokenizer.eos_token
        assert torch.equal(row[wanted != -100], learned)
    assert tokenizer.decode(ids[0].tolist(), skip_special_tokens=True) == "123+4567=4690"


def test_a_training_learns() -> None:
    tokenizer = number_tokenizer("r2l")
    ids, labels = encode(tokenizer, np.array([[1, 2], [4, 4], [3, 5]]))
    losses = []
    for steps in (1, 20):
        model = train(tokenizer, [(1, 1, 1)], [], steps, seed=3)
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=labels).loss.item())
    assert losses[1] < losses[0] - 0.2


def test_a_training_can_be_repeated_and_leaves_the_random_state() -> None:
    tokenizer = number_tokenizer("l2r")
    state = torch.random.get_rng_state()
    first, again = (train(tokenizer, [(1, 1, 1)], [], 2, seed=3) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_concentration_is_a_difference_of_mean_gaps() -> None:
    gap = np.array([1.0, 0.5, 0.0, 0.25])
    longer = np.array([1.0, 1.0, 0.0, 0.0])
    assert reproduction._apart(gap, longer).item() == pytest.approx(0.75 - 0.125)


def test_places_are_told_against_the_borders() -> None:
    # 12|3 from the left: 3 is the first digit of the second token; 1|23 from the right: 2 is.
    units = [[[111, 12, 124], [111, 12, 133], [111, 12, 123], [111, 12, 1230], [111, 12, None]]]
    left = {row.metric: row.here for row in reproduction._places("l2r", units)}
    right = {row.metric: row.here for row in reproduction._places("r2l", units)}
    name = "sums as long as an addend: wrong in the first digit of the second token, of the wrong"
    assert left[f"l2r, {name} of right length"] == 0.5
    assert right[f"r2l, {name} of right length"] == 0.5
    assert left["l2r, sums as long as an addend: wrong in digit 1 of 3"] == 0
    assert left["l2r, sums as long as an addend: wrong in digit 3 of 3"] == 0.5
