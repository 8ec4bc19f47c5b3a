"""Small Llamas trained on the Brown corpus, with other norms and gates, to see their outliers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pertoken.nets import RescaledLlamaForCausalLM

VOCABULARY, LAYERS, HIDDEN, HEADS, FFN = 1024, 4, 128, 4, 352
RANK = 16
LENGTH, BATCH = 96, 16
RATE, WARM_UP, DECAY, CLIP = 6e-3, 100, 0.1, 1.0
START = "<s>"

VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {"norm": "plain", "attn_gate": False},
    "attention gate": {"norm": "plain", "attn_gate": True},
    "attention gate + GatedNorm": {"norm": "gated", "attn_gate": True},
    "attention gate + PreAffine": {"norm": "preaffine", "attn_gate": True},
}


def train_tokenizer(corpus: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens that puts `START` in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    start = backend.token_to_id(START)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, start)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=START)


def pieces(tokenizer: Any, corpus: Sequence[str], length: int = LENGTH) -> torch.Tensor:
    """Rows [pieces, length]: `START`, then length - 1 tokens of one text."""
    rows = []
    for text in corpus:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        width = length - 1
        for start in range(0, len(ids) - width + 1, width):
            rows.append([tokenizer.bos_token_id, *ids[start : start + width]])
    return torch.tensor(rows)


def build(
    variant: str, vocabulary: int, seed: int, length: int = LENGTH
) -> RescaledLlamaForCausalLM:
    """A model at its start. Its MLPs are narrower by what gates and norms add."""
    from pertoken.nets import RescaledLlamaConfig, RescaledLlamaForCausalLM

    chosen = VARIANTS[variant]
    added = HIDDEN * HIDDEN if chosen["attn_gate"] else 0
    added += {"gated": 2 * 2 * RANK * HIDDEN, "preaffine": 2 * HIDDEN}.get(chosen["norm"], 0)
    config = RescaledLlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=FFN - round(added / (3 * HIDDEN)),
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        gate_rank=RANK,
        bos_token_id=0,
        eos_token_id=None,
        **chosen,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RescaledLlamaForCausalLM(config)


def train(
    variant: str,
    rows: torch.Tensor,
    vocabulary: int,
    steps: int,
    seed: int,
    look: Callable[[int, Any], None] | None = None,
) -> RescaledLlamaForCausalLM:
    """A model trained on rows [pieces, length], in eval mode; a seed draws the same batches.

    look: called with the number of steps made and the model, after each.
    """
    model = build(variant, vocabulary, seed, rows.shape[1]).train()
    draw = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=RATE,
        betas=(0.9, 0.95),
    )
    order = torch.cat(
        [torch.randperm(len(rows), generator=draw) for _ in range(1 + steps * BATCH // len(rows))]
    )
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * _schedule(step, steps)
        ids = rows[order[step * BATCH : (step + 1) * BATCH]]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if look is not None:
            look(step + 1, model)
    return model.eval()


@torch.no_grad()
def losses(model: RescaledLlamaForCausalLM, rows: torch.Tensor) -> list[float]:
    """Mean loss in nats per token of each row [pieces, length]."""
    found = []
    for some in rows.split(BATCH):
        logits = model(input_ids=some, use_cache=False).logits[:, :-1]
        own = torch.nn.functional.cross_entropy(logits.mT, some[:, 1:], reduction="none")
        found += own.mean(-1).tolist()
    return found


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: a linear rise, a cosine down to a tenth.

    >>> round(_schedule(0, 1000), 3), round(_schedule(999, 1000), 3)
    (0.01, 0.1)
    """
    return min(1.0, (step + 1) / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
