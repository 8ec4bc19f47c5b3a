"""The battery: every method of the catalogue that is written, as its laws take it.

A method is taken from its card as it is. One that needs something, or has laws that do not apply to
it, is a `Subject` in ``SUBJECTS`` of the module ``_battery`` of its family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from pertoken.catalog import baselines, card, methods
from pertoken.testing._arguments import parameters
from pertoken.testing._case import meets_a_model
from pertoken.testing._law_sets import LAWS, Law

__all__ = [
    "DRAWN_ON",
    "SETTING_LAWS",
    "Subject",
    "expected_skips",
    "finished",
    "laws_on",
    "subject",
]


@dataclass(frozen=True)
class Subject:
    """A method as the laws take it.

    skip: law -> why it does not apply; it is not run. refuses: law -> what the method refuses by
    name in it, told in our words; it is run. laws: of its own, in place of or beside its plug's.
    settings: name -> how it is made with another setting, which is run through `SETTING_LAWS`.
    """

    name: str
    plug: str
    method: Any
    skip: Mapping[str, str] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)
    laws: Mapping[str, Law] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def meets_model(self) -> bool:
        """Whether it works on a model at all."""
        return meets_a_model(self.plug, self.method)


def finished() -> list[str]:
    """Slugs of our own methods and baselines that are written."""
    cards = (*methods(), *baselines())
    return [c.slug for c in cards if c.package == "pertoken" and c.status != "planned"]


def subject(slug: str) -> Subject:
    """A method of the catalogue as the battery takes it."""
    own = card(slug)
    known = _of_family(own.family) if own.package == "pertoken" else {}
    return known.get(slug) or Subject(slug, own.plug, own.load())


@lru_cache
def _of_family(family: str) -> dict[str, Subject]:
    """Slug -> subject, of those that a family describes."""
    name = f"pertoken.{family}._battery"
    if find_spec(f"pertoken.{family}") is None or find_spec(name) is None:
        return {}
    return {each.name: each for each in import_module(name).SUBJECTS}


SETTING_LAWS = ("lossless",)
"""The law that every setting is run through; rows of batches under budgets: tests/decode."""

DRAWN_ON = "llama"
"""Where sampling is tested: it sees logits, never the architecture."""


def laws_on(one: Subject, architecture: str) -> tuple[str, ...]:
    """The laws of a method that are run on an architecture."""
    names = {**LAWS[one.plug], **one.laws}
    return tuple(n for n in names if n != "distribution" or architecture == DRAWN_ON)


def expected_skips(one: Subject, laws: Iterable[str]) -> dict[str, str]:
    """Which of these laws are to be skipped, and why; any other skip is a mistake."""
    known = dict(one.skip) | dict(one.refuses)
    if one.plug == "text" and "keep" not in parameters(one.method):
        known["keep = 1"] = "takes no keep"
    if not one.meets_model:
        known |= {"fits the model": "takes no model", "no trace": "takes no model"}
    return {law: known[law] for law in laws if law in known}
