"""KNN-LM against brute force, its limits, and what it must leave alone."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pertoken.decode import KNNDatastore, KNNMemory, fit_temperature
from pertoken.decode._knn_states import key_place, read, windows
from pertoken.decode._knn_tokens import read_ids
from pertoken.decode.knn_datastore import Neighbours
from pertoken.decode.knn_lm import interpolate, retrieval_log_probs
from pertoken.errors import PertokenError
from pertoken.testing import ARCHITECTURES, ByteTokenizer, check_leaves_no_trace, tiny_model
from pertoken.testing.setups import left_pad

TEXTS = ["the cat sat on the mat", "a dog and a cat", "on and on", "x"]
TOKENIZER = ByteTokenizer()
PROMPTS = [torch.tensor(TOKENIZER.encode(text)) for text in ("the do", "a cat on the m")]


def model_of(architecture: str = "llama", **options: Any) -> Any:
    return tiny_model(architecture, vocab_size=258, **options)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> KNNDatastore:
    path = tmp_path_factory.mktemp("knn") / "store"
    return KNNDatastore.build(model_of(), TOKENIZER, TEXTS, path)


def by_definition(store: KNNDatastore, ids: list[int], k: int, temperature: float) -> torch.Tensor:
    """p_knn [vocab] behind a text, from the definition: every prefix of every text is a context."""
    pairs = [
        (text[: end + 1], text[end + 1])
        for text in map(TOKENIZER.encode, TEXTS)
        for end in range(len(text) - 1)
    ]

    def state(context: list[int]) -> torch.Tensor:
        return read(store.model, torch.tensor([context]))[0][0, -1]

    query = state(ids)
    near = sorted((float((state(c) - query).square().sum()), v) for c, v in pairs)[:k]
    chances = torch.zeros(258, dtype=torch.float64)
    for distance, value in near:
        chances[value] += math.exp(-distance / temperature)
    return chances / chances.sum()


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_a_step_is_the_definition(store: KNNDatastore, weight: float) -> None:
    ids = PROMPTS[1]
    logits = store.model(ids[None]).logits[:, -1]
    memory = KNNMemory(store, k=7, weight=weight, temperature=20.0)
    found = memory(ids[None], logits)[0].exp()
    retrieval = by_definition(store, ids.tolist(), 7, 20.0)
    expected = weight * retrieval + (1 - weight) * logits[0].softmax(-1)
    assert torch.allclose(found, expected, atol=1e-12, rtol=1e-9)
    assert 0 < retrieval.count_nonzero() <= 7


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_are_of_the_state_before_the_token_on_every_architecture(
    architecture: str, tmp_path: Path
) -> None:
    """And what is noted while decoding is what the store would hold of that text."""
    model = model_of(architecture)
    store = KNNDatastore.build(model, TOKENIZER, TEXTS[:2], tmp_path / "store")
    first = TOKENIZER.encode(TEXTS[0])
    assert store.values[: len(first) - 1].tolist() == first[1:]
    for end in (1, 9):
        key = read(model, torch.tensor([first[:end]]))[0][0, -1]
        assert torch.allclose(torch.from_numpy(store.keys[end - 1]), key, atol=1e-12)
    ids, mask = left_pad(PROMPTS, 0)
    seen: list[torch.Tensor] = []

    class Noting(KNNMemory):
        def keys(self, input_ids: torch.Tensor) -> torch.Tensor:
            assert self._watch.key_of(input_ids) is not None
            seen.append(super().keys(input_ids))
            return seen[-1]

    run = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    out = model.generate(ids, logits_processor=[Noting(store, k=5, temperature=9.0)], **run)
    for row, prompt in enumerate(PROMPTS):
        text = out[row, ids.shape[1] - len(prompt) :][None, :-1]
        expected = read(model, text)[0][0, len(prompt) - 1 :]
        assert torch.allclose(torch.stack([keys[row] for keys in seen]), expected, atol=1e-9)


def generate(model: Any, prompts: list[torch.Tensor], **options: Any) -> torch.Tensor:
    ids, mask = left_pad(prompts, 0)
    run = {"max_new_tokens": 8, "do_sample": False, **options}
    return model.generate(ids, attention_mask=mask, **run)[:, ids.shape[1] :]


def test_weight_0_changes_no_bit(store: KNNDatastore) -> None:
    scores = torch.randn(2, 258)
    assert KNNMemory(store, k=3, weight=0)(torch.ones(2, 3).long(), scores) is scores
    run = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    ids = PROMPTS[0][None]
    memory = KNNMemory(store, k=3, weight=0)
    own = store.model.generate(ids, max_new_tokens=3, logits_processor=[memory], **run)
    assert all(map(torch.equal, own.scores, own.logits))


def test_noted_or_read_again_the_text_is_the_same(store: KNNDatastore) -> None:
    """In batches, padded on the left, and with beams; a row is what it is alone."""
    memory = KNNMemory(store, k=9, weight=0.6, temperature=5.0)
    again = KNNMemory(store, k=9, weight=0.6, temperature=5.0)
    again.close()
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        texts = []
        for each in (memory, again):
            torch.manual_seed(1)
            texts.append(generate(store.model, PROMPTS, logits_processor=[each], **options))
        assert torch.equal(*texts)
    rows = generate(store.model, PROMPTS, logits_processor=[memory])
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert torch.equal(row, generate(store.model, [prompt], logits_processor=[memory])[0])
    assert not torch.equal(rows, generate(store.model, PROMPTS))


def test_drafts_are_read_from_the_tree_where_they_are_a_path(store: KNNDatastore) -> None:
    from pertoken.decode import Goose

    memory = KNNMemory(store, k=9, weight=0.6, temperature=5.0)
    noted = 0

    class Counting(KNNMemory):
        def keys(self, input_ids: torch.Tensor) -> torch.Tensor:
            nonlocal noted
            key = self._watch.key_of(input_ids)
            if key is not None:
                noted += 1
                assert torch.allclose(key, read(store.model, input_ids)[0][:, -1], atol=1e-9)
            return super().keys(input_ids)

    plain = generate(store.model, [PROMPTS[1]], logits_processor=[memory])
    counting = Counting(store, k=9, weight=0.6, temperature=5.0)
    drafted = generate(
        store.model, [PROMPTS[1]], logits_processor=[counting], custom_generate=Goose()
    )
    assert torch.equal(plain, drafted)
    assert noted


def test_a_bound_holds_the_loss_and_is_met_where_no_neighbour_has_the_token(
    store: KNNDatastore,
) -> None:
    reads = read_ids(store, TOKENIZER.encode("the dog sat, and sat"), 5)
    change = reads.mixed(0.25, 3.0) - reads.base
    bound = math.log(0.75)
    assert float(change.min()) >= bound - 1e-12
    assert torch.allclose(change[~reads.hit], torch.tensor(bound, dtype=torch.float64))
    assert bool(reads.hit.any() and (~reads.hit).any())
    assert torch.equal(reads.mixed(0, 3.0), reads.base)


def test_a_text_of_the_store_finds_itself_and_is_spared_when_it_is_scored(
    store: KNNDatastore,
) -> None:
    ids = TOKENIZER.encode(TEXTS[1])
    keys, _ = read(store.model, torch.tensor([ids]))
    near = store.search(keys[0, :-1], 1)
    (span,) = store.spans(ids)
    assert near.entries[:, 0].tolist() == list(range(*span))
    assert near.values[:, 0].tolist() == ids[1:]
    assert float(near.distances.max()) < 1e-20  # the same forward again: no rounding either
    spared = store.search(keys[0, :-1], 29, spared=[span]).entries
    assert not bool(((spared >= span[0]) & (spared < span[1])).any())
    reads = read_ids(store, ids, 5)
    assert float(reads.distances.min()) > 0
    with pytest.raises(PertokenError, match=r"29 entries .* beside the text itself, got 30"):
        store.search(keys[0, :1], 30, spared=[span])


def test_entropy_is_of_tokens_not_of_neighbours(store: KNNDatastore) -> None:
    reads = read_ids(store, TOKENIZER.encode("a cat and a mat"), 12)
    near = Neighbours(reads.distances, reads.values, reads.values)
    law = retrieval_log_probs(near, 258, 15.0)
    expected = torch.distributions.Categorical(logits=law).entropy()
    assert torch.allclose(reads.retrieval_entropy(15.0), expected, atol=1e-9)
    assert float(expected.max()) > 0.1


def test_what_is_forbidden_stays_so(store: KNNDatastore) -> None:
    ids = PROMPTS[0][None]
    scores = torch.zeros(1, 258)
    memory = KNNMemory(store, k=1, weight=1.0)
    (only,) = memory(ids, scores)[0].isfinite().nonzero()[:, 0].tolist()
    scores[0, only] = -torch.inf  # the one token that retrieval votes for
    left = memory(ids, scores)
    assert left[0, only] == -torch.inf
    assert torch.allclose(left.exp().sum(), torch.tensor(1.0))
    wide = KNNMemory(store, k=20, weight=0.5, temperature=50.0)(ids, scores)
    assert wide[0, only] == -torch.inf
    assert torch.allclose(wide.exp().sum(), torch.tensor(1.0))


def test_no_trace_is_left_when_the_memory_is_gone(store: KNNDatastore) -> None:
    ids = PROMPTS[0][None]

    def decode(model: Any) -> None:
        run = {"max_new_tokens": 4, "do_sample": False}
        model.generate(ids, logits_processor=[KNNMemory(store, k=3)], **run)

    check_leaves_no_trace(store.model, decode, rng=True)
    before = hooks(store.model)
    with KNNMemory(store, k=3) as memory:
        assert hooks(store.model) == before + 2
    assert hooks(store.model) == before
    assert memory(ids, torch.zeros(1, 258)).isfinite().all()
    other = KNNMemory(store, k=3)
    del other
    gc.collect()
    assert hooks(store.model) == before


def hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_the_fitted_temperature_is_the_best_one(store: KNNDatastore) -> None:
    texts = ["the cat and a dog", "on the mat"]
    best = fit_temperature(store, texts, k=9)
    reads = [read_ids(store, TOKENIZER.encode(text), 9) for text in texts]

    def loss(temperature: float) -> float:
        return -sum(float(each.mixed(0.25, temperature).sum()) for each in reads)

    assert all(loss(best) <= loss(best * factor) + 1e-9 for factor in (0.1, 0.8, 1.2, 10.0))


@pytest.mark.parametrize(("length", "context"), [(2, 4), (9, 4), (10, 4), (30, 7), (5, 2)])
def test_windows_predict_every_token_once_from_enough_text(length: int, context: int) -> None:
    predicted: list[int] = []
    for begin, first, stop in windows(length, context):
        assert 0 <= begin <= first < stop <= length
        assert stop - begin <= context
        assert begin == 0 or first - begin >= context // 2
        predicted += range(first, stop)
    assert predicted == list(range(length - 1))


def test_the_mixture_at_its_ends() -> None:
    law, votes = torch.randn(2, 3, 5).log_softmax(-1)
    assert interpolate(law, votes, 0) is law
    assert interpolate(law, votes, 1) is votes
    none = torch.full((5,), -torch.inf)
    assert torch.allclose(interpolate(law[0], none, 0.25), law[0] + math.log(0.75))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"k": 44}, "k must be from 1 to the 43 entries of .*store, got 44"),
        ({"k": 0}, "k must be from 1"),
        ({"k": 3, "weight": 1.5}, "weight must be from 0 to 1, got 1.5"),
        ({"k": 3, "weight": math.nan}, "weight must be"),
        ({"k": 3, "temperature": 0}, "temperature must be above 0, got 0"),
    ],
)
def test_settings_that_cannot_be(store: KNNDatastore, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(PertokenError, match=line):
        KNNMemory(store, **settings)


def test_use_that_cannot_be(store: KNNDatastore) -> None:
    memory = KNNMemory(store, k=3)
    with pytest.raises(PertokenError, match="a model of 258 tokens, not of 99"):
        memory(PROMPTS[0][None], torch.zeros(1, 99))
    embeds = store.model.get_input_embeddings()(PROMPTS[0][None])
    with pytest.raises(PertokenError, match="inputs_embeds"):
        store.model.generate(inputs_embeds=embeds, max_new_tokens=2, logits_processor=[memory])
    with pytest.raises(PertokenError, match="nothing to predict"):
        fit_temperature(store, ["", "x"], k=3)

    def never(*_: object) -> None:
        raise AssertionError

    for settings, line in (
        ({"k": 3, "weight": 2.0}, "from 0 to 1, got 2"),
        ({"k": 10**6}, "k must be"),
    ):
        with pytest.raises(PertokenError, match=line):
            fit_temperature(store, ["abc"], progress=never, **settings)


@pytest.fixture
def mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=4)
    )


def test_a_block_without_a_feed_forward_part_is_refused_by_its_parts(mamba: Any) -> None:
    with pytest.raises(PertokenError, match=r"MambaForCausalLM has no mlp.* only norm, mixer"):
        key_place(mamba)
