"""A tree's logits are those of each node's own linear text, on every kind of tiny model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, PreTrainedModel

from pertoken.decode import Plain
from pertoken.decode.forward import TreeForward, refuse_unfit
from pertoken.decode.tree import TokenTree, ancestor_mask
from pertoken.errors import PertokenError
from pertoken.testing import ARCHITECTURES, EXTRA_ARCHITECTURES, tiny_model

NAMES = (*ARCHITECTURES, *EXTRA_ARCHITECTURES)
SLIDING = ("gemma3", "mistral", "qwen3-sliding")


def random_text(length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (1, length), generator=generator)


def bushy(root: int = 7) -> TokenTree:
    """Slots and depths differ everywhere, and paths are longer than the window of 8."""
    tree = TokenTree(root)
    for first in (11, 12, 13):
        node = tree.add(0, first)
        for token in (21, 22):
            tree.add(node, token)
    tree.add_chain(2, list(range(30, 40)))
    tree.add_chain(0, list(range(40, 50)))
    return tree


def run(
    forward: TreeForward, tree: TokenTree, text: torch.Tensor, mask: torch.Tensor, cache: Any
) -> torch.Tensor:
    forward.text(text, mask, cache)
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = True
    rows = text.shape[0]
    return forward.tree(
        torch.tensor([tree.tokens]).expand(rows, -1),
        torch.tensor([tree.depths]).expand(rows, -1),
        ancestor_mask(tree.parents).expand(rows, -1, -1),
        mask,
        cache,
    )


def linear(model: PreTrainedModel, text: torch.Tensor, tree: TokenTree, node: int) -> torch.Tensor:
    path = torch.tensor([[tree.tokens[i] for i in tree.path(node)]])
    return model(torch.cat((text, path), -1), use_cache=False).logits[0, -1]


@torch.no_grad()
@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("architecture", NAMES)
def test_every_node_sees_its_own_path_alone(architecture: str, typed: bool) -> None:
    model = tiny_model(architecture)
    forward = TreeForward(model)
    tree = bushy()
    for prefix in (1, 5, 8, 9, 20):
        text = random_text(prefix)
        cache = DynamicCache(config=model.config) if typed else DynamicCache()
        logits = run(forward, tree, text, torch.ones_like(text), cache)[0]
        for node in range(len(tree)):
            assert torch.allclose(logits[node], linear(model, text, tree, node), atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", NAMES)
def test_eager_and_sdpa_in_float32(architecture: str, attention: str) -> None:
    model = tiny_model(architecture, dtype=torch.float32, attention=attention)
    forward = TreeForward(model)
    text, tree = random_text(12), bushy()
    cache = DynamicCache(config=model.config)
    logits = run(forward, tree, text, torch.ones_like(text), cache)[0]
    for node in range(len(tree)):
        assert torch.allclose(logits[node], linear(model, text, tree, node), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("architecture", NAMES)
def test_left_padding_changes_nothing(architecture: str) -> None:
    model = tiny_model(architecture)
    forward = TreeForward(model)
    texts = [random_text(n, seed=n) for n in (3, 9, 15)]
    ids = torch.cat([torch.nn.functional.pad(t, (15 - t.shape[1], 0)) for t in texts])
    tree = bushy()
    cache = DynamicCache(config=model.config)
    logits = run(forward, tree, ids, (ids != 0).long(), cache)
    for row, text in enumerate(texts):
        for node in range(len(tree)):
            wanted = linear(model, text, tree, node)
            assert torch.allclose(logits[row, node], wanted, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("architecture", NAMES)
def test_the_order_of_siblings_does_not_matter(architecture: str) -> None:
    model = tiny_model(architecture)
    forward = TreeForward(model)
    text = random_text(10)
    firsts = [11, 12, 13, 14]
    found = []
    for order in (firsts, firsts[::-1], [13, 11, 14, 12]):
        tree = TokenTree(7)
        for token in order:
            tree.add_chain(0, [token, token + 10])
        logits = run(forward, tree, text, torch.ones_like(text), DynamicCache())[0]
        below = [tree.child(tree.child(0, token), token + 10) for token in firsts]
        found.append(logits[below])
    assert torch.allclose(found[0], found[1], atol=1e-10)
    assert torch.allclose(found[0], found[2], atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("architecture", SLIDING)
def test_windows_count_positions_not_slots(architecture: str) -> None:
    """A wide tree in front of a node must not push text out of its window."""
    model = tiny_model(architecture)
    forward = TreeForward(model)
    text = random_text(12)
    tree = TokenTree(7)
    for token in range(20, 40):  # twenty siblings in front, far more than the window
        tree.add(0, token)
    last = tree.add(0, 50)
    logits = run(forward, tree, text, torch.ones_like(text), DynamicCache(config=model.config))[0]
    assert torch.allclose(logits[last], linear(model, text, tree, last), atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("architecture", NAMES)
def test_masks_are_of_the_models_float_type_never_bool(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture, dtype=dtype)
    forward = TreeForward(model)
    seen: list[dict[str, Any]] = []
    right = model.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        assert not args
        seen.append(kwargs)
        return right(**kwargs)

    monkeypatch.setattr(model, "forward", spy)
    text = random_text(6)
    run(forward, bushy(), text, torch.ones_like(text), DynamicCache(config=model.config))
    masks = seen[-1]["attention_mask"]
    assert isinstance(masks, dict) == (architecture in ("gemma3", "qwen3", "qwen3-sliding"))
    for mask in masks.values() if isinstance(masks, dict) else [masks]:
        assert mask.dtype == dtype
        assert set(mask.unique().tolist()) == {0.0, torch.finfo(dtype).min}
    # A misspelt keyword would be swallowed without a word: all names are of a fixed set.
    known = {
        *("input_ids", "attention_mask", "position_ids", "past_key_values"),
        *("use_cache", "return_dict", "logits_to_keep"),
    }
    for kwargs in seen:
        assert set(kwargs) <= known
        assert kwargs["position_ids"] is not None


def test_no_keyword_gets_through() -> None:
    model = tiny_model("llama")
    forward = TreeForward(model)
    ids = random_text(3)
    with pytest.raises(TypeError):
        forward.text(ids, torch.ones_like(ids), DynamicCache(), positon_ids=ids)  # type: ignore[call-arg]


def t5() -> PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def mamba() -> PreTrainedModel:
    config = transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)
    return transformers.MambaForCausalLM(config)


def bloom() -> PreTrainedModel:
    config = transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    return transformers.BloomForCausalLM(config)


def one_line(error: pytest.ExceptionInfo[PertokenError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (t5, "T5ForConditionalGeneration is an encoder-decoder"),
        (mamba, "MambaForCausalLM keeps a recurrent state"),
        (bloom, "BloomForCausalLM takes no attention mask of the caller's own (ALiBi"),
    ],
)
def test_models_that_cannot_verify_a_tree_are_refused(make: Any, words: str) -> None:
    model = make().eval()
    with pytest.raises(PertokenError, match=re.escape(words)) as error:
        TreeForward(model)
    one_line(error)
    with pytest.raises(PertokenError, match=re.escape(words)):
        model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, custom_generate=Plain())


@pytest.mark.parametrize(
    "name", ["flex_attention", "flash_attention_2", "flash_attention_3", "paged|sdpa"]
)
def test_attention_back_ends_that_ignore_masks_are_refused(name: str) -> None:
    model = tiny_model("llama")
    model.config._attn_implementation_internal = name
    with pytest.raises(PertokenError, match=re.escape(repr(name))) as error:
        refuse_unfit(model)
    one_line(error)


def test_unknown_kinds_of_layers_are_refused_by_name() -> None:
    model = tiny_model("qwen3")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(PertokenError, match="Qwen3ForCausalLM has layers of type chunked_atten"):
        TreeForward(model)


def test_a_model_that_does_not_obey_the_mask_is_found() -> None:
    model = tiny_model("gpt2")

    def deaf(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": None}

    model.get_decoder().register_forward_pre_hook(deaf, with_kwargs=True)
    with pytest.raises(PertokenError, match="GPT2LMHeadModel does not obey the mask"):
        TreeForward(model)
