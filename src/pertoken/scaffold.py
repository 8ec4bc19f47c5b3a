"""`pertoken new`: the files a paper starts from, and its row of the catalogue."""

from __future__ import annotations

import json
import keyword
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from string import Template

from pertoken.catalog import FAMILIES, PLUGS, Card, parse, source_tree
from pertoken.errors import PertokenError, nearest

__all__ = ["scaffold"]

_TEMPLATES = Path(__file__).parent / "_templates"
_CATALOG = Path("src/pertoken/catalog.toml")
# The plug that most methods of a family have.
_USUAL = {
    "tokenize": "tokenizer",
    "attribute": "text",
    "prune": "hooks",
    "cache": "cache",
    "decode": "generate",
    "train": "loss",
    "nets": "net",
    "probe": "probe",
}


def scaffold(
    slug: str,
    *,
    root: Path | None = None,
    title: str | None = None,
    family: str | None = None,
    plug: str | None = None,
    arxiv: str | None = None,
) -> list[Path]:
    """Write method, test and reproduction of `slug` into a source tree and register it.

    root: the tree, default the one this package is imported from. A slug of the catalogue gets
    its entry point; for any other, title and family are required and a row is added, with the
    plug that is usual in the family if none is given. Returns the paths written, relative to root.
    Writes nothing where one of them would be overwritten: PertokenError, as for a name that cannot
    be a module.
    """
    root = _root(root)
    text = (root / _CATALOG).read_text(encoding="utf-8")
    cards = parse(text)
    if slug in cards:
        card = cards[slug]
        _check_known(card, title=title, family=family, plug=plug, arxiv=arxiv)
    else:
        card = _new_card(slug, cards, title=title, family=family, plug=plug, arxiv=arxiv)
    module = slug.replace("-", "_")
    name = "".join(word.capitalize() for word in slug.split("-"))
    entry = f"pertoken.{card.family}.{module}:{name}"
    if slug in cards:
        text = _insert(text, slug, f'entry = "{entry}"\n')
    else:
        same = [c.slug for c in cards.values() if c.family == card.family and not c.baseline]
        row = _row(card, entry)
        text = _insert(text, same[-1], row) if same else text + row
    parse(text)

    cite = f"{card.title.rstrip('.')} (arXiv {card.arxiv or 'number not known'})."
    words = {
        "slug": slug,
        "title": textwrap.fill(cite, width=96),
        "family": card.family,
        "module": module,
        "name": name,
    }
    files = dict(_files(words))
    package = Path("src/pertoken", card.family, "__init__.py")
    if not (root / package).exists():
        files[package] = f'"""Methods that act on: {FAMILIES[card.family]}."""\n'
    taken = [path for path in files if (root / path).exists()]
    if taken:
        raise PertokenError(f"{taken[0]} is there already; nothing was written")
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content, encoding="utf-8")
    (root / _CATALOG).write_text(text, encoding="utf-8")
    return [*files, _CATALOG]


def _root(root: Path | None) -> Path:
    tree = source_tree() if root is None else root
    if tree is None:
        raise PertokenError(
            "pertoken is installed without its sources; clone them and run there, or give --root"
        )
    if not (tree / _CATALOG).is_file():
        raise PertokenError(f"{tree} is not a source tree of pertoken: it has no {_CATALOG}")
    return tree


def _check_known(card: Card, **given: str | None) -> None:
    if card.entry is not None:
        raise PertokenError(f"{card.slug} is there already: {card.entry}")
    for field, value in given.items():
        if value is not None and value != getattr(card, field):
            raise PertokenError(
                f"the catalogue has {card.slug} with {field} {getattr(card, field)!r}; "
                f"leave out --{field}"
            )


def _new_card(
    slug: str,
    cards: dict[str, Card],
    *,
    title: str | None,
    family: str | None,
    plug: str | None,
    arxiv: str | None,
) -> Card:
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", slug):
        raise PertokenError(f"{slug!r} is no slug: lower-case words joined by '-', as in my-paper")
    if len(slug) > 30:
        raise PertokenError(
            f"{slug!r} is too long for a name that is typed; take at most 30 letters"
        )
    if keyword.iskeyword(slug):
        raise PertokenError(f"{slug!r} is a word of Python; add another, as in {slug}-paper")
    if title is None or family is None:
        raise PertokenError(
            f"{slug} is not in the catalogue{nearest(slug, cards)}; "
            "for a new paper give --title and --family"
        )
    if family not in FAMILIES:
        raise PertokenError(
            f"unknown family {family!r}{nearest(family, FAMILIES)}; "
            f"the families are {', '.join(FAMILIES)}"
        )
    if plug is not None and plug not in PLUGS:
        raise PertokenError(
            f"unknown plug {plug!r}{nearest(plug, PLUGS)}; the plugs are {', '.join(PLUGS)}"
        )
    if not title.strip() or not title.isprintable() or set(title) & set('"\\'):
        raise PertokenError('--title must be one line of text without " and \\')
    if arxiv is not None and not re.fullmatch(r"\d{4}\.\d{4,5}", arxiv):
        raise PertokenError(f"{arxiv!r} is no arXiv number, such as 2604.02047")
    return Card(
        slug=slug,
        title=title.strip(),
        family=family,
        plug=plug or _USUAL[family],
        does="…",
        use_when="Use it when …",
        arxiv=arxiv,
    )


def _row(card: Card, entry: str) -> str:
    fields = {
        "slug": card.slug,
        "title": card.title,
        "arxiv": card.arxiv,
        "family": card.family,
        "plug": card.plug,
        "does": card.does,
        "use_when": card.use_when,
        "headline": "…",
        "entry": entry,
    }
    # A JSON string is a TOML string too.
    lines = [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in fields.items() if v]
    return "\n".join(["", "[[paper]]", *lines, ""])


def _insert(text: str, slug: str, new: str) -> str:
    """`text` with `new` behind the last field of the slug's row; all else untouched."""
    lines = text.splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if re.match(rf'slug\s*=\s*"{slug}"', line))
    for i in range(last + 1, len(lines)):
        if lines[i].startswith("["):
            break
        if re.match(r"[a-z_]+\s*=", lines[i]):
            last = i
    return "".join([*lines[: last + 1], new, *lines[last + 1 :]])


def _files(words: dict[str, str]) -> Iterator[tuple[Path, str]]:
    family, module = words["family"], words["module"]
    targets = {
        "method": Path("src/pertoken", family, f"{module}.py"),
        "test": Path("tests", family, f"test_{module}.py"),
        "reproduction": Path("src/pertoken/reproduce", f"{module}.py"),
    }
    for kind, path in targets.items():
        template = Template((_TEMPLATES / f"{kind}.py.txt").read_text(encoding="utf-8"))
        yield path, template.substitute(words)
