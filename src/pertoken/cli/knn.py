"""`pertoken knn …`: a corpus as a memory of a model, and what it does to every token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.cli._group import Group
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from pertoken.decode.knn_lm import KNNMemory

_Texts = Annotated[
    Path,
    typer.Argument(help='.txt (one text), .jsonl with "text" in each line, or a folder of .txt.'),
]
_HeldOut = Annotated[
    Path, typer.Argument(metavar="TEXTS", help="Texts that are not in the store, as for build.")
]
_Store = Annotated[Path, typer.Argument(help="The folder of the store.")]
_Index = Annotated[
    str, typer.Option(metavar="flat|ivfpq", help="flat: exact; ivfpq: for a million entries.")
]
_Context = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        callback=shared.positive,
        help="Tokens the model reads at a time.",
        show_default="1024, or the model's positions",
    ),
]
_KeyDtype = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Of the stored keys; float16 halves the disk."),
]
_K = Annotated[int, typer.Option("--k", callback=shared.positive, help="Neighbours that vote.")]
_Weight = Annotated[float, typer.Option(help="Of the retrieval, 0 to 1.")]
_Temperature = Annotated[
    float | None, typer.Option(help="Of the vote, in squared distance.", show_default="1")
]
_Fit = Annotated[
    Path | None,
    typer.Option(metavar="TEXTS", help="Fit the temperature on these instead, not on TEXTS."),
]
_PromptTokens = Annotated[
    int, typer.Option(metavar="N", callback=shared.positive, help="Tokens of the beginning.")
]


def register(app: typer.Typer) -> None:
    """Add the group and its commands."""
    group = typer.Typer(
        cls=Group,
        help="Look a corpus up while decoding, and measure what that does (KNN-LM).",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command("build")(build)
    group.command("eval")(evaluate)
    group.command("continue")(continue_texts)
    app.add_typer(group, name="knn")


def build(
    texts: _Texts,
    store: _Store,
    index: _Index = "flat",
    context: _Context = None,
    key_dtype: _KeyDtype = None,
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    limit: shared.Limit = None,
    as_json: shared.Json = None,
) -> None:
    """Read a corpus with a model and store what follows what; run it again to go on."""
    from pertoken.cli.progress import progress_bar
    from pertoken.decode.knn_datastore import KNNDatastore

    output = shared.Output(as_json)
    corpus = read_texts(texts, limit)
    loaded, tokenizer = shared.load(model, dtype)
    settings: dict[str, Any] = {"context": context, "index": index, "dtype": key_dtype}
    with progress_bar() as tell:
        made = KNNDatastore.build(loaded, tokenizer, corpus, store, progress=tell, **settings)
    size = sum(path.stat().st_size for path in store.iterdir())
    found = {"path": str(store), "entries": len(made), "bytes": size, "texts": len(made.documents)}
    if not output.write(found):
        typer.echo(f"{store}: {len(made):,} entries of {found['texts']} texts, {size:,} bytes")


def evaluate(
    store: _Store,
    texts: _HeldOut,
    k: _K = 64,
    weight: _Weight = 0.25,
    temperature: _Temperature = None,
    fit: _Fit = None,
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    limit: shared.Limit = None,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Which tokens gain and which lose, by frequency in the store and by class."""
    from pertoken.cli.progress import progress_bar
    from pertoken.decode.knn_analysis import knn_evaluation

    output = shared.Output(as_json, html)
    corpus = read_texts(texts, limit)
    with progress_bar() as tell:
        memory = open_memory(store, model, dtype, k, weight, temperature, fit, tell)
        found = knn_evaluation(memory, corpus, progress=tell)
    if not output.write(found):
        print(found.table())


def continue_texts(
    store: _Store,
    texts: _HeldOut,
    prompt: _PromptTokens = 64,
    k: _K = 64,
    weight: _Weight = 0.25,
    temperature: _Temperature = None,
    fit: _Fit = None,
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    seed: shared.Seed = 0,
    limit: shared.Limit = None,
    max_new_tokens: shared.MaxNewTokens = 128,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Continue the beginnings of texts with the store and without: entropies and quality."""
    from pertoken.cli.progress import progress_bar
    from pertoken.decode.knn_writing import knn_continuations

    output = shared.Output(as_json, html)
    corpus = read_texts(texts, limit)
    run = {"prompt": prompt, "max_new_tokens": max_new_tokens, "seed": seed}
    with progress_bar() as tell:
        memory = open_memory(store, model, dtype, k, weight, temperature, fit, tell)
        found = knn_continuations(memory, corpus, progress=tell, **run)
    if not output.write(found):
        print(found.table())


def open_memory(
    store: Path,
    model: str,
    dtype: str | None,
    k: int,
    weight: float,
    temperature: float | None,
    fit: Path | None,
    tell: Any,
) -> KNNMemory:
    """The memory of a store, its temperature fitted on texts if there are some."""
    from pertoken.decode._knn_build import read_header
    from pertoken.decode.knn_datastore import KNNDatastore
    from pertoken.decode.knn_lm import KNNMemory, check_weight, fit_temperature

    check_weight(weight)
    if fit is not None and temperature is not None:
        raise PertokenError("--fit finds the temperature: leave out --temperature")
    read_header(store)  # no model is loaded for a folder that is no store
    validation = None if fit is None else read_texts(fit, None)
    opened = KNNDatastore(*shared.load(model, dtype), store)
    if validation is not None:
        temperature = fit_temperature(opened, validation, k=k, weight=weight, progress=tell)
    given = {} if temperature is None else {"temperature": temperature}
    return KNNMemory(opened, k=k, weight=weight, **given)


def read_texts(path: Path, limit: int | None) -> list[str]:
    """The texts of a file or folder; PertokenError, which names the place, where there are none."""
    from pertoken.prompts import read_utf8

    if path.is_dir():
        found = [read_utf8(file, "text", exact=True) for file in sorted(path.glob("*.txt"))]
    elif path.suffix.lower() == ".jsonl":
        lines = read_utf8(path, "corpus").split("\n")
        found = [
            _text(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()
        ]
    elif path.suffix.lower() == ".txt" or not path.exists():
        found = [read_utf8(path, "corpus", exact=True)]
    else:
        raise PertokenError(f"texts are read from .txt, .jsonl or a folder of .txt, not {path}")
    if not any(text.strip() for text in found):
        raise PertokenError(f"the corpus {path} is empty")
    return found[:limit]


def _text(line: str, place: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        raise PertokenError(f'{place}: an object such as {{"text": "…"}} is wanted') from None
    if not isinstance(text, str):
        raise PertokenError(f'{place}: "text" must hold text, not {type(text).__name__}')
    return text
