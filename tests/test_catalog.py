"""The catalogue is sound, and what is ready is derived from files."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from pertoken import catalog
from pertoken.catalog import FAMILIES, PLUGS, Card, baselines, card, get, methods
from pertoken.errors import PertokenError

ALL = [*methods(), *baselines()]
ROW = {"metric": "accepted per forward", "bar": ">= 1.12", "holds": True}


def make_card(**fields: object) -> Card:
    given = {"slug": "x", "title": "X", "family": "decode", "plug": "generate"}
    return Card(**given | {"does": "…", "use_when": "…"} | fields)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty source tree in the place of the real one."""
    package = tmp_path / "src" / "pertoken"
    (package / "decode").mkdir(parents=True)
    (tmp_path / "reports").mkdir()
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(catalog, "_PACKAGE", package)
    return tmp_path


def test_has_the_papers_and_the_baselines() -> None:
    assert len(methods()) >= 42
    assert {one.slug for one in baselines()} >= {"plain", "balanced", "prompt-lookup"}
    assert not {one.slug for one in methods()} & {one.slug for one in baselines()}


def test_papers_stand_by_family_then_slug() -> None:
    order = [(list(FAMILIES).index(one.family), one.slug) for one in methods()]
    assert all(left < right for left, right in pairwise(order))


@pytest.mark.parametrize("one", ALL, ids=lambda one: one.slug)
def test_card_is_complete(one: Card) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", one.slug)
    assert one.family in FAMILIES
    assert one.plug in PLUGS
    for sentence in (one.does, one.use_when, one.avoid_when, one.cost, one.headline):
        assert sentence == sentence.strip()
        assert sentence == "" or sentence.endswith((".", "…"))
        assert "\n" not in sentence
    assert one.use_when.startswith("Use it ")
    assert re.fullmatch(r"\d{4}-\d\d(-\d\d)?|", one.date)
    if not one.baseline:
        assert one.headline
        assert re.fullmatch(r"\d{4}\.\d{5}", one.arxiv or "")
    if one.arxiv and one.date:
        # An arXiv number begins with the month it was announced in: the month of the first
        # version or, for one handed in on the last days, the month after.
        months = 12 * int(one.date[2:4]) + int(one.date[5:7])
        given = 12 * int(one.arxiv[:2]) + int(one.arxiv[2:4])
        assert 0 <= given - months <= 1
    if one.status != "planned":
        assert one.avoid_when.startswith("Avoid ")
        assert one.cost
    if one.report is not None and one.headline_row is not None:
        judged = [row["metric"] for row in one.report["rows"] if row["bar"]]
        assert one.headline_row in judged
    if one.entry is not None:
        assert re.fullmatch(rf"pertoken\.{one.family}(\.\w+)+:\w+", one.entry)


def test_numbers_and_titles_are_not_there_twice() -> None:
    for field in ("arxiv", "title"):
        counts = Counter(getattr(one, field) for one in methods())
        assert max(counts.values()) == 1


@pytest.mark.parametrize(
    "one", [one for one in ALL if one.status != "planned"], ids=lambda one: one.slug
)
def test_entry_resolves(one: Card) -> None:
    assert one.entry is not None
    assert get(one.slug).__name__ == one.entry.partition(":")[2]


def test_planned_paper_says_so() -> None:
    planned = next(one for one in methods() if one.entry is None)
    with pytest.raises(PertokenError, match=f"{planned.slug} is planned, not there yet"):
        get(planned.slug)


@pytest.mark.parametrize("ask", [card, get])
def test_wrong_slug_suggests_the_nearest(ask: object) -> None:
    with pytest.raises(PertokenError, match=r"'gose' \(did you mean 'goose'\?\)"):
        ask("gose")
    with pytest.raises(PertokenError, match="'prompt-lookup'"):
        ask("prompt_lookup")


def test_status_follows_from_file_and_report(tree: Path) -> None:
    one = make_card(entry="pertoken.decode.x:X")
    assert make_card().status == "planned"
    assert one.status == "planned"
    with pytest.raises(PertokenError, match="not there yet"):
        one.load()

    source = tree / "src/pertoken/decode/x.py"
    source.write_text("class Y: ...\n")
    assert one.status == "planned"
    source.write_text('class X:\n    raise NotImplementedError("x is not written yet")\n')
    assert one.status == "planned"
    source.write_text("class X: ...\n")
    assert one.status == "built"
    assert one.bars is None

    report = tree / "reports/x.json"
    report.write_text(json.dumps({"rows": []}))
    assert one.status == "built"
    rows = [ROW, ROW | {"holds": False}, {"metric": "information", "bar": "", "holds": None}]
    report.write_text(json.dumps({"rows": rows}))
    assert one.status == "ready"
    assert one.bars == (1, 2)


def test_entry_may_be_a_package(tree: Path) -> None:
    (tree / "src/pertoken/decode/x").mkdir()
    (tree / "src/pertoken/decode/x/__init__.py").write_text("from a import X\n")
    assert make_card(entry="pertoken.decode.x:X").status == "built"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"rows": 1}', '{"rows": [{}]}', "\xff"])
def test_broken_report_is_named(tree: Path, text: str) -> None:
    (tree / "reports/x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PertokenError, match=r"x\.json is not a report .*pertoken reproduce x"):
        _ = make_card().report


def test_installed_package_reads_its_own_reports(tree: Path) -> None:
    assert catalog.reports_dir() == tree / "reports"
    (tree / "pyproject.toml").unlink()
    assert catalog.source_tree() is None
    assert catalog.reports_dir() == tree / "src/pertoken/_reports"


def test_card_as_json() -> None:
    for one in ALL:
        fields = one.to_dict()
        assert json.loads(json.dumps(fields)) == fields
        assert fields["status"] in ("ready", "built", "planned")


PAPER = """[[paper]]
slug = "x"
title = "X"
family = "decode"
plug = "generate"
does = "…"
use_when = "…"
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slug =", "not TOML"),
        (PAPER + PAPER, "x: the slug is there twice"),
        (PAPER + PAPER.replace("paper", "baseline"), "there twice"),
        (PAPER.replace("decode", "decod"), r"no family 'decod' \(did you mean 'decode'\?\)"),
        (PAPER.replace('"generate"', '"generat"'), r"x: no plug 'generat' .*'generate'"),
        (PAPER.replace('"x"', '"X y"'), "'X y' is no slug"),
        (PAPER.replace('plug = "generate"\n', ""), "x: .*plug"),
        (PAPER + 'colour = "red"\n', "x: .*colour"),
        (PAPER.replace('slug = "x"\n', ""), "without a slug: .*slug"),
    ],
)
def test_unsound_catalogue_is_refused(text: str, message: str) -> None:
    with pytest.raises(PertokenError, match=message):
        catalog.parse(text)
