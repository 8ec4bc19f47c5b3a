"""`pertoken doctor` and `pertoken fetch`: what is here, and getting what is not."""

from __future__ import annotations

from typing import Annotated

import typer

from pertoken.cli import options as shared

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    app.command()(doctor)
    app.command()(fetch)


def doctor(
    short: Annotated[bool, typer.Option("--short", help="Only the essentials.")] = False,
    as_json: shared.Json = None,
) -> None:
    """Show versions, devices, speed, fetched models and data, and what is missing."""
    from pertoken import doctor as checks

    output = shared.Output(as_json)
    facts = checks.diagnose()
    if not output.write(facts):
        print("\n".join(checks.short_lines(facts) if short else checks.long_lines(facts)))


def fetch(
    name: Annotated[str, typer.Argument(help="A model, a tokenizer or a data set, by name.")],
    accept_licence: shared.AcceptLicence = False,
) -> None:
    """Fetch a model, tokenizer or data set into the cache; show where it lies and its licence."""
    from pertoken import loading
    from pertoken.data import DATA_SETS, data_folder
    from pertoken.errors import PertokenError, nearest
    from pertoken.tokenize.public import PUBLIC, tokenizer_folder

    if name in DATA_SETS:
        folder = data_folder(DATA_SETS[name], accept_licence=accept_licence)
        licence = DATA_SETS[name].licence
    elif name in PUBLIC and name not in loading.EMBEDDED:
        folder = tokenizer_folder(PUBLIC[name], accept_licence=accept_licence)
        licence = PUBLIC[name].licence
    else:
        names = list(dict.fromkeys([*loading.EMBEDDED, *PUBLIC, *DATA_SETS]))
        if name not in names and "/" not in name and not name.endswith(".gguf"):
            raise PertokenError(
                f"unknown model, tokenizer or data set {name!r}{nearest(name, names)}: there are "
                f"{', '.join(names)}, and Hub ids (org/name)"
            )
        folder = loading.model_folder(name, accept_licence=accept_licence)
        known = loading.EMBEDDED.get(name)
        licence = known.licence if known else "see its own page or files"
    print(f"{folder}\nlicence: {licence}")
