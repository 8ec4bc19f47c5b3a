"""The catalogue: one card per paper, read from `catalog.toml`; methods resolved on first use.

Whether a method is ready is never written down: it follows from its file and its report. Other
packages add cards by entry points of the group `pertoken.methods`, see `pertoken._third_party`.
"""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pertoken.errors import PertokenError, nearest

__all__ = ["FAMILIES", "PLUGS", "Card", "baselines", "card", "get", "methods", "reports_dir"]

Status = Literal["ready", "built", "planned"]

FAMILIES = {
    "tokenize": "text to ids",
    "attribute": "which input tokens mattered",
    "prune": "drop tokens",
    "cache": "keys and values",
    "decode": "the next ids",
    "train": "one loss or weight per token",
    "nets": "architectures",
    "probe": "measure a model or tokenizer",
}
"""Family -> what it acts on, in the order of a token's life; each is a folder of the package."""

PLUGS = {
    "generate": "model.generate(..., custom_generate=method)",
    "logits": "model.generate(..., logits_processor=[method])",
    "cache": "model.generate(..., past_key_values=method)",
    "hooks": "with method(model): model.generate(...)",
    "text": "a function over text and a model",
    "tokenizer": "a tokenizer made from a tokenizer",
    "loss": "a pure function on tensors [batch, time]",
    "net": "a PreTrainedModel",
    "probe": "a function that measures a model or a tokenizer",
}
"""Plug -> what a user writes: how a method meets a model."""

_PACKAGE = Path(__file__).parent
_NOT_WRITTEN = "{slug} is not written yet"  # what a scaffolded method raises


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the catalogue knows of one method.

    slug: its name on the command line and in `get`. plug: how it meets a model, one of `PLUGS`.
    entry: "module:object", None until the method is written. avoid_when, cost: of every written
    method, a sentence each. headline_row: the metric of its report that stands for the claim.
    baseline: a reference for comparisons rather than a paper of the list.
    """

    slug: str
    title: str
    family: str
    plug: str
    does: str
    use_when: str
    avoid_when: str = ""
    cost: str = ""
    headline: str = ""
    headline_row: str | None = None
    date: str = ""
    arxiv: str | None = None
    authors: tuple[str, ...] = ()
    code: str | None = None
    entry: str | None = None
    call: str | None = None
    baseline: bool = False

    @property
    def package(self) -> str:
        """The package whose method it is: "pertoken", or the one that brought the card."""
        return self.entry.split(":")[0].split(".")[0] if self.entry else "pertoken"

    @property
    def path(self) -> Path | None:
        """The source file of the method, None where it has no entry or the file is not there.

        Nothing is imported, of other packages neither.
        """
        if self.entry is None:
            return None
        inside = self.entry.partition(":")[0].split(".")[1:]
        for folder in _folders(self.package):
            module = folder.joinpath(*inside)
            candidates = [module / "__init__.py", *([module.with_suffix(".py")] if inside else [])]
            for path in candidates:
                if path.is_file():
                    return path
        return _single_file(self.package) if not inside else None

    @property
    def report(self) -> dict[str, Any] | None:
        """The report of the last reproduction, None where there is none.

        Raises PertokenError where the file is not a report. Methods of other packages have none.
        """
        if self.package != "pertoken":
            return None
        path = reports_dir() / f"{self.slug}.json"
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            rows = report["rows"]
            if not all(isinstance(row["metric"], str) for row in rows):
                raise TypeError("a metric is not text")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise PertokenError(
                f"{path} is not a report ({error}); "
                f"run `pertoken reproduce {self.slug}` to replace it"
            ) from None
        return dict(report)

    @property
    def status(self) -> Status:
        """ "planned" until the method is written, "built" until it has a report, then "ready".

        Looks at files only; nothing is imported.
        """
        if not self._written():
            return "planned"
        report = self.report
        return "ready" if report is not None and report["rows"] else "built"

    @property
    def bars(self) -> tuple[int, int] | None:
        """(bars that hold, bars declared) of the report, None without a report."""
        report = self.report
        if report is None:
            return None
        judged = [row for row in report["rows"] if row.get("bar")]
        return sum(bool(row.get("holds")) for row in judged), len(judged)

    def to_dict(self) -> dict[str, Any]:
        """All fields and the status, as plain JSON values."""
        return {**asdict(self), "authors": list(self.authors), "status": self.status}

    def load(self) -> Any:
        """Import and return the method."""
        if self.entry is None or self.path is None:
            raise PertokenError(
                f"{self.slug} is planned, not there yet; `pertoken list` shows what is"
            )
        module, _, name = self.entry.partition(":")
        if self.package == "pertoken":
            return getattr(import_module(module), name)
        try:
            return getattr(import_module(module), name)
        except Exception as error:
            raise PertokenError(
                f"{self.slug} of the package {self.package} cannot be loaded: {self.entry} raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def _written(self) -> bool:
        path = self.path
        if path is None or self.entry is None:
            return False
        if self.package != "pertoken":
            return True
        name = re.escape(self.entry.partition(":")[2])
        text = path.read_text(encoding="utf-8")
        defined = re.search(
            rf"^(class|def) {name}\b|^{name}\b.*=|\bimport\b.*\b{name}\b", text, re.M
        )
        return defined is not None and _NOT_WRITTEN.format(slug=self.slug) not in text


def methods() -> list[Card]:
    """The papers of the catalogue by family and slug, then the methods of other packages.

    >>> [card.slug for card in methods() if card.family == "cache"]
    ['kv-direct', 'plt-kv']
    """
    return [card for card in _cards().values() if not card.baseline]


def baselines() -> list[Card]:
    """The references that methods are compared with; `get` knows them too.

    >>> [card.slug for card in baselines() if card.family == "decode"]
    ['balanced', 'lookahead', 'plain', 'prompt-lookup', 'suffix']
    """
    return [card for card in _cards().values() if card.baseline]


def card(slug: str) -> Card:
    """The card of a method or baseline.

    Raises PertokenError, with the nearest names, where there is none.

    >>> card("goose").arxiv
    '2604.02047'
    >>> card("gose")
    Traceback (most recent call last):
    pertoken.errors.PertokenError: unknown method 'gose' (did you mean 'goose'?)...
    """
    cards = _cards()
    if slug not in cards:
        raise PertokenError(
            f"unknown method {slug!r}{nearest(slug, cards)}; `pertoken list` shows all"
        )
    return cards[slug]


def get(slug: str) -> Any:
    """The method itself, imported now: ``get("goose")`` is the class `pertoken.decode.Goose`.

    Raises PertokenError where the name is unknown or the method is not written yet.
    """
    return card(slug).load()


def reports_dir() -> Path:
    """The folder of the reports: the source tree's, else the copy inside the installed package."""
    root = source_tree()
    return _PACKAGE / "_reports" if root is None else root / "reports"


def source_tree() -> Path | None:
    """The root of the checkout this package is imported from, None for an installed package."""
    root = _PACKAGE.parent.parent
    return root if (root / "pyproject.toml").is_file() and _PACKAGE.parent.name == "src" else None


def parse(text: str) -> dict[str, Card]:
    """The cards of a catalogue's text, by slug; PertokenError where a row is not sound."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PertokenError(f"the catalogue is not TOML: {error}") from None
    cards: dict[str, Card] = {}
    for kind in ("paper", "baseline"):
        for row in tables.get(kind, []):
            fields = {**row, "authors": tuple(row.get("authors", ()))}
            try:
                new = Card(**fields, baseline=kind == "baseline")
            except TypeError as error:
                where = row.get("slug", "without a slug")
                raise PertokenError(f"catalogue row {where}: {error}") from None
            if new.slug in cards:
                raise PertokenError(f"catalogue row {new.slug}: the slug is there twice")
            if problem := unsound(new):
                raise PertokenError(f"catalogue row {new.slug}: {problem}")
            cards[new.slug] = new
    return cards


def unsound(card: Card) -> str:
    """What is wrong with a card's slug, family or plug; "" where nothing is."""
    for field in ("slug", "title", "family", "plug", "does", "use_when"):
        if not isinstance(getattr(card, field), str):
            return f"its {field} is no text"
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", card.slug):
        return f"{card.slug!r} is no slug: lower-case words joined by '-', as in my-paper"
    if card.family not in FAMILIES:
        return f"no family {card.family!r}{nearest(card.family, FAMILIES)}"
    if card.plug not in PLUGS:
        return f"no plug {card.plug!r}{nearest(card.plug, PLUGS)}"
    return ""


@lru_cache(maxsize=1)
def _cards() -> dict[str, Card]:
    from pertoken._third_party import add_cards

    own = parse((_PACKAGE / "catalog.toml").read_text(encoding="utf-8"))
    return add_cards(own)


def _folders(package: str) -> list[Path]:
    """Where the modules of a package lie; it is not imported."""
    if package == "pertoken":
        return [_PACKAGE]
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return []
    places = spec.submodule_search_locations if spec is not None else None
    return [Path(place) for place in places or ()]


def _single_file(package: str) -> Path | None:
    """The file of a package that is one module."""
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or spec.submodule_search_locations is not None:
        return None
    path = Path(spec.origin)
    return path if path.suffix == ".py" and path.is_file() else None
