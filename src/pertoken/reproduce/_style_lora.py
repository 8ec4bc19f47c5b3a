"""A small LoRA for style, the baseline of ngram-style's reproduction: no package is needed for it.

W x becomes W x + B A x on the queries and values of every block, with A random and B zero at first;
only A and B learn, on windows of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["LORA", "lora"]

LORA = {"rank": 8, "steps": 30, "window": 128, "learning_rate": 2e-3}


@contextmanager
def lora(model: Any, ids: Sequence[int], *, seed: int, steps: int | None = None) -> Iterator[None]:
    """The model with a LoRA learnt on a text's ids [time] while the block lasts."""
    rank, window = int(LORA["rank"]), int(LORA["window"])
    draw = torch.Generator().manual_seed(seed)
    handles, learnt = [], []
    for name, layer in model.named_modules():
        if not name.endswith(("q_proj", "v_proj")):
            continue
        down = torch.randn(rank, layer.in_features, generator=draw) / layer.in_features**0.5
        parts = [down.to(layer.weight), layer.weight.new_zeros(layer.out_features, rank)]
        learnt += [part.requires_grad_() for part in parts]

        def add(_: Any, given: Any, out: torch.Tensor, parts: Any = parts) -> torch.Tensor:
            found: torch.Tensor = out + given[0] @ parts[0].T @ parts[1].T
            return found

        handles.append(layer.register_forward_hook(add))
    frozen = [(one, one.requires_grad) for one in model.parameters()]
    try:
        for one, _ in frozen:
            one.requires_grad_(False)
        optimizer = torch.optim.AdamW(learnt, lr=LORA["learning_rate"], weight_decay=0.0)
        text = torch.tensor(ids)
        for _ in range(int(LORA["steps"]) if steps is None else steps):
            start = int(torch.randint(max(1, len(text) - window), (1,), generator=draw))
            row = text[None, start : start + window].to(model.device)
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, row[0, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for one, needs in frozen:
            one.requires_grad_(needs)
