"""Prompt lookup, lookahead and suffix decoding in the real loop, on tiny models in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pertoken.decode.drafter import Drafter
from pertoken.decode.lookahead import Lookahead
from pertoken.decode.prompt_lookup import PromptLookup
from pertoken.decode.suffix import SuffixTree
from pertoken.testing import check_batch_invariant, check_lossless, tiny_model

DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "prompt-lookup": PromptLookup,
    "prompt-lookup-original": lambda: PromptLookup(variant="original", budget=3),
    "lookahead": lambda: Lookahead(window=3, ngram=4, guesses=3),
    "lookahead-wide": lambda: Lookahead(window=8, ngram=3, guesses=2, pool_from_prompt=False),
    "lookahead-small-budget": lambda: Lookahead(budget=5),
    "suffix": SuffixTree,
    "suffix-tree": lambda: SuffixTree(mode="tree", max_spec_factor=4.0, keep=True),
}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_lossless(name: str, architecture: str) -> None:
    model = tiny_model(architecture, vocab_size=24)
    check_lossless(DRAFTERS[name](), model)


@pytest.mark.parametrize("name", ["prompt-lookup", "lookahead", "suffix"])
def test_batch_equals_single_rows(name: str) -> None:
    check_batch_invariant(DRAFTERS[name](), tiny_model("llama", vocab_size=24))


def looping_run(drafter: Drafter) -> Drafter:
    """Decode 60 tokens of a model so small that its text repeats, and check them."""
    model = tiny_model("llama", vocab_size=6, layers=1)
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3]])
    options = {"max_new_tokens": 60, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, custom_generate=drafter, **options), plain)
    return drafter


@pytest.mark.parametrize("name", DRAFTERS)
def test_repetitive_text_takes_fewer_passes(name: str) -> None:
    stats = looping_run(DRAFTERS[name]()).stats
    assert stats.new_tokens == 60
    assert stats.accepted_per_forward > 1.1


def test_sources_are_named() -> None:
    assert set(looping_run(PromptLookup()).stats.accepted) <= {"copy", "bonus"}
    assert set(looping_run(SuffixTree()).stats.accepted) <= {"suffix", "bonus"}
    assert set(looping_run(DRAFTERS["lookahead"]()).stats.accepted) <= {"guess", "window", "bonus"}


def test_what_one_call_leaves_helps_the_next() -> None:
    drafter = looping_run(SuffixTree(keep=True))
    first = drafter.stats.forwards
    assert looping_run(drafter).stats.forwards < first
