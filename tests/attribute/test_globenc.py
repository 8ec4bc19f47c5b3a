"""GlobEnc equals its definition written out, feels no padding, and leaves no trace."""

from __future__ import annotations

import pytest
import torch
import transformers

from pertoken.attribute import globenc as module
from pertoken.attribute._question import ask
from pertoken.attribute.globenc import globenc
from pertoken.attribute.methods import find
from pertoken.attribute.quantity import find as quantity
from pertoken.errors import PertokenError
from pertoken.testing import ARCHITECTURES, ByteTokenizer, check_leaves_no_trace, tiny_model
from pertoken.testing.trace import snapshot

DECODERS = [*ARCHITECTURES, "qwen3-sliding"]


def _ids(time, batch=1, low=5):
    return torch.randint(low, 64, (batch, time), generator=torch.Generator().manual_seed(3))


def _close(found, wanted, bar=1e-9):
    """Equal up to a factor."""
    return torch.allclose(found / found.max(), wanted / wanted.max(), rtol=0, atol=bar)


def _rolled(norms, row):
    result = torch.eye(len(norms[0]), dtype=torch.float64)
    for n in norms:
        result = n @ result
    return result[row]


def _centred(x):
    return x - x.mean(-1, keepdim=True)


def _outputs(model, ids, wanted):
    """Inputs and outputs of the modules that `wanted` names, in one plain forward with weights."""
    seen = {}
    model.set_attn_implementation("eager")
    modules = {name: each for name, each in model.named_modules() if wanted(name)}
    handles = [
        each.register_forward_hook(
            lambda m, args, kwargs, out, name=name: seen.update(
                {name: (args[0] if args else next(iter(kwargs.values())), out)}
            ),
            with_kwargs=True,
        )
        for name, each in modules.items()
    ]
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    return seen, [layer[0] for layer in weights]


def _literal_encoder(model, ids):
    """The definition in the module's docstring, every a_ij written out."""
    seen, attentions = _outputs(model, ids, lambda name: "layer." in name)
    norms = []
    for number, alpha in enumerate(attentions):
        at = f"encoder.layer.{number}."
        block = model.encoder.layer[number]
        heads = alpha.shape[0]
        x = seen[at + "attention.self"][0][0]
        value = block.attention.self.value(x).unflatten(-1, (heads, -1))
        out = block.attention.output.dense.weight.unflatten(1, (heads, -1))
        a = torch.einsum("hij,jhd,xhd->ijx", alpha, value, out)
        a = a + torch.eye(len(x), dtype=x.dtype)[:, :, None] * x
        for where in ("attention.output.LayerNorm", "output.LayerNorm"):
            norm, before = block.get_submodule(where), seen[at + where][0][0]
            deviation = (before.var(-1, correction=0) + norm.eps).sqrt()
            a = norm.weight * _centred(a) / deviation[:, None, None]
        norms.append(a.norm(dim=-1))
    return _rolled(norms, 0)


PLACES = {
    # input norm, attention, output projection, norm behind the attention, final norm
    "gpt2": ("ln_1", "attn", "c_proj", None, "ln_f"),
    "gpt-neox": ("input_layernorm", "attention", "dense", None, "final_layer_norm"),
    "opt": ("self_attn_layer_norm", "self_attn", "out_proj", None, "final_layer_norm"),
    "phi": ("input_layernorm", "self_attn", "dense", None, "final_layernorm"),
    "gemma3": ("input_layernorm", "self_attn", "o_proj", "post_attention_layernorm", "norm"),
}


def _values(architecture, attention, normed, heads):
    if architecture == "gpt2":
        return attention.c_attn(normed).chunk(3, -1)[2].unflatten(-1, (heads, -1))
    if architecture == "gpt-neox":
        return attention.query_key_value(normed).unflatten(-1, (heads, -1)).chunk(3, -1)[2]
    value = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim))
    return value.repeat_interleave(heads // value.shape[-2], -2)


def _by_norm(norm, before, a):
    """What a norm does to a [i, j, :], with what it found for token i in `before` [time, :]."""
    if isinstance(norm, torch.nn.LayerNorm):
        deviation = (before.var(-1, correction=0) + norm.eps).sqrt()
        return norm.weight * _centred(a) / deviation[:, None, None]
    gain = 1 + norm.weight if "Gemma" in type(norm).__name__ else norm.weight
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    return gain * a / (before.square().mean(-1) + eps).sqrt()[:, None, None]


def _literal_decoder(architecture, model, ids, row=-1):
    first, attn, out, behind, final = PLACES.get(
        architecture, ("input_layernorm", "self_attn", "o_proj", None, "norm")
    )
    decoder = model.get_decoder()
    seen, attentions = _outputs(model, ids, lambda name: True)
    names = {each: name for name, each in model.named_modules()}
    blocks = next(each for each in decoder.children() if isinstance(each, torch.nn.ModuleList))
    readers = [*(block.get_submodule(first) for block in blocks[1:]), getattr(decoder, final)]
    norms = []
    for block, alpha, reader in zip(blocks, attentions, readers, strict=True):
        heads = alpha.shape[0]
        x, normed = (each[0] for each in seen[names[block.get_submodule(first)]])
        attention = block.get_submodule(attn)
        value = _values(architecture, attention, normed, heads)
        project = attention.get_submodule(out)
        weight = project.weight.T if architecture == "gpt2" else project.weight
        a = torch.einsum("hij,jhd,xhd->ijx", alpha, value, weight.unflatten(1, (heads, -1)))
        if behind:
            norm = block.get_submodule(behind)
            a = _by_norm(norm, seen[names[norm]][0][0], a)
        a = a + torch.eye(len(x), dtype=x.dtype)[:, :, None] * x
        norms.append(_by_norm(reader, seen[names[reader]][0].view(-1, 32), a).norm(dim=-1))
    return _rolled(norms, row)


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta", "Electra"])
def test_equals_the_slow_definition_on_encoders(tiny_encoder, kind):
    model, ids = tiny_encoder(kind, num_hidden_layers=3), _ids(8)
    found = globenc(model, ids)[0]
    assert _close(found, _literal_encoder(model, ids))


@pytest.mark.parametrize("architecture", DECODERS)
def test_equals_the_slow_definition_on_decoders(architecture):
    model, ids = tiny_model(architecture, layers=3, sliding_window=4), _ids(8)
    found = globenc(model, ids)[0]
    # Llama's own norm rounds to float32, whatever the model's type.
    assert _close(found, _literal_decoder(architecture, model, ids), 1e-6)


def test_rows_in_chunks_are_the_same(tiny_encoder, monkeypatch):
    models = [tiny_encoder("Bert"), tiny_model("llama"), tiny_model("gemma3")]
    wanted = [globenc(model, _ids(20)) for model in models]
    monkeypatch.setattr(module, "_CHUNK", 1)
    for model, scores in zip(models, wanted, strict=True):
        assert torch.allclose(globenc(model, _ids(20)), scores, rtol=1e-9)


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_padding_changes_nothing_in_an_encoder(tiny_encoder, kind):
    model = tiny_encoder(kind)
    _padding(model, left=False)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "opt"])
@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_nothing_in_a_decoder(architecture, left):
    _padding(tiny_model(architecture), left)


def _padding(model, left):
    ids = _ids(9, batch=2)
    mask = torch.ones_like(ids)
    gone = slice(0, 4) if left else slice(5, 9)
    mask[1, gone], ids[1, gone] = 0, 0
    found = globenc(model, ids, mask)
    assert torch.allclose(found[0], globenc(model, ids[:1])[0], rtol=1e-12)
    kept = mask[1].bool()
    assert torch.allclose(found[1, kept], globenc(model, ids[1:, kept])[0], rtol=1e-12)
    assert not found[1, ~kept].any()


@pytest.mark.parametrize("name", ["Bert", "Roberta", "llama", "gemma3", "gpt2", "opt", "phi"])
@pytest.mark.parametrize(("dtype", "bar"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_texts_that_run_together_score_as_alone(tiny_encoder, name, dtype, bar, monkeypatch):
    model = tiny_encoder(name) if name[0].isupper() else tiny_model(name, sliding_window=4)
    ids, mask, alone = _texts()
    model = model.to(dtype)
    wanted = [globenc(model, each[None])[0] for each in alone]
    runs = _count_runs(monkeypatch)
    found = globenc(model, ids, mask)
    assert runs == [[10, 12], [1, 16]]  # texts and places of each forward
    for row, scores in enumerate(wanted):
        assert torch.allclose(found[row, mask[row] == 1], scores, rtol=0, atol=bar)
        assert not found[row, mask[row] == 0].any()


def test_many_texts_run_in_several_batches(tiny_encoder, monkeypatch):
    model, (ids, mask, _) = tiny_encoder("Bert"), _texts()
    wanted = globenc(model, ids, mask)
    monkeypatch.setattr(module, "_TOKENS", 20)
    runs = _count_runs(monkeypatch)
    assert torch.allclose(globenc(model, ids, mask), wanted, rtol=1e-12)
    assert max(batch * time for batch, time in runs) <= 20


def _texts():
    """Eleven texts of 8 to 16 tokens, padding on both sides; and each without it."""
    ids, mask = _ids(16, batch=11), torch.ones(11, 16, dtype=torch.long)
    for row in range(1, 11):
        mask[row, : row % 3], mask[row, 16 - (row % 4 + 4 - row % 3) :] = 0, 0
    return ids * mask, mask, [row[real == 1] for row, real in zip(ids, mask, strict=True)]


def _count_runs(monkeypatch):
    runs, own = [], module._Watch.__call__

    def run(self, ids, real, asked):
        runs.append(list(ids.shape))
        return own(self, ids, real, asked)

    monkeypatch.setattr(module._Watch, "__call__", run)
    return runs


def test_attention_to_itself_alone_gives_all_to_the_last_token():
    scores = globenc(tiny_model("mistral", sliding_window=1), _ids(7))[0]
    assert scores[-1] > 0
    assert not scores[:-1].any()


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMaskedLM"])
def test_a_head_does_not_matter(tiny_encoder, head):
    model = tiny_encoder("Bert", head)
    assert torch.equal(globenc(model, _ids(8)), globenc(model.bert, _ids(8)))


@pytest.mark.parametrize("name", ["Bert", "llama", "gemma3", "gpt2", "phi"])
def test_behind_the_top_attention_one_token_of_a_text_runs(tiny_encoder, name):
    model = tiny_encoder(name) if name[0].isupper() else tiny_model(name)
    read = []
    for part in module.stack(model, "globenc")[-1].modules():
        if module.is_linear(part):
            own = part.forward
            part.forward = lambda x, own=own: (read.append(x.shape[-2]), own(x))[1]
    with torch.no_grad():
        module._Watch(model)(_ids(7, batch=2), None, torch.tensor([[6], [6]]))
    assert set(read) == {1, 7}
    assert read == sorted(read, reverse=True)
    assert read.count(1) >= 3  # W_O and the feed-forward layer


def test_a_target_gets_the_row_before_it():
    asked = ask(tiny_model("gemma3", vocab_size=258), ByteTokenizer(), "some words", "xyz")
    found = find("globenc")(asked, quantity("probability")).values
    for number, place in enumerate(asked.places):
        alone = globenc(asked.model, asked.ids[None, :place])[0]
        assert _close(found[number, :place], alone)
        assert found[number, place:].isnan().all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_leaves_no_trace_in_a_decoder(architecture):
    check_leaves_no_trace(tiny_model(architecture), lambda m: globenc(m, _ids(6)), rng=True)


def test_leaves_no_trace_in_an_encoder(tiny_encoder, monkeypatch):
    model = tiny_encoder("Bert")
    globenc(model, _ids(4))  # registers its attention function once
    before = snapshot(model)
    globenc(model, _ids(6))
    monkeypatch.setattr(module, "_same", lambda x, *parts: False)
    with pytest.raises(PertokenError, match="not simply added to the residual stream"):
        globenc(model, _ids(6))
    monkeypatch.undo()
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []


def test_an_encoder_of_another_build_is_refused_by_name():
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for kind, reason in (("ModernBert", "norms stand"), ("DebertaV2", "attention itself")):
        config = getattr(transformers, f"{kind}Config")(
            **size, intermediate_size=32, pad_token_id=0, cls_token_id=1, sep_token_id=2
        )
        model = getattr(transformers, f"{kind}Model")(config).eval()
        with pytest.raises(PertokenError, match=f"globenc cannot serve {kind}Model: .*{reason}"):
            globenc(model, _ids(5))


def test_bad_input_is_one_line(tiny_encoder):
    bert, llama = tiny_encoder("Bert"), tiny_model("llama")
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    ).eval()
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    ).eval()
    broken = tiny_encoder("Bert")
    with torch.no_grad():
        broken.encoder.layer[0].attention.self.value.weight[0, 0] = torch.nan
    for call, message in (
        (lambda: globenc(bert, _ids(5)[0]), r"input_ids must be \[batch, time\], got \[5\]"),
        (lambda: globenc(bert, _ids(5), torch.ones(1, 4)), r"\[1, 4\] and input_ids \[1, 5\]"),
        (lambda: globenc(bert, _ids(5), torch.zeros(1, 5)), "a text is empty"),
        (lambda: globenc(bert, _ids(71)), "71 tokens is longer than the 70 positions of BertModel"),
        (lambda: globenc(bert.train(), _ids(5)), "in training mode"),
        (lambda: globenc(broken, _ids(5)), "NaN"),
        (lambda: globenc(mamba, _ids(5)), "globenc cannot serve MambaForCausalLM: .* recurrent"),
        (lambda: globenc(bloom, _ids(5)), "globenc cannot serve BloomForCausalLM: .*ALiBi"),
        (lambda: globenc(llama, torch.zeros(0, 4).long()), "there is no text"),
    ):
        with pytest.raises(PertokenError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    bert.eval()
