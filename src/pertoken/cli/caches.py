"""`pertoken compare-caches`: one conversation, several KV caches, what each costs and forgets."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from pertoken.cache.fidelity import Turn
    from pertoken.cache.fidelity_report import Fidelity
    from pertoken.conversation import Exchange

# "step" of KV-Direct reads the whole evicted text again for every token; "turn" once a turn.
DEFAULT_CACHES = ("kv-direct:turn", "window", "streaming-llm", "h2o", "snapkv", "tova")
_DELAY = 2.0  # seconds before a progress bar is worth the trouble


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare-caches")(compare_caches)


@dataclass(frozen=True)
class Row:
    """One line of the table: a cache with a budget (None: it keeps everything) and its result."""

    cache: str
    budget: int | None
    result: Fidelity

    @property
    def label(self) -> str:
        """The cache and its budget in one."""
        return self.cache if self.budget is None else f"{self.cache} {self.budget}"


def compare_caches(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAMES...",
            help="full, fp8, kv-direct[:residual|:per_layer][:turn], window, streaming-llm, h2o, "
            "snapkv, tova; a choice of them if none is given.",
        ),
    ] = None,
    conversation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='JSON lines, or one JSON list, of {"role", "content"}; a built-in sample of 20 '
            "turns if not given.",
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            metavar="N[,N...]",
            help="Tokens a cache may keep, or a share of the conversation such as 25%.",
        ),
    ] = "25%",
    answers: Annotated[
        str,
        typer.Option(
            metavar="model|file",
            help="What is judged: the full cache's own greedy answers, or those in the file.",
        ),
    ] = "model",
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file or short name.")] = (
        "smollm2"
    ),
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float64; the device's default.")
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(help="Tokens of an answer at most; longer ones are cut.")
    ] = 16,
    limit: Annotated[int | None, typer.Option(help="Only the first N turns.")] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Read questions in pieces of N tokens; whole if not given.")
    ] = None,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write all results as JSON.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with the table and the KL turn by turn.")
    ] = None,
) -> None:
    """Decode a conversation with several KV caches; show what each forgets, holds and takes."""
    from pertoken._files import check_target, write_whole
    from pertoken.cache.named import check_name
    from pertoken.conversation import exchanges, read_conversation

    chosen = list(dict.fromkeys(names or DEFAULT_CACHES))
    for name in chosen:
        check_name(name)
    budgets = parse_budgets(budget)
    if answers not in ("model", "file"):
        raise PertokenError(f"--answers is model or file, not {answers!r}")
    for option, number in (("--new-tokens", new_tokens), ("--limit", limit), ("--chunk", chunk)):
        if number is not None and number < 1:
            raise PertokenError(f"{option} must be 1 or more, got {number}")
    targets = [Path(as_json)] if as_json not in (None, "-") else []
    for target in [*targets, *([html] if html else [])]:
        check_target(target)
    if html and html in targets:
        raise PertokenError(f"--json and --html both want to write {html}")
    system, talk = exchanges(read_conversation(conversation))
    talk = _answered(talk[:limit], answers)

    import pertoken

    loaded, tokenizer = pertoken.load(model, dtype=dtype, kind="decoder")
    turns = as_turns(tokenizer, talk, system, new_tokens, answers == "file")
    length = sum(
        len(turn.given) + (new_tokens if turn.answer is None else len(turn.answer))
        for turn in turns
    )
    settings = {
        "conversation": str(conversation) if conversation else "built-in sample",
        "turns": len(turns),
        "answers": answers,
        "tokens": length,
        "name": model,
    }
    rows, more = _run(loaded, turns, chosen, budgets, length, new_tokens, chunk)
    settings |= more
    if as_json is not None:
        results = [
            {"cache": row.cache, "budget": row.budget, **row.result.to_dict()} for row in rows
        ]
        values = {"settings": settings, "results": results}
        text = json.dumps(values, ensure_ascii=False, indent=1, allow_nan=False)
        if as_json == "-":
            print(text)
        else:
            write_whole(Path(as_json), text + "\n")
    if html:
        from pertoken.cli._caches_page import page

        write_whole(html, page(rows, cells(rows), notes(rows, settings)))
    if as_json != "-":
        from pertoken.result import aligned

        print("\n".join([aligned(cells(rows)), "", *notes(rows, settings)]))


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
    new_tokens: int,
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
            answer = tokenizer(exchange.answer, add_special_tokens=False)["input_ids"][:new_tokens]
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
    length: int,
    new_tokens: int,
    chunk: int | None,
) -> tuple[list[Row], dict[str, Any]]:
    """A row per cache and budget, and settings of the run."""
    from pertoken.cache.fidelity import compare_caches as compare
    from pertoken.cache.named import UNBOUNDED, make_cache
    from pertoken.timing import foreign_share, read_cpu

    limits = list(dict.fromkeys(tokens_of(budget, length) for budget in budgets))
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
            model, factories, [turns], new_tokens=new_tokens, chunk=chunk, progress=progress
        )
    foreign = foreign_share(before, read_cpu())
    rows = [
        Row(name, limit, result)
        for (name, limit), result in zip(wanted, found.values(), strict=True)
    ]
    return rows, {"budgets": limits, "foreign_share": foreign}


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Head and lines of the table, the full cache first."""
    from pertoken.cache.fidelity_report import HEAD, table_cells

    name, *head = HEAD
    full, *body = table_cells({row.label: row.result for row in rows})
    lines = [[name, "budget", *head], [full[0], "", *full[1:]]]
    for row, (_, *values) in zip(rows, body, strict=True):
        lines.append([row.cache, "" if row.budget is None else str(row.budget), *values])
    return lines


def notes(rows: Sequence[Row], settings: dict[str, Any]) -> list[str]:
    """What has to be known to read the table."""
    from pertoken.timing import FOREIGN_LIMIT

    run = rows[0].result.settings
    judged = len(rows[0].result.kl)
    whose = (
        "of the file" if settings["answers"] == "file" else "that the full cache writes greedily"
    )
    lines = [
        f"{settings['turns']} turns, {judged} tokens of answers {whose}, at most "
        f"{run['new_tokens']} a turn, {settings['tokens']} tokens in all at most; "
        f"{settings['name']}, {run['dtype']}, {run['device']}, {run['threads']} threads",
        "KL: from the full cache's next-token law, nats, mean and largest of a step, fed the same "
        "tokens one by one; token match: writing freely",
        "held: between two forwards, at most; peak: within one too, where the cache tells it; a "
        "question is read in one forward unless --chunk is given",
    ]
    foreign = settings.get("foreign_share")
    if foreign is not None and foreign > FOREIGN_LIMIT:
        lines.append(f"other programs used {foreign:.0%} of the machine: take the speeds with care")
    return lines


@contextlib.contextmanager
def _progress(passes: int) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr, shown after two seconds and gone when it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    # Redrawn seldom: the drawing thread and the decoding share the cores.
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        refresh_per_second=2,
    )
    task = bar.add_task("starting", total=None)
    began = time.perf_counter()
    started = False
    seen: list[str] = []

    def tell(what: str, done: int, total: int) -> None:
        nonlocal started
        name = what.removesuffix(", free running")
        if name not in seen:
            seen.append(name)
        bar.update(
            task, description=f"{what} ({len(seen)} of {passes})", completed=done, total=total
        )
        if not started and time.perf_counter() - began > _DELAY:
            bar.start()
            started = True

    try:
        yield tell
    finally:
        bar.stop()
