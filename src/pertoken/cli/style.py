"""`pertoken style`: learn a style from texts, and see what it does to a model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from pertoken.cli import options as shared
from pertoken.cli._group import Group
from pertoken.errors import PertokenError

group = typer.Typer(
    cls=Group,
    help="Learn a style from texts, and see what it does to a model.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Corpus = Annotated[
    list[Path],
    typer.Argument(metavar="FILE...", help='A text each, or .jsonl with {"text": "…"} lines.'),
]
_Out = Annotated[Path, typer.Option(metavar="FILE", help="The style file to write.")]
_Smoothing = Annotated[
    str,
    typer.Option(
        metavar="add-k|jelinek-mercer",
        help="Each order by itself, or mixed with the next lower one.",
    ),
]
_Style = Annotated[Path, typer.Argument(metavar="STYLE", help="A file of `style train`.")]
_Strengths = Annotated[
    str | None,
    typer.Option(metavar="X[,X...]", help="Numbers from 0 to 1; eight if not given."),
]
_Normalize = Annotated[
    str | None,
    typer.Option(metavar="gap", help="Divide each step by its largest gain (not the paper's)."),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(group, name="style")


@group.command("train")
def train(
    corpus: _Corpus,
    out: _Out,
    smoothing: _Smoothing = "add-k",
    model: shared.Model = "smollm2",
    as_json: shared.Json = None,
) -> None:
    """Count the n-grams of texts in the tokens of a model, and write them as a style."""
    from pertoken.decode.ngram_style import NGramStyle
    from pertoken.loading import load_tokenizer

    output = shared.Output(as_json, out=out)
    texts = [text for file in corpus for text in _texts(file)]
    if not any(texts):
        raise PertokenError("the corpus is empty: there is no token to learn a style from")
    began = time.perf_counter()
    style = NGramStyle.train(texts, load_tokenizer(model), smoothing=smoothing)  # type: ignore[arg-type]
    style.save(out)
    counted = style.corpus
    found = {
        "path": str(out),
        "tokenizer": counted.tokenizer,
        "texts": counted.texts,
        "tokens": counted.tokens,
        "ngrams": [len(table.keys) for table in counted.tables],
        "bytes": out.stat().st_size,
        "seconds": time.perf_counter() - began,
    }
    if not output.write(found):
        grams = ", ".join(f"{number:,}" for number in found["ngrams"])  # type: ignore[attr-defined]
        typer.echo(
            f"{out}: {counted.tokens:,} tokens of {counted.texts:,} texts in the tokens of "
            f"{counted.tokenizer}; different n-grams of order 1, 2, 3: {grams}; "
            f"{found['seconds']:.1f} s"
        )


@group.command("sweep")
def sweep(
    style: _Style,
    prompts: shared.Prompts = None,
    strengths: _Strengths = None,
    normalize: _Normalize = None,
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    seed: shared.Seed = 0,
    limit: shared.Limit = None,
    max_new_tokens: shared.MaxNewTokens = 60,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Continue prompts at several strengths of a style: perplexities, divergence, repetition."""
    from pertoken.cli.progress import progress_bar
    from pertoken.decode.ngram_style import NGramStyle, check_strength
    from pertoken.decode.style_figures import OPENINGS, STRENGTHS, style_sweep
    from pertoken.prompts import read_prompts

    output = shared.Output(as_json, html)
    wanted = STRENGTHS if strengths is None else _numbers(strengths)
    for one in wanted:
        check_strength(one)
    if normalize not in (None, "gap"):
        raise PertokenError(f"--normalize takes gap, not {normalize!r}")
    texts = [one.text for one in read_prompts(prompts, limit)] if prompts else OPENINGS[::2][:limit]
    if not style.is_file():
        raise PertokenError(f"there is no style file {style}")
    loaded, tokenizer = shared.load(model, dtype)
    learnt = NGramStyle.load(style, tokenizer)
    with progress_bar() as tell:
        found = style_sweep(
            loaded,
            tokenizer,
            learnt,
            texts,
            strengths=wanted,
            normalize=normalize,
            max_new_tokens=max_new_tokens,
            seed=seed,
            progress=tell,
        )
    if not output.write(found):
        typer.echo(found.table())


def _texts(file: Path) -> list[str]:
    """The texts of a file: those of its JSON lines, or the whole of it as one."""
    from pertoken.prompts import read_prompts, read_utf8

    if file.suffix.lower() == ".jsonl":
        return [one.text for one in read_prompts(file)]
    return [read_utf8(file, "text file")]


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them.

    >>> _numbers("0, 0.1")
    (0.0, 0.1)
    """
    try:
        return tuple(float(one) for one in text.split(","))
    except ValueError:
        raise PertokenError(f"--strengths takes numbers such as 0,0.1,0.5, not {text!r}") from None
