"""A small Mamba that reads bytes, trained here for some minutes: none with weights is at hand.

transformers runs the recurrence step by step on slices; on a CPU the gradient of a slice is as
large as the whole, so that a step of training takes seconds. While it is trained, the recurrence
runs on tensors taken apart beforehand: the same sums, many times as fast.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

HIDDEN, LAYERS, STATE = 96, 6, 8
STEPS, BATCH, LENGTH, RATE, WARM_UP, CLIP = 800, 8, 96, 3e-3, 50, 1.0
_VOCAB = 258  # of ByteTokenizer


def new_model(seed: int) -> Any:
    """A random model in eval mode, in float32."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=_VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        state_size=STATE,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MambaForCausalLM(config).eval()


def train(texts: Sequence[str], steps: int, seed: int) -> dict[str, Any]:
    """Train on pieces of texts, drawn at random: the weights, and the loss of the last steps.

    Plain JSON, so that an interrupted reproduction keeps it; `load` makes the model of it.
    """
    from pertoken.testing import ByteTokenizer

    model = new_model(seed)
    ids = torch.tensor(ByteTokenizer().encode("\n\n".join(texts)))
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    losses = []
    with _taken_apart():
        for step in range(steps):
            rate = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = RATE * rate
            starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=draw)
            batch = torch.stack([ids[start : start + LENGTH + 1] for start in starts.tolist()])
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            losses.append(loss.item())
    weights = torch.cat([part.detach().flatten() for part in model.state_dict().values()])
    last = losses[-50:]
    return {
        "weights": base64.b64encode(weights.numpy().tobytes()).decode("ascii"),
        "loss": sum(last) / len(last),
        "bytes": len(ids),
    }


def load(kept: dict[str, Any]) -> Any:
    """The model of what `train` gave."""
    model = new_model(0)
    flat = torch.frombuffer(bytearray(base64.b64decode(kept["weights"])), dtype=torch.float32)
    state = model.state_dict()
    parts = flat.split([part.numel() for part in state.values()])
    model.load_state_dict(
        {name: one.view(part.shape) for one, (name, part) in zip(parts, state.items(), strict=True)}
    )
    return model


@contextmanager
def _taken_apart() -> Iterator[None]:
    """Within the `with` transformers' Mamba runs `scan`."""
    from transformers.models.mamba import modeling_mamba

    before = modeling_mamba.mamba_selective_scan
    modeling_mamba.mamba_selective_scan = scan
    try:
        yield
    finally:
        modeling_mamba.mamba_selective_scan = before


def scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor,
    delta_bias: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """Mamba's selective scan: h_t = exp(A dt_t) h_(t-1) + dt_t B_t u_t, y_t = C_t h_t + D u_t.

    hidden_states u, dt, z: [batch, inner, time]; A: [inner, state]; B, C: [batch, state, time];
    D, delta_bias: [inner]. Gives y · silu(z), [batch, inner, time].
    """
    pace = torch.nn.functional.softplus(dt.mT + delta_bias)
    fed = hidden_states.mT
    decay = (pace[..., None] * A).exp()
    put = (pace * fed)[..., None] * B.mT[:, :, None]
    state = torch.zeros_like(put[:, 0])
    states = []
    for keep, new in zip(decay.unbind(1), put.unbind(1), strict=True):
        state = torch.addcmul(new, keep, state)
        states.append(state)
    read = (torch.stack(states, 1) * C.mT[:, :, None]).sum(-1) + fed * D
    return (read * torch.nn.functional.silu(z.mT)).mT
