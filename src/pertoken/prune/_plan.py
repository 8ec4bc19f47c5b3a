"""One text made shorter: rated, chosen from, cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pertoken import select
from pertoken._stop_words import STOP_WORDS
from pertoken.errors import PertokenError
from pertoken.prune import _protect, _text
from pertoken.prune.compressed import CompressedPrompt, Word
from pertoken.signal import TokenSignal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pertoken.prune._salience import Rate

__all__ = ["Plan", "Reader", "count", "name_of", "shorten"]


class Reader(NamedTuple):
    """The model that rates and its tokenizer; both None where the salience needs none."""

    model: PreTrainedModel | None
    tokenizer: Any


class Plan(NamedTuple):
    """How texts are made shorter; the fields are those of `compress`, checked."""

    keep: float
    salience: str | Rate | TokenSignal
    reader: Reader
    counter: Any  # the tokenizer that counts, or None
    patterns: Sequence[_protect.Pattern]
    lowest: bool
    seed: int

    @property
    def label(self) -> str:
        """What rates, in a word."""
        if isinstance(self.salience, TokenSignal):
            return self.salience.name
        return self.salience if isinstance(self.salience, str) else name_of(self.salience)


def shorten(text: str, plan: Plan, *, spared: str = "") -> CompressedPrompt:
    """The text with the planned share of its words; all of them where `spared` says why."""
    spans = _text.words(text)
    found = _protect.find(text, spans, plan.patterns)
    if spared:
        found = [_protect.Protected(0, len(text), spared)]
    why = [""] * len(spans)
    for start, end, name in found:
        for place in _text.overlapping(spans, start, end):
            why[place] = why[place] or f"protected: {name}"
    protected = torch.tensor([bool(each) for each in why])
    budget = max(1, select.budget_of(len(spans), plan.keep))
    left = budget - int(protected.sum())
    scores: list[float] | None = None
    notes: list[str] = []
    if left <= 0:
        kept = protected
    elif budget == len(spans):
        kept = torch.ones_like(protected)
    else:
        scores, notes = _rate(text, spans, plan)
        kept = protected | _choose(text, spans, ~protected, left, plan, scores)
    for place in (~kept).nonzero().flatten().tolist():
        why[place] = _reason(text[slice(*spans[place])], plan, scores, left)
    if left < 0 and not spared:
        notes.append(
            f"protected words alone are {int(protected.sum())} of {len(spans)}, more than the "
            f"{budget} asked for"
        )
    stays = kept.tolist()
    notes += _lost_digits([text[start:end] for start, end in spans], stays)
    solid = [span for span, stay in zip(spans, stays, strict=True) if stay]
    solid = _text.merge([*solid, *((start, end) for start, end, _ in found)])
    cut = _text.kept_spans(text, spans, solid)
    short = _text.join(text, cut)
    rated = [None] * len(spans) if scores is None else scores
    return CompressedPrompt(
        prompt=text,
        text=short,
        kept=tuple(cut),
        words=tuple(
            Word(*span, text[slice(*span)], score, stay, reason)
            for span, score, stay, reason in zip(spans, rated, stays, why, strict=True)
        ),
        salience=plan.label,
        share=plan.keep,
        tokens_before=count(plan.counter, text),
        tokens_after=count(plan.counter, short),
        notes=tuple(notes),
    )


def count(tokenizer: Any, text: str) -> int | None:
    """Tokens of a text, without special ones; None where there is no tokenizer."""
    if tokenizer is None:
        return None
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def name_of(thing: Any) -> str:
    """The name of a function, or the class of anything else."""
    return str(getattr(thing, "__name__", type(thing).__name__))


def _rate(
    text: str, spans: Sequence[_text.Span], plan: Plan
) -> tuple[list[float] | None, list[str]]:
    """A score for each word, None where the salience has none; and notes."""
    salience, reader = plan.salience, plan.reader
    if isinstance(salience, TokenSignal):
        return _of_signal(salience, spans), []
    if reader.model is None:
        return None, []
    from pertoken.prune._salience import by_sentence, by_surprise

    if salience == "self-information":
        return by_surprise(text, spans, reader.model, reader.tokenizer)
    parts = _text.sentences(text, spans)
    rate = _function(salience) if isinstance(salience, str) else salience
    scores, notes = by_sentence(text, spans, parts, rate, reader.model, reader.tokenizer)
    if salience == "globenc":
        from pertoken.prune._lexrank import lexrank

        sentences = [text[spans[part.start][0] : spans[part.stop - 1][1]] for part in parts]
        for part, weight in zip(parts, lexrank(sentences), strict=True):
            for place in part:
                scores[place] *= weight
    return scores, notes


def _choose(
    text: str,
    spans: Sequence[_text.Span],
    free: torch.Tensor,
    budget: int,
    plan: Plan,
    scores: list[float] | None,
) -> torch.Tensor:
    """Which `budget` of the free words stay, bool [words]."""
    if scores is not None:
        values = torch.tensor([scores], dtype=torch.float64)
        return select.top_k(-values if plan.lowest else values, budget, free[None])[0]
    if plan.salience == "random":
        return select.random(free[None], budget, seed=plan.seed)[0]
    stops = torch.tensor([_is_stop_word(text[start:end]) for start, end in spans])
    first = free & (stops if plan.lowest else ~stops)
    missing = budget - int(first.sum())
    if missing <= 0:
        return select.grid(first[None], budget)[0]
    return first | select.grid((free & ~first)[None], missing)[0]


def _reason(word: str, plan: Plan, scores: list[float] | None, left: int) -> str:
    """Why a word is gone."""
    if left <= 0:
        return "no room beside what is protected"
    if scores is not None:
        return f"{plan.label} too {'high' if plan.lowest else 'low'}"
    if plan.salience == "random":
        return "not drawn"
    return "stop word" if _is_stop_word(word) else "no stop word, but over the share"


def _is_stop_word(word: str) -> bool:
    plain = word.lower().replace("’", "'").strip("\"'“”‘«»()[]{},.;:!?…-–—")
    return plain in STOP_WORDS


def _lost_digits(words: Sequence[str], stays: Sequence[bool]) -> list[str]:
    """A warning where numbers were lost: mathematics is what compression hurts most."""
    digits = [any(letter.isdigit() for letter in word) for word in words]
    lost = sum(has and not stay for has, stay in zip(digits, stays, strict=True))
    if not lost:
        return []
    return [
        f"{lost} of {sum(digits)} words with digits were dropped: for calculations protect "
        '"numbers", or do not compress'
    ]


def _of_signal(signal: TokenSignal, spans: Sequence[_text.Span]) -> list[float]:
    """The values of a signal's tokens, added up to words; over all targets their mean."""
    values = signal.total().values
    for place, value in enumerate(values.tolist()):
        if math.isnan(value) and _text.overlapping(spans, *signal.offsets[place]):
            raise PertokenError(
                f"the score of {signal.tokens[place]!r} is NaN: it was not measured"
            )
    scores = [0.0] * len(spans)
    _text.add_up(spans, signal.offsets, values.tolist(), scores)
    return scores


def _function(name: str) -> Rate:
    found: Rate = getattr(import_module(f"pertoken.attribute.{name}"), name)
    return found
