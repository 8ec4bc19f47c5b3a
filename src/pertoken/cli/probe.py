"""`pertoken probe …`: measure a model."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from pertoken.errors import PertokenError


def register(app: typer.Typer) -> None:
    """Add the group and its commands."""
    group = typer.Typer(
        help="Measure a model: what its residual stream holds.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command("residual")(residual)
    app.add_typer(group, name="probe")


def residual(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file or short name.")] = (
        "smollm2"
    ),
    prompt: Annotated[
        str | None,
        typer.Option(help="The text that is read.", show_default="the paper's donor prompt"),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="float32, bfloat16, float16 or float64; the device's default. Repeat it to try "
            "the reconstruction in several; the first is that of the rest."
        ),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="A row for every layer, not only a summary.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show that keys and values follow from the residual stream, and what else does (KV-Direct).

    Four measurements: keys and values made again from the stream, greedy decoding without a
    cache, residuals of one prompt put into another's run, the rank of the query-key products.
    """
    if prompt is not None and not prompt.strip():
        raise PertokenError("--prompt is empty: give a text")

    import pertoken
    from pertoken.cli.progress import progress_bar
    from pertoken.probe.patching import DONOR, residual_patching
    from pertoken.probe.query_key import query_key_rank
    from pertoken.probe.residual import cache_free_decoding, reconstruction_error

    text = prompt or DONOR
    with progress_bar() as tell:
        tell(f"loading {model}", 0, 0)
        loaded, tokenizer = pertoken.load(model, dtype=dtype[0] if dtype else None, kind="decoder")
        ids = list(tokenizer(text)["input_ids"])
        # The quick one first: it refuses what the others would only refuse later.
        rank = query_key_rank(loaded, progress=tell)
        results: dict[str, Any] = {
            "reconstruction": reconstruction_error(loaded, ids, dtypes=dtype, progress=tell),
            "cache_free": cache_free_decoding(loaded, ids, progress=tell),
            "patching_all": residual_patching(loaded, tokenizer, text, progress=tell),
            "patching_last": residual_patching(
                loaded, tokenizer, text, positions="last", progress=tell
            ),
            "query_key_rank": rank,
        }
    if as_json:
        found = {name: result.to_dict() for name, result in results.items()}
        print(json.dumps({"model": model, "prompt": text, **found}, indent=1, ensure_ascii=False))
        return
    for name, result in results.items():
        print(result.table() if name == "cache_free" else result.table(layers=layers), end="\n\n")
