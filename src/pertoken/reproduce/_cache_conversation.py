"""A conversation of 20 turns with a cache that lives through it: answers, bytes, seconds.

The questions are those of the built-in sample; the answers are the model's own, greedy and of a few
tokens only, so that the whole stays short enough for caches that make all evicted tokens again at
every step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pertoken._forward import text_logits
from pertoken.cache.memory import cache_bytes, rss_bytes
from pertoken.conversation import exchanges, first_turn, follow, next_turn, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

TURNS = 20


@dataclass
class Conversed:
    """What came of a conversation; the lists have one entry per turn.

    answers: the new tokens. tokens: tokens of the conversation so far. peak_bytes: the most the
    cache held during the turn, scratch within a forward counted. kv_bytes: the most keys and values
    held behind any forward of the turn. rss_growth: by how much the process's memory had grown at
    most since the start.
    """

    answers: list[list[int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    kv_bytes: list[int] = field(default_factory=list)
    rss_growth: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def questions(tokenizer: Any, turns: int, *, letters: int | None = None) -> list[list[int]]:
    """Ids of each question with what stands around it; at most `letters` of each."""
    from pertoken.samples import CONVERSATION

    asked = [exchange.question[:letters] for exchange in exchanges(CONVERSATION)[1][:turns]]
    return [first_turn(tokenizer, asked[0]), *(next_turn(tokenizer, one) for one in asked[1:])]


@torch.no_grad()
def converse(
    model: PreTrainedModel, cache: Cache, turns: Sequence[Sequence[int]], new_tokens: int
) -> Conversed:
    """Go through the turns with one cache, greedily, one token at a time.

    turns: ids of the questions, see `questions`; an answer ends at a stop id or at `new_tokens`.
    """
    stops, found = stop_ids(model), Conversed()
    # Weights are mapped from the disk and come into memory when they are first read.
    model(input_ids=torch.tensor([list(turns[0])], device=model.device), use_cache=False)
    before, began, fed, last = rss_bytes(), time.perf_counter(), 0, list[int]()
    for turn in turns:
        if hasattr(cache, "reset_peak"):
            cache.reset_peak()
        peak = held = 0
        # The last token of an answer is read together with the next question.
        read = [*last[-1:], *follow(last, turn, stops)]
        answer: list[int] = []
        while True:
            fed += len(read)
            ids = torch.tensor([read], device=model.device)
            logits = text_logits(model, ids, ids.new_ones(1, fed), cache)[0, -1]
            peak = max(peak, cache_bytes(cache))
            held = max(held, int(getattr(cache, "kv_bytes", cache_bytes(cache))))
            found.rss_growth = max(found.rss_growth, rss_bytes() - before)
            answer.append(int(logits.float().argmax()))
            if len(answer) == new_tokens or answer[-1] in stops:
                break
            read = answer[-1:]
        found.answers.append(answer)
        found.tokens.append(fed)
        found.peak_bytes.append(max(peak, int(getattr(cache, "peak_bytes", 0))))
        found.kv_bytes.append(held)
        if hasattr(cache, "end_turn"):
            cache.end_turn()
        last = answer
    found.seconds = time.perf_counter() - began
    return found


def token_match(reference: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
    """Share of the reference's new tokens that stand at the same place of the same turn.

    >>> token_match([[1, 2], [3, 4]], [[1, 2], [3]])
    0.75
    """
    same = sum(
        a == b
        for right, own in zip(reference, answers, strict=True)
        for a, b in zip(right, own, strict=False)
    )
    return same / sum(map(len, reference))


def parting(reference: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> int | None:
    """The first turn whose answers differ.

    >>> parting([[1, 2], [3, 4]], [[1, 2], [3]]), parting([[1]], [[1]])
    (1, None)
    """
    pairs = zip(reference, answers, strict=True)
    return next((turn for turn, (a, b) in enumerate(pairs) if list(a) != list(b)), None)


def history(
    model: PreTrainedModel,
    turns: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    turn: int,
) -> list[int]:
    """All ids in front of the answer of a turn."""
    stops, ids, last = stop_ids(model), list[int](), list[int]()
    for number in range(turn + 1):
        ids += [*last, *follow(last, turns[number], stops)]
        last = list(answers[number])
    return ids
