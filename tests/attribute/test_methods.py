"""The laws of all attribution methods: they find what was planted, add up, and leave no trace."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from pertoken.attribute import gradients
from pertoken.attribute._question import ask
from pertoken.attribute.api import attribute
from pertoken.attribute.gradients import gradient_shap, input_x_gradient, integrated_gradients
from pertoken.attribute.methods import METHODS, find
from pertoken.attribute.perturb import lime, occlusion
from pertoken.attribute.quantity import Quantity
from pertoken.attribute.quantity import find as quantity
from pertoken.errors import PertokenError
from pertoken.testing import (
    ARCHITECTURES,
    ByteTokenizer,
    MockModel,
    check_leaves_no_trace,
    tiny_model,
)

TOKENIZER = ByteTokenizer()
# Small settings: a law holds for any.
QUICK = {
    "reagent": {"probes": 2, "max_steps": 4},
    "integrated-gradients": {"steps": 4},
    "gradient-shap": {"samples": 4},
    "occlusion": {"draws": 1},
    "lime": {"samples": 12},
}
ALL = list(METHODS)


def _planted():
    """The module beside this one; tests are no package."""
    spec = importlib.util.spec_from_file_location("_planted", Path(__file__).parent / "_planted.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def planted():
    return _planted().planted_model()


# Behind a norm the product of an embedding and its gradient vanishes: it need not find anything.
@pytest.mark.parametrize("name", [name for name in ALL if name != "input-x-gradient"])
@pytest.mark.parametrize("prompt", ["Kbcdefghijkl", "abcdeKghijkl", "abcdefghijkK"])
def test_the_planted_token_is_found(planted, name, prompt):
    options = {"replacer": "uniform"} if "replacer" in find(name).options else {}
    if name == "reagent":
        options |= {"probes": 20, "max_steps": 100}
    signal = attribute(planted, TOKENIZER, prompt, "A", name, **options)
    values = signal.values.copy()
    if name in ("attention-rollout", "globenc") and not prompt.endswith("K"):
        values[-1] = 0  # the residual stream stays where it is
    key = prompt.index("K")
    assert values[key] > 1.5 * np.abs(np.delete(values, key)).max()


@pytest.mark.parametrize(
    "name", [name for name in ALL if set(find(name).options) <= {"seed", "steps"}]
)
def test_values_go_with_their_tokens(planted, name):
    """The model knows no positions: other places before the last token change no value."""
    order = [3, 0, 4, 1, 2]
    values = attribute(planted, TOKENIZER, "aKcdez", "A", name).values
    moved = attribute(planted, TOKENIZER, "".join("aKcde"[i] for i in order) + "z", "A", name)
    assert np.allclose(moved.values, values[[*order, 5]], rtol=0, atol=1e-9)


# Attention looks somewhere even if nothing comes of it; GlobEnc follows the last token itself.
BLIND = [name for name in ALL if not name.startswith("attention") and name != "globenc"]


@pytest.mark.parametrize("name", BLIND)
def test_a_model_that_sees_nothing_gives_nothing_or_the_same_to_all(name):
    """A uniform next token: no difference, no gradient; ReAGent's importance stays its start."""
    model = MockModel(torch.full((258, 258), 1 / 258))
    options = {**QUICK.get(name, {}), **({"probes": 400} if name == "reagent" else {})}
    values = attribute(model, TOKENIZER, "abcdef", "x", name, **options).values
    if name == "reagent":
        # The mean of softmax(U) over 400 probes: 1/6 each, standard error 0.0024.
        assert np.abs(values - 1 / 6).max() < 0.015
    else:
        assert np.abs(values).max() < 1e-5


@pytest.mark.parametrize("name", ["attention", "attention-last", "attention-rollout"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "qwen3-sliding"])
def test_attention_is_that_of_the_model(architecture, name):
    model = tiny_model(architecture, vocab_size=258, attention="eager")
    asked = ask(model, TOKENIZER, "a text of some length", "xyz")
    found = find(name)(asked, quantity("probability")).values
    with torch.no_grad():
        layers = model(asked.ids[None], output_attentions=True).attentions
    weights = torch.stack([layer[0].double().mean(0) for layer in layers])
    if name == "attention":
        wanted = weights.mean(0)
    elif name == "attention-last":
        wanted = weights[-1]
    else:
        wanted = torch.eye(len(asked.ids), dtype=torch.double)
        for layer in weights:
            wanted = (0.5 * layer + 0.5 * torch.eye(len(layer), dtype=torch.double)) @ wanted
    for number, place in enumerate(asked.places):
        assert torch.allclose(found[number, :place], wanted[place - 1, :place], atol=2e-6)
    assert torch.allclose(found.nansum(1), torch.ones(3, dtype=torch.double))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["decompx", "globenc"])
def test_a_model_in_half_precision_is_served(architecture, name, dtype):
    wide = tiny_model(architecture, vocab_size=258)
    half = copy.deepcopy(wide).to(dtype)
    values = [
        attribute(model, TOKENIZER, "two words", "!", name).values.flatten()
        for model in (wide.double(), half)
    ]
    assert np.corrcoef(values)[0, 1] > 0.9


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("name", ["probability", "log-probability"])
def test_integrated_gradients_add_up(architecture, name):
    asked = ask(tiny_model(architecture, vocab_size=258, scale=0.1), TOKENIZER, "words", "x")
    measure = quantity(name)
    scores = integrated_gradients(asked, measure, steps=1000)
    embeds = _embeds(asked)
    with torch.no_grad():
        ends = [
            measure(asked.model(inputs_embeds=x).logits[:, -1], asked.ids[-1:])
            for x in (embeds, torch.zeros_like(embeds))
        ]
    difference = float(ends[0] - ends[1])
    assert abs(float(scores.values.nansum()) - difference) < 3e-3 * abs(difference)
    assert scores.notes == ()


def test_too_few_steps_are_said():
    asked = ask(tiny_model("llama", vocab_size=258), TOKENIZER, "some words", "x")
    (note,) = integrated_gradients(asked, quantity("log-probability"), steps=1).notes
    assert "more steps help" in note


def _embeds(asked):
    return asked.model.get_input_embeddings()(asked.ids[None, : asked.prompt]).detach()


def test_gradients_are_those_of_captum():
    """On a model without RMS norms, where captum's integral converges."""
    captum = pytest.importorskip("captum.attr")
    asked = ask(tiny_model("gpt2", vocab_size=258), TOKENIZER, "some words", "x")
    measure = quantity("log-probability")

    def f(x):
        return measure(asked.model(inputs_embeds=x).logits[:, -1], asked.ids[-1:].expand(len(x)))

    wanted = captum.InputXGradient(f).attribute(_embeds(asked).requires_grad_()).sum(-1)[0]
    found = input_x_gradient(asked, measure).values[0, : asked.prompt]
    assert torch.allclose(found, wanted.detach(), atol=1e-9)
    wanted = captum.IntegratedGradients(f).attribute(_embeds(asked), n_steps=500).sum(-1)[0]
    found = integrated_gradients(asked, measure, steps=400).values[0, : asked.prompt]
    assert torch.allclose(found, wanted.detach(), atol=1e-4)


@pytest.mark.parametrize("name", ["input-x-gradient", "gradient-norm", "integrated-gradients"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mamba"])
def test_long_texts_are_computed_in_pieces_and_are_the_same(architecture, name, monkeypatch):
    if architecture == "mamba":
        from transformers import MambaConfig, MambaForCausalLM

        sizes = {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4}
        model = MambaForCausalLM(MambaConfig(**sizes)).double().eval()
    else:
        model = tiny_model(architecture, vocab_size=258, layers=3)
    asked = ask(model, TOKENIZER, "a text of some length", "xy")
    options = QUICK.get(name, {})
    wanted, much = _kept(lambda: find(name)(asked, quantity("logit"), **options).values)
    monkeypatch.setattr(gradients, "LONG", 0)
    found, little = _kept(lambda: find(name)(asked, quantity("logit"), **options).values)
    assert torch.allclose(found, wanted, rtol=1e-9, equal_nan=True)
    assert little < much / 2
    check_leaves_no_trace(model, lambda m: attribute(m, TOKENIZER, "abc", "x", name, **options))


def _kept(run):
    """What a function gives, and how many numbers it keeps for the way back."""
    count = 0

    def pack(tensor):
        nonlocal count
        count += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return run(), count


@pytest.mark.parametrize("name", ["input-x-gradient", "decompx", "reagent"])
def test_a_text_of_4096_tokens(name):
    """One row goes through the model at a time, and of a gradient's blocks the inputs are kept."""
    model = tiny_model("llama", vocab_size=258, dtype=torch.float32, max_positions=4097)
    rows = []

    def see(module, args, output):
        rows.append(len(output.last_hidden_state))

    handle = model.model.register_forward_hook(see)
    options = {"probes": 1, "max_steps": 1} if name == "reagent" else {}
    signal, kept = _kept(lambda: attribute(model, TOKENIZER, "abcd" * 1024, "x", name, **options))
    handle.remove()
    assert np.isfinite(signal.values).all()
    assert len(signal.values) == 4096
    assert set(rows) == {1}
    assert kept < 8 * 4096 * model.config.hidden_size


def test_gradient_shap_adds_up_on_average():
    asked = ask(tiny_model("gpt2", vocab_size=258, scale=0.1), TOKENIZER, "words", "x")
    measure = quantity("log-probability")
    total = float(gradient_shap(asked, measure, samples=3000).values.nansum())
    draw = torch.randint(2, 258, (3000, asked.prompt), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        here = measure(asked.model(asked.ids[None, :-1]).logits[:, -1], asked.ids[-1:])
        others = measure(asked.model(draw).logits[:, -1], asked.ids[-1:].expand(3000))
    wanted, spread = float(here - others.mean()), float(others.std())
    assert abs(total - wanted) < 0.15 * spread  # eight standard errors of a mean of 3,000


def test_occlusion_is_the_mean_fall_over_all_replacements():
    asked = ask(tiny_model("llama", vocab_size=258), TOKENIZER, "abc", "x")
    measure = quantity("probability")
    found = occlusion(asked, measure, draws=4000, replacer="uniform").values[0, :3]
    for place in range(3):
        rows = asked.ids[None, :3].repeat(256, 1)
        rows[:, place] = torch.arange(2, 258)
        with torch.no_grad():
            x = asked.ids[None, :3]
            p0 = measure(asked.model(x).logits[:, -1], asked.ids[-1:])
            each = measure(asked.model(rows).logits[:, -1], asked.ids[-1:].expand(256))
        fall, error = float(p0 - each.mean()), float(each.std()) / 4000**0.5
        assert abs(float(found[place]) - fall) < 6 * error


def test_lime_recovers_a_linear_model(monkeypatch):
    asked = ask(tiny_model("llama", vocab_size=258), TOKENIZER, "abcdef", "x")
    true = torch.tensor([0.3, -0.2, 0.0, 0.5, 0.1, -0.4], dtype=torch.double)

    def linear(question, quantity, place, rows):
        return 0.7 + (rows == question.ids[:place]).double() @ true

    monkeypatch.setattr("pertoken.attribute.perturb._measure", linear)
    found = lime(asked, quantity("probability"), samples=60, replacer="nearest").values[0, :6]
    assert torch.allclose(found, true, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_the_same_seed_gives_the_same(name):
    model = tiny_model("llama", vocab_size=258)
    run = [
        attribute(model, TOKENIZER, "abcde", 2, name, seed=seed, **QUICK.get(name, {})).values
        for seed in (3, 3, 4)
    ]
    assert np.allclose(run[0], run[1], rtol=0, atol=1e-12)
    if name in ("reagent", "gradient-shap", "lime"):
        assert not np.allclose(run[0], run[2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_leaves_no_trace(architecture, name):
    model = tiny_model(architecture, vocab_size=258, layers=2)
    check_leaves_no_trace(
        model,
        lambda m: attribute(m, TOKENIZER, "abc", "xy", name, **QUICK.get(name, {})),
        rng=True,
    )


@pytest.mark.parametrize("name", ALL)
def test_grad_mode_does_not_matter(name):
    model = tiny_model("llama", vocab_size=258)
    options = QUICK.get(name, {})
    wanted = attribute(model, TOKENIZER, "abc", "x", name, **options).values
    with torch.no_grad():
        again = attribute(model, TOKENIZER, "abc", "x", name, **options).values
    assert np.allclose(wanted, again, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["attention", "attention-rollout", "globenc"])
def test_what_does_not_depend_on_the_quantity_says_so(name):
    model = tiny_model("llama", vocab_size=258)
    plain = attribute(model, TOKENIZER, "some text", "!", name)
    other = attribute(model, TOKENIZER, "some text", "!", name, "entropy")
    assert (plain.values == other.values).all()
    assert not plain.notes
    assert other.notes == (f"{name} is the same for every quantity: it depends on the place alone",)


@pytest.mark.parametrize("name", ["attention", "attention-last", "attention-rollout"])
def test_a_model_without_attention_weights_is_refused(name):
    from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=258, hidden_size=16, num_hidden_layers=1, state_size=4)
    ).eval()
    bloom = BloomForCausalLM(BloomConfig(vocab_size=258, hidden_size=16, n_layer=1, n_head=2))
    for model, reason in ((mamba, "recurrent state"), (bloom.eval(), "ALiBi")):
        with pytest.raises(PertokenError, match=f"the method '{name}' cannot serve .*{reason}"):
            attribute(model, TOKENIZER, "abc", "x", name)


@pytest.fixture(scope="module")
def models_without_a_next_token(tiny_encoder):
    heads = ("", "ForSequenceClassification", "ForMaskedLM")
    encoders = [tiny_encoder("Bert", head, vocab_size=258) for head in heads]
    return [*encoders, tiny_model("llama", vocab_size=258).model]


@pytest.mark.parametrize("name", ALL)
def test_a_model_that_predicts_no_next_token_is_refused(models_without_a_next_token, name):
    reason = r"is an encoder, .* use pertoken\.attribute\.decompx|LlamaModel predicts no next token"
    for model in models_without_a_next_token:
        for target in ("x", None):
            with pytest.raises(PertokenError, match=reason):
                attribute(model, TOKENIZER, "abc", target, name)


@pytest.mark.parametrize("name", ALL)
def test_a_model_that_computes_nan_is_refused(name):
    model = tiny_model("gpt2", vocab_size=258)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    for target in ("x", None):
        with pytest.raises(PertokenError, match=r"NaN: load .* in float32"):
            attribute(model, TOKENIZER, "abcdef", target, name)


@pytest.mark.parametrize("name", ["reagent", "occlusion", "lime"])
def test_nan_of_a_replaced_text_alone_is_refused(name):
    model = tiny_model("gpt2", vocab_size=258, dtype=torch.float64)
    asked = ask(model, TOKENIZER, "abcdef", "x")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # not tied
    with torch.no_grad():
        model.get_input_embeddings().weight[200] = torch.nan

    def always(question):
        return lambda uniforms: torch.full_like(uniforms, 200, dtype=torch.long)

    with pytest.raises(PertokenError, match="the logits of GPT2LMHeadModel are NaN"):
        find(name)(asked, quantity("probability"), replacer=always)


@pytest.mark.parametrize("name", ["reagent", "occlusion", "lime"])
def test_a_quantity_that_is_nan_is_refused(name):
    nowhere = Quantity("nowhere", "nats", lambda logits, targets: logits[:, 0] * torch.nan)
    with pytest.raises(PertokenError, match="the quantity of a text is NaN"):
        attribute(tiny_model("gpt2", vocab_size=258), TOKENIZER, "abcdef", "x", name, nowhere)


@pytest.mark.parametrize("name", [name for name in ALL if METHODS[name].backward])
def test_a_gradient_that_is_nan_is_refused(name):
    steep = Quantity("steep", "nats", lambda logits, targets: (0 * logits[:, 0]).sqrt())
    with pytest.raises(PertokenError, match=r"is NaN: load .* in float32"):
        attribute(tiny_model("gpt2", vocab_size=258), TOKENIZER, "abcdef", "x", name, steep)


def test_reagent_serves_a_model_without_attention():
    from transformers import MambaConfig, MambaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MambaForCausalLM(
            MambaConfig(vocab_size=258, hidden_size=16, num_hidden_layers=1, state_size=4)
        ).eval()
    values = attribute(model, TOKENIZER, "abcdef", "xy", **QUICK["reagent"]).values
    assert not np.isnan(values).any()


def test_options_are_checked():
    model = tiny_model("llama", vocab_size=258)
    for arguments, message in (
        ({"method": "limes"}, "unknown attribution method 'limes' (did you mean 'lime'?)"),
        ({"method": "lime", "sample": 3}, "no option 'sample' (did you mean 'samples'?)"),
        ({"method": "attention", "probes": 3}, "no option 'probes'"),
        ({"quantity": "prob"}, "unknown quantity 'prob' (did you mean 'probability'"),
        ({"method": "lime", "samples": 1}, "samples must be 2 or more"),
        ({"method": "occlusion", "draws": 0}, "draws must be 1 or more"),
        ({"method": "integrated-gradients", "steps": 0}, "steps must be 1 or more"),
    ):
        with pytest.raises(PertokenError) as error:
            attribute(model, TOKENIZER, "abc", "x", **arguments)
        assert message in str(error.value)
