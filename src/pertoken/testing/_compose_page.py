"""The page of `compose`: a table of kinds by kinds, and below it what each cell stands for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pertoken.testing._parts import KINDS, Kind, parts

if TYPE_CHECKING:
    from pertoken.testing.compose import PairResult

_HEAD = """\
# Which methods work together

Every pair of finished methods is tried on a tiny model, and this page is what came of it;
`python -m pertoken.testing.compose` writes it anew. A method acts at one place, and where two
places meet follows what must hold there, whichever methods stand at them: the numbers in the table
lead to these laws below it. *Works*: the law holds for all pairs of the cell. *Refused*: an error
in one line names both, before the model has read anything. *One place*: `generate` has one argument
for both, so they cannot be written down together. *Apart*: the two act at different times and have
nothing to do with each other. How to write a combination down is said in [combine](combine.md).
"""


def page(results: Sequence[PairResult]) -> str:
    """Markdown of the results of `compositions`."""
    cells: dict[tuple[Kind, Kind], list[PairResult]] = {}
    for each in results:
        cells.setdefault(each.kinds, []).append(each)
    kinds = [kind for kind in KINDS if any(kind in pair for pair in cells)]
    notes: dict[str, int] = {}
    rows = [
        [f"**{kind}**", *(_cell(cells.get((kind, other), []), notes) for other in kinds)]
        for kind in kinds
    ]
    listed = [f"{number}. {text}" for text, number in notes.items()]
    return "\n".join(
        [
            _HEAD,
            *_table(["", *kinds], rows),
            "",
            *listed,
            "",
            "The kinds and their methods:",
            "",
            *_table(["kind", "what it is", "methods"], [_members(kind, results) for kind in kinds]),
            "",
        ]
    )


def _cell(results: Sequence[PairResult], notes: dict[str, int]) -> str:
    """What a cell says; its notes are numbered where they are new."""
    said = []
    for outcome in ("works", "refused", "one place", "apart", "broken"):
        found = [each for each in results if each.outcome == outcome]
        if not found:
            continue
        count = "" if len(found) == len(results) else f"{len(found)} "
        note = _note(found, results)
        word = {"works": "work"}.get(outcome, outcome) if count else outcome
        said.append(f"{count}{word} ({notes.setdefault(note, len(notes) + 1)})")
    return ", ".join(said)


def _note(found: Sequence[PairResult], of: Sequence[PairResult]) -> str:
    """The law or reason of results of one outcome; of refusals who is refused, and one line."""
    first, last = found[0], found[-1]
    if first.outcome in ("works", "one place", "apart"):
        return f"{first.line[0].upper()}{first.line[1:]}."
    who = "" if len(found) == len(of) else f"{_who(found, of)}. "
    return f"{who}{last.a} with {last.b}: “{last.line}”"


def _who(found: Sequence[PairResult], of: Sequence[PairResult]) -> str:
    """The pairs in few words: two sets where every one of the first goes with all of the second."""
    ones, others = _names(each.a for each in found), _names(each.b for each in found)
    if len(found) < len(ones) * len(others):
        return ", ".join(f"{each.a} with {each.b}" for each in found)
    sides = []
    for names, every, kind in (
        (ones, _names(each.a for each in of), found[0].kinds[0]),
        (others, _names(each.b for each in of), found[0].kinds[1]),
    ):
        missing = [name for name in every if name not in names]
        if len(missing) < len(names) and len(names) > 1:
            sides.append(f"every {kind}{' but ' if missing else ''}{', '.join(missing)}")
        else:
            sides.append(", ".join(names))
    text = " with ".join(sides)
    return f"{text[0].upper()}{text[1:]}"


def _names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _members(kind: Kind, results: Sequence[PairResult]) -> list[str]:
    tried = {name for each in results for name in (each.a, each.b)}
    names = [part.name for part in parts().values() if part.kind == kind and part.name in tried]
    return [f"**{kind}**", KINDS[kind], ", ".join(names)]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
