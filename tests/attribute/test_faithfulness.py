"""Soft sufficiency and comprehensiveness: by the formula, on common draws, and what they say."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from pertoken.attribute import evaluate_attribution, faithfulness
from pertoken.attribute._question import ask
from pertoken.attribute._scores import Scores, seeded
from pertoken.attribute.faithfulness import RANDOM, importance, soft_scores
from pertoken.attribute.methods import METHODS, Method
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, MockModel, check_leaves_no_trace, tiny_model

TOKENIZER = ByteTokenizer()
QUICK = {
    "reagent": {"max_steps": 1},
    "integrated-gradients": {"steps": 2},
    "gradient-shap": {"samples": 2},
    "lime": {"samples": 4},
}


@pytest.fixture(scope="module")
def model():
    return tiny_model("gemma3", vocab_size=258)


def _importances(methods, draws, place):
    generator = torch.Generator().manual_seed(5)
    drawn = torch.rand(methods, draws, place, generator=generator, dtype=torch.double)
    return drawn / drawn.sum(-1, keepdim=True)


@pytest.mark.parametrize("distance", ["hellinger", "repo"])
def test_scores_are_the_formula(model, distance):
    asked = ask(model, TOKENIZER, "seven", "x")
    given = _importances(3, 4, 5)
    found = soft_scores(asked, 5, given, seed=2, distance=distance)
    embeds = model.get_input_embeddings()(asked.ids[None, :5]).detach()

    def p(x):
        with torch.no_grad():
            return model(inputs_embeds=x).logits[0, -1].softmax(-1)

    def d(q):
        squares = (p(embeds).sqrt() - q.sqrt()).square().sum()
        return float(squares / 2**0.5) if distance == "repo" else float((squares / 2).sqrt())

    s0 = 1 - d(p(torch.zeros_like(embeds)))
    generator = seeded(2, 0, 2)
    for draw in range(4):
        u = torch.rand(embeds.shape[1:], generator=generator, dtype=torch.double)
        for method in range(3):
            a = given[method, draw][:, None]
            keep, drop = (p(embeds * (u < chance)) for chance in (a, 1 - a))
            sufficiency = max(0, (1 - d(keep)) - s0) / (1 - s0)
            assert found[0][method, draw] == pytest.approx(sufficiency, abs=1e-9)
            assert found[1][method, draw] == pytest.approx(d(drop) / (1 - s0), abs=1e-9)


def test_the_size_of_a_forward_does_not_matter(model, monkeypatch):
    asked = ask(model, TOKENIZER, "seven", "x")
    wanted = soft_scores(asked, 5, _importances(3, 4, 5))
    for tokens in (1, 20, 70):
        monkeypatch.setattr(faithfulness, "most_tokens", lambda _, n=tokens: n)
        again = soft_scores(asked, 5, _importances(3, 4, 5))
        assert np.allclose(wanted, again, atol=1e-9)


def test_keeping_all_suffices_and_dropping_nothing_changes_nothing(model):
    asked = ask(model, TOKENIZER, "seven", "x")
    whole, nothing = (torch.full((1, 2, 5), value, dtype=torch.double) for value in (1.0, 0.0))
    sufficiency, comprehensiveness = soft_scores(asked, 5, whole)
    assert np.allclose(sufficiency, 1)
    assert np.allclose(comprehensiveness, 1)  # everything is dropped: the distance to nothing
    sufficiency, comprehensiveness = soft_scores(asked, 5, nothing)
    assert np.allclose(sufficiency, 0)
    assert np.allclose(comprehensiveness, 0)


def test_protected_tokens_are_never_zeroed(model):
    asked = ask(model, TOKENIZER, "seven", "x")
    asked.free[:4] = False
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["inputs_embeds"]), with_kwargs=True
    )
    soft_scores(asked, 5, torch.tensor([[[0.0, 0, 0, 0, 0]]], dtype=torch.double))
    handle.remove()
    embeds = model.get_input_embeddings()(asked.ids[:5])
    for rows in seen:
        assert torch.equal(rows[:, :4], embeds[:4].expand(len(rows), -1, -1))


def test_importance_of_scores():
    free = torch.tensor([True, True, False])
    assert importance(torch.tensor([0.0, 0.0, 5.0]), free).tolist() == [0.5, 0.5, 0.0]
    assert importance(torch.tensor([-1.0, 3.0, math.nan]), free).tolist() == [0.25, 0.75, 0.0]
    with pytest.raises(PertokenError, match="a score is NaN"):
        importance(torch.tensor([math.nan, 3.0, 1.0]), free)


def _method(name, values):
    """A method that gives the same values whatever it is asked."""

    def run(question, quantity, *, seed=0):
        found = torch.full((1, len(question.ids)), torch.nan, dtype=torch.double)
        found[0, : question.prompt] = torch.tensor(values)
        return Scores(found)

    return Method(name, run, lambda *_: (1, 1), "made up")


def test_the_token_that_decides_is_faithful(monkeypatch):
    """The next token hangs on the last one alone: naming it beats random, the first loses."""
    table = torch.full((258, 258), 0.1 / 257, dtype=torch.double)
    for last in range(258):
        table[last, (7 * last) % 258] = 0.9
    model = MockModel(table / table.sum(-1, keepdim=True)).double()
    monkeypatch.setitem(METHODS, "last", _method("last", [0.0, 0, 0, 1]))
    monkeypatch.setitem(METHODS, "first", _method("first", [1.0, 0, 0, 0]))
    prompts = ["abcd", "wxyz", "4321", "spam"]
    found = evaluate_attribution(model, TOKENIZER, prompts, ["last", "first"])
    last, first, drawn = (found.results[name] for name in ("last", "first", RANDOM))
    assert np.allclose(last.sufficiency, 1, atol=1e-4)
    assert np.allclose(last.comprehensiveness, 1, atol=1e-4)
    assert np.allclose(first.comprehensiveness, 0, atol=1e-4)
    assert last.comprehensiveness.mean() > drawn.comprehensiveness.mean()
    rows = {row["method"]: row for row in found.rows()}
    assert rows["last"]["comprehensiveness_ln_ratio"] > 0
    low, high = rows["last"]["comprehensiveness_ln_ratio_interval"]
    assert low <= rows["last"]["comprehensiveness_ln_ratio"] <= high


def test_scores_of_every_sign_and_target(model):
    found = evaluate_attribution(
        model,
        TOKENIZER,
        ["abcd", ("efgh", "xyz")],
        ["occlusion", "input-x-gradient"],
        target=2,
        draws=3,
        options={"occlusion": {"draws": 1, "replacer": "uniform"}},
    )
    assert found.settings["target_tokens"] == 5
    assert found.settings["intervals_over"] == "prompts"
    assert all(len(result.sufficiency) == 2 for result in found.results.values())
    plain = found.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert [row["method"] for row in plain["rows"]] == ["occlusion", "input-x-gradient", "random"]
    lines = str(found).splitlines()
    assert lines[0].split()[0] == "method"
    assert len(lines) == 4


def test_one_prompt_has_intervals_over_draws(model):
    found = evaluate_attribution(model, TOKENIZER, ["abcd"], ["gradient-norm"], draws=7)
    assert found.settings["intervals_over"] == "draws"
    assert found.results[RANDOM].sufficiency.shape == (7,)


def test_methods_share_their_draws(model, monkeypatch):
    """Two methods of the same scores get the same figures; others beside them do not matter."""
    monkeypatch.setitem(METHODS, "one", _method("one", [1.0, 2, 3, 4]))
    monkeypatch.setitem(METHODS, "two", _method("two", [-1.0, 2, 3, -4]))
    both = evaluate_attribution(model, TOKENIZER, ["abcd"], ["one", "two"], draws=3).results
    alone = evaluate_attribution(model, TOKENIZER, ["abcd"], ["two"], draws=3).results
    assert np.allclose(both["one"].sufficiency, both["two"].sufficiency)
    assert np.allclose(both["two"].comprehensiveness, alone["two"].comprehensiveness)
    assert np.allclose(both[RANDOM].sufficiency, alone[RANDOM].sufficiency)


def test_prompts_do_not_share_their_draws(model):
    prompts = [("abcd", "x")] * 3
    found = evaluate_attribution(model, TOKENIZER, prompts, ["gradient-norm"], draws=2, seed=4)
    alone = [
        evaluate_attribution(model, TOKENIZER, prompts[:1], ["gradient-norm"], draws=2, seed=seed)
        for seed in (4, 5, 6)
    ]
    for name, result in found.results.items():
        means = [each.results[name].sufficiency.mean() for each in alone]
        assert result.sufficiency.tolist() == pytest.approx(means)
        assert len(set(means)) == 3


def test_nan_scores_are_refused(model, monkeypatch):
    monkeypatch.setitem(METHODS, "broken", _method("broken", [1.0, math.nan, 0, 0]))
    with pytest.raises(PertokenError, match="a score of broken is NaN"):
        evaluate_attribution(model, TOKENIZER, ["abcd"], ["broken"])


def test_a_method_that_does_not_fit_is_left_out_of_all_and_refused_by_name():
    from transformers import BloomConfig, BloomForCausalLM

    bloom = BloomForCausalLM(BloomConfig(vocab_size=258, hidden_size=16, n_layer=1, n_head=2))
    found = evaluate_attribution(bloom.eval(), TOKENIZER, ["abcd"], draws=1, options=QUICK)
    unfit = ["attention", "attention-last", "attention-rollout", "decompx", "globenc"]
    assert set(found.results) == {name for name in METHODS if name not in unfit} | {RANDOM}
    assert [note.partition(" is left out")[0] for note in found.notes] == unfit
    with pytest.raises(PertokenError, match="cannot serve"):
        evaluate_attribution(bloom, TOKENIZER, ["abcd"], ["attention"])


def test_a_mistake_in_the_options_is_no_reason_to_leave_a_method_out(model):
    """Of all methods too: only one that cannot serve the model is left out."""
    for options, message in (
        ({"reagent": {"max_steps": 0}}, "max_steps must be 1 or more"),
        ({"lime": {"samples": 1}}, "samples must be 2 or more"),
        ({"lime": {"sample": 9}}, "no option 'sample'"),
        ({"decompx": {"gate": "halve"}}, "gate must be one of"),
    ):
        with pytest.raises(PertokenError, match=message):
            evaluate_attribution(model, TOKENIZER, ["abc"], draws=1, options=QUICK | options)


def test_a_model_that_does_not_listen_is_said():
    uniform = MockModel(torch.full((258, 258), 1 / 258))
    with pytest.raises(PertokenError, match="the same without any input"):
        evaluate_attribution(uniform, TOKENIZER, ["abcd"], ["gradient-norm"])


def test_leaves_no_trace(model):
    check_leaves_no_trace(
        model,
        lambda m: evaluate_attribution(m, TOKENIZER, ["abc"], ["gradient-norm"], draws=2),
        rng=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "at least one prompt and one method"),
        ({"methods": ["lim"]}, "unknown attribution method 'lim' (did you mean 'lime'?)"),
        ({"draws": 0}, "draws must be 1 or more"),
        ({"distance": "helinger"}, "unknown distance 'helinger' (did you mean 'hellinger'?)"),
        ({"options": {"lime": {}}}, "options for 'lime', which is not among the methods"),
        ({"prompts": "abc"}, "prompts is one text: give a list of them"),
        ({"seed": -1}, "the seed must be 0 or more, got -1"),
        ({"options": {"gradient-norm": {"steps": 3}}}, "has no option 'steps'"),
        ({"prompts": ["ab", ""]}, "the prompt is empty"),
    ],
)
def test_mistakes_are_named(model, arguments, message):
    given = {"prompts": ["abc"], "methods": ["gradient-norm"], **arguments}
    with pytest.raises(PertokenError) as error:
        evaluate_attribution(model, TOKENIZER, **given)
    assert message in str(error.value)
