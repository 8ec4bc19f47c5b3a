"""`pertoken explain` and `pertoken evaluate-attribution`: which tokens mattered, how sure is it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.cli.progress import progress_bar
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from pertoken.attribute import Faithfulness, Quantity
    from pertoken.signal import TokenSignal

LONG = 10.0  # seconds; an estimate is shown for what may take longer

_Quantity = Annotated[
    str,
    typer.Option(help="What is explained: probability, log-probability, logit, entropy, contrast."),
]
_MaxSteps = Annotated[
    int,
    typer.Option(
        "--max-steps",
        callback=shared.positive,
        help="Steps of reagent at most (3000 in the paper's settings).",
    ),
]
_Draws = Annotated[
    int,
    typer.Option(
        "--draws", callback=shared.positive, help="Random draws of the faithfulness figures."
    ),
]
_Target = Annotated[
    str | None,
    typer.Option(help="The text to explain; what the model writes next if not given."),
]
_Method = Annotated[
    str | None,
    typer.Option(
        help="reagent, attention, integrated-gradients and others.", show_default="reagent"
    ),
]
_Compare = Annotated[
    bool, typer.Option("--compare", help="All methods, with their faithfulness and seconds.")
]
_Foil = Annotated[str | None, typer.Option(help="With --quantity contrast: why not this token.")]


_Methods = Annotated[
    str | None,
    typer.Option(metavar="NAME,NAME…", help="Attribution methods; all if not given."),
]
_Distance = Annotated[
    str, typer.Option(metavar="hellinger|repo", help="The paper's, or that of its code.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("explain")(explain)
    app.command("evaluate-attribution")(evaluate)


def explain(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - or nothing reads it from a pipe.")
    ] = None,
    target: _Target = None,
    method: _Method = None,
    compare: _Compare = False,
    quantity: _Quantity = "probability",
    foil: _Foil = None,
    max_steps: _MaxSteps = 100,
    draws: _Draws = 20,
    top: Annotated[int, typer.Option(help="List so many tokens.")] = 5,
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    seed: shared.Seed = 0,
    max_new_tokens: shared.MaxNewTokens = 1,
    no_chat: shared.NoChat = False,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Show which tokens of a prompt led to what follows it."""
    _check(context)
    output = shared.Output(as_json, html)
    text = shared.read_prompt(prompt, 'pertoken explain "The capital of France is"')
    name = method or "reagent"

    from pertoken.attribute.methods import find

    find(name)  # a wrong name is said before the model is loaded
    loaded, tokenizer, measure = _load(model, dtype, quantity, foil)
    given = _as_prompt(tokenizer, text, no_chat)
    aim: Any = max_new_tokens if target is None else target
    if compare:
        pair = given if target is None else (given, target)
        found = _evaluate(
            loaded, tokenizer, [pair], None, max_steps, measure, aim, draws=draws, seed=seed
        )
        (signals,) = found.signals
        plain = {name: signal.to_dict() for name, signal in signals.items()}
        if not output.write(found, {**found.to_dict(), "signals": plain}):
            _show_comparison(found, top)
        return
    options = {"max_steps": max_steps} if name == "reagent" else {}
    signal, seconds = _attribute(loaded, tokenizer, given, aim, name, measure, seed, options)
    values = {"method": name, "seconds": seconds, "signal": signal.to_dict()}
    if not output.write(signal, values):
        _show(signal, top)
        typer.echo(f"{seconds:.2f} s; --compare says how faithful this is", err=True)


def evaluate(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(help="Prompts: .jsonl, or .txt with one a line.")],
    methods: _Methods = None,
    quantity: _Quantity = "probability",
    foil: _Foil = None,
    max_steps: _MaxSteps = 100,
    draws: _Draws = 20,
    distance: _Distance = "hellinger",
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    seed: shared.Seed = 0,
    limit: shared.Limit = None,
    max_new_tokens: shared.MaxNewTokens = 1,
    no_chat: shared.NoChat = False,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Measure how faithful attribution methods are on your prompts."""
    from pertoken.prompts import read_prompts

    prompts = read_prompts(data, limit)
    names = None
    if methods is not None:
        names = [name.strip() for name in methods.split(",") if name.strip()]
        if not names:
            raise PertokenError(
                "--methods names no method: give at least one method, or leave it out"
            )
        _check_max_steps(context, names)
    _check_foil(quantity, foil)
    output = shared.Output(as_json, html)

    from pertoken.attribute.faithfulness import check_distance
    from pertoken.attribute.methods import find

    check_distance(distance)
    for name in names or []:
        find(name)
    loaded, tokenizer, measure = _load(model, dtype, quantity, foil)
    asked = [_as_prompt(tokenizer, prompt.text, no_chat) for prompt in prompts]
    choice = {"draws": draws, "distance": distance, "seed": seed}
    found = _evaluate(loaded, tokenizer, asked, names, max_steps, measure, max_new_tokens, **choice)
    if not output.write(found):
        print(found.table())


def _check(context: typer.Context) -> None:
    """Refuse options of `explain` that do not go together."""
    given = context.params
    if given["compare"] and given["method"] is not None:
        raise PertokenError("--compare shows all methods; leave --method out")
    if given["target"] is not None and shared.given(context, "max_new_tokens"):
        raise PertokenError(
            "--target and --max-new-tokens do not go together; leave one of them out"
        )
    if given["target"] == "":
        raise PertokenError("the target is empty")
    if given["top"] < 0:
        raise PertokenError(f"--top must be 0 or more, got {given['top']}")
    if not given["compare"]:
        if shared.given(context, "draws"):
            raise PertokenError("--draws goes with --compare")
        _check_max_steps(context, [given["method"] or "reagent"])
    _check_foil(given["quantity"], given["foil"])


def _check_max_steps(context: typer.Context, methods: list[str]) -> None:
    if "reagent" not in methods and shared.given(context, "max_steps"):
        raise PertokenError("--max-steps goes with the method reagent")


def _attribute(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    target: Any,
    method: str,
    quantity: str | Quantity,
    seed: int,
    options: dict[str, Any],
) -> tuple[TokenSignal, float]:
    """What a method says, and the seconds it took; what may last is announced."""
    from pertoken.attribute import attribute

    _announce(model, tokenizer, prompt, target, method, options)
    began = time.perf_counter()
    with progress_bar() as tell:
        signal = attribute(
            model,
            tokenizer,
            prompt,
            target,
            method,
            quantity,
            seed=seed,
            progress=tell,
            **options,
        )
    return signal, time.perf_counter() - began


def _evaluate(
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    names: list[str] | None,
    max_steps: int,
    quantity: str | Quantity,
    target: Any,
    **choice: Any,
) -> Faithfulness:
    from pertoken.attribute import METHODS, evaluate_attribution

    methods = list(METHODS) if names is None else names
    options = {"reagent": {"max_steps": max_steps}} if "reagent" in methods else {}
    _announce_all(model, tokenizer, prompts, target, methods, options, choice["draws"])
    if isinstance(target, int):
        choice["target"] = target  # a text comes with its prompt
    with progress_bar() as tell:
        return evaluate_attribution(
            model,
            tokenizer,
            prompts,
            names,
            quantity=quantity,
            options=options,
            progress=tell,
            **choice,
        )


def _load(
    model: str, dtype: str | None, quantity: str, foil: str | None
) -> tuple[Any, Any, str | Quantity]:
    """Model, tokenizer and what is explained; a wrong quantity is said before loading."""
    from pertoken.attribute.api import foil_of
    from pertoken.attribute.quantity import find

    if foil is None:
        find(quantity)

    loaded, tokenizer = shared.load(model, dtype)
    return loaded, tokenizer, quantity if foil is None else foil_of(tokenizer, foil)


def _check_foil(quantity: str, foil: str | None) -> None:
    if quantity == "contrast" and not foil:
        raise PertokenError('a contrast needs a token to compare with: --foil " Lyon"')
    if foil is not None and quantity != "contrast":
        raise PertokenError("--foil goes with --quantity contrast")


def _as_prompt(tokenizer: Any, text: str, no_chat: bool) -> Any:
    """A message of a chat where there is a template, else the text."""
    if no_chat or not getattr(tokenizer, "chat_template", None):
        return text
    return [{"role": "user", "content": text}]


def _announce(
    model: Any, tokenizer: Any, prompt: Any, target: Any, method: str, options: dict[str, Any]
) -> None:
    """What a run that may last will take, on standard error."""
    from pertoken.attribute import estimate_cost

    cost = estimate_cost(model, tokenizer, prompt, target, method, **options)
    if cost.seconds[1] > LONG:
        typer.echo(f"{method}: {cost}", err=True)


def _announce_all(
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    target: Any,
    methods: list[str],
    options: dict[str, Any],
    draws: int,
) -> None:
    """What all methods on all prompts will take, by the prompt of middle length, if it may last."""
    from pertoken.attribute._question import ask
    from pertoken.attribute.api import Cost, cost, seconds_of_row

    typical = sorted(prompts, key=lambda prompt: len(str(prompt)))[len(prompts) // 2]
    pair: tuple[Any, Any] = typical if isinstance(typical, tuple) else (typical, target)
    question = ask(model, tokenizer, *pair)
    each = seconds_of_row(question)
    costs = [cost(question, name, options.get(name, {}), each) for name in methods]
    # The figures: two metrics of every method and of random, and the text whole and without all.
    drawn = (2 * draws * (len(methods) + 1) + 2) * len(question.targets)

    def total(end: int) -> tuple[int, float]:
        rows = drawn + sum(one.rows[end] for one in costs)
        seconds = drawn * each + sum(one.seconds[end] for one in costs)
        return rows * len(prompts), seconds * len(prompts)

    (low, least), (high, most) = total(0), total(1)
    all_of_it = Cost((low, high), (least, most), max((one.megabytes for one in costs), default=0.0))
    if most > LONG:
        several = "prompts" if len(prompts) > 1 else "prompt"
        typer.echo(f"{len(methods)} methods, {len(prompts)} {several}: {all_of_it}", err=True)


def _show(signal: TokenSignal, top: int) -> None:
    """The coloured text and the tokens that mattered most."""
    from rich.console import Console

    Console().print(signal)
    for line in top_lines(signal, top):
        print(line)


def top_lines(signal: TokenSignal, count: int) -> list[str]:
    """The tokens with the largest values, a line each.

    >>> from pertoken.signal import TokenSignal
    >>> top_lines(TokenSignal("to be", [0.5, -1.0], [(0, 2), (2, 5)], "weight"), 1)
    ["    -1  ' be'"]
    """
    return [f"{top.value:>6.3g}  {top.token!r}" for top in signal.top(count)]


def _show_comparison(found: Faithfulness, top: int) -> None:
    """The methods' texts under each other and their table."""
    from rich.console import Console

    (signals,) = found.signals
    console = Console()
    for signal in signals.values():
        console.print(signal)
        words = ", ".join(repr(each.token) for each in signal.top(top))
        print(f"most: {words}\n")
    print(found.table())
