"""The analysis of KNN-LM: what it counts, against counting by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pertoken.decode import (
    KNNDatastore,
    KNNMemory,
    knn_continuations,
    knn_evaluation,
)
from pertoken.decode._knn_states import read
from pertoken.decode.knn_writing import distinct, entropies, mauve_score, slope, summary
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, tiny_model

TEXTS = ["the cat sat on the mat", "a dog and a cat 12", "on and on, and on."]
HELD_OUT = ["the cat and a dog sat, 1", "on the mat."]
TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> KNNMemory:
    model = tiny_model("llama", vocab_size=258)
    path = tmp_path_factory.mktemp("knn") / "store"
    store = KNNDatastore.build(model, TOKENIZER, TEXTS, path, context=16)
    return KNNMemory(store, k=9, weight=0.3, temperature=20.0)


def test_the_evaluation_counts_what_the_processor_does(memory: KNNMemory) -> None:
    found = knn_evaluation(memory, [*HELD_OUT, "x"])
    base, mixed = [], []
    for text in HELD_OUT:
        ids = torch.tensor([TOKENIZER.encode(text)])
        for end in range(1, ids.shape[1]):
            begin = max(0, end - 16) if end <= 16 else 8  # windows of 16 that begin every 8
            logits = memory.datastore.model(ids[:, begin:end]).logits[:, -1].detach()
            base.append(float(logits.log_softmax(-1)[0, ids[0, end]]))
            mixed.append(float(memory(ids[:, begin:end], logits)[0, ids[0, end]]))
    change = np.array(mixed) - np.array(base)
    total = found.total
    assert total.tokens == len(change)
    assert total.base_perplexity == pytest.approx(math.exp(-np.mean(base)))
    assert total.perplexity == pytest.approx(math.exp(-np.mean(mixed)))
    assert total.worse == np.mean(change < 0)
    assert total.mean_gain == pytest.approx(change[change > 0].mean())
    assert total.mean_loss == pytest.approx(change[change < 0].mean())
    for by in ("in the store", "class"):
        assert sum(each.tokens for each in found.groups if each.by == by) == total.tokens
    assert sum(each.tokens for each in found.texts) == total.tokens
    assert sum(found.counts) == total.tokens
    assert found.bound == pytest.approx(math.log(0.7))
    assert "no token can lose more than 0.357" in found.table()
    assert json.loads(found.to_json())["groups"] == found.rows()


def test_a_text_of_the_store_does_not_find_itself(memory: KNNMemory) -> None:
    known, spared = TEXTS[1], knn_evaluation(memory, [TEXTS[1]])
    other = knn_evaluation(memory, [known + " "])  # the same but for its end: found in the store
    assert spared.total.perplexity > 1.2 * other.total.perplexity


def test_continuations_are_followed_at_their_own_positions(memory: KNNMemory) -> None:
    texts = [text * 2 for text in HELD_OUT]
    found = knn_continuations(memory, texts, prompt=6, max_new_tokens=8, seed=3)
    settings, before = memory.datastore.model.generation_config, torch.get_rng_state()
    settings.temperature = 50.0
    try:
        again = knn_continuations(memory, texts, prompt=6, max_new_tokens=8, seed=3)
    finally:
        settings.temperature = None
    assert found == again
    assert torch.equal(torch.get_rng_state(), before)
    assert [each.name for each in found.sources] == ["gold", "with the store", "model"]
    curves = []
    for text in texts:
        ids = TOKENIZER.encode(text)[:14]
        logits = memory.datastore.model(torch.tensor([ids])).logits[0, 5:-1]
        curves.append(torch.distributions.Categorical(logits=logits).entropy().tolist())
    assert found["gold"].model == pytest.approx(np.mean(curves, axis=0).tolist())
    assert found["gold"].model_slope == pytest.approx(np.mean([slope(c) for c in curves]))
    assert len(found["model"].retrieval) == 8
    assert found["gold"].distinct[1] < 1
    assert found.note.startswith("no MAUVE: it takes 20 texts or more, got 2")
    assert "no MAUVE" in found.table()
    assert {"retrieval_slope", "seq_rep_4", "distinct_1", "mauve"} <= found.rows()[0].keys()


def test_the_feature_of_a_text_is_its_last_key(memory: KNNMemory) -> None:
    ids = TOKENIZER.encode("the cat sat")
    kept = entropies(memory, ids, 4)
    key = read(memory.datastore.model, torch.tensor([ids[:-1]]))[0][0, -1]
    assert kept["feature"] == pytest.approx(key.tolist(), abs=1e-5)
    assert kept["ids"] == ids[4:]
    assert len(kept["retrieval"]) == len(kept["model"]) == len(ids) - 4


def test_mauve_is_high_for_one_law_and_low_for_two() -> None:
    pytest.importorskip("mauve")
    draw = np.random.default_rng(0)
    gold, same, other = (draw.normal(shift, 1, (60, 4)).tolist() for shift in (0, 0, 9))
    assert mauve_score(gold, same) > 0.6 > 0.2 > mauve_score(gold, other)


def test_repetition_and_variety_by_hand() -> None:
    def text(ids: list[int]) -> dict[str, object]:
        return {"ids": ids, "retrieval": [0.0, 1.0], "model": [1.0, 1.0], "feature": [0.0]}

    rows = [text([1, 2, 1, 2, 1, 2]), text([1, 2, 3, 4, 5, 6])]
    found = summary(dict.fromkeys(("gold", "with the store", "model"), rows))
    assert found["gold"].seq_rep == {1: pytest.approx((4 / 6 + 0) / 2), 4: pytest.approx(1 / 6)}
    assert found["gold"].distinct == {1: 0.5, 4: pytest.approx(5 / 6)}
    assert found["gold"].retrieval_slope == pytest.approx(100.0)
    assert distinct([[1]], 2) == 0.0


def test_what_cannot_be_measured_is_refused(memory: KNNMemory, tmp_path: Path) -> None:
    with pytest.raises(PertokenError, match=r"none of 2 texts has 64 \+ 128 tokens"):
        knn_continuations(memory, HELD_OUT)
    with pytest.raises(PertokenError, match=r"text 1 is in .*: its continuation would be looked"):
        knn_continuations(memory, TEXTS, prompt=2, max_new_tokens=4)
    with pytest.raises(PertokenError, match="nothing to predict"):
        knn_evaluation(memory, ["x"])


def test_pages_have_a_picture(memory: KNNMemory) -> None:
    found = knn_evaluation(memory, HELD_OUT)
    page = found.to_html()
    assert page.count("<svg") == 1
    assert page.count("<rect") == sum(count > 0 for count in found.counts)
    assert "nan" not in page
    written = knn_continuations(memory, [HELD_OUT[0]], prompt=4, max_new_tokens=12).to_html()
    assert written.count("<svg") == 2
    assert written.count("<polyline") == 2 * 3


def test_pictures(memory: KNNMemory) -> None:
    pytest.importorskip("plotly")
    assert knn_evaluation(memory, HELD_OUT).plot().data[0].type == "bar"
    found = knn_continuations(memory, [HELD_OUT[0]], prompt=4, max_new_tokens=12)
    assert len(found.plot().data) == 6
