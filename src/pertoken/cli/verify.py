"""`pertoken verify`: is this way of decoding lossless, and if not, where?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.cli.objects import import_object
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from pertoken.testing.setups import Setup


_A = Annotated[
    str | None,
    typer.Argument(help="A slug, hf or hf-prompt-lookup; goose if nothing is named."),
]
_Against = Annotated[
    str, typer.Option(help="hf (transformers' own generate), plain (our loop) or a slug.")
]
_Option = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="An option of A, such as budget=16; repeatable."),
]
_Assistant = Annotated[
    str | None, typer.Option(help="A is transformers' generate with this assistant model.")
]
_Callable = Annotated[
    str | None,
    typer.Option("--callable", metavar="MODULE:OBJECT", help="A is this Python object."),
]
_Sample = Annotated[
    bool,
    typer.Option("--sample", help="Test sampling instead, on tiny models (no model loaded)."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("verify")(verify)


def verify(
    a: _A = None,
    against: _Against = "hf",
    prompts: shared.Prompts = None,
    option: _Option = None,
    assistant: _Assistant = None,
    function: _Callable = None,
    sample: _Sample = False,
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    limit: shared.Limit = None,
    max_new_tokens: shared.MaxNewTokens = 64,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Show where a way of decoding leaves plain decoding, and whether rounding explains it.

    Exit code: 0 identical or numerical ties only, 1 something is different, 2 a mistake.
    """
    if sum(named is not None for named in (a, assistant, function)) > 1:
        raise PertokenError("name one way of decoding: A, --assistant or --callable")
    output = shared.Output(as_json, html)
    options = parse_options(option or [])
    from pertoken.cli.progress import progress_bar
    from pertoken.prompts import read_prompts
    from pertoken.testing.verify import as_setup
    from pertoken.testing.verify import verify as run

    chosen = [] if sample else read_prompts(prompts, limit)
    first = _first(a or "goose", assistant, function, options)
    second = as_setup(against)
    loaded, tokenizer = (None, None) if sample else shared.load(model, dtype)
    if assistant is not None:
        first = {**options, "assistant_model": _assistant(assistant, dtype, loaded)}
    name = a or ("hf-assistant" if assistant else function) or "goose"
    title = f"{name} ({', '.join(option or [])})" if options else name
    with progress_bar() as tell:
        report = run(
            loaded,
            tokenizer,
            chosen,
            first,
            second,
            max_new_tokens=max_new_tokens,
            sample=sample,
            progress=tell,
            names=(title, against),
        )
    if not output.write(report):
        print(report.table())
    if not report.lossless:
        raise typer.Exit(1)


def _first(
    name: str, assistant: str | None, function: str | None, options: dict[str, Any]
) -> Setup:
    """The way of decoding that is asked about; an assistant model is loaded later."""
    from pertoken.testing.verify import as_setup

    if assistant is not None:
        return {"assistant_model": None, **options}
    if function is None:
        return as_setup(name, **options)
    found = import_object(function, "--callable")
    if not callable(found):
        raise PertokenError(f"--callable {function}: this is {type(found).__name__}, not callable")
    made: Setup = found(**options) if isinstance(found, type) else as_setup(found, **options)
    return made


def parse_options(pairs: list[str]) -> dict[str, Any]:
    """Options from "key=value": a value is a JSON value where it reads as one, else text.

    >>> parse_options(["budget=16", "shape=paper", "keep=true"])
    {'budget': 16, 'shape': 'paper', 'keep': True}
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            raise PertokenError(f"--option takes KEY=VALUE, got {pair!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def _assistant(name: str, dtype: str | None, model: Any) -> Any:
    """The assistant model; another vocabulary than the model's is refused."""
    if model is None:  # sampling brings tiny models of its own, the assistant's too
        return name
    assistant, _ = shared.load(name, dtype)
    sizes = [one.config.get_text_config().vocab_size for one in (model, assistant)]
    if sizes[0] != sizes[1]:
        raise PertokenError(
            f"--assistant {name} has {sizes[1]} tokens and the model {sizes[0]}; "
            "assisted decoding needs one vocabulary"
        )
    return assistant
