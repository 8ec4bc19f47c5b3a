"""The audit's section on tokens and morphemes, and the table of several such reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pertoken.tokenize._material import Material
from pertoken.tokenize.morphology import GROUPS, MorphologyReport, morphology_report
from pertoken.tokenize.section import Row, Section

__all__ = ["lines", "morphology"]

_OF_AN_AUDIT = ("%TR", "%Pure", "micro F1", "cut behind the lemma", "cut exactly", "fertility")


def lines(reports: Mapping[str, MorphologyReport]) -> Section:
    """Reports of several tokenizers on the same words: a row per metric, a column for each.

    The boundaries are drawn. The notes are those of the first report, since the words are the same,
    and of each tokenizer its commonest tokens that are not valid.
    """
    rows = [
        Row(group, metric, unit, tuple(each.values[metric] for each in reports.values()))
        for group, metrics in GROUPS.items()
        for metric, unit in metrics.items()
    ]
    seconds = tuple(each.seconds for each in reports.values())
    rows.insert(len(GROUPS["tokens"]), Row("tokens", "seconds", "", seconds))
    shared = next(iter(reports.values()))
    notes = [note for note in shared.notes() if not note.startswith("not valid")]
    for name, report in reports.items():
        if report.invalid:
            notes.append(f"{name}: {report.notes()[-1]}")
    return Section("Tokens and morphemes", tuple(reports), tuple(rows), "boundaries", tuple(notes))


def morphology(tokenizers: Mapping[str, Any], material: Material) -> Section:
    """Tokens and morphemes of sixty Turkish words that were cut by hand.

    A look, not a measurement: `morphology_report` takes a text and an analyser.
    """
    reports = {}
    for number, (name, tokenizer) in enumerate(tokenizers.items()):
        material.tell(f"morphemes, {name}", number, len(tokenizers))
        reports[name] = morphology_report(tokenizer)
    units = {metric: unit for metrics in GROUPS.values() for metric, unit in metrics.items()}
    group = "sixty Turkish words"
    rows = [
        Row(group, metric, units[metric], tuple(each[metric] for each in reports.values()))
        for metric in _OF_AN_AUDIT
    ]
    notes = ["too few words to tell close tokenizers apart: `pertoken turkish` takes a text"]
    return Section(
        "How words meet their morphemes", tuple(tokenizers), tuple(rows), group, tuple(notes)
    )
