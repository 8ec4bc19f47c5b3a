"""Residual patching across prompts, layer by layer (KV-Direct, arXiv 2603.19664).

The recipient's residual stream is replaced by the donor's at the input of one block, and the
next-token distribution is compared with that of either prompt.

Whole sequence (``positions="all"``): the stream that is put in is the donor's with the donor's
length, so that the blocks behind read exactly what they read in the donor's own run. KL 0 to the
donor is then a tautology, and the paper's claim of it is true of any model whose blocks read
nothing but the stream. What the test can show is a path beside the stream, such as embeddings that
are fed to later blocks again.

The informative variant (ours): only the last positions are replaced, aligned from the right. The
blocks behind then still read the recipient's earlier positions, and the curve over layers shows
where what the donor's answer needs has moved to the last position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from pertoken._extras import need
from pertoken.errors import PertokenError
from pertoken.probe._stream import (
    Progress,
    block_inputs,
    blocks_of,
    changed_input,
    one_text,
    refuse_unread,
    spread_out,
)
from pertoken.result import Part, Result, figure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DONOR = "What is the capital of Australia?"
RECIPIENT = "What language is spoken in France?"
"""The paper's prompts."""


@dataclass(frozen=True)
class Patching(Result):
    """KL divergences in nats between next-token distributions, one per patched layer."""

    replaced: int
    """Positions replaced, counted from the right."""
    whole: bool
    """Whether the whole sequence was, so that `to_donor` is 0 by construction."""
    donor_tokens: int
    recipient_tokens: int
    to_donor: list[float]
    """KL(patched || donor) with the input of block 0, 1, … patched."""
    to_recipient: list[float]
    """KL(patched || recipient)."""
    apart: float
    """KL(recipient || donor): `to_donor` where the patch has no effect."""

    _title = "Residual patching"

    def table(self, *, layers: bool = True) -> str:
        """One row per layer, or only some of them, evenly spread."""
        return self._parts(layers)[0].text()

    def _parts(self, layers: bool = True) -> list[Part]:
        count = len(self.to_donor)
        rows = [
            [str(i), f"{self.to_donor[i]:.3g}", f"{self.to_recipient[i]:.3g}"]
            for i in (range(count) if layers else spread_out(count, 6))
        ]
        which = "all positions" if self.whole else f"the last {self.replaced} only"
        notes = [f"nats; without a patch {self.apart:.3g} to the donor, 0 to the recipient"]
        if self.whole:
            notes.append("all positions replaced: 0 to the donor by construction")
        headings = ["input of block", "KL(patched || donor)", "KL(patched || recipient)"]
        return [Part(f"residual patching, {which}", [headings, *rows], notes)]

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)

    def rows(self) -> list[dict[str, Any]]:
        """A record per patched layer: layer, to_donor, to_recipient, in nats."""
        return [
            {"layer": layer, "to_donor": donor, "to_recipient": recipient}
            for layer, (donor, recipient) in enumerate(
                zip(self.to_donor, self.to_recipient, strict=True)
            )
        ]

    def plot(self) -> Any:
        """Both divergences over the patched layer (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        curves = [
            graph.Scatter(y=self.to_donor, name="to the donor"),
            graph.Scatter(y=self.to_recipient, name="to the recipient"),
        ]
        axis = {"title": "KL, nats", "rangemode": "tozero"}
        return figure(curves, xaxis={"title": "input of block"}, yaxis=axis)


@torch.no_grad()
def residual_patching(
    model: PreTrainedModel,
    tokenizer: Any,
    donor: str = DONOR,
    recipient: str = RECIPIENT,
    *,
    positions: str | int | float = "all",
    progress: Progress | None = None,
) -> Patching:
    """Replace the recipient's residuals by the donor's, at the input of each block in turn.

    positions: "all" (the donor's whole sequence, see above), "last", a number of last positions,
        or a share between 0 and 1 of the shorter prompt's positions, rounded up. Residuals are
        aligned from the right; where the prompts differ in length, a model with learned positions
        is given residuals that carry another position.
    progress: called with (what, layers done, layers in all).
    Raises PertokenError for a model without a stream, an empty prompt, more positions than the
    shorter prompt has.

    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> model = tiny_model("llama", vocab_size=258)
    >>> result = residual_patching(model, ByteTokenizer(), "ab", "cd")
    >>> result.to_donor
    [0.0, 0.0]
    """
    blocks = blocks_of(model)
    given, taken = (
        _ids(model, tokenizer, donor, "donor"),
        _ids(model, tokenizer, recipient, "recipient"),
    )
    whole = positions == "all"
    count = given.shape[1] if whole else _count(positions, min(given.shape[1], taken.shape[1]))
    with block_inputs(blocks) as streams:
        of_donor = _next_token(model, given)
    of_recipient = _next_token(model, taken)
    read = _resized(taken, given.shape[1]) if whole else taken
    tell = progress or (lambda what, done, total: None)
    to_donor, to_recipient = [], []
    for layer, (block, stream) in enumerate(zip(blocks, streams, strict=True)):
        tell("residual patching", layer, len(blocks))
        with changed_input(block, _replace_last(stream[:, -count:])):
            patched = _next_token(model, read)
        to_donor.append(_kl(patched, of_donor))
        to_recipient.append(_kl(patched, of_recipient))
    return Patching(
        replaced=count,
        whole=whole,
        donor_tokens=given.shape[1],
        recipient_tokens=taken.shape[1],
        to_donor=to_donor,
        to_recipient=to_recipient,
        apart=_kl(of_recipient, of_donor),
    )


def _ids(model: PreTrainedModel, tokenizer: Any, text: str, name: str) -> torch.Tensor:
    """Ids [1, time] of a prompt, with the tokenizer's own special tokens."""
    if not text.strip():
        raise PertokenError(f"the {name} prompt is empty")
    ids = list(tokenizer(text)["input_ids"])
    refuse_unread(model, ids)
    return one_text(model, ids)


def _count(positions: str | int | float, shorter: int) -> int:
    """How many last positions are meant.

    >>> _count("last", 7), _count(3, 7), _count(0.5, 7)
    (1, 3, 4)
    """
    if positions == "last":
        return 1
    if isinstance(positions, int) and not isinstance(positions, bool) and 1 <= positions <= shorter:
        return positions
    if isinstance(positions, float) and 0 < positions < 1:
        return math.ceil(positions * shorter)
    raise PertokenError(
        f'positions is "all", "last", a number from 1 to {shorter} (the shorter prompt) or a share '
        f"between 0 and 1, got {positions!r}"
    )


def _resized(ids: torch.Tensor, length: int) -> torch.Tensor:
    """Exactly `length` of the ids, from the right; the first is repeated where there are fewer.

    What they are does not matter in front of the patched block, only how many there are.
    """
    missing = length - ids.shape[1]
    if missing > 0:
        return torch.cat((ids[:, :1].expand(-1, missing), ids), -1)
    return ids[:, -length:]


def _replace_last(new: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat((hidden[:, : hidden.shape[1] - new.shape[1]], new), 1)

    return change


def _next_token(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [vocab] behind the text, float64."""
    logits = model(input_ids=ids, use_cache=False).logits[0, -1]
    return logits.double().log_softmax(-1)


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p || q) in nats of log-probabilities; a token of probability 0 in p adds nothing."""
    return float(torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum())
