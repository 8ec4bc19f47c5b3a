"""Where two decodings part, and whether rounding alone can explain it.

Plain decoding feeds one token at a time; a fast decoder feeds several. The same sum in another
order ends in other last bits, so two logits that nearly tie may swap. We measure how far logits
move between such forward shapes on this model, at this place, and call a divergence a numerical
tie only if both candidate tokens are that close to the best one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from pertoken.testing.setups import forward_parameters, pad_id

if TYPE_CHECKING:
    from transformers import LogitsProcessorList, PreTrainedModel

Outcome = Literal["identical", "numerical tie", "different"]

_PLACES = 16  # noise is taken over the last 16 positions before the divergence
_CHUNKS = (2, 4, _PLACES)
# Only tokens that could win count: some far-off logit of 49k moves twice as much and would excuse
# too much (SmolLM2 in bfloat16: 0.6 to 1.1 over all tokens, 0.5 to 0.6 over the best 32).
_CONTENDERS = 32
TIE_FACTOR = 2.0
"""A gap may close by twice the noise: each of its two logits can move by the noise once."""


@dataclass(frozen=True)
class Divergence:
    """The first step at which two decodings choose different tokens. Logits are in nats."""

    step: int
    """New tokens before the divergence; 0 is the first new token."""
    expected: int | None
    actual: int | None
    """Candidate token ids; `None` where that decoding had already ended."""
    gap: float | None = None
    """logit(expected) - logit(actual), as one-token decoding with a cache sees them."""
    gap_one_shot: float | None = None
    """The same gap from one forward over the whole text."""
    below_top: float | None = None
    """How far the lower of the two candidates lies below the best token."""
    top2_gap: float | None = None
    """Best minus second-best logit at this step."""
    noise: float | None = None
    """Largest change of a contender's logit between forward shapes at the last positions, and no
    less than the last bit of the greatest logit."""

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains it: both candidates within `TIE_FACTOR` noises of the top."""
        if self.below_top is None or self.noise is None:
            return False
        return self.below_top <= TIE_FACTOR * self.noise

    def __str__(self) -> str:
        if self.expected is None and self.actual is None:
            return f"step {self.step}: ended early, neither at a stop id nor at the length limit"
        text = f"step {self.step}: expected token {_name(self.expected)}, got {_name(self.actual)}"
        if self.gap is None:
            return text
        return (
            f"{text}; gap {self.gap:.3g} (one-shot {self.gap_one_shot:.3g}), lower candidate "
            f"{self.below_top:.3g} below the top, top-2 gap {self.top2_gap:.3g}, "
            f"noise {self.noise:.3g}"
        )


@dataclass(frozen=True)
class Verdict:
    """How two decodings of one prompt compare; `divergence` is the one that decided."""

    outcome: Outcome
    new_tokens: int
    """Tokens compared: the longer of the two."""
    divergence: Divergence | None = None

    def to_dict(self) -> dict[str, Any]:
        divergence = asdict(self.divergence) if self.divergence else None
        return {
            "outcome": self.outcome,
            "new_tokens": self.new_tokens,
            "divergence": divergence,
        }


def compare_ids(
    model: PreTrainedModel,
    prompt_ids: torch.Tensor | Sequence[int],
    expected: Sequence[int],
    actual: Sequence[int],
    *,
    processor: LogitsProcessorList | None = None,
    max_new_tokens: int | None = None,
    stops: frozenset[int] = frozenset(),
) -> Verdict:
    """Judge `actual` new token ids against `expected` ones, both greedy after the same prompt.

    prompt_ids: [time] ids without pads. processor: logits processors that were in force.
    Behind a tie the texts rightly differ, so the rest of `actual` is judged by itself: each of its
    tokens must again be the best one, within noise, after the tokens before it, and (where
    `max_new_tokens` is given) it must end at a stop id or at that length.

    >>> from pertoken.testing import tiny_model
    >>> compare_ids(tiny_model("llama"), [5, 6], [7, 8], [7, 8]).outcome
    'identical'
    """
    longer = max(len(expected), len(actual))
    step = first_difference(expected, actual)
    if step is None:
        return Verdict("identical", longer)
    prompt = torch.as_tensor(prompt_ids, device=model.device).reshape(-1)
    first = measure(
        model, prompt, actual[:step], _at(expected, step), _at(actual, step), processor=processor
    )
    if not first.is_tie:
        return Verdict("different", longer, first)
    later = _later_break(model, prompt, actual, first, processor)
    if later is None and max_new_tokens is not None:
        later = _wrong_end(actual, max_new_tokens, stops)
    return Verdict("different", longer, later) if later else Verdict("numerical tie", longer, first)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first index at which two sequences differ, an end counting as a difference.

    >>> first_difference([1, 2, 3], [1, 2]), first_difference([1], [1])
    (2, None)
    """
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    new: Sequence[int],
    expected: int | None,
    actual: int | None,
    *,
    processor: LogitsProcessorList | None = None,
) -> Divergence:
    """The divergence after prompt + `new` tokens between two candidates, with gap and noise.

    Costs one decoding of `new` and about 30 short forwards.
    """
    if expected is None or actual is None:
        return Divergence(len(new), expected, actual)
    text = torch.cat([prompt, prompt.new_tensor(list(new))])[None]
    plain = _last_logits(model, text, _split(text.shape[1], len(new), 1), 1, processor)[0]
    shapes = _shapes(model, text, processor)
    single = shapes["1"]
    moved = [_moved(single, logits) for logits in shapes.values()]
    moved += [_moved(plain[None], logits[-1:]) for logits in shapes.values()]
    # One last bit is always in doubt: that of the model's dtype, or of the float32 that generate
    # rounds scores to before it picks. Some processors show no movement between shapes at all.
    eps = max(torch.finfo(dtype).eps for dtype in (model.dtype, torch.float32))
    ulp = eps * float(plain.abs().max())
    top2 = plain.topk(min(2, len(plain))).values
    whole = shapes["whole"][-1]
    return Divergence(
        step=len(new),
        expected=expected,
        actual=actual,
        gap=float(plain[expected] - plain[actual]),
        gap_one_shot=float(whole[expected] - whole[actual]),
        below_top=float(top2[0] - min(plain[expected], plain[actual])),
        top2_gap=float(top2[0] - top2[-1]),
        noise=max(ulp, *moved),
    )


def _moved(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Largest change among the best tokens of each place; both [places, vocab]."""
    best = reference.topk(min(_CONTENDERS, reference.shape[-1])).indices
    return float((other - reference).gather(1, best).abs().max())


def _shapes(
    model: PreTrainedModel, text: torch.Tensor, processor: LogitsProcessorList | None
) -> dict[str, torch.Tensor]:
    """Logits [places, vocab] of the last places of `text` [1, time], per shape of forward.

    "1" and the chunks feed the last places in pieces of that size; "whole" is one forward without
    a cache to lean on; "padded" is two rows with a pad in front, which brings an explicit mask.
    """
    length = text.shape[1]
    places = max(1, min(_PLACES, length - 1))
    sizes = (1,) if getattr(model, "_is_stateful", False) else (1, *_CHUNKS)
    shapes = {
        str(size): _last_logits(model, text, _split(length, places, size), places, processor)
        for size in sizes
    }
    shapes["whole"] = _last_logits(model, text, [length], places, processor)
    shapes["padded"] = _last_logits(model, text, [length + 1], places, processor, padded=True)
    return shapes


def _split(length: int, tail: int, size: int) -> list[int]:
    """Chunk lengths: everything but the tail at once, then the tail in pieces of `size`.

    >>> _split(7, 5, 2)
    [2, 2, 2, 1]
    """
    tail = min(tail, length - 1)
    pieces = [min(size, tail - start) for start in range(0, tail, size)]
    return [length - tail, *pieces]


def _last_logits(
    model: PreTrainedModel,
    text: torch.Tensor,
    chunks: Sequence[int],
    keep: int,
    processor: LogitsProcessorList | None,
    padded: bool = False,
) -> torch.Tensor:
    """Processed float32 logits [keep, vocab] at the last positions, fed chunk by chunk."""
    ids, mask = text, torch.ones_like(text)
    if padded:
        ids = torch.nn.functional.pad(text, (1, 0), value=pad_id(model)).repeat(2, 1)
        mask = torch.nn.functional.pad(mask, (1, 0), value=0).repeat(2, 1)
    names = forward_parameters(model)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    memory: dict[str, Any] = {}
    parts: list[torch.Tensor] = []
    start = 0
    for size in chunks:
        end = start + size
        wanted = max(1, min(size, keep - (ids.shape[1] - end)))
        given: dict[str, Any] = {"use_cache": True, **memory}
        if padded:
            given["attention_mask"] = mask
        if "position_ids" in names:
            given["position_ids"] = positions[:, start:end]
        if "logits_to_keep" in names:
            given["logits_to_keep"] = wanted
        output = model(ids[:, start:end], **given)
        parts.append(output.logits[0, -wanted:].float())
        memory = {
            name: output[name]
            for name in ("past_key_values", "cache_params")
            if output.get(name) is not None
        }
        start = end
    return _processed(torch.cat(parts)[-keep:], text, processor)


def _processed(
    logits: torch.Tensor, text: torch.Tensor, processor: LogitsProcessorList | None
) -> torch.Tensor:
    """Logits [places, vocab] of the last places of `text` [1, time] after the processors."""
    if not processor:
        return logits
    first = text.shape[1] - len(logits)
    rows = [processor(text[:, : first + i + 1], row[None])[0] for i, row in enumerate(logits)]
    # A forbidden token is as far down as can be, and two of them do not differ.
    return torch.stack(rows).clamp(min=torch.finfo(torch.float32).min / 4)


@torch.no_grad()
def _later_break(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    actual: Sequence[int],
    tie: Divergence,
    processor: LogitsProcessorList | None,
) -> Divergence | None:
    """The first token of `actual` behind a tie that noise cannot explain, or `None`."""
    text = torch.cat([prompt, prompt.new_tensor(list(actual))])[None]
    logits = _last_logits(model, text[:, :-1], [text.shape[1] - 1], len(actual), processor)
    chosen = logits.gather(1, text[0, -len(actual) :, None])[:, 0]
    gaps = logits.max(-1).values - chosen
    assert tie.noise is not None
    for step in range(tie.step + 1, len(actual)):
        if gaps[step] > TIE_FACTOR * tie.noise:
            best = int(logits[step].argmax())
            found = measure(model, prompt, actual[:step], best, actual[step], processor=processor)
            if not found.is_tie:
                return found
    return None


def _wrong_end(
    actual: Sequence[int], max_new_tokens: int, stops: frozenset[int]
) -> Divergence | None:
    """Where a text ends that should have gone on, or goes on past its limit."""
    if len(actual) > max_new_tokens:
        return Divergence(max_new_tokens, None, actual[max_new_tokens])
    if len(actual) < max_new_tokens and (not actual or actual[-1] not in stops):
        return Divergence(len(actual), None, None)
    return None


def _at(tokens: Sequence[int], index: int) -> int | None:
    return int(tokens[index]) if index < len(tokens) else None


def _name(token: int | None) -> str:
    return "none (it had ended)" if token is None else str(token)
