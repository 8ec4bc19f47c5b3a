"""Prompt lookup against transformers' own candidate generator and the published function."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from pertoken.decode.prompt_lookup import PromptLookup
from pertoken.errors import PertokenError


def start(drafter: PromptLookup, *prompts: list[int]) -> PromptLookup:
    drafter.contexts = [list(prompt) for prompt in prompts]
    drafter.begin(64)
    return drafter


def chain(drafter: PromptLookup, row: int = 0, budget: int = 10, room: int = 100) -> list[int]:
    tree = drafter.propose(row, budget, room)
    assert tree.parents == list(range(-1, len(tree) - 1))
    assert tree.tokens[0] == drafter.contexts[row][-1]
    return tree.tokens[1:]


def transformers_chain(text: list[int], ngram: int, tokens: int, stops: list[int]) -> list[int]:
    generator = PromptLookupCandidateGenerator(
        eos_token_id=torch.tensor(stops) if stops else None,
        num_output_tokens=tokens,
        max_matching_ngram_size=ngram,
        max_length=10_000,
    )
    candidates, _ = generator.get_candidates(torch.tensor([text]))
    return candidates[0, len(text) :].tolist()


def published_chain(text: list[int], ngram: int, tokens: int) -> list[int]:
    for length in range(min(ngram, len(text)), 0, -1):
        for start in range(length, len(text) - length):
            if text[start - length : start] == text[-length:] and start + tokens <= len(text):
                return text[start : start + tokens]
    return []


texts = st.lists(st.integers(0, 5), min_size=2, max_size=40)


@settings(max_examples=200, deadline=None)
@given(
    prompt=texts,
    more=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), max_size=4),
    ngram=st.integers(1, 4),
    tokens=st.integers(1, 12),
    stops=st.lists(st.integers(0, 5), max_size=2),
)
def test_copies_equal_transformers(
    prompt: list[int], more: list[list[int]], ngram: int, tokens: int, stops: list[int]
) -> None:
    drafter = start(PromptLookup(max_ngram=ngram, stop_ids=stops), prompt)
    for new in [[], *more]:
        drafter.commit(0, new)
        text = drafter.contexts[0]
        assert chain(drafter, budget=tokens) == transformers_chain(text, ngram, tokens, stops)


@settings(max_examples=200, deadline=None)
@given(prompt=texts, ngram=st.integers(1, 4), tokens=st.integers(1, 12))
def test_copies_equal_the_published_function(prompt: list[int], ngram: int, tokens: int) -> None:
    drafter = start(PromptLookup(variant="original", max_ngram=ngram), prompt)
    assert chain(drafter, budget=tokens) == published_chain(prompt, ngram, tokens)


def test_defaults_are_the_published_ones() -> None:
    assert (PromptLookup().longest, PromptLookup.default_budget) == (2, 10)
    assert PromptLookup(variant="original").longest == 3


def test_worked_example() -> None:
    # "8 9" first stood at 1-2 and again at 5-6: the first place is copied, up to the text's end.
    text = [7, 8, 9, 1, 2, 8, 9, 3, 8, 9]
    drafter = start(PromptLookup(), text, [1, 2, 3], [4, 4])
    assert chain(drafter) == [1, 2, 8, 9, 3, 8, 9]
    assert chain(drafter, budget=3) == [1, 2, 8]
    assert chain(drafter, room=2) == [1, 2]
    assert chain(drafter, row=1) == []
    assert chain(drafter, row=2) == [4]
    assert chain(start(PromptLookup(variant="original"), text)) == []


def test_source_and_learned_probability() -> None:
    drafter = start(PromptLookup(), [1, 2, 3, 1, 2])
    before = drafter.propose(0, 2, 9)
    assert before.sources[1:] == ["copy", "copy"]
    for _ in range(50):
        drafter.propose(0, 2, 9)
        drafter._edges.settle(0, [99])  # never right; the text stays as it is
    after = drafter.propose(0, 2, 9)
    assert after.values[1] < 0.5 * before.values[1]
    assert after.values[2] < after.values[1]


@pytest.mark.parametrize("options", [{"max_ngram": 0}, {"variant": "transformer"}])
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(PertokenError):
        PromptLookup(**options)
