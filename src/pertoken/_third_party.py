"""Methods of other packages: entry points of the group `pertoken.methods`, each a `pertoken.Card`.

    [project.entry-points."pertoken.methods"]
    my-method = "my_package.cards:MY_METHOD"

Asking `importlib.metadata` costs a tenth of a second, most of it for importing it, and nearly all
environments have no such package: so the files it would read are looked through first. Packages
inside zip files are therefore not found.

A package that cannot be taken in is named in one line of the logger "pertoken" (standard error,
unless the program set up logging) and left out.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from pertoken.catalog import Card, unsound

__all__ = ["GROUP", "add_cards"]

GROUP = "pertoken.methods"


def add_cards(own: Mapping[str, Card]) -> dict[str, Card]:
    """The cards with those of other packages behind them, by package and slug.

    A card of a slug that is taken is refused, whoever has it.
    """
    cards = dict(own)
    for package, name, load in _entries():
        try:
            new = load()
        except (Exception, SystemExit) as error:
            _warn(package, f"its entry {name!r} raised {type(error).__name__}: {error}")
            continue
        if problem := _problem(new):
            _warn(package, f"its entry {name!r} is not sound: {problem}")
        elif new.slug in cards:
            taken = cards[new.slug]
            whose = "pertoken's own" if taken.package == "pertoken" else f"of {taken.package}"
            _warn(
                package,
                f"its method {new.slug!r} ({new.entry}) has the name of one {whose} "
                f"({taken.entry or 'planned'}), which stays",
            )
        else:
            cards[new.slug] = new
    return cards


def _entries() -> list[tuple[str, str, Any]]:
    """Package, name and loader of every entry, by package and name."""
    if not any(GROUP in text for text in _texts()):
        return []
    from importlib.metadata import entry_points

    found = []
    for entry in entry_points(group=GROUP):
        package = entry.dist.name if entry.dist else entry.value.partition(":")[0]
        found.append((package, entry.name, entry.load))
    return sorted(found, key=lambda each: each[:2])


def _texts() -> Iterator[str]:
    """The entry point files of all installed packages."""
    for folder in dict.fromkeys(sys.path):
        try:
            with os.scandir(folder or ".") as inside:
                names = [x.path for x in inside if x.name.endswith((".dist-info", ".egg-info"))]
        except OSError:
            continue
        for name in names:
            try:
                with open(os.path.join(name, "entry_points.txt"), encoding="utf-8") as file:
                    yield file.read()
            except (OSError, UnicodeDecodeError):
                continue


def _problem(card: Any) -> str:
    """What is wrong with a card of another package, "" where nothing is."""
    if not isinstance(card, Card):
        return f"it is a {type(card).__name__}, not a pertoken.Card"
    if problem := unsound(card):
        return problem
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", card.entry or ""):
        return f'the entry of {card.slug} must be "package.module:object", got {card.entry!r}'
    if card.package == "pertoken":
        return f"the entry of {card.slug} must be in its own package, got {card.entry!r}"
    if card.path is None:
        return f"the entry of {card.slug}, {card.entry!r}, is in no file"
    return ""


def _warn(package: str, what: str) -> None:
    import logging

    line = " ".join(f"the package {package} is left out of the catalogue: {what}".split())
    logging.getLogger("pertoken").warning(line)
