"""`pertoken probe …`: measure a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.cli._group import Group
from pertoken.cli._probe_words import characters, consistency
from pertoken.errors import PertokenError
from pertoken.result import Part, Result

_Prompt = Annotated[
    str | None,
    typer.Option(help="The text that is read.", show_default="the paper's donor prompt"),
]
_Dtypes = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[,NAME...]",
        help="Try the reconstruction in each of these.",
        show_default="that of the model",
    ),
]
_Layers = Annotated[
    bool, typer.Option("--layers", help="A row for every layer, not only a summary.")
]
_Texts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help=".txt (a document a line) or .jsonl; a built-in sample if not given."
    ),
]
_Fit = Annotated[
    str, typer.Option(metavar="local|global", help="A map for each token, or one for all.")
]
_Classes = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[,NAME...]",
        help="Of scalar, diagonal, orthogonal, low-rank, affine and mlp.",
        show_default="those that are quick",
    ),
]
_Neighbours = Annotated[
    str, typer.Option(metavar="N[,N...]", help="Tokens that a local map is fitted on.")
]
_Tested = Annotated[
    str,
    typer.Option(metavar="NAME[,NAME...]", help="Put into the model in a layer's place; or none."),
]
_Svg = Annotated[
    Path | None, typer.Option("--svg", metavar="PATH", help="Write the pictures as SVG.")
]


def register(app: typer.Typer) -> None:
    """Add the group and its commands."""
    group = typer.Typer(
        cls=Group,
        help="Measure a model: words and letters, its residual stream, what its layers do.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command("characters")(characters)
    group.command("consistency")(consistency)
    group.command("geometry")(geometry)
    group.command("residual")(residual)
    group.command("sinks")(sinks)
    app.add_typer(group, name="probe")


@dataclass(frozen=True)
class Probes(Result):
    """Several probes of one model, by name."""

    settings: dict[str, Any]
    probes: dict[str, Result]
    heading: str = "What the residual stream holds"

    def to_dict(self) -> dict[str, Any]:
        """The settings, and each probe by its name."""
        return self.settings | {name: probe.to_dict() for name, probe in self.probes.items()}

    def rows(self) -> list[dict[str, Any]]:
        """The records of all probes, each with the name of its own."""
        return [
            {"probe": name} | row for name, probe in self.probes.items() for row in probe.rows()
        ]

    def _parts(self) -> list[Part]:
        return [part for probe in self.probes.values() for part in probe._parts()]

    def _page(self) -> str:
        from pertoken._html import report

        return report(f"pertoken: {self.heading}", self.heading, self._repr_html_())

    def summary(self) -> str:
        """The tables with the layers put together."""
        from pertoken.probe import CacheFree

        tables: list[str] = []
        for probe in self.probes.values():
            options = {} if isinstance(probe, CacheFree) else {"layers": False}
            tables.append(probe.table(**options))
        return "\n\n".join(tables)


def residual(
    model: shared.ModelArgument = "smollm2",
    prompt: _Prompt = None,
    dtypes: _Dtypes = None,
    layers: _Layers = False,
    dtype: shared.Dtype = None,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Show that keys and values follow from the residual stream, and what else does (KV-Direct).

    Four measurements: keys and values made again from the stream, greedy decoding without a
    cache, residuals of one prompt put into another's run, the rank of the query-key products.
    """
    if prompt is not None and not prompt.strip():
        raise PertokenError("--prompt is empty: give a text")
    output = shared.Output(as_json, html)
    from pertoken.cli.progress import progress_bar
    from pertoken.probe.patching import DONOR, residual_patching
    from pertoken.probe.query_key import query_key_rank
    from pertoken.probe.residual import cache_free_decoding, dtype_named, reconstruction_error

    text = prompt or DONOR
    tried = _names(dtypes) if dtypes else None
    for name in tried or ():
        dtype_named(name)  # refuses it before a model is loaded
    with progress_bar() as tell:
        tell(f"loading {model}", 0, 0)
        loaded, tokenizer = shared.load(model, dtype)
        ids = list(tokenizer(text)["input_ids"])
        # The quick one first: it refuses what the others would only refuse later.
        rank = query_key_rank(loaded, progress=tell)
        last = residual_patching(loaded, tokenizer, text, positions="last", progress=tell)
        probes = {
            "reconstruction": reconstruction_error(loaded, ids, dtypes=tried, progress=tell),
            "cache_free": cache_free_decoding(loaded, ids, progress=tell),
            "patching_all": residual_patching(loaded, tokenizer, text, progress=tell),
            "patching_last": last,
            "query_key_rank": rank,
        }
    found = Probes({"model": model, "prompt": text}, probes)
    if not output.write(found):
        print(found.table() if layers else found.summary())


def geometry(
    model: shared.ModelArgument = "smollm2",
    texts: _Texts = None,
    fit: _Fit = "local",
    classes: _Classes = None,
    neighbours: _Neighbours = "64",
    tested: _Tested = "low-rank",
    svg: _Svg = None,
    dtype: shared.Dtype = None,
    seed: shared.Seed = 0,
    limit: shared.Limit = None,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Split what each layer does into a tokenwise part and a residual (layer geometry).

    The texts are documents: a token's map is fitted on other documents than its own.
    """
    output = shared.Output(as_json, html, svg=svg)
    counts = _numbers(neighbours)
    from pertoken.cli.progress import progress_bar
    from pertoken.probe.geometry import chosen_classes, layer_geometry
    from pertoken.prompts import read_prompts

    wanted = _names(classes) if classes is not None else None
    put_in = [] if tested == "none" else _names(tested)
    chosen_classes(fit, wanted, put_in)  # refuses them before a model is loaded
    documents = [prompt.text for prompt in read_prompts(texts, limit)]
    with progress_bar() as tell:
        tell(f"loading {model}", 0, 0)
        loaded, tokenizer = shared.load(model, dtype)
        found = layer_geometry(
            loaded,
            tokenizer,
            documents,
            fit=fit,
            classes=wanted,
            neighbours=counts,
            tested=put_in,
            seed=seed,
            progress=tell,
        )
    if svg is not None:
        found.to_svg(svg)
    if not output.write(found):
        print(found.table())


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _numbers(text: str) -> list[int]:
    """The numbers of `--neighbours`."""
    try:
        return [int(word) for word in _names(text)]
    except ValueError:
        raise PertokenError(
            f"--neighbours takes whole numbers with commas between, got {text!r}"
        ) from None


def sinks(
    model: shared.ModelArgument = "smollm2",
    texts: _Texts = None,
    dtype: shared.Dtype = None,
    limit: shared.Limit = None,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Find the tokens that take the attention and the dimensions that are always huge.

    By layer and head: attention on the first token, massive activations, residual sinks with the
    weight of the norms that read them, and what is left of them behind each norm.
    """
    output = shared.Output(as_json, html)
    from pertoken.cli.progress import progress_bar
    from pertoken.probe import find_sinks
    from pertoken.prompts import read_prompts

    read = [each.text for each in read_prompts(texts, limit)]
    with progress_bar() as tell:
        tell(f"loading {model}", 0, 0)
        loaded, tokenizer = shared.load(model, dtype)
        found = find_sinks(loaded, tokenizer, read, progress=tell)
    if not output.write(found, {"name": model} | found.to_dict()):
        print(found.table())
