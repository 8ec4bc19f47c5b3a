"""The page of one batch: each token's ratio, the gates closed on it, and at which level."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
import torch

from pertoken._html import document
from pertoken._pieces import pieces
from pertoken._signal_html import _style
from pertoken.errors import PertokenError
from pertoken.signal import TokenSignal
from pertoken.train.fiberpo import Bounds, Variant
from pertoken.train.gates import ClosedGates, closed_gates

__all__ = ["gates_page"]

# Level and side -> class of the mark, and what it looks like beside the colour.
_MARKS = {
    ("token", "high"): ("th", "border-top: 3px solid CanvasText"),
    ("token", "low"): ("tl", "border-bottom: 3px solid CanvasText"),
    ("trajectory", "high"): ("sh", "box-shadow: inset 0 3px #c3c; padding-top: 3px"),
    ("trajectory", "low"): ("sl", "box-shadow: inset 0 -3px #c3c; padding-bottom: 3px"),
}
_BOTH = ".sh.sl { box-shadow: inset 0 3px #c3c, inset 0 -3px #c3c; }"


def gates_page(
    tokenizer: Any,
    ids: torch.Tensor,
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    method: str = "fiberpo",
    token: Bounds | None = None,
    trajectory: Bounds | None = None,
    variant: Variant = "paper",
    rewards: Sequence[float] | torch.Tensor | None = None,
    prompts: Sequence[str] | None = None,
    title: str = "Gates of one batch",
) -> str:
    """A stand-alone HTML page of a batch: ratio, gate and level of every token.

    ids: [batch, time], the sampled tokens; the other tensors and the bounds as in `closed_gates`.
    rewards: [batch]; prompts: the text in front of each row. Tokens under the mask are left out.
    The colour is the log ratio, on one scale for all rows. PertokenError for what the losses
    refuse, and for rewards or prompts of another number than rows.

    >>> from pertoken.testing import ByteTokenizer
    >>> page = gates_page(
    ...     ByteTokenizer(), torch.tensor([[97, 98]]), torch.tensor([[0.5, 0.0]]),
    ...     torch.zeros(1, 2), torch.tensor([1.0]), torch.ones(1, 2),
    ...     method="grpo", token=(0.8, 1.2),
    ... )
    >>> "token gate closed, high side" in page
    True
    """
    bounds = {"token": token, "trajectory": trajectory}
    gates = closed_gates(
        log_probs, old_log_probs, advantages, mask, method=method, variant=variant, **bounds
    )
    if ids.shape != mask.shape:
        raise PertokenError(
            f"ids must be [batch, time] like mask {tuple(mask.shape)}, got {tuple(ids.shape)}"
        )
    for name, given in (("rewards", rewards), ("prompts", prompts)):
        if given is not None and len(given) != len(ids):
            raise PertokenError(f"{len(given)} {name} for {len(ids)} rows")
    keep = mask != 0
    texts = [pieces(tokenizer, row[shown].tolist()) for row, shown in zip(ids, keep, strict=True)]
    signal = _joined(texts, gates.log_ratio[keep])
    shades, marks = signal.shades(), _marks(gates, keep)
    blocks, first = [], 0
    for row, text in enumerate(texts):
        own = slice(first, first + len(text))
        first += len(text)
        spans = map(_span, text, signal.values[own].tolist(), shades[own], marks[own])
        head = _head(row, gates, advantages, keep, rewards)
        asked = "" if prompts is None else f'<p class="asked">{escape(prompts[row])}</p>\n'
        blocks.append(f"<section>\n<h2>{head}</h2>\n{asked}<p>{''.join(spans)}</p>\n</section>")
    return _page(title, _told(method, variant, bounds, gates), _legend(gates, signal), blocks)


def _joined(texts: list[list[str]], log_ratio: torch.Tensor) -> TokenSignal:
    """One signal for all rows, so that a colour means the same in each."""
    flat = [piece for text in texts for piece in text]
    ends = np.cumsum([len(piece) for piece in flat], dtype=int).tolist()
    offsets = list(zip([0, *ends[:-1]], ends, strict=True))
    return TokenSignal("".join(flat), log_ratio.double().cpu().numpy(), offsets, "log ratio, nats")


def _marks(gates: ClosedGates, keep: torch.Tensor) -> list[list[tuple[str, str]]]:
    """(level, side) of every gate closed on each token shown."""
    found: list[list[tuple[str, str]]] = [[] for _ in range(int(keep.sum()))]
    for level, sides in gates.closed.items():
        for side, closed in zip(("low", "high"), sides, strict=True):
            for place in closed[keep].nonzero().flatten().tolist():
                found[place].append((level, side))
    return found


def _span(piece: str, value: float, shade: int, marks: list[tuple[str, str]]) -> str:
    names = [f"{'p' if shade > 0 else 'n'}{abs(shade)}"] if shade else []
    names += [_MARKS[mark][0] for mark in marks]
    told = [f"ratio {np.exp(value):.4g}, log {value:.4g}"]
    told += [f"{level} gate closed, {side} side" for level, side in marks]
    look = f' class="{" ".join(names)}"' if names else ""
    return f'<span{look} title="{escape("; ".join(told))}">{escape(piece)}</span>'


def _head(
    row: int,
    gates: ClosedGates,
    advantages: torch.Tensor,
    keep: torch.Tensor,
    rewards: Sequence[float] | torch.Tensor | None,
) -> str:
    """What is known of a trajectory: reward, advantage, drift, tokens, closed gates."""
    own = advantages[row] if advantages.dim() == 1 else advantages[row][keep[row]].float().mean()
    parts = [f"trajectory {row + 1}"]
    if rewards is not None:
        parts.append(f"reward {float(rewards[row]):.4g}")
    low, high = (float(side[row]) for side in gates.drift)
    drift = f"drift {high:+.4g}" if high == -low else f"drift {high:+.4g} and {-low:+.4g}"
    parts += [f"advantage {float(own):+.4g}", f"{drift} nats", f"{int(keep[row].sum())} tokens"]
    for side, closed in zip(("low", "high"), gates.closed.get("trajectory", ()), strict=False):
        if bool(closed[row].any()):
            parts.append(f"trajectory gate closed, {side} side")
    return " · ".join(parts)


def _told(
    method: str, variant: str, bounds: dict[str, Bounds | None], gates: ClosedGates
) -> list[str]:
    """What the method gates, with its bounds and the share closed by level and side."""
    lines = [f"Method: {method}" + (f", variant {variant}" if method == "fiberpo" else "")]
    for level, (low, high) in gates.closed.items():
        given = bounds[level] or (0.0, float("inf"))
        counts = f"{int(low.sum())} tokens on the low side, {int(high.sum())} on the high side"
        if level == "trajectory":
            rows = [int(side.any(1).sum()) for side in (low, high)]
            counts = f"{rows[0]} trajectories on the low side, {rows[1]} on the high side"
        lines.append(f"{level} gate, ratios {given[0]:g} to {given[1]:g}: closed for {counts}")
    if method == "cispo":
        lines.append("cispo closes nothing: a marked token's weight is cut at the bound.")
    if method == "fiberpo" and variant == "paper":
        lines.append(
            "The drift of a trajectory is summed in two channels, of its tokens that went up and "
            "of those that went down; a trajectory gate closes for the tokens of its channel."
        )
    return lines


def _legend(gates: ClosedGates, signal: TokenSignal) -> str:
    values = signal.values
    samples = [
        f'<span class="n9">less likely</span> <span class="p9">more likely</span> than when it was '
        f"sampled: log ratio {values.min():.4g} to {values.max():.4g} nats"
    ]
    for level in gates.closed:
        for side in ("high", "low"):
            samples.append(
                f'<span class="{_MARKS[level, side][0]}">like this</span> {level} gate closed, '
                f"{side} side"
            )
    return "".join(f"<li>{sample}</li>" for sample in samples)


def _page(title: str, told: list[str], legend: str, blocks: list[str]) -> str:
    rules = [
        _style(),
        "h2 { font-size: 1em; margin: 1.5em 0 0; font-weight: 600; }",
        ".asked { opacity: .7; margin: 0; }",
        "section p { margin: .3em 0; }",
        *(f".{name} {{ {look}; }}" for name, look in _MARKS.values()),
        _BOTH,
    ]
    style = "\n".join(rules)
    lines = "".join(f"<li>{escape(line)}</li>" for line in told)
    texts = "\n".join(blocks)
    body = f"""\
<h1>{escape(title)}</h1>
<ul>{lines}</ul>
<ul>{legend}</ul>
{texts}"""
    return document(title, body, style=style)
