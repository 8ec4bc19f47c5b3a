"""Tiny random models of eight architectures: built in milliseconds, exact in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

from pertoken.errors import PertokenError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES: tuple[str, ...] = (
    "llama",
    "qwen3",
    "gemma3",
    "gpt2",
    "gpt-neox",
    "opt",
    "mistral",
    "phi",
)
"""The eight decoder families every method that says "any decoder-only model" is tested on."""

EXTRA_ARCHITECTURES: tuple[str, ...] = ("qwen3-sliding",)
"""Variants `tiny_model` also builds: Qwen3 with sliding-window and full layers mixed."""

_HIDDEN, _HEADS, _KV_HEADS = 32, 4, 2
_WINDOW = 8
# Weights are drawn wide so that greedy text varies and its choices are not close calls: at 0.35
# the median gap between the best two logits is about 0.6 and 40 tokens hold 10 to 25 kinds.
_SCALE = 0.35


def tiny_model(
    architecture: str,
    *,
    vocab_size: int = 64,
    layers: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
    sliding_window: int | None = None,
    scale: float = _SCALE,
    max_positions: int = 512,
) -> PreTrainedModel:
    """A random causal language model of a known architecture, in eval mode.

    architecture: one of `ARCHITECTURES` or `EXTRA_ARCHITECTURES`.
    sliding_window: window in tokens of the sliding layers of gemma3 (mixed with full layers),
        mistral (every layer) and qwen3-sliding (mixed); 8 by default, no meaning elsewhere.
    scale: standard deviation of the weights; the default gives text that varies and choices
        that are not close calls.
    No stop id is set (`generate` runs to its length limit); the pad id is 0, so keep 0 out of
    prompts or pass an attention mask. float64 with sdpa is exact to 1e-12: use it for equality.

    >>> model = tiny_model("llama")
    >>> ids = torch.tensor([[5, 6, 7]])
    >>> model.generate(ids, max_new_tokens=4, do_sample=False).shape
    torch.Size([1, 7])
    """
    known = (*ARCHITECTURES, *EXTRA_ARCHITECTURES)
    if architecture not in known:
        raise PertokenError(
            f"unknown architecture {architecture!r}{nearest(architecture, known)}; "
            f"known: {', '.join(known)}"
        )
    config = _config(architecture, vocab_size, layers, sliding_window or _WINDOW, max_positions)
    config.tie_word_embeddings = False
    # The global generator is left as it was: building a model must not change a test's draws.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        _randomise(model, scale)
    model = model.to(dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _config(name: str, vocab: int, layers: int, window: int, positions: int) -> Any:
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": _HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "max_position_embeddings": positions,
        **ids,
    }
    mlp = {"intermediate_size": 2 * _HIDDEN}
    grouped = {"num_key_value_heads": _KV_HEADS}
    mixed = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]
    if name == "llama":
        return transformers.LlamaConfig(**common, **mlp, **grouped)
    if name == "mistral":
        return transformers.MistralConfig(**common, **mlp, **grouped, sliding_window=window)
    if name == "qwen3":
        return transformers.Qwen3Config(**common, **mlp, **grouped, head_dim=_HIDDEN // _HEADS)
    if name == "qwen3-sliding":
        return transformers.Qwen3Config(
            **common,
            **mlp,
            **grouped,
            head_dim=_HIDDEN // _HEADS,
            use_sliding_window=True,
            sliding_window=window,
            layer_types=mixed,
        )
    if name == "gemma3":
        return transformers.Gemma3TextConfig(
            **common,
            **mlp,
            **grouped,
            head_dim=_HIDDEN // _HEADS,
            query_pre_attn_scalar=_HIDDEN // _HEADS,
            sliding_window=window,
            layer_types=mixed,
        )
    if name == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocab,
            n_positions=positions,
            n_embd=_HIDDEN,
            n_layer=layers,
            n_head=_HEADS,
            **ids,
        )
    if name == "gpt-neox":
        return transformers.GPTNeoXConfig(**common, **mlp)
    if name == "opt":
        return transformers.OPTConfig(
            **common, ffn_dim=2 * _HIDDEN, word_embed_proj_dim=_HIDDEN, dropout=0.0
        )
    return transformers.PhiConfig(**common, **mlp, **grouped)


@torch.no_grad()
def _randomise(model: PreTrainedModel, scale: float) -> None:
    """Redraw all matrices with one standard deviation; biases and norms stay nearly neutral."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(0.0, scale)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.1)
