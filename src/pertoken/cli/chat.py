"""`pertoken chat`: a conversation in one KV cache that lives on from turn to turn."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.errors import PertokenError, nearest

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

COMMANDS = ("/exit", "/clear", "/stats")
_MIB = 2**20


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("chat")(chat)


def chat(
    cache: Annotated[
        str,
        typer.Option(
            help="full, fp8, kv-direct[:residual|:per_layer][:turn], window, streaming-llm, h2o, "
            "snapkv, tova. KV-Direct reads what it evicted again for every token, with :turn once "
            "a turn."
        ),
    ] = "kv-direct:turn",
    budget: Annotated[int, typer.Option(help="Tokens whose keys and values are kept.")] = 256,
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file or short name.")] = (
        "smollm2"
    ),
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float64; the device's default.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens of an answer at most.")] = 256,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens instead of taking the best.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Above 0; implies --sample. 1 is the model's own.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes --sample repeatable.")] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep the conversation as JSON lines, written after every answer; after /clear "
            "the new one takes its place.",
        ),
    ] = None,
) -> None:
    """Talk to a model; after each answer, say what the cache holds and a full one would.

    /exit or Ctrl-D ends, /clear begins anew, /stats tells more, Ctrl-C stops an answer. From a
    pipe, each line is a question.
    """
    from pertoken._files import check_target, write_whole
    from pertoken.cache.named import check_budget, check_name, make_cache
    from pertoken.conversation import as_jsonl

    check_name(cache)
    check_budget(budget)
    if max_new_tokens < 1:
        raise PertokenError(f"--max-new-tokens must be 1 or more, got {max_new_tokens}")
    if temperature is not None and not 0 < temperature < float("inf"):
        raise PertokenError(
            f"--temperature must be above 0, got {temperature:g}; leave it out for the best tokens"
        )
    if save is not None:
        check_target(save)
        if save.exists():
            raise PertokenError(f"{save} exists already; give --save the name of a new file")

    import torch

    import pertoken

    loaded, tokenizer = pertoken.load(model, dtype=dtype, kind="decoder")
    choice: dict[str, Any] = {"do_sample": False}
    if sample or temperature is not None:
        choice = {"do_sample": True, "temperature": temperature or 1.0}
    if seed is not None:
        torch.manual_seed(seed)
    with contextlib.closing(
        Talk(loaded, tokenizer, partial(make_cache, cache, loaded, budget), max_new_tokens, choice)
    ) as talk:
        if not getattr(tokenizer, "chat_template", None):
            _dim(f"{model} has no chat template: the conversation is written as a transcript")
        if sys.stdin.isatty():
            _dim(
                f"{model}, {cache}, budget {budget}; {', '.join(COMMANDS)}; Ctrl-C stops an answer"
            )
        for line in _lines():
            try:
                if not _obey(talk, line, cache):
                    return
            except PertokenError as error:
                if talk.reading or not sys.stdin.isatty():
                    raise
                typer.echo(f"error: {error}", err=True)
                continue
            if save is not None and talk.messages:
                write_whole(save, as_jsonl(talk.messages))


def _obey(talk: Talk, line: str, name: str) -> bool:
    """Do what a line says: a command, or a question; False ends the chat."""
    word = line.strip()
    if not word:
        return True
    if not re.fullmatch(r"/\w+", word):
        said = talk.ask(word)
        _dim(f"{said.line()}{' (stopped)' if said.stopped else ''}")
    elif word == "/exit":
        return False
    elif word == "/clear":
        talk.clear()
        _dim("a new conversation")
    elif word == "/stats":
        for text in talk.stats(name):
            _dim(text)
    else:
        raise PertokenError(
            f"unknown command {word}{nearest(word, COMMANDS)}; known: {', '.join(COMMANDS)}"
        )
    return True


def _lines() -> Iterator[str]:
    """Lines that the user types, or that come through a pipe."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # line editing and history in `input`
        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                return
    while True:
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise PertokenError("the conversation on standard input is not UTF-8") from None
        if not line:
            return
        yield line


def _dim(text: str) -> None:
    typer.echo(typer.style(text, dim=True), err=True)  # plain where it is no terminal


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
        config = self.model.config.get_text_config(decoder=True)
        most = getattr(config, "max_position_embeddings", None)
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
