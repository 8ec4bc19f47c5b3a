"""`pertoken chat`: a conversation in one KV cache that lives on from turn to turn."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pertoken.cli import options as shared
from pertoken.errors import PertokenError, nearest

if TYPE_CHECKING:
    from pertoken.cli._talk import Talk

COMMANDS = ("/exit", "/clear", "/stats")


_Cache = Annotated[
    str,
    typer.Option(
        help="full, fp8, kv-direct[:residual|:per_layer][:turn], window, streaming-llm, h2o, "
        "snapkv, tova. KV-Direct reads what it evicted again for every token, with :turn once "
        "a turn."
    ),
]
_Save = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Keep the conversation as JSON lines, written after every answer; after /clear "
        "the new one takes its place.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("chat")(chat)


def chat(
    cache: _Cache = "kv-direct:turn",
    budget: Annotated[int, typer.Option(help="Tokens whose keys and values are kept.")] = 256,
    sample: shared.Sample = False,
    temperature: shared.Temperature = None,
    top_p: shared.TopP = None,
    save: _Save = None,
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    seed: shared.OptionalSeed = None,
    max_new_tokens: shared.MaxNewTokens = 256,
) -> None:
    """Talk to a model; after each answer, say what the cache holds and a full one would.

    /exit or Ctrl-D ends, /clear begins anew, /stats tells more, Ctrl-C stops an answer. From a
    pipe, each line is a question.
    """
    from pertoken._files import check_target
    from pertoken.cache.named import check_budget, check_name, make_cache

    check_name(cache)
    check_budget(budget)
    if save is not None:
        check_target(save)
        if save.exists():
            raise PertokenError(f"{save} exists already; give --save the name of a new file")

    import torch

    from pertoken.cli._talk import Talk

    loaded, tokenizer = shared.load(model, dtype)
    if seed is not None:
        torch.manual_seed(seed)
    make = partial(make_cache, cache, loaded, budget)
    choice = shared.sampling(sample, temperature, top_p)
    with contextlib.closing(Talk(loaded, tokenizer, make, max_new_tokens, choice)) as talk:
        if not getattr(tokenizer, "chat_template", None):
            _dim(f"{model} has no chat template: the conversation is written as a transcript")
        if sys.stdin.isatty():
            _dim(
                f"{model}, {cache}, budget {budget}; {', '.join(COMMANDS)}; Ctrl-C stops an answer"
            )
        _converse(talk, cache, save)


def _converse(talk: Talk, cache: str, save: Path | None) -> None:
    """Do what each line says, and keep the conversation, until one ends it."""
    from pertoken._files import write_whole
    from pertoken.conversation import as_jsonl

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
