"""The store of shared prefixes: caches come back bit for bit, and blocks are counted by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pertoken import PertokenError
from pertoken.cache._predictive import cached_rows
from pertoken.cache._rows import Rows, plain_cache
from pertoken.cache.named import make_cache
from pertoken.cache.prefix_trie import PrefixTrie, canonical_text
from pertoken.testing.models import ARCHITECTURES, tiny_model

ROW = 2 * 2 * 3 * 4  # bytes of a token in `rows`: keys and values, two layers, dim 3, float32


def rows(ids: list[int], variant: int = 0) -> Rows:
    """Rows that hang on the whole prefix, as a model's do; variants differ in every row."""
    made = []
    for layer in range(2):
        tensors = []
        for which in range(2):
            prints = [hash((tuple(ids[: n + 1]), layer, which, variant)) for n in range(len(ids))]
            numbers = [[(p >> 8 * d) % 251 / 7 for d in range(3)] for p in prints]
            tensors.append(torch.tensor(numbers).view(1, 1, len(ids), 3))
        made.append((tensors[0], tensors[1]))
    return made


def same(cache: Any, expected: Rows, length: int) -> bool:
    """Whether a cache holds the first `length` of the expected rows, bit for bit."""
    if not length:
        return int(cache.get_seq_length()) == 0
    return len(cache.layers) == len(expected) and all(
        torch.equal(a, b[:, :, :length])
        for layer, pair in zip(cache.layers, expected, strict=True)
        for a, b in zip((layer.keys, layer.values), pair, strict=True)
    )


class TrieAgainstDict(RuleBasedStateMachine):
    """Any order of calls, against a dict from session to what was put in."""

    def __init__(self) -> None:
        super().__init__()
        self.trie = PrefixTrie(block=3)
        self.put: dict[int, tuple[list[int], Rows, list[float]]] = {}

    # Two tokens, so that prefixes are shared often.
    ids = st.lists(st.integers(1, 2), min_size=1, max_size=10)

    @rule(ids=ids, variant=st.sampled_from([0, 0, 0, 1]))
    def add(self, ids: list[int], variant: int) -> None:
        made = rows(ids, variant)
        bits = [1.0 + (sum(ids[: n + 1]) % 3) for n in range(len(ids))]
        self.put[self.trie.add(ids, plain_cache(made), bits=bits)] = (ids, made, bits)

    @rule(ids=ids)
    def lookup(self, ids: list[int]) -> None:
        cache, length = self.trie.lookup(ids)
        held = [its[: self.trie.length(session)] for session, (its, _, _) in self.put.items()]
        assert length == max((common(ids, other) for other in held), default=0)
        assert not length or any(
            common(ids, its) >= length and same(cache, made, length)
            for its, made, _ in self.put.values()
        )
        for layer in cache.layers:  # what the caller does with it changes nothing in the store
            layer.keys.zero_()

    @precondition(lambda self: self.put)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.put)))
        self.trie.release(session)
        del self.put[session]
        with pytest.raises(PertokenError, match="no session"):
            self.trie.read(session)

    @rule(share=st.floats(0, 1))
    def evict(self, share: float) -> None:
        before = self.trie.stats().bytes_held
        freed = self.trie.evict(int(share * before))
        assert self.trie.stats().bytes_held == before - freed <= share * before

    @invariant()
    def sessions_come_back_bit_for_bit(self) -> None:
        for session, (ids, made, _) in self.put.items():
            length = self.trie.length(session)
            assert length == len(ids) or length % 3 == 0
            assert same(self.trie.read(session), made, length)

    @invariant()
    def counts_are_those_of_a_fresh_count(self) -> None:
        blocks, nodes, unshared = set(), set(), 0
        for session, (ids, made, _) in self.put.items():
            length = self.trie.length(session)
            unshared += length * ROW
            for start in range(0, length, 3):
                end = min(start + 3, length)
                bits = tuple(t[:, :, :end].numpy().tobytes() for pair in made for t in pair)
                blocks.add((tuple(ids[:end]), start, bits))
            nodes |= {tuple(ids[: n + 1]) for n in range(length)}
        stats = self.trie.stats()
        assert stats.sessions == len(self.put)
        assert stats.blocks == len(blocks)
        assert stats.nodes == len(nodes)
        assert stats.bytes_unshared == unshared
        assert stats.bytes_held == sum(ROW * (len(ids) - start) for ids, start, _ in blocks)

    @invariant()
    def shared_bits_are_a_similarity_and_the_distance_an_ultrametric(self) -> None:
        sessions = list(self.put)[:5]
        for a in sessions:
            for b in sessions:
                shared = self.trie.shared_bits(a, b)
                ours, theirs = (self.put[s][0][: self.trie.length(s)] for s in (a, b))
                assert shared == pytest.approx(sum(self.put[a][2][: common(ours, theirs)]))
                assert (self.trie.distance(a, b) == 0) == (ours == theirs)
                for c in sessions:
                    assert self.trie.shared_bits(a, c) >= min(shared, self.trie.shared_bits(b, c))
                    assert self.trie.distance(a, c) <= max(
                        self.trie.distance(a, b), self.trie.distance(b, c)
                    )

    def teardown(self) -> None:
        for session in self.put:
            self.trie.release(session)
        stats = self.trie.stats()
        assert stats.bytes_held == stats.blocks == stats.nodes == stats.sessions == 0
        assert not self.trie._root.children


TestTrieAgainstDict = TrieAgainstDict.TestCase
TestTrieAgainstDict.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)


def common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def test_dedup_ratio_is_the_hand_count() -> None:
    trie = PrefixTrie(block=4)
    system = [9] * 10
    for turn in ([1, 2], [3, 4, 5], [1, 7]):
        trie.add(system + turn, plain_cache(rows(system + turn)))
    # Blocks 0-3 and 4-7 are common; 8-11 differs thrice; the second session has one row more.
    stats = trie.stats()
    assert stats.blocks == 2 + 3 + 1
    assert stats.bytes_held == (8 + 3 * 4 + 1) * ROW
    assert stats.bytes_unshared == (12 + 13 + 12) * ROW
    assert stats.dedup_ratio == 37 / 21
    assert stats.nodes == 10 + 2 + 3 + 1


def test_rows_of_other_bits_are_not_shared() -> None:
    trie, ids = PrefixTrie(block=2), [5, 6, 7, 8]
    first, second = (trie.add(ids, plain_cache(rows(ids, variant))) for variant in (0, 1))
    assert trie.stats().dedup_ratio == 1
    assert same(trie.read(first), rows(ids), 4)
    assert same(trie.read(second), rows(ids, 1), 4)
    assert trie.distance(first, second) == 0  # the same tokens all the same


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_goes_on_from_a_lookup_as_from_its_own_cache(architecture: str) -> None:
    model = tiny_model(architecture)
    drawn = torch.Generator().manual_seed(1)
    prompt = torch.randint(1, 64, (25,), generator=drawn).tolist()
    trie = PrefixTrie(model, block=4)
    trie.add([*prompt[:20], 3, 3, 3])
    cache, length = trie.lookup(prompt[:-1])
    assert length == 20
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, past_key_values=cache, **settings), expected)


def test_the_models_own_fill_equals_a_plain_prefill_and_prices_its_tokens() -> None:
    model = tiny_model("llama")
    trie = PrefixTrie(model, block=4)
    shared, ids = [5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 10, 11, 12, 13]
    first = trie.add(shared)
    second = trie.add(ids)
    for layer, (keys, values) in zip(
        trie.read(second).layers, cached_rows(model, torch.tensor([ids])), strict=True
    ):
        assert torch.allclose(layer.keys, keys, atol=1e-10)
        assert torch.allclose(layer.values, values, atol=1e-10)
    # The six common rows are the first session's own, bit for bit.
    for ours, theirs in zip(trie.read(first).layers, trie.read(second).layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys[:, :, :6])
    with torch.no_grad():
        laws = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    bits = [math.log2(64)] + [-float(laws[n, t]) / math.log(2) for n, t in enumerate(ids[1:])]
    assert trie.shared_bits(first, second) == pytest.approx(sum(bits[:6]), rel=1e-5)
    assert trie.shared_bits(second, second) == pytest.approx(sum(bits), rel=1e-5)
    third = trie.add(ids)  # all of it is there: nothing is computed or stored
    assert trie.distance(second, third) == 0
    assert trie.stats().blocks == 4


def test_eviction_drops_the_end_of_the_fewest_bits_times_hits() -> None:
    trie = PrefixTrie(block=2)
    cheap, dear = [1, 2, 3, 4], [1, 2, 5, 6]
    a = trie.add(cheap, plain_cache(rows(cheap)), bits=[1, 1, 1, 1])
    b = trie.add(dear, plain_cache(rows(dear)), bits=[1, 1, 9, 9])
    assert trie.evict(5 * ROW) == 2 * ROW
    assert (trie.length(a), trie.length(b)) == (2, 4)
    trie.release(a)
    a = trie.add(cheap, plain_cache(rows(cheap)), bits=[1, 1, 1, 1])
    for _ in range(6):
        trie.lookup(cheap)  # 4 bits, 7 hits: now worth more than 20 bits, 1 hit
    trie.evict(5 * ROW)
    assert (trie.length(a), trie.length(b)) == (4, 2)
    assert trie.stats().hits == 6


def test_capacity_holds_after_every_add() -> None:
    trie = PrefixTrie(block=2, capacity=5 * ROW)
    for token in range(1, 6):
        trie.add([token] * 4, plain_cache(rows([token] * 4)))
        assert trie.stats().bytes_held <= 5 * ROW


def test_the_last_id_of_generate_has_no_row() -> None:
    model, trie = tiny_model("llama"), PrefixTrie(block=4)
    ids = torch.tensor([[5, 6, 7]])
    out = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    session = trie.add(out.sequences[0], out.past_key_values)
    assert trie.length(session) == 6
    assert trie.lookup(out.sequences[0])[1] == 6


def test_caches_of_two_models_do_not_mix() -> None:
    trie = PrefixTrie()
    trie.add([1, 2], plain_cache(rows([1, 2])))
    with pytest.raises(PertokenError, match="one trie holds the caches of one model"):
        trie.add([1, 2], plain_cache(rows([1, 2])[:1]))


def test_canonical_text_is_stable_and_joins_spellings() -> None:
    spelt = ["Café \r\nx", "Cafe\u0301\nx  "]
    found = {canonical_text(text) for text in spelt}
    assert found == {"Café\nx"}
    assert canonical_text(found.pop()) == "Café\nx"


@pytest.mark.parametrize("name", ["h2o", "fp8", "kv-direct"])
def test_caches_of_another_kind_are_refused_by_name(name: str) -> None:
    model = tiny_model("llama")
    cache = make_cache(name, model, 8)
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(PertokenError, match=f"a {type(cache).__name__} does not hold plain keys"):
        PrefixTrie(model).add(ids, cache)


def test_caches_that_do_not_hold_every_row_are_refused() -> None:
    from transformers import DynamicCache, StaticCache

    model, ids = tiny_model("mistral"), [5] * 20
    sliding = DynamicCache(config=model.config)
    model(torch.tensor([ids]), past_key_values=sliding)
    with pytest.raises(PertokenError, match="holds 7 of 20 rows: use DynamicCache"):
        PrefixTrie().add(ids, sliding)
    static = StaticCache(config=model.config, max_cache_len=32)
    model(torch.tensor([ids]), past_key_values=static)
    with pytest.raises(PertokenError, match=r"Static.*use DynamicCache"):
        PrefixTrie().add(ids, static)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PrefixTrie(block=0), "block must be 1 or more"),
        (lambda: PrefixTrie(capacity=-1), "capacity must be 0 or more"),
        (lambda: PrefixTrie().add([]), "ids are empty"),
        (lambda: PrefixTrie().lookup([]), "ids are empty"),
        (lambda: PrefixTrie().add([1]), "needs the cache of the ids, or PrefixTrie"),
        (lambda: PrefixTrie().add([1, 2, 3], plain_cache(rows([1]))), "holds 1 rows for 3 ids"),
        (lambda: PrefixTrie().add([1], plain_cache(rows([1])), bits=[]), "0 numbers for 1 ids"),
        (lambda: PrefixTrie().add([1], plain_cache([])), "the cache is empty"),
        (lambda: PrefixTrie().release(3), "no session 3"),
        (lambda: PrefixTrie().evict(-1), "cannot evict down to -1"),
        (
            lambda: PrefixTrie().add([1], plain_cache([(torch.ones(2, 1, 1, 3),) * 2])),
            "batch of 2",
        ),
    ],
)
def test_errors_name_the_mend(call: Any, message: str) -> None:
    with pytest.raises(PertokenError, match=message):
        call()


def test_ids_that_the_model_cannot_read_are_refused() -> None:
    trie = PrefixTrie(tiny_model("gpt2", max_positions=16))
    for ids, words in (
        ([5, 64], "the id 64, but the model knows 64 ids"),
        ([5, -1], "0 or more, got -1"),
        ([5] * 17, "17 tokens do not fit the model's 16 positions"),
    ):
        with pytest.raises(PertokenError, match=words):
            trie.add(ids)
    assert trie.stats().sessions == 0
    trie.add([5] * 16)
