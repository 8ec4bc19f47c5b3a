"""`pertoken explain` and `pertoken evaluate-attribution`: which tokens mattered, how sure is it."""

from __future__ import annotations

import json
import sys
import time
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.cli.progress import progress_bar
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from pertoken.attribute import Faithfulness, Quantity
    from pertoken.signal import TokenSignal

LONG = 10.0  # seconds; an estimate is shown for what may take longer

MODEL = Annotated[str, typer.Option(help="Hub id, folder, .gguf file or short name.")]
DTYPE = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float64; the device's default.")
]
QUANTITY = Annotated[
    str,
    typer.Option(help="What is explained: probability, log-probability, logit, entropy, contrast."),
]
MAX_STEPS = Annotated[
    int, typer.Option(help="Steps of reagent at most (3000 in the paper's settings).")
]
SEED = Annotated[int, typer.Option(help="Of the random draws.")]
DRAWS = Annotated[int, typer.Option(help="Random draws of the faithfulness figures.")]
JSON = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write JSON.")]
NO_CHAT = Annotated[
    bool, typer.Option("--no-chat", help="The bare prompt, without the chat template.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("explain")(explain)
    app.command("evaluate-attribution")(evaluate)


def explain(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - or nothing reads it from a pipe.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="The text to explain; what the model writes next if not given."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="How many tokens the model writes, without --target; 1.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="reagent, attention, integrated-gradients …", show_default="reagent"),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="All methods, with their faithfulness and seconds.")
    ] = False,
    quantity: QUANTITY = "probability",
    foil: Annotated[
        str | None, typer.Option(help="With --quantity contrast: why not this token.")
    ] = None,
    top: Annotated[int, typer.Option(help="List so many tokens.")] = 5,
    model: MODEL = "smollm2",
    dtype: DTYPE = None,
    max_steps: MAX_STEPS = 100,
    draws: DRAWS = 20,
    seed: SEED = 0,
    no_chat: NO_CHAT = False,
    as_json: JSON = None,
    html: Annotated[Path | None, typer.Option(help="Write a page.")] = None,
) -> None:
    """Show which tokens of a prompt led to what follows it."""
    if compare and method is not None:
        raise PertokenError("--compare shows all methods; leave --method out")
    if target is not None and tokens is not None:
        raise PertokenError("--target and --tokens do not go together; leave one of them out")
    if target == "":
        raise PertokenError("the target is empty")
    if top < 0:
        raise PertokenError(f"--top must be 0 or more, got {top}")
    _check_foil(quantity, foil)
    _check_outputs(as_json, html)
    text = _prompt(prompt)
    wanted = 1 if tokens is None else tokens
    name = method or "reagent"

    from pertoken.attribute import attribute, methods

    methods.find(name)  # a wrong name is said before the model is loaded
    loaded, tokenizer, measure = _load(model, dtype, quantity, foil)
    given = _as_prompt(tokenizer, text, no_chat)
    if compare:
        pair = given if target is None else (given, target)
        found = _evaluate(
            loaded, tokenizer, [pair], None, measure, wanted, draws, "hellinger", seed, max_steps
        )
        _show_comparison(found, top, as_json, html)
        return
    options = {"max_steps": max_steps} if name == "reagent" else {}
    aim: Any = wanted if target is None else target
    _announce(loaded, tokenizer, given, aim, name, options)
    began = time.perf_counter()
    with progress_bar() as tell:
        signal = attribute(
            loaded,
            tokenizer,
            given,
            aim,
            name,
            measure,
            seed=seed,
            progress=lambda done, total: tell(name, done, total),
            **options,
        )
    seconds = time.perf_counter() - began
    if html:
        from pertoken._files import write_whole

        write_whole(html, signal.to_html())
    result = {"method": name, "seconds": seconds, "signal": signal.to_dict()}
    if not _write_json(result, as_json):
        _show(signal, top)
        typer.echo(f"{seconds:.2f} s; --compare says how faithful this is", err=True)


def evaluate(
    data: Annotated[Path, typer.Argument(help="Prompts: .jsonl, or .txt with one a line.")],
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME…", help="Attribution methods; all if not given."),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Target tokens the model writes per prompt.")] = 1,
    quantity: QUANTITY = "probability",
    distance: Annotated[
        str, typer.Option(metavar="hellinger|repo", help="The paper's, or that of its code.")
    ] = "hellinger",
    limit: Annotated[int | None, typer.Option(help="Only the first N prompts.")] = None,
    model: MODEL = "smollm2",
    dtype: DTYPE = None,
    max_steps: MAX_STEPS = 100,
    draws: DRAWS = 20,
    seed: SEED = 0,
    no_chat: NO_CHAT = False,
    as_json: JSON = None,
) -> None:
    """Measure how faithful attribution methods are on your prompts."""
    from pertoken.prompts import read_prompts

    prompts = read_prompts(data, limit)
    names = None
    if methods is not None:
        names = [name.strip() for name in methods.split(",") if name.strip()]
    _check_foil(quantity, None)
    _check_outputs(as_json, None)

    from pertoken.attribute.methods import find

    for name in names or []:
        find(name)
    loaded, tokenizer, measure = _load(model, dtype, quantity, None)
    asked = [_as_prompt(tokenizer, prompt.text, no_chat) for prompt in prompts]
    found = _evaluate(
        loaded, tokenizer, asked, names, measure, tokens, draws, distance, seed, max_steps
    )
    if not _write_json(found.to_dict(), as_json):
        print(found.table())


def _evaluate(
    model: Any,
    tokenizer: Any,
    prompts: list[Any],
    names: list[str] | None,
    quantity: str | Quantity,
    tokens: int,
    draws: int,
    distance: str,
    seed: int,
    max_steps: int,
) -> Faithfulness:
    from pertoken.attribute import evaluate_attribution

    has_reagent = names is None or "reagent" in names
    options = {"reagent": {"max_steps": max_steps}} if has_reagent else {}
    with progress_bar() as tell:
        return evaluate_attribution(
            model,
            tokenizer,
            prompts,
            names,
            target=tokens,
            quantity=quantity,
            draws=draws,
            distance=distance,
            seed=seed,
            options=options,
            progress=tell,
        )


def _load(
    model: str, dtype: str | None, quantity: str, foil: str | None
) -> tuple[Any, Any, str | Quantity]:
    """Model, tokenizer and what is explained; a wrong quantity is said before loading."""
    from pertoken.attribute.api import foil_of
    from pertoken.attribute.quantity import find

    if foil is None:
        find(quantity)

    import pertoken

    loaded, tokenizer = pertoken.load(model, dtype=dtype, kind="decoder")
    return loaded, tokenizer, quantity if foil is None else foil_of(tokenizer, foil)


def _check_foil(quantity: str, foil: str | None) -> None:
    if quantity == "contrast" and not foil:
        raise PertokenError('a contrast needs a token to compare with: explain … --foil " Lyon"')
    if foil is not None and quantity != "contrast":
        raise PertokenError("--foil goes with --quantity contrast")


def _check_outputs(as_json: str | None, html: Path | None) -> None:
    from pertoken._files import check_target

    targets = [Path(as_json)] if as_json not in (None, "-") else []
    for target in [*targets, *([html] if html else [])]:
        check_target(target)
    if html and html in targets:
        raise PertokenError(f"--json and --html both want to write {html}")


def _prompt(prompt: str | None) -> str:
    """The prompt from the command line, or all of standard input; empty is refused."""
    if prompt is None and sys.stdin.isatty():
        raise PertokenError('give a prompt: pertoken explain "The capital of France is"')
    if prompt is None or prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise PertokenError(f"the prompt is not UTF-8 (byte {error.start + 1})") from None
    if not prompt.strip():
        raise PertokenError("the prompt is empty")
    return prompt


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


def _write_json(result: dict[str, Any], as_json: str | None) -> bool:
    """Write the result if asked to; was it to standard output, so that nothing else may go?"""
    from pertoken._files import write_whole

    if as_json is None:
        return False
    text = json.dumps(result, ensure_ascii=False, indent=1, allow_nan=False)
    if as_json == "-":
        print(text)
        return True
    write_whole(Path(as_json), text + "\n")
    return False


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


def _show_comparison(found: Faithfulness, top: int, as_json: str | None, html: Path | None) -> None:
    """The methods' texts under each other and their table."""
    from rich.console import Console

    from pertoken._files import write_whole

    (signals,) = found.signals
    if html:
        write_whole(html, comparison_page(found))
    plain = {name: signal.to_dict() for name, signal in signals.items()}
    if _write_json({**found.to_dict(), "signals": plain}, as_json):
        return
    console = Console()
    for signal in signals.values():
        console.print(signal)
        words = ", ".join(repr(each.token) for each in signal.top(top))
        print(f"most: {words}\n")
    print(found.table())


def comparison_page(found: Faithfulness) -> str:
    """A page with the table and every method's text, without anything from outside."""
    from pertoken._html import document
    from pertoken._signal_html import fragment

    (signals,) = found.signals
    texts = "\n".join(fragment(signal) for signal in signals.values())
    body = f"""\
<div style="font-family: sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em">
<h1>Which tokens mattered</h1>
<pre style="overflow-x: auto">{escape(found.table())}</pre>
{texts}
</div>"""
    return document("which tokens mattered", body)
