"""A page per method of the catalogue: card, algorithm, report, signature, picture."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from _generate.text import as_markdown, table
from pertoken.catalog import FAMILIES, Card, baselines, methods, reports_dir
from pertoken.reproduce._report import Report, Row, read_report
from pertoken.reproduce._table import NO_REASON, figure, number, verdict

# Pages of the gallery that show what a method gives; the others have no picture of their own.
PICTURES = {
    "fiberpo": "gates.html",
    "frugalprompt": "compress.html",
    "goose": "compare.html",
    "kv-direct": "caches.html",
    "number-tokenization": "arithmetic.html",
    "reagent": "explain.html",
    "token-premiums": "premiums.html",
}


def cards() -> list[Card]:
    """Papers and baselines, by family; in a family the papers first."""
    every = [*methods(), *baselines()]
    return [one for family in FAMILIES for one in every if one.family == family]


def pages() -> dict[str, str]:
    """Path -> Markdown: the catalogue, and a page per method."""
    return {"methods/index.md": catalogue()} | {
        f"methods/{one.slug}.md": page(one) for one in cards()
    }


def nav() -> list[Any]:
    """The catalogue, then the methods by family."""
    found: list[Any] = ["methods/index.md"]
    for family in FAMILIES:
        found.append(
            {
                family: [
                    {one.slug: f"methods/{one.slug}.md"} for one in cards() if one.family == family
                ]
            }
        )
    return found


def catalogue() -> str:
    """The page that lists all of them."""
    parts = ["# Methods", "By the place in a token's life that they act on."]
    for family, acts_on in FAMILIES.items():
        rows = [
            (
                f"[{one.slug}]({one.slug}.md)",
                _status(one),
                one.use_when.removeprefix("Use it ").removeprefix("when "),
                "baseline" if one.baseline else _paper(one),
            )
            for one in cards()
            if one.family == family
        ]
        parts += [
            f"## {family}: {acts_on}",
            table(["method", "status", "use it when", "paper"], rows),
        ]
    return "\n\n".join(parts) + "\n"


def page(card: Card) -> str:
    """The page of one method."""
    if card.status == "planned":
        parts = [*_head(card), '!!! note "Planned, not there yet"', *_claim(card)]
        return "\n\n".join(parts) + "\n"
    parts = [*_head(card), *_how(card), *_claim(card), *_measured(card), *_picture(card)]
    module, _, name = (card.entry or "").partition(":")
    parts += [
        "## Signature",
        f"::: {module}.{name}\n    options:\n"
        "      skip_local_inventory: true\n      heading_level: 3",
    ]
    return "\n\n".join(parts) + "\n"


def report_of(card: Card) -> Report | None:
    """The last report of a method; None where there is none or it was a smoke run."""
    path = reports_dir() / f"{card.slug}.json"
    report = read_report(path) if path.is_file() else None
    return None if report is None or report.smoke else report


def _head(card: Card) -> Iterator[str]:
    yield f"# {card.slug}"
    yield f"**{card.title}**"
    facts = [f"family [{card.family}](../methods/index.md)"]
    facts += [", ".join(card.authors)] if card.authors else []
    facts += [card.date] if card.date else []
    facts += [f"[arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv})"] if card.arxiv else []
    facts += [f"[the authors' code]({card.code})"] if card.code else []
    plug = getattr(card, "plug", None)
    facts += [f"plug `{plug}`"] if plug else []
    yield " · ".join([*facts, _status(card)])
    yield card.does
    told = [re.sub(r"^Use it( when)?", r"**\g<0>**", card.use_when)]
    told += [re.sub(r"^Avoid", "**Avoid**", card.avoid_when)] if card.avoid_when else []
    told += [f"**It costs**: {card.cost}"] if card.cost else []
    yield "\n".join(f"- {line}" for line in told)


def _how(card: Card) -> Iterator[str]:
    if card.call:
        yield "## How to call it"
        yield f"```python\n{card.call}\n```"
    if card.path is not None:
        told = ast.get_docstring(ast.parse(card.path.read_text(encoding="utf-8"))) or ""
        yield "## How it works"
        yield as_markdown(told)


def _claim(card: Card) -> Iterator[str]:
    if card.headline:
        yield "## What the paper says"
        yield card.headline


def _measured(card: Card) -> Iterator[str]:
    report = report_of(card)
    if report is None:
        if not card.baseline:
            yield "## What holds here"
            yield f"Not measured yet: `pertoken reproduce {card.slug}`."
        return
    judged = [row for row in report.figures if row.bar]
    held = sum(row.holds is True for row in judged)
    yield "## What holds here"
    machine = report.machine
    yield (
        f"{held} of {len(judged)} bars hold, all fixed before the run: {report.model}, "
        f"{report.settings.get('dtype', 'float32')}, {machine.get('cores')} cores of "
        f"{machine.get('cpu')}, seed {report.seed}, version {report.version}. "
        f"Run it again with `pertoken reproduce {card.slug}`."
    )
    yield table(["what", "paper", "here", "bar", "holds?"], map(_cells, judged))
    careful: dict[str, list[str]] = {}  # caveat -> the bars that hold with it
    for row in judged:
        if row.caveat:
            careful.setdefault(row.caveat, []).append(f"*{row.metric}*")
    if careful:
        yield "What holds, but says less than it seems to:"
        yield "\n".join(f"- {'; '.join(bars)}: {why}" for why, bars in careful.items())
    failed: dict[str, list[str]] = {}  # reason -> the bars that fail for it
    for row in judged:
        if row.holds is False:
            failed.setdefault(row.why or NO_REASON, []).append(f"*{row.metric}*")
    if failed:
        yield "Why what does not hold does not:"
        yield "\n".join(f"- {'; '.join(bars)}: {why}" for why, bars in failed.items())
    rest = [row for row in report.figures if not row.bar]
    if rest:
        shown = table(["what", "paper", "here", "note"], map(_information, rest))
        yield f'??? note "{len(rest)} more rows, for information"'
        yield "\n".join(f"    {line}" for line in shown.splitlines())


def _picture(card: Card) -> Iterator[str]:
    if card.slug in PICTURES:
        name = PICTURES[card.slug]
        yield "## A picture"
        yield (
            f'<iframe class="sample" src="../../gallery/{name}" loading="lazy" '
            f'title="{card.slug}"></iframe>'
        )
        yield f"[The page by itself](../gallery/{name}); [all pages](../gallery.md)."


def _cells(row: Row) -> tuple[str, ...]:
    bar = row.bar.replace(" ", "\N{NO-BREAK SPACE}")
    return row.metric, _published(row), figure(row), bar, verdict(row)


def _information(row: Row) -> tuple[str, ...]:
    return row.metric, _published(row), figure(row), row.why


def _published(row: Row) -> str:
    return number(row.paper) + (f" ({row.paper_setting})" if row.paper_setting else "")


def _status(card: Card) -> str:
    if card.bars is None:
        return card.status
    held, judged = card.bars
    return f"{held} of {judged} bars hold"


def _paper(card: Card) -> str:
    return f"[{card.title}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else card.title
