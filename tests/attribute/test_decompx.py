"""DecompX: parts add up to the model's own state everywhere, both forms agree, no trace is left."""

from __future__ import annotations

import pytest
import torch
import transformers

from pertoken.attribute import decompx as module
from pertoken.attribute._parts import BIASES
from pertoken.attribute._question import ask
from pertoken.attribute.decompx import decompose, decompx
from pertoken.attribute.globenc import globenc
from pertoken.attribute.methods import find
from pertoken.attribute.quantity import contrast
from pertoken.attribute.quantity import find as quantity
from pertoken.errors import PertokenError
from pertoken.testing import ARCHITECTURES, ByteTokenizer, check_leaves_no_trace, tiny_model
from pertoken.testing.trace import snapshot

DECODERS = [*ARCHITECTURES, "qwen3-sliding", "qwen2"]
ENCODERS = [
    ("Bert", ""),
    ("Bert", "ForSequenceClassification"),
    ("Bert", "ForMaskedLM"),
    ("Bert", "ForTokenClassification"),
    ("Roberta", "ForSequenceClassification"),
    ("XLMRoberta", ""),
    ("Electra", "ForSequenceClassification"),
]


def _ids(time, batch=1):
    return torch.randint(5, 64, (batch, time), generator=torch.Generator().manual_seed(3))


def _decoder(architecture, **settings):
    if architecture != "qwen2":
        return tiny_model(architecture, **settings)
    config = transformers.Qwen2Config(  # biases at q, k, v, none behind the attention
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.endswith("bias"):
                torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model.to(settings.get("dtype", torch.float64)).eval()


@torch.no_grad()
def _plain(model, ids):
    """The outputs of all modules, and of the model, in a plain forward."""
    outputs, handles = {}, []
    blocks = next(
        each for each in model.get_decoder().modules() if isinstance(each, torch.nn.ModuleList)
    )
    names = {each: name for name, each in model.named_modules()}
    names |= {each: f"block {number}" for number, each in enumerate(blocks)}
    for each in model.modules():

        def keep(module, args, out):
            outputs[names[module]] = out[0] if isinstance(out, tuple) else out

        handles.append(each.register_forward_hook(keep))
    output = model(ids)
    for handle in handles:
        handle.remove()
    outputs["output"] = output.logits if "logits" in output else output.last_hidden_state
    return outputs


def _worst(model, ids, **settings):
    """The largest miss of a sum over the parts, of all stages, and how many there were."""
    states, plain = decompose(model, ids, every_module=True, **settings), _plain(model, ids)
    misses = []
    for name, state in states.items():
        if name == "embeddings":
            continue
        total, wanted = state.sum(0), plain[name]
        wanted = wanted[0] if len(wanted) == 1 else wanted
        if wanted.numel() > total.numel():
            wanted = wanted[-1]  # a decoder is read at its last position
        misses.append(float((total.view_as(wanted) - wanted).abs().max()))
    return max(misses), len(misses)


@pytest.mark.parametrize("gate", ["half", "frozen"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_parts_add_up_to_every_state_of_a_decoder(architecture, gate):
    if architecture in ("gpt2", "gpt-neox", "opt", "phi") and gate == "frozen":
        pytest.skip("it has no gated product")
    worst, stages = _worst(_decoder(architecture), _ids(12), gate=gate)
    assert worst < 1e-10
    assert stages > 15  # 2 blocks with their linear layers, norms and activations


@pytest.mark.parametrize(("kind", "head"), ENCODERS)
def test_parts_add_up_to_every_state_of_an_encoder(tiny_encoder, kind, head):
    worst, stages = _worst(tiny_encoder(kind, head), _ids(12))
    assert worst < 1e-10
    assert stages > 15


@pytest.mark.parametrize("architecture", DECODERS)
def test_parts_add_up_in_float32(architecture):
    assert _worst(_decoder(architecture, dtype=torch.float32), _ids(12))[0] < 1e-4


@pytest.mark.parametrize(("kind", "head"), ENCODERS)
def test_parts_of_an_encoder_add_up_in_float32(tiny_encoder, kind, head):
    assert _worst(tiny_encoder(kind, head).float(), _ids(12))[0] < 1e-4


@pytest.mark.model
def test_the_embedded_model(smollm2):
    model, tokenizer = smollm2
    text = "The capital of Italy is Rome. The capital of Spain is"
    ids = tokenizer(text, return_tensors="pt").input_ids
    states = decompose(model, ids, biases="token")
    with torch.no_grad():
        output = model(ids, output_hidden_states=True)
    for number, wanted in enumerate(output.hidden_states[1:-1]):
        miss = (states[f"block {number}"].sum(0) - wanted[0]).abs().max()
        # float32, and single elements are as large as 20,000; the error goes with the processor.
        assert miss < 1e-5 * wanted.abs().max()
    token = int(output.logits[0, -1].argmax())
    parts = states["output"][:, token]
    assert abs(float(parts.sum() - output.logits[0, -1, token])) < 1e-4
    found = decompx(model, ids, target="predicted")[0]
    assert torch.allclose(found, parts[:-1].double(), rtol=0, atol=1e-4)
    assert tokenizer.decode([token]) == " Madrid"
    assert tokenizer.decode(ids[0, found.argmax()]) == " Spain"


@pytest.mark.parametrize("biases", BIASES)
def test_parts_add_up_however_biases_are_shared(tiny_encoder, biases):
    # "dot" divides by a sum of both signs, which may nearly vanish.
    bar = 1e-6 if biases == "dot" else 1e-10
    for model in (tiny_encoder("Bert", "ForSequenceClassification"), _decoder("gpt2")):
        assert _worst(model, _ids(8), biases=biases)[0] < bar
        left = decompose(model, _ids(8), biases=biases)["block 1"][-1].abs().max()
        assert (left > 0.1) == (biases == "token")


@pytest.mark.parametrize("architecture", DECODERS)
def test_no_part_comes_from_behind(architecture):
    for state in decompose(_decoder(architecture), _ids(8)).values():
        if state.dim() == 3:
            assert not torch.triu(state[:-1].abs().sum(-1).T, diagonal=1).any()


def _shared(parts, bias):
    """Rows `parts` [k, width] of one token with a bias shared out by |<part, bias>|."""
    weights = (parts @ bias).abs()
    return parts + (weights / weights.sum())[:, None] * bias


def test_the_paper_written_out_for_bert(tiny_encoder):
    """Layer by layer and token by token, from the weights, with the paper's sharing of biases."""
    model, ids = tiny_encoder("Bert", "ForSequenceClassification"), _ids(6)
    found = decompose(model, ids)["output"]
    bert = model.bert
    with torch.no_grad():
        x = bert.embeddings(ids)[0]
        parts = torch.diag_embed(x.T).permute(1, 2, 0)  # [i, k, :], x_i where i = k
        for layer in bert.encoder.layer:
            own, out = layer.attention.self, layer.attention.output.dense
            query, key = (f(x).unflatten(-1, (4, 8)) for f in (own.query, own.key))
            alpha = (torch.einsum("ihd,jhd->hij", query, key) / 8**0.5).softmax(-1)
            value = (parts @ own.value.weight.T).unflatten(-1, (4, 8))
            mixed = torch.einsum("hij,jkhd->ikhd", alpha, value).flatten(-2)
            parts = mixed @ out.weight.T + parts
            bias = out.weight @ own.value.bias + out.bias
            parts = torch.stack([_shared(each, bias) for each in parts])
            parts = _normed(parts, layer.attention.output.LayerNorm)
            inner = torch.stack(
                [
                    _shared(each, layer.intermediate.dense.bias)
                    for each in parts @ layer.intermediate.dense.weight.T
                ]
            )
            z = inner.sum(1, keepdim=True)
            inner = inner * (torch.nn.functional.gelu(z) / z)
            outer = torch.stack(
                [
                    _shared(each, layer.output.dense.bias)
                    for each in inner @ layer.output.dense.weight.T
                ]
            )
            parts = _normed(parts + outer, layer.output.LayerNorm)
            x = parts.sum(1)
        pooled = _shared(parts[0] @ bert.pooler.dense.weight.T, bert.pooler.dense.bias)
        z = pooled.sum(0)
        logits = _shared(pooled * (z.tanh() / z) @ model.classifier.weight.T, model.classifier.bias)
    assert torch.allclose(found[:-1], logits, rtol=0, atol=1e-10)
    assert torch.allclose(logits.sum(0), model(ids).logits[0], rtol=0, atol=1e-10)


def _normed(parts, norm):
    """LayerNorm of parts [i, k, width], its beta shared out."""
    total = parts.sum(1)
    deviation = (total.var(-1, correction=0) + norm.eps).sqrt()
    parts = norm.weight * (parts - parts.mean(-1, keepdim=True)) / deviation[:, None, None]
    return torch.stack([_shared(each, norm.bias) for each in parts])


@pytest.mark.parametrize("gate", ["half", "frozen"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_the_adjoint_is_the_full_propagation_of_a_decoder(architecture, gate):
    model, ids = _decoder(architecture), _ids(32)
    parts = decompose(model, ids, biases="token", gate=gate)["output"][:-1]
    logits = model(ids).logits[0, -1]
    for target in ("predicted", 7):
        token = int(logits.argmax()) if target == "predicted" else target
        found = decompx(model, ids, target=target, gate=gate)[0]
        assert torch.allclose(found, parts[:, token], rtol=0, atol=1e-10)
    assert torch.equal(
        decompx(model, ids, gate=gate), decompx(model, ids, target="predicted", gate=gate).abs()
    )


@pytest.mark.parametrize(("kind", "head"), ENCODERS)
def test_the_adjoint_is_the_full_propagation_of_an_encoder(tiny_encoder, kind, head):
    model, ids = tiny_encoder(kind, head), _ids(32)
    states = decompose(model, ids, biases="token")
    if head:
        output = states["output"]
        output = output[:, 0] if output.dim() == 3 else output
        wanted = output[:-1, int(output.sum(0).argmax())]
        assert torch.allclose(decompx(model, ids, target="predicted")[0], wanted, atol=1e-10)
    last = states["block 1"][:, 0]
    state = last.sum(0)
    wanted = last[:-1] @ state / state.norm()
    assert torch.allclose(decompx(model, ids, target="norm")[0], wanted, rtol=0, atol=1e-10)


def test_another_place_is_explained(tiny_encoder):
    gpt2, bert, ids = _decoder("gpt2"), tiny_encoder("Bert", "ForTokenClassification"), _ids(9)
    found = decompx(gpt2, ids, place=4)[0]
    assert torch.equal(found[:5], decompx(gpt2, ids[:, :5])[0])
    assert not found[5:].any()
    assert torch.equal(decompx(gpt2, ids, place=-5)[0], found)
    parts = decompose(bert, ids, biases="token")["output"][:-1, 3]
    assert torch.allclose(decompx(bert, ids, place=3, target=2)[0], parts[:, 2], atol=1e-10)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "opt", "gpt-neox"])
def test_long_texts_are_computed_in_pieces_and_are_the_same(architecture, monkeypatch):
    model, ids = _decoder(architecture), _ids(20)
    wanted = decompx(model, ids)
    monkeypatch.setattr(module, "LONG", 0)
    assert torch.allclose(decompx(model, ids), wanted, rtol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "Bert", "Roberta"])
@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing(tiny_encoder, name, left):
    model = tiny_encoder(name) if name[0].isupper() else _decoder(name)
    ids = _ids(9, batch=2)
    mask = torch.ones_like(ids)
    gone = slice(0, 4) if left else slice(5, 9)
    mask[1, gone], ids[1, gone] = 0, 0
    found, kept = decompx(model, ids, mask), mask[1].bool()
    assert torch.allclose(found[0], decompx(model, ids[:1])[0], rtol=1e-12)
    assert torch.allclose(found[1, kept], decompx(model, ids[1:, kept])[0], rtol=1e-12)
    assert not found[1, ~kept].any()
    parts = decompose(model, ids[1:], mask[1:])["output"]
    assert torch.equal(parts, decompose(model, ids[1:, kept])["output"])


@pytest.mark.parametrize(("kind", "head"), ENCODERS)
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_texts_that_run_together_have_the_shares_they_have_alone(
    tiny_encoder, kind, head, dtype, bar, monkeypatch
):
    model = tiny_encoder(kind, head).to(dtype)
    ids, mask = _ids(12, batch=6), torch.ones(6, 12, dtype=torch.long)
    for row in range(1, 6):
        mask[row, : row % 2], mask[row, 12 - row // 2 :] = 0, 0
    targets = ("predicted", "norm", 1) if head else ("predicted", "norm")
    alone = [ids[row : row + 1, real == 1] for row, real in enumerate(mask)]
    wanted = {t: [decompx(model, each, target=t)[0] for each in alone] for t in targets}
    runs, own = [], module._run
    monkeypatch.setattr(
        module, "_run", lambda model, *given: runs.append(given[0].shape) or own(model, *given)
    )
    for target in targets:
        found = decompx(model, ids * mask, mask, target=target)
        for row, shares in enumerate(wanted[target]):
            scale = shares.abs().max()
            assert torch.allclose(found[row, mask[row] == 1], shares, rtol=0, atol=bar * scale)
            assert not found[row, mask[row] == 0].any()
    assert runs == [(6, 12)] * len(targets)


def test_attention_to_itself_alone_gives_all_to_the_own_token():
    model, ids = tiny_model("mistral", sliding_window=1), _ids(7)
    found = decompx(model, ids, target="predicted")[0]
    assert not found[:-1].any()
    assert torch.allclose(found[-1], model(ids).logits[0, -1].max(), atol=1e-6)  # it has no biases
    parts = decompose(model, ids)["block 1"]
    assert all(not parts[k, i].any() for k in range(7) for i in range(7) if i != k)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("long", [True, False])
def test_leaves_no_trace_in_a_decoder(architecture, long, monkeypatch):
    monkeypatch.setattr(module, "LONG", 0 if long else 1024)
    model = _decoder(architecture)
    check_leaves_no_trace(model, lambda m: decompx(m, _ids(6)), rng=True)
    check_leaves_no_trace(model, lambda m: decompose(m, _ids(6)), rng=True)


def test_leaves_no_trace_in_an_encoder(tiny_encoder, monkeypatch):
    model = tiny_encoder("Roberta", "ForSequenceClassification")
    decompx(model, _ids(4))  # registers its attention function once
    before = snapshot(model)
    decompx(model, _ids(6))
    decompose(model, _ids(6))

    def broken(*args, **kwargs):
        raise RuntimeError("planted")

    monkeypatch.setattr(module, "sdpa", broken)
    with pytest.raises(RuntimeError, match="planted"):
        decompx(model, _ids(6))
    monkeypatch.undo()
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []


def test_a_user_who_froze_the_model_and_switched_gradients_off_is_served():
    model, ids = _decoder("gpt2"), _ids(8)
    wanted = decompx(model, ids)
    model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(decompx(model, ids), wanted)


def test_the_shares_of_a_contrast_are_the_difference_of_the_logits():
    asked = ask(_decoder("gpt2", vocab_size=258), ByteTokenizer(), "some words", "xy")
    run = find("decompx")
    first = asked.ids[asked.prompt :].tolist()
    found = run(asked, contrast(9)).values
    logit = run(asked, quantity("logit")).values
    for number, place in enumerate(asked.places):
        ids = asked.ids[None, :place]
        token, foil = (decompx(asked.model, ids, target=t)[0] for t in (first[number], 9))
        assert torch.allclose(logit[number, :place], token, rtol=0, atol=1e-10)
        assert torch.allclose(found[number, :place], token - foil, rtol=0, atol=1e-10)


def test_a_nonlinear_part_that_is_not_known_is_refused_by_name():
    model, ids = _decoder("gemma3"), _ids(6)
    model.config.final_logit_softcapping = 2.0  # a tanh of the logits, called as a function
    for call in (decompx, decompose):
        with pytest.raises(PertokenError, match=r"Gemma3ForCausalLM cannot be decomposed"):
            call(model, ids)
    llama = _decoder("llama")
    llama.model.layers[0].mlp.act_fn = torch.nn.Sigmoid()
    with pytest.raises(PertokenError, match="its activation Sigmoid is not 0 at 0"):
        decompx(llama, ids)


def test_positions_that_begin_behind_the_padding_are_no_room(tiny_encoder):
    roberta = tiny_encoder("Roberta", pad_token_id=1, max_position_embeddings=20)
    for method in (decompx, globenc):
        assert method(roberta, _ids(18)).shape == (1, 18)
        with pytest.raises(PertokenError, match="19 tokens is longer than the 18 positions"):
            method(roberta, _ids(19))


def test_bad_input_is_one_line(tiny_encoder):
    gpt2, ids = _decoder("gpt2"), _ids(5)
    bert, headless = tiny_encoder("Bert", "ForSequenceClassification"), tiny_encoder("Bert")
    answers = tiny_encoder("Bert", "ForQuestionAnswering", num_labels=2)
    deberta = transformers.DebertaV2Model(
        transformers.DebertaV2Config(
            vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    ).eval()
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    ).eval()
    broken = _decoder("gpt2")
    with torch.no_grad():
        broken.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    for call, message in (
        (lambda: decompx(gpt2, ids, target="predict"), r"'predict' \(did you mean 'predicted'\?\)"),
        (lambda: decompx(gpt2, ids, target=64), r"target must be in 0..63, got 64"),
        (lambda: decompx(bert, ids, target=3), r"target must be in 0..2, got 3"),
        (lambda: decompx(headless, ids, target=1), "BertModel has no classes, so no target 1"),
        (lambda: decompx(answers, ids), "BertForQuestionAnswering gives no logits"),
        (lambda: decompose(answers, ids), "BertForQuestionAnswering gives no logits"),
        (lambda: decompx(gpt2, ids, place=5), r"place must be in -5..4, got 5"),
        (lambda: decompx(gpt2, ids, gate="halve"), "gate must be one of half, frozen, got 'halve'"),
        (lambda: decompose(gpt2, ids, biases="abs"), "biases must be one of absdot, .* got 'abs'"),
        (lambda: decompose(gpt2, _ids(5, batch=2)), "takes one text at a time, got 2"),
        (lambda: decompose(gpt2, _ids(257)), "takes up to 256 tokens, got 257"),
        (lambda: decompx(deberta, ids), "decompx cannot serve DebertaV2Model: "),
        (lambda: decompx(mamba, ids), "decompx cannot serve MambaForCausalLM: .*recurrent"),
        (lambda: decompose(mamba, ids), "decompose cannot serve MambaForCausalLM: .*recurrent"),
        (lambda: decompx(broken, ids), "is NaN: load it in float32"),
        (lambda: decompose(broken, ids), "is NaN: load it in float32"),
        (lambda: decompx(bert.train(), ids), "in training mode"),
        (lambda: decompx(gpt2, ids, torch.zeros(1, 5)), "a text is empty"),
    ):
        with pytest.raises(PertokenError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    bert.eval()
