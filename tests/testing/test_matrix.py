"""docs/matrix.md is what the battery declares, and names every method and architecture."""

from __future__ import annotations

from typing import Any

import pytest

from pertoken.catalog import card, source_tree
from pertoken.errors import PertokenError
from pertoken.testing import ARCHITECTURES, LawBroken, matrix
from pertoken.testing.battery import finished, subject
from pertoken.testing.method import LawResult, MethodReport

TREE = source_tree()


@pytest.mark.skipif(TREE is None, reason="needs the source tree")
def test_the_committed_page_is_what_is_declared() -> None:
    assert TREE is not None
    page = (TREE / "docs/matrix.md").read_text(encoding="utf-8")
    assert page == matrix.page(matrix.declared()) + "\n", (
        "write it anew: python -m pertoken.testing.matrix > docs/matrix.md"
    )


def test_every_method_stands_under_its_plug_with_all_architectures() -> None:
    sections = matrix.page(matrix.declared()).split("\n## ")[1:]
    found = {part.split("\n")[0]: part for part in sections}
    for slug in finished():
        part = found[card(slug).plug]
        (row,) = (line for line in part.splitlines() if line.startswith(f"| `{slug}` |"))
        heads = [line for line in part.splitlines() if line.startswith("| method |")]
        if subject(slug).meets_model:
            assert all(f" {name} |" in heads[0] for name in ARCHITECTURES)
            assert row.count("✓") + row.count("–") == len(ARCHITECTURES)
        else:
            assert row.count("✓") == 1


def report(skips: dict[str, str], broken: str = "") -> Any:
    """What check_method would say of a method with these skips."""

    def check(slug: str, model: Any, laws: Any) -> MethodReport:
        rows = tuple(
            LawResult(law, "skipped", skips[law]) if law in skips else LawResult(law, "holds")
            for law in laws
        )
        if broken:
            raise LawBroken(broken)
        return MethodReport(slug, "cache", model, rows)

    return check


def test_a_run_gives_the_declared_page(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(slug: str, model: Any, laws: Any) -> MethodReport:
        return report(matrix.expected_skips(subject(slug), laws))(slug, model, laws)

    monkeypatch.setattr(matrix, "check_method", check)
    assert matrix.page(matrix.run()) == matrix.page(matrix.declared())


def test_a_run_that_skips_more_or_breaks_a_law_gives_no_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(matrix, "check_method", report({"batch = single": "no idea"}))
    with pytest.raises(PertokenError, match="skips other laws than the battery declares"):
        matrix.run()
    monkeypatch.setattr(matrix, "check_method", report({}, broken="goose breaks lossless"))
    assert matrix.main([]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: goose breaks lossless" in err


def test_reasons_of_single_architectures_stand_in_their_cells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cells = dict(matrix.declared())
    holds, skips = cells["h2o", "opt"]
    cells["h2o", "opt"] = holds, {**skips, "turns": "only opt does"}
    cells["tova", "phi"] = (), dict.fromkeys((*holds, *skips), "not at all")
    lines = matrix.page(cells).splitlines()
    (h2o,) = (line for line in lines if line.startswith("| `h2o`"))
    (tova,) = (line for line in lines if line.startswith("| `tova`"))
    (note,) = (line for line in lines if "*turns*: only opt does." in line)
    assert h2o.split("|")[7].strip() == f"✓ {note.split('.')[0]}"
    assert tova.split("|")[9].strip().startswith("– ")
