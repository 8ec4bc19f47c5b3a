"""`pertoken verify`: is this way of decoding lossless, and if not, where?"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.cli.objects import import_object
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from pertoken.testing.setups import Setup


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("verify")(verify)


def verify(
    a: Annotated[
        str | None,
        typer.Argument(help="A slug, hf or hf-prompt-lookup; goose if nothing is named."),
    ] = None,
    against: Annotated[
        str, typer.Option(help="hf (transformers' own generate), plain (our loop) or a slug.")
    ] = "hf",
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file or short name.")] = (
        "smollm2"
    ),
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float64; the device's default.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help=".jsonl or .txt; a built-in sample if not given.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens per prompt.")] = 64,
    limit: Annotated[int | None, typer.Option(help="Only the first N prompts.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of A, such as budget=16; repeatable."),
    ] = None,
    assistant: Annotated[
        str | None, typer.Option(help="A is transformers' generate with this assistant model.")
    ] = None,
    function: Annotated[
        str | None,
        typer.Option("--callable", metavar="MODULE:OBJECT", help="A is this Python object."),
    ] = None,
    sample: Annotated[
        bool,
        typer.Option("--sample", help="Test sampling instead, on tiny models (no model loaded)."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where a way of decoding leaves plain decoding, and whether rounding explains it.

    Exit code: 0 identical or numerical ties only, 1 something is different, 2 a mistake.
    """
    if sum(named is not None for named in (a, assistant, function)) > 1:
        raise PertokenError("name one way of decoding: A, --assistant or --callable")
    if max_new_tokens < 1:
        raise PertokenError(f"--max-new-tokens must be 1 or more, got {max_new_tokens}")
    options = parse_options(option or [])
    from pertoken.prompts import read_prompts

    chosen = [] if sample else read_prompts(prompts, limit)

    from pertoken.testing.verify import as_setup, setup_name
    from pertoken.testing.verify import verify as run

    name = a or ("hf-assistant" if assistant else function) or "goose"
    first: Setup
    if function is not None:
        found = import_object(function, "--callable")
        if not callable(found):
            raise PertokenError(
                f"--callable {function}: this is {type(found).__name__}, not callable"
            )
        first = found(**options) if isinstance(found, type) else as_setup(found, **options)
    elif assistant is not None:
        first = {"assistant_model": None, **options}  # the model is loaded below
    else:
        first = as_setup(name, **options)
    second = as_setup(against)
    loaded, tokenizer = (None, None) if sample else _load(model, dtype)
    if assistant is not None:
        first = {**options, "assistant_model": _assistant(assistant, dtype, loaded)}
    if options:
        name += f" ({', '.join(option or [])})"
    report = run(
        loaded,
        tokenizer,
        chosen,
        first,
        second,
        max_new_tokens=max_new_tokens,
        sample=sample,
        progress=_progress(len(chosen) or None),
        names=(name, against if isinstance(against, str) else setup_name(second)),
    )
    if as_json:
        print(json.dumps(report.to_dict(), indent=2, ensure_ascii=False))
    else:
        print(report.table())
    if not report.lossless:
        raise typer.Exit(1)


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


def _load(name: str, dtype: str | None) -> tuple[Any, Any]:
    import pertoken

    return pertoken.load(name, dtype=dtype, kind="decoder")


def _assistant(name: str, dtype: str | None, model: Any) -> Any:
    """The assistant model; another vocabulary than the model's is refused."""
    if model is None:  # sampling brings tiny models of its own, the assistant's too
        return name
    assistant, _ = _load(name, dtype)
    sizes = [one.config.get_text_config().vocab_size for one in (model, assistant)]
    if sizes[0] != sizes[1]:
        raise PertokenError(
            f"--assistant {name} has {sizes[1]} tokens and the model {sizes[0]}; "
            "assisted decoding needs one vocabulary"
        )
    return assistant


def _progress(total: int | None) -> Any:
    """A progress bar on stderr around an iterable, gone when it is done."""
    from rich.console import Console
    from rich.progress import track

    def watch(items: Iterable[Any]) -> Iterator[Any]:
        console = Console(stderr=True)
        yield from track(
            items,
            description="verifying",
            total=total,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    return watch
