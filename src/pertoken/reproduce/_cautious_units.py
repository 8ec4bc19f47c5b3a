"""What cautious decoding's reproduction does with some questions: every method, from one cache.

Questions are GSM8K's behind worked examples, the same for all: a model that was never tuned does
not follow the format without. An answer is one line. The prompts are read once, as one batch; every
method goes on from a copy of their cache, a row for each draw.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch

from pertoken._answers import number_in
from pertoken._forward import text_logits
from pertoken.decode import CautiousDecoding
from pertoken.reproduce._context import Context
from pertoken.stats_text import distinct_ngram_share, repeated_4gram_share
from pertoken.testing.setups import left_pad

__all__ = ["DRAWS", "METHODS", "Models", "Question", "equations", "measure", "questions"]

SHOTS = 2
DRAWS = 3  # of self-consistency; the paper takes 40
BEAMS = 3  # the paper takes 5
NEW_TOKENS = 96  # 60 in 100 of the worked answers have no more
SAMPLED = {"do_sample": True, "temperature": 1.2, "top_p": 0.9, "top_k": 50}
"""The authors' settings for Llama on GSM8K; their `generate` has its default of top_k=50 too."""

Unit = dict[str, Any]
Maker = Callable[[Any], CautiousDecoding]
CAUTIOUS: dict[str, tuple[Maker, int]] = {
    "cntp": (lambda tokenizer: CautiousDecoding(tokenizer), DRAWS),
    "fixed trials": (lambda tokenizer: CautiousDecoding(tokenizer, trials=6), 1),
    "inverted trials": (lambda tokenizer: CautiousDecoding(tokenizer, trials="inverted"), 1),
    "whole answers": (lambda tokenizer: CautiousDecoding(trials=DRAWS, punctuation=()), 1),
}
"""Name -> how it is made, and how many draws of it are taken."""
METHODS = ("greedy", "beam", "sampling", *CAUTIOUS)


@dataclass(frozen=True)
class Question:
    """A problem by its row, its prompt with the worked examples, and the right answer."""

    number: int
    prompt: str
    answer: str


def questions(rows: Sequence[Mapping[str, Any]], count: int) -> list[Question]:
    """Problems of the report half (odd rows); the examples are short ones of the other half."""
    solved = [(str(row["question"]), *_solution(str(row["answer"]))) for row in rows]
    short = sorted(solved[:80:2], key=lambda one: len(one[0]) + len(one[1]))[:SHOTS]
    shown = "".join(f"Question: {q}\nAnswer: {s} The answer is {a}.\n\n" for q, s, a in short)
    return [
        Question(number, f"{shown}Question: {solved[number][0]}\nAnswer:", solved[number][2])
        for number in range(1, len(solved), 2)
    ][:count]


def _solution(text: str) -> tuple[str, str]:
    """A worked answer on one line, without its calculator marks; and the number at its end."""
    worked, _, answer = re.sub(r"<<.*?>>", "", text).rpartition("####")
    return " ".join(worked.split()), number_in(answer) or ""


_NUMBER = r"(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_SIGN = r"\s*[-+*/x×]\s*"
_BEHIND = r"(?<![\d.,%/*x×+-])(?<![-+*/x×] )"  # no sign, digit or percentage before: not a rest
_EQUATION = re.compile(rf"{_BEHIND}\$?({_NUMBER}(?:{_SIGN}\$?{_NUMBER})+)\s*=\s*\$?({_NUMBER})")


def equations(text: str) -> tuple[int, int]:
    """How many of the equations a ∘ b ∘ … = c in a text are right, and how many there are.

    To a hundredth; products first.

    >>> equations("48 / 2 = $24, then 48 + 24 = 70"), equations("16 - 3 - 4 * 2 = 5")
    ((1, 2), (1, 1))
    """
    found = _EQUATION.findall(text)
    values = [(_value(left), _fraction(result)) for left, result in found]
    known = [(value, result) for value, result in values if value is not None]
    return sum(abs(value - result) < Fraction(1, 100) for value, result in known), len(known)


def _value(chain: str) -> Fraction | None:
    """Of numbers with signs between them; None where something is divided by 0.

    >>> _value("60/100 * $5")
    Fraction(3, 1)
    """
    numbers = [_fraction(one) for one in re.findall(_NUMBER, chain)]
    signs = re.findall(r"[-+*/x×]", chain)
    terms = [numbers[0]]
    for sign, number in zip(signs, numbers[1:], strict=True):
        if sign == "/" and not number:
            return None
        if sign in "+-":
            terms.append(number if sign == "+" else -number)
        else:
            terms[-1] = terms[-1] / number if sign == "/" else terms[-1] * number
    return sum(terms, Fraction(0))


def _fraction(number: str) -> Fraction:
    return Fraction(number.replace(",", ""))


class Models:
    """The two models, each loaded when it is first asked for, and the ids that end a line."""

    def __init__(self, context: Context, second: str) -> None:
        self._context, self._second_name = context, second

    def get(self, which: str) -> tuple[Any, Any, list[int]]:
        """(model, tokenizer, stop ids) of "first" or "second"."""
        found: tuple[Any, Any, list[int]] = self._first if which == "first" else self._second
        return found

    @cached_property
    def _first(self) -> tuple[Any, Any, list[int]]:
        return _with_stops(*self._context.load())

    @cached_property
    def _second(self) -> tuple[Any, Any, list[int]]:
        context = self._context
        if context.smoke:
            return self._first
        from pertoken.loading import load

        name = self._second_name
        return _with_stops(*load(name, device=context.device, dtype=context.dtype, kind="decoder"))


def _with_stops(model: Any, tokenizer: Any) -> tuple[Any, Any, list[int]]:
    """Every token with a line's end, and the model's own stop ids."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    stops = {token for token, text in enumerate(texts) if "\n" in text}
    own = model.generation_config.eos_token_id
    stops |= set(own if isinstance(own, list) else [] if own is None else [own])
    return model, tokenizer, sorted(stops)


def measure(
    models: Models, which: str, asked: Sequence[Question], seed: int, *, check: bool, tokens: int
) -> list[Unit]:
    """Every method on some questions, a unit each.

    check: also whether cautious decoding without trials is sampling.
    """
    model, tokenizer, stops = models.get(which)
    rows = [torch.tensor(tokenizer(question.prompt)["input_ids"]) for question in asked]
    ids, mask = (each.to(model.device) for each in left_pad(rows, 0))
    read = _read(model, ids, mask)

    def write(draws: int, **options: Any) -> list[list[list[int]]]:
        """New ids of every draw of every question, without their stop token."""
        cache = copy.deepcopy(read)
        cache.batch_repeat_interleave(options.get("num_beams", draws))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1000 * asked[0].number)
            out = model.generate(
                ids.repeat_interleave(draws, 0),
                attention_mask=mask.repeat_interleave(draws, 0),
                past_key_values=cache,
                max_new_tokens=tokens,
                eos_token_id=stops,
                pad_token_id=0,
                **options,
            )
        texts = [_without_stop(row, stops) for row in out[:, ids.shape[1] :].tolist()]
        return [texts[place : place + draws] for place in range(0, len(texts), draws)]

    runs = {
        "greedy": write(1, do_sample=False),
        "beam": write(1, do_sample=False, num_beams=BEAMS),
        "sampling": write(DRAWS, **SAMPLED),
    }
    units: list[Unit] = [{} for _ in asked]
    for name, (make, draws) in CAUTIOUS.items():
        method = make(tokenizer)
        runs[name] = write(draws, **SAMPLED, custom_generate=method)
        # Counted over all questions: as much for each of them.
        counts = {key: value / len(asked) for key, value in vars(method.stats).items()}
        for unit in units:
            unit[name] = dict(counts)
    if check:
        sure = CautiousDecoding(max_trials=1, punctuation=())
        same = write(DRAWS, **SAMPLED, custom_generate=sure)
        for unit, own, other in zip(units, same, runs["sampling"], strict=True):
            unit["same"] = own == other
    for name, found in runs.items():
        first = [texts[0] for texts in found]
        losses = _losses(model, copy.deepcopy(read), ids[:, -1:], mask, first)
        for unit, question, texts, loss in zip(units, asked, found, losses, strict=True):
            figures = _figures(tokenizer, texts, question.answer, tokens)
            unit[name] = unit.get(name, {}) | figures | {"loss": loss, "rated": len(texts[0])}
    return units


@torch.no_grad()
def _read(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> Any:
    """The cache of prompts [batch, time] without their last token."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    text_logits(model, ids[:, :-1], mask[:, :-1], cache)
    return cache


def _without_stop(row: list[int], stops: Sequence[int]) -> list[int]:
    ends = [place for place, token in enumerate(row) if token in stops]
    return row[: ends[0]] if ends else row


def _figures(tokenizer: Any, texts: list[list[int]], answer: str, tokens: int) -> Unit:
    """What the draws of one method behind one prompt are like; tokens: the most they could have."""
    written = [tokenizer.decode(text, skip_special_tokens=True) for text in texts]
    right, count = map(sum, zip(*(equations(text) for text in written), strict=True))
    pairs = sum(max(0, len(text) - 1) for text in texts)
    return {
        "answers": [number_in(text) for text in written],
        "right": sum(number_in(text) == answer for text in written) / len(texts),
        "length": sum(map(len, texts)) / len(texts),
        "cut": sum(len(text) >= tokens for text in texts) / len(texts),
        "empty": sum(not text for text in texts) / len(texts),
        "pairs": pairs,
        "distinct_pairs": round(distinct_ngram_share(texts, 2) * pairs) if pairs else 0,
        "distinct": distinct_ngram_share(texts[:1], 2),
        "repeated": sum(map(repeated_4gram_share, texts)) / len(texts),
        "equations": count,
        "equations_right": right,
    }


@torch.no_grad()
def _losses(
    model: Any, cache: Any, last: torch.Tensor, mask: torch.Tensor, texts: Sequence[list[int]]
) -> list[float]:
    """Minus the log-probability of a text behind each prompt under the model itself, nats.

    cache, mask: of the prompts, the cache without their last tokens [batch, 1].
    """
    longest = max(map(len, texts))
    if not longest:
        return [0.0] * len(texts)
    new = last.new_zeros(len(texts), longest)
    known = mask.new_zeros(len(texts), longest)
    for row, text in enumerate(texts):
        new[row, : len(text)] = last.new_tensor(text)
        known[row, : len(text)] = 1
    # What stands behind a text is padding that nothing before it sees.
    ids, whole = torch.cat((last, new[:, :-1]), 1), torch.cat((mask, known[:, :-1]), 1)
    logits = text_logits(model, ids, whole, cache, all_logits=True)
    losses = -logits.float().log_softmax(-1).gather(-1, new[..., None])[..., 0]
    return [float(loss) for loss in (losses * known).sum(-1)]
