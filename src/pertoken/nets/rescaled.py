"""A Llama with other norms and a gate on its attention, as a model of transformers.

    model = with_rescaling(llama, norm="gated", attn_gate=True)   # weights taken over
    model.save_pretrained("folder")
    AutoModelForCausalLM.from_pretrained("folder")                # after `import pertoken.nets`

The modelling code stays that of transformers: `RescaledLlamaForCausalLM` is its Llama with modules
exchanged. Its config has a `model_type` of its own, so that without this package it is refused and
not read as a Llama that has lost its gates.

The attention gate (arXiv 2505.06708, the partner of GatedNorm and PreAffine in arXiv 2601.22966)
multiplies the mixed values of every head, before they are projected back, by σ(W x) with x what the
attention reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from pertoken._takeover import implementation
from pertoken.errors import PertokenError, nearest
from pertoken.nets.norms import DynamicTanh, GatedNorm, PreAffine

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "GatedAttention",
    "RescaledLlamaConfig",
    "RescaledLlamaForCausalLM",
    "with_rescaling",
]

NORMS = ("plain", "gated", "preaffine", "tanh")


class RescaledLlamaConfig(LlamaConfig):
    """A Llama's config, with what is exchanged.

    norm: "plain", "gated" (`GatedNorm`), "preaffine" (`PreAffine`) or "tanh" (`DynamicTanh`), after
        every sub-layer's input and the last block. attn_gate: whether attention has a gate.
    gate_rank: of `GatedNorm` (paper: 16).

    >>> RescaledLlamaConfig(norm="preaffine").model_type
    'pertoken_rescaled_llama'
    """

    model_type: ClassVar[str] = "pertoken_rescaled_llama"

    norm: str = "gated"
    attn_gate: bool = True
    gate_rank: int = 16


class GatedAttention(LlamaAttention):
    """Llama's attention whose mixed values are multiplied by σ(W x) before `o_proj`.

    W is `gate_proj`, [heads · head_dim, hidden], drawn as every other weight.
    """

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(config, layer)
        self.gate_proj = nn.Linear(config.hidden_size, self.o_proj.in_features, bias=False)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As `LlamaAttention.forward`."""
        gate = torch.sigmoid(self.gate_proj(hidden_states))
        # The only place between the mixed values and their projection that is not inside Llama's
        # own forward.
        handle = self.o_proj.register_forward_pre_hook(lambda _, given: (given[0] * gate,))
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            handle.remove()


class RescaledLlamaForCausalLM(LlamaForCausalLM):
    """A Llama with the norms and the attention that its config names.

    >>> config = RescaledLlamaConfig(
    ...     vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
    ...     num_attention_heads=2, norm="gated", attn_gate=False, gate_rank=2)
    >>> model = RescaledLlamaForCausalLM(config)
    >>> model(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 11])
    """

    config_class = RescaledLlamaConfig

    def __init__(self, config: Any) -> None:
        if config.norm not in NORMS:
            raise PertokenError(
                f"unknown norm {config.norm!r}{nearest(config.norm, NORMS)}: {', '.join(NORMS)}"
            )
        super().__init__(config)
        for place, block in enumerate(self.model.layers):
            if config.attn_gate:
                gated = GatedAttention(config, place)
                # The parts that it shares with the plain one, so that a seed draws them alike.
                for name, part in block.self_attn.named_children():
                    setattr(gated, name, part)
                block.self_attn = gated
            block.input_layernorm = _norm(config, block.input_layernorm)
            block.post_attention_layernorm = _norm(config, block.post_attention_layernorm)
        self.model.norm = _norm(config, self.model.norm)
        self.post_init()


def _norm(config: Any, plain: nn.Module) -> nn.Module:
    hidden, eps = config.hidden_size, config.rms_norm_eps
    if config.norm == "gated":
        gated = GatedNorm(hidden, rank=config.gate_rank, eps=eps)
        vars(gated.up)["_is_hf_initialized"] = True  # else it is drawn like every linear layer
        return gated
    if config.norm == "preaffine":
        return PreAffine(hidden, eps=eps)
    if config.norm == "tanh":
        return DynamicTanh(hidden)
    return plain


def with_rescaling(
    model: PreTrainedModel, norm: str = "gated", *, attn_gate: bool = True, gate_rank: int = 16
) -> RescaledLlamaForCausalLM:
    """A Llama again, with other norms and gates and the same weights; the given one is unchanged.

    norm: "plain", "gated", "preaffine" or "tanh". With the first three and no attention gate the
    new model computes what the old one did until it is trained: `GatedNorm` and `PreAffine` start
    as the plain norm. An attention gate starts near 1/2, as in the paper.
    Raises PertokenError for a model that is not a Llama, and an unknown norm.

    >>> from pertoken.testing import tiny_model
    >>> model = with_rescaling(tiny_model("llama"), "preaffine", attn_gate=False)
    >>> type(model.model.norm).__name__
    'PreAffine'
    """
    if type(model) is not LlamaForCausalLM:
        raise PertokenError(
            f"with_rescaling changes a LlamaForCausalLM, got {type(model).__name__}: build a Llama "
            "of your sizes, or train with the modules of pertoken.nets in your own code"
        )
    own = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "dtype")}
    config = RescaledLlamaConfig(**own, norm=norm, attn_gate=attn_gate, gate_rank=gate_rank)
    config._attn_implementation = implementation(model.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new = RescaledLlamaForCausalLM(config).to(model.device, model.dtype)
    new.load_state_dict(model.state_dict(), strict=False)
    if norm == "gated":  # the gate is 1/2 at the start
        for module in new.modules():
            if isinstance(module, GatedNorm):
                module.weight.data.mul_(2.0)
    new.generation_config = model.generation_config
    return new.train(model.training)


AutoConfig.register(RescaledLlamaConfig.model_type, RescaledLlamaConfig)
AutoModelForCausalLM.register(RescaledLlamaConfig, RescaledLlamaForCausalLM)
