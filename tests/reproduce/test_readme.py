"""README tables say what the reports say, failures with their reasons, and never go stale."""

from __future__ import annotations

from pathlib import Path

import pytest

from pertoken.catalog import Card, methods, source_tree
from pertoken.errors import PertokenError
from pertoken.reproduce import Report, Row, readme
from pertoken.reproduce._bars import Bar
from pertoken.reproduce._report import write_json

EMPTY = (
    "# pertoken\n<!-- results:begin -->\n<!-- results:end -->\n"
    "<!-- losses:begin -->\n<!-- losses:end -->\n"
    "mid\n<!-- methods:begin -->old<!-- methods:end -->\nend\n"
)


def report(slug: str = "goose", smoke: bool = False) -> Report:
    good = Row("tokens | forward", 1.25, paper=1.3, paper_setting="8B", interval=(1.2, 1.31))
    good.judge(Bar.parse(">= 1.12"))
    bad = Row("speed-up", 1.25, unit="x", paper="1.9–4.3x", why="the\nmachine is small")
    bad.judge(Bar.parse(">= 1.5"))
    unexplained = Row("memory", 3)
    unexplained.judge(Bar.parse("<= 2"))
    fine = Row("ties", 0)
    fine.judge(Bar.parse("== 0"))
    rows = [good, bad, Row("for information", 7), unexplained, fine]
    return Report(
        slug=slug,
        version=1,
        model="smollm2",
        settings={"dtype": "float32", "smoke": smoke},
        seed=0,
        versions={},
        machine={"cpu": "a CPU", "cores": 2},
        seconds=1.0,
        figures=rows,
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(EMPTY)
    write_json(report().to_dict(), tmp_path / "reports" / "goose.json")
    return tmp_path


def test_a_report_is_one_line_and_what_fails_stands_below_with_its_reason(root: Path) -> None:
    assert readme.main(["--root", str(root)]) == 0
    text = (root / "README.md").read_text()
    line = "| [goose](reports/goose.json) | tokens \\| forward | 1.3 | 1.25 (1.2–1.31) | "
    assert line + "2 of 4 hold |" in text
    assert "| goose | speed-up >= 1.5 | 1.25 x (1) |" in text
    assert "| goose | memory <= 2 | 3 (2) |" in text
    assert "1. the machine is small" in text
    assert "2. no reason given yet" in text
    assert "for information" not in text
    assert text.startswith("# pertoken\n")
    assert "\nmid\n" in text
    assert text.endswith("\nend\n")


def test_a_caveat_stands_below_what_holds() -> None:
    plain, careful = report(), report("token-recycling")
    careful.figures[0].caveat, careful.figures[4].caveat = "by | construction", "a law"
    text = readme.results([plain, careful])
    assert text.count("| 1.25 (1.2–1.31) | 2 of 4 hold |") == 1
    assert text.count("| 1.25 (1.2–1.31) (a) | 2 of 4 hold, 2 with a caveat |") == 1
    assert "a law" not in text
    assert text.endswith("- (a) token-recycling: by \\| construction\n\n</details>")
    assert "a letter" not in readme.results([plain])


def test_a_reason_shared_by_bars_stands_once() -> None:
    text = readme.losses([report(), report("token-recycling")])
    assert text.count("the machine is small") == 1
    assert "| token-recycling | speed-up >= 1.5 | 1.25 x (1) |" in text
    assert readme.losses([]) == "No bar fails."


def test_the_row_that_stands_for_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for row in report().figures if row.bar]
    assert readme.headline(report("unknown"), rows).metric == "tokens | forward"
    card = Card(
        slug="goose",
        title="",
        family="decode",
        plug="generate",
        does="",
        use_when="",
        headline_row="speed-up",
    )
    monkeypatch.setattr(readme, "cards", lambda: [card])
    assert readme.headline(report(), rows).metric == "speed-up"
    assert readme.headline(report("other"), rows[3:]).metric == rows[3].metric


def test_families_say_what_is_there_and_what_is_planned() -> None:
    text = readme.methods(methods())
    (line,) = [one for one in text.splitlines() if one.startswith("| cache |")]
    assert "[kv-direct](https://arxiv.org/abs/2603.19664)" in line.split("|")[3]
    assert all(f"[{one.slug}](" in text for one in methods())


def test_writing_twice_changes_nothing_and_check_sees_a_new_report(root: Path) -> None:
    assert readme.main(["--root", str(root), "--check"]) == 1
    assert (root / "README.md").read_text() == EMPTY
    readme.main(["--root", str(root)])
    first = (root / "README.md").read_text()
    assert readme.main(["--root", str(root), "--check"]) == 0
    readme.main(["--root", str(root)])
    assert (root / "README.md").read_text() == first
    write_json(report("token-recycling").to_dict(), root / "reports" / "token-recycling.json")
    assert readme.main(["--root", str(root), "--check"]) == 1


def test_smoke_reports_are_left_out(root: Path) -> None:
    readme.main(["--root", str(root)])
    write_json(report("token-recycling", smoke=True).to_dict(), root / "reports" / "tr.json")
    assert readme.main(["--root", str(root), "--check"]) == 0


@pytest.mark.parametrize(
    "text", ["", "<!-- x:begin -->", "<!-- x:end --><!-- x:begin -->", "<!-- x:begin -->" * 2]
)
def test_markers_must_be_there_once_in_order(text: str) -> None:
    with pytest.raises(PertokenError, match="x:begin"):
        readme.fill(text, "x", "new")


def test_no_readme_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert readme.main(["--root", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: no README.md in {tmp_path}\n"


def test_the_readme_of_this_project_is_fresh() -> None:
    root = source_tree()
    if root is None or not (root / "README.md").is_file():
        pytest.skip("no source tree with a README")
    assert not readme.update(root, write=False), "README.md is stale: run `make readme`"
