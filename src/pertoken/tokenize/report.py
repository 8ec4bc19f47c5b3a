"""One report on tokenizers, a column each: what they are, what text costs, what survives.

A section is a function (tokenizers by name, material) -> `Section`, that is, rows of figures and
what is drawn of them. `SECTIONS` holds them by name; adding one there is all a new section needs.

The counts use the backend's `encode_batch_fast`, which makes no offsets and no object of Python's
per token, so an audit counts about as fast as the tokenizer itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pertoken.errors import PertokenError, nearest
from pertoken.prompts import check_utf8
from pertoken.result import Part, Result
from pertoken.tokenize import sections as basic
from pertoken.tokenize import sections_vocabulary as vocabulary
from pertoken.tokenize._material import Material, Tell, find_languages
from pertoken.tokenize.load import as_fast, open_tokenizer
from pertoken.tokenize.section import Section
from pertoken.tokenize.sections_morphology import morphology

__all__ = ["SECTIONS", "Audit", "audit"]

FORMAT = 1  # of the JSON form; raised when it changes

SECTIONS: dict[str, Callable[[Mapping[str, Any], Material], Section]] = {
    "overview": basic.overview,
    "text": basic.text,
    "languages": basic.languages,
    "numbers": basic.numbers,
    "fidelity": vocabulary.fidelity,
    "controls": vocabulary.controls,
    "redundancy": vocabulary.redundancy,
    "morphology": morphology,
}
"""The sections of an audit by name, in their order."""


@dataclass(frozen=True)
class Audit(Result):
    """What an audit found: `sections` by name, each with a column for each of `tokenizers`."""

    tokenizers: tuple[str, ...]
    sections: dict[str, Section]

    def to_dict(self) -> dict[str, Any]:
        """A JSON form. A share is 0 to 1; None where a question makes no sense."""
        return {
            "format": FORMAT,
            "tokenizers": list(self.tokenizers),
            "sections": {name: part.to_dict() for name, part in self.sections.items()},
        }

    def rows(self) -> list[dict[str, Any]]:
        """A record per value: section, group, row, unit, tokenizer, value."""
        return [
            {"section": name} | row for name, part in self.sections.items() for row in part.rows()
        ]

    def _parts(self) -> list[Part]:
        return [part for section in self.sections.values() for part in section._parts()]

    def _page(self) -> str:
        from pertoken.tokenize._audit_html import page

        return page(self)


def audit(
    tokenizers: Any,
    languages: Sequence[str] | str | None = None,
    texts: Mapping[str, str | Sequence[str]] | None = None,
    *,
    sections: Sequence[str] | None = None,
    reference: str = "eng",
    accept_licence: bool = False,
    progress: Tell | None = None,
) -> Audit:
    """Report what tokenizers are, what text and languages cost in them, and what survives them.

    tokenizers: one or several names (see `open_tokenizer`) or tokenizers, or a dict from a name of
        yours to either.
    languages: codes such as "en", "deu" or "cmn_hans", or "all"; a choice and the dearest if None.
    texts: your own texts by name, in place of the built-in kinds.
    sections: names in `SECTIONS`; all if None.
    reference: the language that premiums are over.
    progress: called with (what, done, total) as the work goes on.

    Raises PertokenError with one line for an unknown tokenizer, language or section, for a
    tokenizer that has no fast form, and for empty text.

    >>> from tokenizers import Tokenizer, models
    >>> backend = Tokenizer(models.WordLevel({"?": 0, "cat": 1}, unk_token="?"))
    >>> found = audit({"mine": backend}, sections=["overview"])
    >>> found.sections["overview"].lines[0].values
    ('WordLevel',)
    """
    chosen = list(SECTIONS) if sections is None else list(dict.fromkeys(sections))
    for name in chosen:
        if name not in SECTIONS:
            raise PertokenError(
                f"unknown section {name!r}{nearest(name, SECTIONS)}: there are "
                f"{', '.join(SECTIONS)}"
            )
    if not chosen:
        raise PertokenError(f"no section to show: name some of {', '.join(SECTIONS)}")
    own = None if texts is None else {name: _texts(name, text) for name, text in texts.items()}
    if languages is not None and languages != "all":
        find_languages([languages] if isinstance(languages, str) else languages)
    opened = _open(tokenizers, accept_licence, progress)
    material = Material(languages, own, reference, *([progress] if progress else []))
    return Audit(tuple(opened), {name: SECTIONS[name](opened, material) for name in chosen})


def _open(tokenizers: Any, accept_licence: bool, tell: Tell | None) -> dict[str, Any]:
    if isinstance(tokenizers, Mapping):
        named = dict(tokenizers)
    elif isinstance(tokenizers, list | tuple):
        named = {}
        for one in tokenizers:
            name = _name(one)
            while name in named and not isinstance(one, str | Path):
                name += "'"
            named[name] = one
    else:
        named = {_name(tokenizers): tokenizers}
    if not named:
        raise PertokenError("no tokenizer to audit")
    opened = {}
    for number, (name, one) in enumerate(named.items()):
        if tell is not None:
            tell(f"opening {name}", number, len(named))
        if isinstance(one, str | Path):
            opened[str(name)] = open_tokenizer(one, accept_licence=accept_licence)
        else:
            opened[str(name)] = as_fast(one, str(name))
    return opened


def _name(tokenizer: Any) -> str:
    if isinstance(tokenizer, str | Path):
        return str(tokenizer)
    return str(getattr(tokenizer, "name_or_path", "")) or type(tokenizer).__name__


def _texts(name: str, text: str | Sequence[str]) -> list[str]:
    texts = [text] if isinstance(text, str) else list(text)
    if not any(one.strip() for one in texts):
        raise PertokenError(f"the text {name!r} is empty")
    for one in texts:
        check_utf8(one, f"the text {name!r}")
    return texts
