"""What a KV cache costs in quality, judged through decoding.

A log-likelihood of a whole text in one forward never uses a compressed cache: the method has had no
step at which it could forget. So a cache is judged here as decoding uses it:

1. the full cache (`DynamicCache`) writes the reference: greedy text, token by token, or it reads a
   given text in the same way; its logits are kept;
2. the candidate's cache reads the same prompt and is then fed the reference's tokens ONE BY ONE
   (teacher forcing); at every step its next-token law is held against the full cache's;
3. the candidate writes by itself (free running), and its tokens are held against the reference's.
   A candidate whose best token was the reference's at every step of 2 writes that same text, so
   that this pass is left out.

Both sides run the same forwards in the same shapes, so a cache that changes nothing has a KL of
exactly 0. A text may be a conversation of several turns: the cache lives on from turn to turn.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from pertoken._forward import text_logits
from pertoken.cache._texts import Text, Turn, check_fit, refuse_unfit, scripts
from pertoken.cache.fidelity_report import Fidelity, Speed, TextFidelity
from pertoken.cache.memory import cache_bytes
from pertoken.conversation import follow, stop_ids
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

__all__ = ["Fidelity", "Text", "Turn", "cache_fidelity", "compare_caches"]

Progress = Callable[[str, int, int], None]
"""Called with (what goes on now, tokens done, tokens of this pass)."""


def cache_fidelity(
    model: PreTrainedModel,
    cache_factory: Callable[[], Cache],
    texts: Sequence[Text],
    *,
    tokenizer: Any = None,
    continuation: Literal["greedy", "text"] = "greedy",
    max_new_tokens: int = 64,
    prompt_share: float = 0.5,
    chunk: int | None = None,
    context: Callable[[PreTrainedModel], AbstractContextManager[Any]] | None = None,
    progress: Progress | None = None,
) -> Fidelity:
    """How far decoding with a cache is from decoding with the full cache.

    cache_factory: makes a new, empty `Cache` each time it is called: ours, transformers', yours.
    texts: each is judged by itself (batch 1). Strings need the `tokenizer`.
    continuation: "greedy": a text is a prompt, and what is judged are the `max_new_tokens` (or
        fewer, where the model stops) that the full cache writes behind it. "text": the first
        `prompt_share` of a text is the prompt, and at most `max_new_tokens` behind it are judged
        as they stand. A list of `Turn`s says for each turn which answer is meant.
    chunk: prompts are read in pieces of that many tokens; in one forward if None.
    context: called with the model, returns a context manager in which the candidate runs. A press
        of kvpress is one as it is:
        ``cache_fidelity(model, DynamicCache, texts, context=KnormPress(0.5))``, under a
        transformers that kvpress supports (0.5.5: below 5.3).

    Raises PertokenError: no texts, a text with too few tokens, one that does not fit the model's
    positions, a factory that returns no Cache, a used one or one twice, NaN in the logits.

    >>> from transformers import DynamicCache
    >>> from pertoken.testing import tiny_model
    >>> result = cache_fidelity(tiny_model("llama"), DynamicCache, [[5, 6, 7]], max_new_tokens=4)
    >>> result.kl, result.top1_agreement, result.token_match
    ([0.0, 0.0, 0.0, 0.0], 1.0, 1.0)
    """
    found = _judge(
        model,
        {"cache": (cache_factory, context)},
        scripts(
            texts,
            tokenizer=tokenizer,
            continuation=continuation,
            max_new_tokens=max_new_tokens,
            prompt_share=prompt_share,
        ),
        max_new_tokens,
        chunk,
        progress,
    )
    return found["cache"]


def compare_caches(
    model: PreTrainedModel,
    factories: Mapping[str, Callable[[], Cache]],
    texts: Sequence[Text],
    *,
    tokenizer: Any = None,
    continuation: Literal["greedy", "text"] = "greedy",
    max_new_tokens: int = 64,
    prompt_share: float = 0.5,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Fidelity]:
    """`cache_fidelity` of several caches against one reference, which is decoded once per text.

    factories: name -> function that makes an empty cache. See `cache_fidelity` for the rest, and
    `fidelity_table` for all results in one table.
    """
    if not factories:
        raise PertokenError("give at least one cache to compare")
    turns = scripts(
        texts,
        tokenizer=tokenizer,
        continuation=continuation,
        max_new_tokens=max_new_tokens,
        prompt_share=prompt_share,
    )
    plain = {name: (factory, None) for name, factory in factories.items()}
    return _judge(model, plain, turns, max_new_tokens, chunk, progress)


class _Reader:
    """A model reading one text with one cache: times each forward, and counts the cache's bytes."""

    def __init__(self, model: PreTrainedModel, cache: Cache, chunk: int | None, who: str) -> None:
        self.model, self.cache, self.chunk, self.who = model, cache, chunk, who
        self.speed = Speed()
        self.held_bytes = self.peak_bytes = 0
        self.fed = 0

    def read(self, ids: Sequence[int]) -> torch.Tensor:
        """Logits [vocab] on the CPU behind given tokens, read in one forward or in chunks."""
        size = self.chunk or len(ids)
        for start in range(0, len(ids), size):
            logits, seconds = self._forward(ids[start : start + size])
            self.speed.prefill_seconds += seconds
        self.speed.prefill_tokens += len(ids)
        return logits

    def step(self, token: int) -> torch.Tensor:
        """Logits [vocab] on the CPU behind one more token."""
        logits, seconds = self._forward([token])
        self.speed.decode_seconds += seconds
        self.speed.steps += 1
        return logits

    def end_turn(self) -> None:
        """An answer is whole: caches that keep scratch for a turn drop it."""
        if hasattr(self.cache, "end_turn"):
            self.cache.end_turn()

    def _forward(self, ids: Sequence[int]) -> tuple[torch.Tensor, float]:
        began = time.perf_counter()
        new = torch.tensor([ids], dtype=torch.long, device=self.model.device)
        # Positions count what was fed: a cache that was cut may have forgotten how much it saw.
        mask = new.new_ones(1, self.fed + len(ids))
        logits = text_logits(self.model, new, mask, self.cache)[0, -1].cpu()
        seconds = time.perf_counter() - began
        self.fed += len(ids)
        if bool((logits.isnan() | logits.isposinf()).any()):
            raise PertokenError(
                f"the logits of {type(self.model).__name__} with {self.who} are NaN or infinite "
                f"behind {self.fed} tokens"
            )
        inside = int(getattr(self.cache, "peak_bytes", 0))  # scratch within a forward
        self.held_bytes = max(self.held_bytes, cache_bytes(self.cache))
        self.peak_bytes = max(self.held_bytes, inside)
        return logits, seconds


def _converse(
    reader: _Reader,
    turns: Sequence[Turn],
    limits: Sequence[int],
    stops: Collection[int],
    see: Callable[[torch.Tensor], None],
) -> list[list[int]]:
    """Go through the turns; the answers, given or greedy, the latter at most `limits` long.

    `see` gets the logits in front of every token of an answer. The last token of an answer is fed
    together with the next turn, as `generate` does it.
    """
    answers: list[list[int]] = []
    for turn, limit in zip(turns, limits, strict=True):
        last = answers[-1] if answers else []
        logits = reader.read([*last[-1:], *follow(last, turn.given, stops)])
        answer: list[int] = []
        while True:
            see(logits)
            if turn.answer is None:
                answer.append(int(logits.float().argmax()))
                done = len(answer) == limit or answer[-1] in stops
            else:
                answer.append(turn.answer[len(answer)])
                done = len(answer) == len(turn.answer)
            if done:
                break
            logits = reader.step(answer[-1])
        reader.end_turn()
        answers.append(answer)
    return answers


@dataclass
class _Reference:
    """What the full cache made of one text."""

    answers: list[list[int]]
    logits: list[torch.Tensor]  # one [vocab] per token of the answers, in order
    speed: Speed
    peak_bytes: int


Candidate = tuple[
    Callable[[], "Cache"], "Callable[[PreTrainedModel], AbstractContextManager[Any]] | None"
]


@torch.no_grad()
def _judge(
    model: PreTrainedModel,
    candidates: Mapping[str, Candidate],
    texts: Sequence[Sequence[Turn]],
    max_new_tokens: int,
    chunk: int | None,
    progress: Progress | None,
) -> dict[str, Fidelity]:
    if chunk is not None and chunk < 1:
        raise PertokenError(f"chunk must be 1 or more tokens, got {chunk}")
    refuse_unfit(model)
    tell = progress or (lambda what, done, total: None)
    for number, turns in enumerate(texts, 1):
        check_fit(model, turns, max_new_tokens, number)
    found: dict[str, list[TextFidelity]] = {name: [] for name in candidates}
    made: list[weakref.ref[Any]] = []
    # One text after the other, all candidates on each: only its own reference is kept in memory.
    for turns in texts:
        reference = _reference(model, turns, max_new_tokens, chunk, tell)
        for name, (factory, context) in candidates.items():
            make = partial(_new_cache, factory, made)
            with contextlib.nullcontext() if context is None else context(model):
                found[name].append(_text(model, make, name, turns, reference, chunk, tell))
    settings = {
        "model": getattr(model.config, "name_or_path", "") or type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "new_tokens": max_new_tokens,
        "chunk": chunk,
    }
    return {name: Fidelity(results, settings) for name, results in found.items()}


def _reference(
    model: PreTrainedModel,
    turns: Sequence[Turn],
    max_new_tokens: int,
    chunk: int | None,
    tell: Progress,
) -> _Reference:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    reader = _Reader(model, cache, chunk, "the full cache")
    logits: list[torch.Tensor] = []
    limits = [len(turn.answer) if turn.answer is not None else max_new_tokens for turn in turns]

    def see(row: torch.Tensor) -> None:
        logits.append(row)
        tell("full cache", len(logits), sum(limits))

    answers = _converse(reader, turns, limits, stop_ids(model), see)
    return _Reference(answers, logits, reader.speed, reader.peak_bytes)


def _text(
    model: PreTrainedModel,
    make: Callable[[], AbstractContextManager[Cache]],
    name: str,
    turns: Sequence[Turn],
    reference: _Reference,
    chunk: int | None,
    tell: Progress,
) -> TextFidelity:
    """One candidate on one text: teacher forcing, then free running where that can differ."""
    stops = stop_ids(model)
    tokens = [token for answer in reference.answers for token in answer]
    limits = [len(answer) for answer in reference.answers]
    steps: list[tuple[float, bool, float, float]] = []

    def see(row: torch.Tensor) -> None:
        at = len(steps)
        steps.append(_compared(reference.logits[at], row, tokens[at]))
        tell(name, at + 1, len(tokens))

    forced = [
        Turn(turn.given, answer) for turn, answer in zip(turns, reference.answers, strict=True)
    ]
    with make() as cache:
        reader = _Reader(model, cache, chunk, name)
        _converse(reader, forced, limits, stops, see)
    kl, agrees, nll, full_nll = (list(column) for column in zip(*steps, strict=True))
    free: list[list[int] | None] = [None] * len(turns)
    if any(turn.answer is None for turn in turns):
        written = reference.answers
        if not all(agrees):
            done = [0]

            def count(row: torch.Tensor) -> None:
                done[0] += 1
                tell(f"{name}, free running", done[0], len(tokens))

            with make() as cache:
                alone = _Reader(model, cache, chunk, name)
                written = _converse(alone, turns, limits, stops, count)
        free = [
            answer if turn.answer is None else None
            for turn, answer in zip(turns, written, strict=True)
        ]
    return TextFidelity(
        answers=reference.answers,
        free=free,
        kl=kl,
        agrees=agrees,
        nll=nll,
        full_nll=full_nll,
        held_bytes=reader.held_bytes,
        peak_bytes=reader.peak_bytes,
        full_peak_bytes=reference.peak_bytes,
        speed=reader.speed,
        full_speed=reference.speed,
    )


def _compared(
    full: torch.Tensor, own: torch.Tensor, token: int
) -> tuple[float, bool, float, float]:
    """(KL(full || own) in nats, same best token?, -log p of `token` with own, with full)."""
    p, q = full.double().log_softmax(-1), own.double().log_softmax(-1)
    # Where the full law gives nothing, nothing is lost: 0 log 0 = 0.
    kl = torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum().clamp(min=0.0)
    agrees = int(full.float().argmax()) == int(own.float().argmax())
    return float(kl), agrees, -float(q[token]), -float(p[token])


@contextlib.contextmanager
def _new_cache(factory: Callable[[], Cache], before: list[weakref.ref[Any]]) -> Iterator[Cache]:
    """A checked new cache, closed at the end; `before` are the factory's earlier ones."""
    from transformers.cache_utils import Cache

    if isinstance(factory, Cache) or not callable(factory):
        raise PertokenError(
            "cache_factory must be a function that makes a new cache each time, such as "
            f"lambda: DynamicCache(), not {_a(factory)}"
        )
    cache = factory()
    if not isinstance(cache, Cache):
        raise PertokenError(f"cache_factory must return a Cache, not {_a(cache)}")
    if any(cache is other() for other in before):
        raise PertokenError("cache_factory returned the same cache twice; make a new one each time")
    if int(cache.get_seq_length()):
        raise PertokenError(
            f"cache_factory returned a used cache ({int(cache.get_seq_length())} tokens); make a "
            "new one each time"
        )
    before.append(weakref.ref(cache))
    try:
        yield cache
    finally:
        if hasattr(cache, "close"):  # ours: hooks on the model
            cache.close()


def _a(thing: Any) -> str:
    name = type(thing).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
