"""ReAGent: which tokens matter, found by replacing tokens and watching the prediction (2402.00794).

Needs no gradients and no attention weights: any decoder-only model will do. For each target y:

    s ~ U(0, 1) for every token; importance = softmax(s)
    repeat: replace every token with probability r, independently; d = p(y | x) - p(y | replaced)
            s += 2 artanh(d) where replaced, s -= 2 artanh(d) elsewhere
    until y is among the top k of p(. | all but the n most important tokens replaced)

run by several probes; the importance is the mean over the probes that stopped. 2 artanh(d) is the
log-odds logit((d + 1) / 2) of the authors' code, clipped so that |d| = 1 stays finite. The masks do
not depend on s. So the steps of a chunk are drawn at once and d is found for all of them in one go;
cumulative sums give s after every step, a second pass tests the stopping rule after every step, and
the first hit of a probe counts: what comes out is what the step-by-step loop gives with the same
random numbers.

The authors claim more faithful importances than seven other methods on six decoder-only models.
Where this differs from their code: special tokens and the chat template are never replaced; the
default replacements are proposals of the model itself (theirs: tokens of the same part of speech;
the paper's text: RoBERTa; both are here as replacers "pos" and `mlm`); n is at most a quarter of
the tokens, so that short prompts are rated at all (ours); where no probe stopped, the mean is over
all of them and a note says so (theirs: a division by zero). For a quantity in nats the step is the
difference itself (our reading: 2 artanh is what turns a difference of probabilities into one).

Where the prediction is lost whatever is replaced, s with few steps mostly counts how often a token
was drawn; there r = 0.1 tells more (measured on planted facts, docs/attribution.md).

Cost: two forwards of a row per step, probe and target; memory of one bounded forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pertoken.attribute._forward import most_tokens, read_rows
from pertoken.attribute._question import Question
from pertoken.attribute._replace import Draw, Replacer, prepare
from pertoken.attribute._scores import Scores, seeded
from pertoken.attribute.quantity import Quantity
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["reagent"]

_CLIP = 1 - 1e-6


@dataclass
class _Target:
    """The state of one target's probes.

    s: [probes, time]; stopped: bool [probes]; p0: the quantity at the untouched text.
    """

    place: int
    generator: torch.Generator
    s: torch.Tensor
    stopped: torch.Tensor
    free: torch.Tensor
    keep: int
    p0: torch.Tensor
    steps: int = 0


@torch.no_grad()
def reagent(
    question: Question,
    quantity: Quantity,
    *,
    seed: int = 0,
    probes: int = 5,
    ratio: float = 0.3,
    keep: int = 8,
    top_k: int = 3,
    max_steps: int = 3000,
    replacer: str | Replacer = "lm_topk",
) -> Scores:
    """Importance of each token for each target, sums to 1 over what may be replaced.

    probes: independent runs of the loop; ratio: r; keep: n, the size of the rationale that must
        keep y among the top_k. The defaults are the authors' for single tokens (for sequences:
        probes 3, ratio 0.1, keep 3).
    replacer: see `pertoken.attribute`; "lm_topk", "uniform", "nearest", "pos" or `mlm(...)`.
    Source: the paper's algorithm, as the authors' code runs it.
    """
    _check(probes, ratio, keep, top_k, max_steps)
    draw = prepare(replacer, question)
    targets = [
        _begin(question, quantity, place, seed, probes, keep, number)
        for number, place in enumerate(question.places)
    ]
    live = list(targets)
    chunk = 1
    total = probes * len(targets)
    while live:
        tokens = sum(int((~t.stopped).sum()) * t.place for t in live)
        room = max(1, _enough(question.model) // tokens)
        size = min(chunk, room, *(max_steps - t.steps for t in live))
        before = sum(int(t.stopped.sum()) for t in live)
        _advance(question, quantity, live, size, ratio, top_k, draw)
        if sum(int(t.stopped.sum()) for t in live) == before:
            chunk *= 2
        live = [t for t in live if not bool(t.stopped.all()) and t.steps < max_steps]
        question.progress(sum(int(t.stopped.sum()) for t in targets), total)
    return _scores(question, targets, max_steps)


def _enough(model: PreTrainedModel) -> int:
    """Tokens of a chunk's forward: more would be no faster, and steps after a stop are wasted."""
    most = most_tokens(model)
    return min(most, 1024) if model.device.type == "cpu" else most


def _begin(
    question: Question,
    quantity: Quantity,
    place: int,
    seed: int,
    probes: int,
    keep: int,
    number: int,
) -> _Target:
    generator = seeded(seed, number)
    ids = question.ids[:place]
    free = question.free[:place]
    start = torch.rand(probes, place, generator=generator, dtype=torch.float64)
    target = question.ids[place : place + 1]
    p0 = read_rows(question.model, [ids[None]], lambda logits, _: quantity(logits, target))
    return _Target(
        place,
        generator,
        start.to(ids.device),
        torch.zeros(probes, dtype=torch.bool, device=ids.device),
        free,
        max(1, min(keep, int(free.sum()) // 4)),
        p0.double(),
    )


def _advance(
    question: Question,
    quantity: Quantity,
    live: list[_Target],
    size: int,
    ratio: float,
    top_k: int,
    draw: Draw,
) -> None:
    """`size` steps of all probes that have not stopped."""
    drawn, rows, masks = [], [], []
    for target in live:
        # A step's numbers: which are replaced, by what; by what in the test of the rationale.
        shape = (size, 3, *target.s.shape)
        uniforms = torch.rand(shape, generator=target.generator, dtype=torch.float64)
        uniforms = uniforms.to(target.s.device)[:, :, ~target.stopped]  # [size, 3, probes, time]
        mask = (uniforms[:, 0] < ratio) & target.free
        drawn.append(uniforms)
        masks.append(mask)
        rows.append(_replaced(question, target, mask, draw(uniforms[:, 1])))
    wanted = _wanted(question, live, rows)
    measured = read_rows(question.model, rows, lambda x, part: quantity(x, wanted[part]).double())

    paths = []
    for number, (target, mask) in enumerate(zip(live, masks, strict=True)):
        found = _part(measured, rows, number).view(mask.shape[:2])
        step = _step(target.p0 - found, quantity.unit)[..., None]
        moves = torch.where(mask, step, -step)
        paths.append(target.s[~target.stopped] + moves.cumsum(0))  # [size, probes, time]
        kept = _rationale(paths[-1], target.free, target.keep)
        others = target.free & ~kept
        rows[number] = _replaced(question, target, others, draw(drawn[number][:, 2]))
    hits = read_rows(question.model, rows, lambda logits, part: _among(logits, wanted[part], top_k))

    for number, (target, path) in enumerate(zip(live, paths, strict=True)):
        hit = _part(hits, rows, number).view(path.shape[:2])
        stops = hit.any(0)
        first = torch.where(stops, hit.byte().argmax(0), size - 1)
        moving = (~target.stopped).nonzero()[:, 0]
        target.s[moving] = path[first, torch.arange(len(moving), device=path.device)]
        target.stopped[moving] = stops
        target.steps += size


def _replaced(
    question: Question, target: _Target, mask: torch.Tensor, stand_in: torch.Tensor
) -> torch.Tensor:
    """The text with what is in the mask [size, probes, time] replaced, one row each."""
    ids = question.ids[: target.place]
    return torch.where(mask, stand_in, ids).flatten(0, 1)


def _wanted(question: Question, live: list[_Target], rows: list[torch.Tensor]) -> torch.Tensor:
    """The target's id for every row."""
    return torch.cat(
        [
            question.ids[target.place].expand(len(group))
            for target, group in zip(live, rows, strict=True)
        ]
    )


def _part(values: torch.Tensor, rows: list[torch.Tensor], number: int) -> torch.Tensor:
    """The values of one target's rows."""
    begin = sum(len(group) for group in rows[:number])
    return values[begin : begin + len(rows[number])]


def _step(difference: torch.Tensor, unit: str) -> torch.Tensor:
    if unit == "nats":
        return difference
    return 2 * torch.atanh(difference.clamp(-_CLIP, _CLIP))


def _rationale(s: torch.Tensor, free: torch.Tensor, keep: int) -> torch.Tensor:
    """The `keep` most important tokens, bool of the shape of s [..., time]."""
    places = s.masked_fill(~free, -torch.inf).topk(keep, dim=-1).indices
    return torch.zeros_like(s, dtype=torch.bool).scatter(-1, places, True)


def _among(logits: torch.Tensor, wanted: torch.Tensor, top_k: int) -> torch.Tensor:
    """Is the wanted id among the top_k of its row? bool [rows]."""
    return (logits > logits.gather(-1, wanted[:, None])).sum(-1) < top_k


def _scores(question: Question, targets: list[_Target], max_steps: int) -> Scores:
    values = torch.full((len(targets), len(question.ids)), torch.nan, dtype=torch.float64)
    lost = []
    for number, target in enumerate(targets):
        importance = target.s.masked_fill(~target.free, -torch.inf).softmax(-1)
        if bool(target.stopped.any()):
            importance = importance[target.stopped]
        else:
            lost.append(repr(question.targets[number]))
        mean = importance.mean(0).masked_fill(~target.free, torch.nan)
        values[number, : target.place] = mean.cpu()
    notes = []
    if lost:
        notes.append(
            f"no probe stopped within {max_steps} steps for {', '.join(lost)}: "
            "the mean over all probes; a larger keep or top_k helps"
        )
    return Scores(values, tuple(notes))


def _check(probes: int, ratio: float, keep: int, top_k: int, max_steps: int) -> None:
    if not 0 < ratio < 1:
        raise PertokenError(f"the ratio to replace must be above 0 and below 1, got {ratio}")
    for name, value in (
        ("probes", probes),
        ("keep", keep),
        ("top_k", top_k),
        ("max_steps", max_steps),
    ):
        if value < 1:
            raise PertokenError(f"{name} must be 1 or more, got {value}")
