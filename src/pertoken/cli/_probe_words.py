"""`pertoken probe consistency` and `characters`: what a model makes of words and their letters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.errors import PertokenError

__all__ = ["consistency"]

_Texts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Texts, one a line, or .jsonl; words in [brackets] are replaced, else drawn ones. A "
        "built-in sample if not given.",
    ),
]
_Share = Annotated[
    float, typer.Option(metavar="X", help="Of the words that are no stop words, to be replaced.")
]
_Batch = Annotated[int, typer.Option(metavar="N", callback=shared.positive, help="Asked at once.")]


def consistency(
    model: shared.ModelArgument = "smollm2",
    texts: _Texts = None,
    share: _Share = 0.05,
    batch: _Batch = 8,
    dtype: shared.Dtype = None,
    seed: shared.Seed = 0,
    limit: shared.Limit = None,
    max_new_tokens: shared.OptionalMaxNewTokens = None,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Have words replaced and see whether the text changed or only its tokens (phantom edits).

    As it is and with all encodings of the words masked; then how far the next token depends on
    which tokens write a word.
    """
    output = shared.Output(as_json, html)
    from pertoken.cli.probe import Probes
    from pertoken.cli.progress import progress_bar
    from pertoken.probe import encoding_sensitivity, token_consistency
    from pertoken.prompts import read_prompts

    read = [each.text for each in read_prompts(texts, limit)]
    options: dict[str, Any] = {"share": share, "seed": seed}
    with progress_bar() as tell:
        tell(f"loading {model}", 0, 0)
        loaded, tokenizer = shared.load(model, dtype)
        found = token_consistency(
            loaded,
            tokenizer,
            read,
            mask=True,
            max_new_tokens=max_new_tokens,
            batch=batch,
            progress=tell,
            **options,
        )
        probes: dict[str, Any] = {"consistency": found}
        try:
            probes["sensitivity"] = encoding_sensitivity(
                loaded, tokenizer, read, progress=tell, **options
            )
        except PertokenError as error:  # a tokenizer of bytes has one encoding of each word
            typer.echo(str(error), err=True)
    result = Probes({"model": model}, probes, "Words and their tokens")
    if not output.write(result):
        print(result.table())
