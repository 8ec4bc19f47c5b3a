"""Tokenwise part and residual of a layer: planted layers, brute force, and the replaced output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import transformers

from pertoken.errors import PertokenError
from pertoken.probe import _geometry_replace as replace
from pertoken.probe import _tokenwise as tokenwise
from pertoken.probe import layer_geometry
from pertoken.probe._geometry_measures import over_documents, spearman
from pertoken.probe._stream import blocks_of
from pertoken.testing import (
    ARCHITECTURES,
    EXTRA_ARCHITECTURES,
    ByteTokenizer,
    check_leaves_no_trace,
    tiny_model,
)

TEXTS = [
    "A layer reads one token.",
    "Another document, of its own",
    "whose bytes differ a lot!",
    "0123456789 and some more.",
    "the last of five short texts",
]
LINEAR = ["scalar", "diagonal", "orthogonal", "low-rank", "affine"]
ALL = ["identity", *LINEAR]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.double, generator=generator)


def model_of(name: str = "llama", **settings: Any) -> Any:
    return tiny_model(name, vocab_size=258, **settings)


def mamba(layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=258, hidden_size=16, num_hidden_layers=layers, state_size=4, pad_token_id=0
    )
    return transformers.MambaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def found() -> Any:
    """Three layers of a tiny model, two numbers of neighbours, two classes tested."""
    return layer_geometry(
        model_of(layers=3),
        ByteTokenizer(),
        TEXTS,
        classes=ALL,
        neighbours=[16, 8],
        rank=2,
        tested=["low-rank", "identity"],
    )


# ---------------------------------------------------------------- the classes


def planted(name: str, x: torch.Tensor) -> torch.Tensor:
    """Updates that a class of this name explains without a rest."""
    d = x.shape[-1]
    if name == "scalar":
        return 0.7 * x
    if name == "diagonal":
        return x * drawn(d, seed=1)
    if name == "orthogonal":
        return x @ torch.linalg.qr(drawn(d, d, seed=2))[0] - x
    if name == "low-rank":
        return x @ drawn(d, 2, seed=3) @ drawn(2, d, seed=4) + drawn(d, seed=5)
    return x @ drawn(d, d, seed=6) + drawn(d, seed=7)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("fit", ["local", "global"])
def test_a_layer_of_the_class_leaves_no_residual(name: str, fit: str) -> None:
    x, documents = drawn(60, 6), torch.arange(60) // 12
    first = torch.arange(60) % 12 == 0
    update = planted(name, x)
    if fit == "local":
        near = tokenwise.nearest_tokens(x, documents, first, 20)
        found = tokenwise.local_updates(x, update, near, ALL, 0.0, 2)
    else:
        found = tokenwise.global_updates(x, update, documents, first, ALL, 0.0, 2, 0)
    assert (found[name] - update).abs().max() < 1e-8
    assert (found["identity"] - update).abs().max() > 0.1
    # Richer classes hold the poorer ones.
    if name != "orthogonal":
        assert (found["affine"] - update).abs().max() < 1e-8


def test_a_term_of_another_token_is_what_remains() -> None:
    """Tokenwise by construction, plus a known term of an earlier token, is split into the two."""
    x, documents = drawn(400, 5), torch.arange(400) // 10
    first = torch.arange(400) % 10 == 0
    other = 0.3 * drawn(400, 5, seed=8)  # unknown to the token itself
    found = tokenwise.global_updates(
        x, planted("diagonal", x) + other, documents, first, ["diagonal"], 0.0, 1, 0
    )
    residual = (planted("diagonal", x) + other - found["diagonal"])[~first]
    assert (residual - other[~first]).norm() < 0.1 * other.norm()
    assert residual.norm() == pytest.approx(float(other[~first].norm()), rel=0.01)


def brute(name: str, x: torch.Tensor, d: torch.Tensor, q: torch.Tensor, ridge: float) -> Any:
    """One token's predicted update, from the normal equations written out."""
    if name == "identity":
        return 0 * q
    if name == "scalar":
        return q * (x * d).sum() / (x * x).sum()
    if name == "diagonal":
        return q * (x * d).sum(0) / (x * x).sum(0)
    size = x.shape[1]
    if name == "orthogonal":
        strength = ridge * (x.T @ x).trace() / size
        left, _, right = torch.linalg.svd(x.T @ (x + d) + strength * torch.eye(size).double())
        return q @ left @ right - q
    spread = x.std(0, unbiased=False)
    z, asked, moved = (x - x.mean(0)) / spread, (q - x.mean(0)) / spread, d - d.mean(0)
    gram = z.T @ z
    # The mean of the diagonal of the smaller product, as said.
    strength = ridge * gram.trace() / min(len(x), size)
    rows = torch.cat((z, strength.sqrt() * torch.eye(size).double()))
    goal = torch.cat((moved, torch.zeros(size, size).double()))
    solved = torch.linalg.lstsq(rows, goal).solution
    if name == "low-rank":
        frame = torch.linalg.svd(rows @ solved)[2][:2].T
        solved = solved @ frame @ frame.T
    return asked @ solved + d.mean(0)


@pytest.mark.parametrize("hidden", [4, 40])  # fewer dimensions than neighbours, and many more
def test_local_fits_equal_a_loop_over_tokens(hidden: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenwise, "_ENTRIES", 5 * 9 * hidden)  # batches of 5 tokens
    x, update = drawn(24, hidden), drawn(24, hidden, seed=1)
    documents, first = torch.arange(24) // 6, torch.arange(24) % 6 == 0
    near = tokenwise.nearest_tokens(x, documents, first, 9)
    found = tokenwise.local_updates(x, update, near, ALL, 0.2, 2)
    for token in range(24):
        pool = [
            other
            for other in range(24)
            if documents[other] != documents[token] and (first[token] or not first[other])
        ]
        nearest = sorted(pool, key=lambda other: float((x[token] - x[other]).norm()))[:9]
        assert near[token].tolist() == nearest
        for name in ALL:
            right = brute(name, x[nearest], update[nearest], x[token], 0.2)
            assert torch.allclose(found[name][token], right, atol=1e-9), name


def test_equal_neighbours_give_their_mean_update_and_no_noise() -> None:
    """The first layer of many models reads nothing but the token's id: neighbours are equal."""
    x = (0.1 * drawn(1, 1, 30)).expand(1, 12, 30).float()
    update = drawn(1, 12, 30, seed=1).float()
    found = tokenwise.fitted(x, update, x[:, :1], ["low-rank", "affine"], 0.1, 2)
    for part in found.values():
        assert torch.allclose(part[0, 0], update[0].mean(0), atol=1e-5)


def test_a_global_map_never_saw_the_document_it_is_judged_on(monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenwise, "_STEPS", 3)
    x, documents = drawn(50, 4), torch.arange(50) // 10
    first, update = torch.arange(50) % 10 == 0, drawn(50, 4, seed=1)
    classes = [*ALL, "mlp"]
    before = tokenwise.global_updates(x, update, documents, first, classes, 0.1, 2, 0)
    changed = update + 100.0 * (documents == 3)[:, None]
    after = tokenwise.global_updates(x, changed, documents, first, classes, 0.1, 2, 0)
    for name in classes[1:]:
        assert torch.equal(before[name][documents == 3], after[name][documents == 3])
        assert not torch.equal(before[name][documents == 1], after[name][documents == 1])
    # And first tokens take no part in the maps of the others.
    changed = update + 100.0 * first[:, None]
    after = tokenwise.global_updates(x, changed, documents, first, classes, 0.1, 2, 0)
    assert all(torch.equal(before[name][~first], after[name][~first]) for name in classes)


def test_the_mlp_bends_where_lines_cannot() -> None:
    x, queries = drawn(1, 500, 3), drawn(1, 100, 3, seed=2)
    bent = drawn(3, 3, seed=1)
    state = torch.get_rng_state()
    found = tokenwise.fitted(x, (x @ bent).relu(), queries, ["affine", "mlp"], 0.0, 1)
    assert torch.equal(state, torch.get_rng_state())
    lost = {name: (part - (queries @ bent).relu()).norm() for name, part in found.items()}
    assert lost["mlp"] < 0.5 * lost["affine"]


# ---------------------------------------------------------------- in a model


def tokenwise_model(extra: float = 0.0) -> Any:
    """A Llama whose layers add a linear map of the token's own vector, and `extra` attention."""
    model = model_of(layers=2)
    linear = 0.1 * drawn(32, 32, seed=9)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(extra)
            block.post_attention_layernorm.forward = lambda hidden: hidden
            block.mlp.forward = lambda hidden: hidden @ linear
    return model


def test_a_model_of_tokenwise_layers_has_residual_0() -> None:
    texts = [bytes(range(32 + n, 120 + n)).decode() for n in range(4)]
    model = tokenwise_model()
    for fit in ("local", "global"):
        found = layer_geometry(
            model, ByteTokenizer(), texts, fit=fit, classes=["affine"], neighbours=150,
            ridge=0.0, tested=["affine"],
        )  # fmt: skip
        for one in found.view("not first", "all"):
            if one.function == "affine":
                assert one.error < 1e-8
                assert one.explained == pytest.approx(1)
            else:
                assert one.error > 0.1
        assert all(effect.kl < 1e-12 for effect in found.effects)
    attending = layer_geometry(
        tokenwise_model(1.0), ByteTokenizer(), texts, fit="global", classes=["affine"], ridge=0.0
    )
    assert min(attending.curve("affine", "error")) > 1e-3


def started(model: Any, texts: list[str]) -> tuple[Any, replace.Reading]:
    """(blocks, reading) of a model that has read texts."""
    blocks = blocks_of(model, attention=False)
    ids = [torch.tensor([ByteTokenizer().encode(text)]) for text in texts]
    return blocks, replace.read(model, blocks, ids, lambda *_: None)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *EXTRA_ARCHITECTURES, "mamba"])
@torch.no_grad()
def test_a_true_output_changes_nothing_and_tokens_are_replaced_alone(name: str) -> None:
    """25 bytes are three windows of the models with sliding windows."""
    model = mamba() if name == "mamba" else model_of(name)
    blocks, reading = started(model, TEXTS[:1])
    hows = [kind(model, blocks, reading) for kind in (replace.AtOnce, replace.AloneByCopies)]
    assert type(replace.replacing(model, blocks, reading, False)) is replace.AtOnce
    best = replace.replacing(model, blocks, reading, True)
    assert isinstance(best, replace.AloneByCopies if name == "mamba" else replace.AloneByKeys)
    moved = drawn(*reading.states[1].shape).to(reading.states[1])
    tolerance = 1e-4 if name == "mamba" else 1e-9
    answers = []
    for how in [*hows, best]:
        replace.refuse_other_paths(how)
        true = how.start(0)
        for layer in range(2):
            assert (how.replaced(layer, how.true(layer)) - true).abs().max() < tolerance
        answers.append(how.replaced(0, how.true(0) + moved))
    at_once, copies, keys = answers
    assert (copies - keys).abs().max() < tolerance
    assert (at_once - copies)[2:].abs().max() > 0.01
    # Alone, a token's answer knows nothing of what the others would have given.
    other = moved.clone()
    other[:-1] *= -1
    again = best.replaced(0, best.true(0) + other)
    assert (again - keys)[-1].abs().max() < tolerance
    assert (again - keys)[1:-1].abs().max() > 0.01


@torch.no_grad()
def test_copies_run_in_parts_are_the_same(monkeypatch: Any) -> None:
    model = model_of()
    blocks, reading = started(model, TEXTS[:1])
    how = replace.AloneByCopies(model, blocks, reading)
    how.start(0)
    moved = how.true(0) + 1
    whole = how.replaced(0, moved)
    monkeypatch.setattr(replace, "_LOGITS", 4 * 258 * len(moved))
    assert torch.allclose(how.replaced(0, moved), whole, atol=1e-12)


@pytest.mark.parametrize("alone", [True, False])
@torch.no_grad()
def test_the_change_of_the_output_equals_blocks_run_by_hand(alone: bool) -> None:
    model = model_of(layers=3)
    found = layer_geometry(
        model,
        ByteTokenizer(),
        TEXTS[:2],
        fit="global",
        classes=[],
        tested=["identity"],
        alone=alone,
    )
    kl: list[torch.Tensor] = []
    for text in TEXTS[:2]:
        ids = torch.tensor([ByteTokenizer().encode(text)])
        output = model(ids, output_hidden_states=True)
        before, behind = output.hidden_states[1:3]  # layer 1 is left out
        rotation = model.model.rotary_emb(before, torch.arange(ids.shape[1])[None])
        true = output.logits[0].log_softmax(-1)
        for token in range(1, ids.shape[1]):
            hidden = behind.clone()
            some = slice(token, token + 1) if alone else slice(1, None)
            hidden[:, some] = before[:, some]
            hidden = model.model.layers[2](hidden, position_embeddings=rotation)
            other = model.lm_head(model.model.norm(hidden))[0, token].log_softmax(-1)
            kl.append((true[token].exp() * (true[token] - other)).sum())
    assert found.effects[1].kl == pytest.approx(float(torch.stack(kl).mean()), rel=1e-9)


def test_what_is_measured_of_vectors_written_out(found: Any) -> None:
    model = model_of(layers=3)
    x, y = [], []
    with torch.no_grad():
        for text in TEXTS:
            hidden = model(
                torch.tensor([ByteTokenizer().encode(text)]), output_hidden_states=True
            ).hidden_states
            x.append(hidden[0][0, 1:])
            y.append(hidden[1][0, 1:])
    x, y = torch.cat(x), torch.cat(y)
    one = next(
        one
        for one in found.view("not first", "all")
        if (one.layer, one.function) == (0, "identity")
    )
    cosine = torch.nn.functional.cosine_similarity
    assert one.cosine == pytest.approx(float(cosine(x, y).mean()))
    assert one.residual_cosine == pytest.approx(float(cosine(y - x, x).mean()))
    assert one.error == pytest.approx(float((y - x).norm(dim=-1).mean()))
    assert one.explained == 0
    assert np.isnan(one.update_cosine)
    frame = torch.linalg.svd(x - x.mean(0))[2][:2]
    share = ((y - x) @ frame.T).square().sum(-1) / (y - x).square().sum(-1)
    assert one.residual_in_subspace == pytest.approx(float(share.mean()))


def test_a_state_space_model_in_float32_and_bfloat16() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        result = layer_geometry(mamba().to(dtype), ByteTokenizer(), TEXTS, neighbours=16)
        assert [effect.layer for effect in result.effects] == [0, 1]
        assert all(np.isfinite(effect.kl) for effect in result.effects)
        assert all(0.9 < one.cosine <= 1.001 for one in result.fits)


def test_a_deep_model_in_bfloat16_is_not_refused_for_its_rounding() -> None:
    model = tiny_model("llama", vocab_size=260, layers=8).to(torch.bfloat16)
    texts = [("the cat sat on the mat and slept " * 4)[:length] for length in (120, 100)]
    result = layer_geometry(model, ByteTokenizer(), texts, neighbours=8)
    assert all(np.isfinite(effect.kl) for effect in result.effects)


def test_it_leaves_no_trace() -> None:
    model = model_of()
    layer_geometry(model, ByteTokenizer(), TEXTS, neighbours=8)  # the library's own first hooks
    check_leaves_no_trace(
        model, lambda model: layer_geometry(model, ByteTokenizer(), TEXTS, neighbours=8)
    )


# ---------------------------------------------------------------- correlations


def test_rank_correlations_are_scipys_also_with_ties_and_repeats() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 9, 40) * 1.0, generator.normal(size=40)
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    counts = generator.integers(0, 3, (5, 40))
    for count, value in zip(counts, spearman(a, b, counts * 1.0), strict=True):
        right = scipy.stats.spearmanr(a.repeat(count), b.repeat(count)).statistic
        assert value == pytest.approx(right)


def test_intervals_are_of_documents_not_tokens() -> None:
    # One document of two disagrees with the other: whole documents are drawn, never half.
    values = np.array([1.0, 1, -1, -1])
    documents = np.array([0, 0, 1, 1])

    def mean(counts: Any) -> Any:
        weights = counts[:, documents]
        return (weights * values).sum(-1) / weights.sum(-1)

    assert over_documents(mean, 2, seed=0) == (-1.0, 1.0)


# ---------------------------------------------------------------- the result


def test_the_identity_is_always_there_and_views_are_named(found: Any) -> None:
    views = {(one.tokens, one.dimensions) for one in found.fits}
    assert views == {("all", "all"), ("not first", "all"), ("not first", "no outliers")}
    identity = [one for one in found.fits if one.function == "identity"]
    others = [one for one in found.fits if one.function == "affine"]
    assert len(identity) == 3 * 3
    assert {one.neighbours for one in others} == {16, 8}
    assert "identity" in found.table()
    assert found.curve("affine", "explained", 8) != found.curve("affine", "explained")
    rows = found.rows()
    assert len(rows) == len(found.fits) == 3 * 3 * (1 + 2 * len(LINEAR))
    tested = [row for row in rows if "kl" in row]
    assert {(row["function"], row["neighbours"]) for row in tested} == {
        ("identity", None),
        ("low-rank", 16),
    }
    assert set(found.over_layers) == {"identity", "low-rank"}
    json.dumps(found.to_dict(), allow_nan=False)
    assert len(found.to_dataframe()) == len(rows)


def test_pictures_and_page(found: Any, tmp_path: Path) -> None:
    import xml.etree.ElementTree as tree

    picture = found.to_svg(tmp_path / "geometry.svg")
    assert tree.fromstring(picture).tag.endswith("svg")
    assert (tmp_path / "geometry.svg").read_text() == picture
    assert picture.count("<polyline") == 2 * len(ALL) + 2
    assert "nan" not in picture
    page = found.to_html(tmp_path / "geometry.html")
    assert "<polyline" in page
    assert "https://" not in page
    assert len(found.plot().data) == 2 * len(ALL) + 2


def test_a_png_where_kaleido_is_there(found: Any, tmp_path: Path) -> None:
    pytest.importorskip("kaleido")
    found.plot().write_image(tmp_path / "geometry.png")
    assert (tmp_path / "geometry.png").read_bytes()[1:4] == b"PNG"


def test_classes_that_are_not_tested_cost_no_forward() -> None:
    model = model_of()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    result = layer_geometry(model, ByteTokenizer(), TEXTS, fit="global", tested=[])
    assert len(calls) == len(TEXTS)
    assert result.effects == []
    assert "Spearman" not in result.table() + result.to_svg()


# ---------------------------------------------------------------- bad input


def broken() -> Any:
    model = model_of()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    return model


def encoder() -> Any:
    config = transformers.BertConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    return transformers.BertForMaskedLM(config)


def two_stacks() -> Any:
    config = transformers.T5Config(vocab_size=258, d_model=32, d_kv=8, d_ff=32, num_layers=1)
    return transformers.T5ForConditionalGeneration(config)


def unknown_layout() -> Any:
    model = model_of()
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    return model


def second_path() -> Any:
    """The second block reads what the first one read, beside the stream."""
    model = model_of()
    kept: list[torch.Tensor] = []
    first, second = model.model.layers
    first.mlp.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    second.mlp.register_forward_hook(lambda *args: args[2] + (kept.pop() if kept else 1.0))
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (broken, "layer 1 gives NaN or infinity for text 1"),
        (encoder, "BertForMaskedLM is an encoder"),
        (two_stacks, "encoder-decoder"),
        (unknown_layout, "no single list of 2 blocks"),
        (second_path, r"read more than the stream.*tested=\[\]"),
        (lambda: torch.nn.Linear(2, 2), "causal language model"),
    ],
)
def test_models_that_cannot_be_split_are_named(make: Any, words: str) -> None:
    with pytest.raises(PertokenError, match=words) as caught:
        layer_geometry(make(), ByteTokenizer(), TEXTS, neighbours=8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"texts": TEXTS[:1]}, "got 1 text: .*two or more"),
        ({"texts": "one text"}, "a list of documents"),
        ({"texts": ["one", "", "two"]}, "text 2 has fewer than 2 tokens"),
        ({"neighbours": 1000}, "1000 neighbours .* has only 98"),
        ({"neighbours": 1}, "2 or more"),
        ({"neighbours": []}, "2 or more"),
        ({"rank": 0}, "rank must be"),
        ({"ridge": -1.0}, "ridge must be"),
        ({"length": 1}, "length must be 2"),
        ({"fit": "both"}, 'is "local" or "global"'),
        ({"classes": ["diagnal"]}, "did you mean 'diagonal'"),
        ({"classes": "diagonal"}, "lists of names"),
        ({"tested": ["mlp"]}, "no local fit"),
    ],
)
def test_mistakes_are_said_before_any_forward(settings: Any, words: str) -> None:
    model = model_of()
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward"))
    texts = settings.pop("texts", TEXTS)
    with pytest.raises(PertokenError, match=words) as caught:
        layer_geometry(model, ByteTokenizer(), texts, **settings)
    assert "\n" not in str(caught.value)
