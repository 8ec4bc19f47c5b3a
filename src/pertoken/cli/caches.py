"""`pertoken compare-caches`: one conversation, several KV caches, what each costs and forgets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from pertoken.cache.fidelity import Turn
    from pertoken.cli._caches_report import CacheComparison
    from pertoken.conversation import Exchange

# "step" of KV-Direct reads the whole evicted text again for every token; "turn" once a turn.
DEFAULT_CACHES = ("kv-direct:turn", "window", "streaming-llm", "h2o", "snapkv", "tova")


_Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAMES...",
        help="full, fp8, kv-direct[:residual|:per_layer][:turn], window, streaming-llm, h2o, "
        "snapkv, tova; a choice of them if none is given.",
    ),
]
_Conversation = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help='JSON lines, or one JSON list, of {"role", "content"}; a built-in sample of 20 '
        "turns if not given.",
    ),
]
_Budget = Annotated[
    str,
    typer.Option(
        metavar="N[,N...]",
        help="Tokens a cache may keep, or a share of the conversation such as 25%.",
    ),
]
_Answers = Annotated[
    str,
    typer.Option(
        metavar="model|file",
        help="What is judged: the full cache's own greedy answers, or those in the file.",
    ),
]
_Chunk = Annotated[
    int | None,
    typer.Option(
        callback=shared.positive,
        help="Read questions in pieces of N tokens; whole if not given.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare-caches")(compare_caches)


def compare_caches(
    names: _Names = None,
    conversation: _Conversation = None,
    budget: _Budget = "25%",
    answers: _Answers = "model",
    chunk: _Chunk = None,
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    limit: shared.Limit = None,
    max_new_tokens: shared.MaxNewTokens = 16,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Decode a conversation with several KV caches; show what each forgets, holds and takes.

    --limit counts turns; longer answers than --max-new-tokens are cut.
    """
    from pertoken.cache.named import check_name
    from pertoken.conversation import exchanges, read_conversation

    chosen = list(dict.fromkeys(names or DEFAULT_CACHES))
    for name in chosen:
        check_name(name)
    budgets = parse_budgets(budget)
    if answers not in ("model", "file"):
        raise PertokenError(f"--answers is model or file, not {answers!r}")
    output = shared.Output(as_json, html)
    system, talk = exchanges(read_conversation(conversation))
    talk = _answered(talk[:limit], answers)
    loaded, tokenizer = shared.load(model, dtype)
    turns = as_turns(tokenizer, talk, system, max_new_tokens, answers == "file")
    settings = {
        "conversation": str(conversation) if conversation else "built-in sample",
        "turns": len(turns),
        "answers": answers,
        "tokens": sum(
            len(turn.given) + (max_new_tokens if turn.answer is None else len(turn.answer))
            for turn in turns
        ),
        "name": model,
    }
    found = _run(loaded, turns, chosen, budgets, max_new_tokens, chunk, settings)
    if not output.write(found):
        print(found.table())


def parse_budgets(text: str) -> list[int | float]:
    """Budgets of an option: whole numbers of tokens, and shares as floats.

    >>> parse_budgets("64, 128,25%")
    [64, 128, 0.25]
    """
    found: list[int | float] = []
    for part in text.split(","):
        word = part.strip()
        value: int | float = 0
        with contextlib.suppress(ValueError):
            value = float(word[:-1]) / 100 if word.endswith("%") else int(word)
        if not (0 < value <= 1 if word.endswith("%") else value >= 1):
            raise PertokenError(
                f"--budget takes tokens from 1 on, or shares up to 100%, not {word!r}"
            )
        if value not in found:
            found.append(value)
    return found


def tokens_of(budget: int | float, length: int) -> int:
    """A budget in tokens: a share is one of the whole conversation.

    >>> tokens_of(0.25, 1000), tokens_of(64, 1000)
    (250, 64)
    """
    return max(1, round(budget * length)) if isinstance(budget, float) else budget


def as_turns(
    tokenizer: Any,
    talk: Sequence[Exchange],
    system: str | None,
    max_new_tokens: int,
    from_file: bool,
) -> list[Turn]:
    """The conversation as ids, in the chat template if there is one."""
    from pertoken.cache.fidelity import Turn
    from pertoken.conversation import first_turn, next_turn

    found = []
    for place, exchange in enumerate(talk):
        question = exchange.question
        given = next_turn(tokenizer, question) if place else first_turn(tokenizer, question, system)
        answer = None
        if from_file:
            answer = tokenizer(exchange.answer, add_special_tokens=False)["input_ids"][
                :max_new_tokens
            ]
        found.append(Turn(given, answer))
    return found


def _answered(talk: list[Exchange], answers: str) -> list[Exchange]:
    """With the file's answers: a last question without one goes, any other is refused."""
    if answers == "model":
        return talk
    if talk and talk[-1].answer is None:
        talk = talk[:-1]
    for number, exchange in enumerate(talk, 1):
        if exchange.answer is None:
            raise PertokenError(
                f"question {number} of the conversation has no answer; leave out --answers file"
            )
    if not talk:
        raise PertokenError("the conversation has no answer; leave out --answers file")
    return talk


def _run(
    model: Any,
    turns: Sequence[Turn],
    names: Sequence[str],
    budgets: Sequence[int | float],
    max_new_tokens: int,
    chunk: int | None,
    settings: dict[str, Any],
) -> CacheComparison:
    """A row per cache and budget; settings: what is known of the run already."""
    from pertoken.cache.fidelity import compare_caches as compare
    from pertoken.cache.named import UNBOUNDED, make_cache
    from pertoken.cli._caches_report import CacheComparison, Row
    from pertoken.timing import foreign_share, read_cpu

    limits = list(dict.fromkeys(tokens_of(budget, settings["tokens"]) for budget in budgets))
    wanted = [
        (name, limit)
        for name in names
        for limit in ([None] if name in UNBOUNDED else limits)
    ]  # fmt: skip
    factories = {
        name if limit is None else f"{name} {limit}": partial(make_cache, name, model, limit or 1)
        for name, limit in wanted
    }
    for make in factories.values():  # what a cache refuses is said before anything is decoded
        getattr(make(), "close", lambda: None)()
    before = read_cpu()
    with _progress(len(factories) + 1) as progress:
        found = compare(
            model, factories, [turns], max_new_tokens=max_new_tokens, chunk=chunk, progress=progress
        )
    foreign = foreign_share(before, read_cpu())
    rows = [
        Row(name, limit, result)
        for (name, limit), result in zip(wanted, found.values(), strict=True)
    ]
    return CacheComparison(rows, {**settings, "budgets": limits, "foreign_share": foreign})


@contextlib.contextmanager
def _progress(passes: int) -> Iterator[Callable[[str, int, int], None]]:
    """A bar that says which of the passes over the conversation this is."""
    from pertoken.cli.progress import delayed_bar

    seen: list[str] = []
    with delayed_bar() as show:

        def tell(what: str, done: int, total: int) -> None:
            name = what.removesuffix(", free running")
            if name not in seen:
                seen.append(name)
            show(f"{what} ({len(seen)} of {passes})", done, total)

        yield tell
