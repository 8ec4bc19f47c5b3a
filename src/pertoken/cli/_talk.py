"""A conversation in one KV cache that lives on from turn to turn: what `pertoken chat` runs."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pertoken.errors import PertokenError
from pertoken.prompts import positions

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

__all__ = ["Said", "Talk"]

_MIB = 2**20


@dataclass(frozen=True)
class Said:
    """One answer, and what the cache holds behind it. Sizes in bytes."""

    ids: list[int]
    text: str
    seconds: float
    stopped: bool
    held: int
    peak: int | None
    full: int
    seen: int

    def line(self) -> str:
        """The figures in one line.

        >>> Said([1, 2], "", 0.5, False, 2**20, 3 * 2**20, 4 * 2**20, 812).line()
        '1.00 MiB held (peak 3.00), a full cache 4.00 MiB; 4.0 tokens/s; 812 tokens seen'
        """
        peak = f" (peak {self.peak / _MIB:.2f})" if self.peak and self.peak > self.held else ""
        return (
            f"{self.held / _MIB:.2f} MiB held{peak}, a full cache {self.full / _MIB:.2f} MiB; "
            f"{len(self.ids) / self.seconds:.1f} tokens/s; {self.seen} tokens seen"
        )


class Talk:
    """A conversation: its ids, which only grow, and the one cache that has read them.

    A question is rendered by the chat template and appended; earlier ids are never rendered anew,
    so that the cache stays right also with templates that change earlier turns.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        make: Callable[[], Cache],
        max_new_tokens: int,
        choice: dict[str, Any],
    ) -> None:
        from pertoken.cache._texts import refuse_unfit
        from pertoken.conversation import stop_ids

        refuse_unfit(model)
        self.model, self.tokenizer, self._make = model, tokenizer, make
        self.max_new_tokens, self._choice = max_new_tokens, choice
        self._stops = stop_ids(model)
        self.cache = make()
        self.ids: list[int] = []
        self._answer: list[int] = []  # the last one
        self.messages: list[dict[str, str]] = []
        self.reading = False  # stays True behind an error: the cache has read a part
        self.figures()  # a model whose cache cannot be counted is refused at once

    def ask(self, question: str) -> Said:
        """Print the answer as it comes."""
        import torch
        from transformers import StoppingCriteriaList

        from pertoken.cli.generate import Streamer

        before = [*self.ids, *self._turn(question)]
        room = self._room(len(before))
        ids = torch.tensor([before], device=self.model.device)
        getattr(self.cache, "reset_peak", lambda: None)()
        self.reading = True
        began = time.perf_counter()
        with _stoppable() as stopped:

            def criterion(input_ids: Any, scores: Any, **_: Any) -> Any:
                return torch.full((1,), bool(stopped), device=input_ids.device)

            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=self.cache,  # it holds all but the new part, which alone is read
                max_new_tokens=min(self.max_new_tokens, room),
                streamer=Streamer(self.tokenizer),
                stopping_criteria=StoppingCriteriaList([criterion]),
                **self._choice,
            )
        seconds = time.perf_counter() - began
        getattr(self.cache, "end_turn", lambda: None)()
        self.reading = False
        self.ids = output[0].tolist()
        self._answer = self.ids[len(before) :]
        text = str(self.tokenizer.decode(self._answer, skip_special_tokens=True)).strip()
        self.messages.append({"role": "user", "content": question})
        if text:
            self.messages.append({"role": "assistant", "content": text})
        held, peak, full, seen = self.figures()
        return Said(self._answer, text, seconds, bool(stopped), held, peak, full, seen)

    def figures(self) -> tuple[int, int | None, int, int]:
        """Bytes held, peak of the last answer if the cache tells, bytes of a full cache, tokens."""
        from pertoken.cache.memory import cache_bytes, full_cache_bytes

        seen = int(self.cache.get_seq_length())
        peak = getattr(self.cache, "peak_bytes", None)
        return cache_bytes(self.cache), peak, full_cache_bytes(self.model, seen), seen

    def stats(self, name: str) -> list[str]:
        """All that is known of the cache, line by line."""
        from pertoken.cache.memory import rss_bytes

        held, peak, full, seen = self.figures()
        questions = sum(message["role"] == "user" for message in self.messages)
        budget = getattr(self.cache, "budget", None)
        lines = [
            f"cache {name}" + ("" if budget is None else f", budget {budget} tokens"),
            f"{questions} questions, {seen} tokens seen",
            f"{held} bytes held, {full} bytes in a full cache",
        ]
        if peak is not None:
            lines.append(f"{peak} bytes at most during the last answer")
        for field, what in (("kv_bytes", "keys and values"), ("checkpoint_bytes", "checkpoints")):
            if hasattr(self.cache, field):
                lines.append(f"{getattr(self.cache, field)} bytes of {what}")
        with contextlib.suppress(PertokenError):
            lines.append(f"{rss_bytes() / _MIB:.0f} MiB of memory in the whole process")
        return lines

    def clear(self) -> None:
        """Begin a new conversation in a new cache."""
        self.close()
        self.cache = self._make()
        self.ids, self._answer, self.messages = [], [], []

    def close(self) -> None:
        """Remove the hooks of the cache."""
        getattr(self.cache, "close", lambda: None)()

    def _turn(self, question: str) -> list[int]:
        from pertoken.conversation import first_turn, follow, next_turn

        try:
            question.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PertokenError(
                f"the question is not UTF-8 text: its character {error.start + 1} is a broken one"
            ) from None
        if not self.ids:
            return first_turn(self.tokenizer, question)
        return follow(self._answer, next_turn(self.tokenizer, question), self._stops)

    def _room(self, length: int) -> int:
        """New tokens that still fit the model's positions."""
        most = positions(self.model)
        if most is not None and length >= most:
            raise PertokenError(
                f"with this question the conversation has {length} tokens; the model has {most} "
                "positions: /clear begins a new one"
            )
        return self.max_new_tokens if most is None else most - length


@contextlib.contextmanager
def _stoppable() -> Iterator[list[bool]]:
    """A list that the first Ctrl-C makes true; the second raises KeyboardInterrupt.

    An exception in the middle of a forward would leave some layers of the cache one token longer
    than others, so the answer is ended between two tokens instead.
    """
    stopped: list[bool] = []

    def stop(*_: Any) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)

    if threading.current_thread() is not threading.main_thread():
        yield stopped  # signals reach the main thread only
        return
    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
