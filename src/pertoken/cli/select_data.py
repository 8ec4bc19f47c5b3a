"""`pertoken select-data`: keep the documents that teach."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from pertoken.train import NgramScorer, Preselection

_In = Annotated[
    Path, typer.Argument(metavar="IN", help="A .jsonl or .parquet file, or a folder of either.")
]
_Out = Annotated[Path, typer.Argument(metavar="OUT", help="A file of the same kind.")]
_Keep = Annotated[float, typer.Option(help="Share of all characters that is kept, in (0, 1].")]
_Scorer = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A scorer that --save-scorer wrote.")
]
_Models = Annotated[
    str | None,
    typer.Option(
        metavar="NAME=ABILITY,…",
        help="Models and a number for the ability of each, higher is abler: a scorer is learned "
        "from them.",
    ),
]
_Sample = Annotated[
    int,
    typer.Option(metavar="N", callback=shared.positive, help="Documents that the models read."),
]
_Save = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Keep the scorer that was learned.")
]
_Jobs = Annotated[
    int, typer.Option(metavar="N", callback=shared.positive, help="Processes that score.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("select-data")(select_data)


def select_data(
    source: _In,
    out: _Out,
    keep: _Keep = 0.1,
    scorer: _Scorer = None,
    models: _Models = None,
    sample: _Sample = 2000,
    margin: Annotated[
        float, typer.Option(help="Pairs of models whose abilities differ no more do not count.")
    ] = 0.0,
    save_scorer: _Save = None,
    field: Annotated[str, typer.Option(help="Where a document's text is.")] = "text",
    jobs: _Jobs = 1,
    ray: shared.Ray = False,
    seed: shared.Seed = 0,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Keep the documents that predict models' abilities best (PreSelect).

    Give a --scorer, or --models: several models of known ability, which differ in what they have
    read or in size and have not read these documents. Their losses on a sample tell which documents
    order them rightly, and a classifier learned from that scores all. What is interrupted goes on
    when it is run again.
    """
    from pertoken.cli.progress import delayed_bar
    from pertoken.train import NgramScorer, select_file
    from pertoken.train.pool import checked

    output = shared.Output(as_json, html, out=out, **{"save-scorer": save_scorer})
    if (scorer is None) == (models is None):
        raise PertokenError(
            "give either --scorer FILE or --models, as in --models small=0.31,large=0.42"
        )
    if models is None and save_scorer is not None:
        raise PertokenError("--save-scorer is for a scorer that is learned: give --models")
    checked(source, out, keep)  # before models read anything
    found: Preselection | None = None
    with delayed_bar() as tell:
        if scorer is not None:
            learned: NgramScorer = NgramScorer.load(scorer)
        else:
            found = _learn(source, out, models or "", sample, margin, field, seed, tell)
            learned = found.scorer
            if save_scorer is not None:
                learned.save(save_scorer)
        try:
            kept = select_file(
                source, out, learned, keep, field=field, jobs=jobs, ray=ray, progress=tell
            )
        except KeyboardInterrupt:
            typer.echo(f"scores so far are in {out}.scores; run it again to go on", err=True)
            raise
    values: dict[str, Any] = kept.to_dict()
    if found is not None:
        values["scorer"] = found.to_dict()
    page = found if html is not None and found is not None else kept
    if not output.write(page, values):
        if found is not None:
            typer.echo(found.table() + "\n")
        typer.echo(kept.table())


def _learn(
    source: Path,
    out: Path,
    models: str,
    sample: int,
    margin: float,
    field: str,
    seed: int,
    tell: Any,
) -> Preselection:
    """A scorer from models' losses; these stay in OUT.losses, for a run that goes on."""
    from pertoken.train import preselect, sample_documents

    named, folder = _ability(models), out.with_name(f"{out.name}.losses")
    texts = sample_documents(source, sample, field=field, seed=seed)
    try:
        return preselect(
            list(named),
            list(named.values()),
            texts,
            margin=margin,
            seed=seed,
            folder=folder,
            progress=tell,
        )
    except KeyboardInterrupt:
        if folder.exists():
            typer.echo(f"losses so far are in {folder}; run it again to go on", err=True)
        raise


def _ability(models: str) -> dict[str, float]:
    """Names and abilities of NAME=ABILITY,…

    >>> _ability("small=0.31, large=0.42")
    {'small': 0.31, 'large': 0.42}
    """
    found: dict[str, float] = {}
    for part in models.split(","):
        name, _, number = part.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name.strip() or not math.isfinite(value):
            raise PertokenError(f"--models: {part.strip()!r} is not NAME=ABILITY with a number")
        if name.strip() in found:
            raise PertokenError(f"--models: {name.strip()} is there twice")
        found[name.strip()] = value
    return found
