"""The site says all there is, builds without a warning, and never goes stale."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pertoken.catalog import source_tree
from pertoken.cli import main as pertoken
from pertoken.reproduce._table import NO_REASON

ROOT = source_tree() or Path()
pytestmark = pytest.mark.skipif(source_tree() is None, reason="needs the source tree")
griffe = pytest.importorskip("griffe", reason="needs the extra docs")
pytest.importorskip("material", reason="needs the extra docs")

from _generate import (  # noqa: E402
    api,
    bench,
    commands,
    gallery,
    hook,
    methods,
    reference,
    text,
)

CARDS = {one.slug: one for one in methods.cards()}
FIELDS = re.compile(r"^<!-- bench: (\w+) -->$", re.M)


@pytest.fixture(scope="module")
def package() -> Any:
    """The package as griffe reads it, nothing imported."""
    return griffe.load("pertoken", search_paths=[ROOT / "src"], resolve_aliases=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_it_builds_without_a_warning(site: Path) -> None:
    assert (site / "index.html").is_file()
    assert (site / "search/search_index.json").is_file()


def test_every_public_name_stands_in_the_reference(site: Path) -> None:
    for path, module in reference._paths().items():
        page = (site / path).with_suffix("") / "index.html"
        shown = page.read_text(encoding="utf-8")
        missing = [name for name in reference.names(module) if f'id="{name}"' not in shown]
        assert not missing, f"{module}: not on its page: {', '.join(missing)}"


def test_every_public_name_has_a_docstring(package: Any) -> None:
    bare = []
    for module in reference._paths().values():
        for name in reference.names(module):
            found = package[name.partition(".")[2]]
            found = found.final_target if found.is_alias else found
            if found.docstring is None:
                bare.append(name)
    assert not bare, f"without a docstring: {', '.join(bare)}"


def test_the_reference_has_what_the_packages_export() -> None:
    import pertoken
    from pertoken import decode

    listed = set(reference.names("pertoken"))
    assert {f"pertoken.{name}" for name in pertoken.__all__ if name != "__version__"} <= listed
    assert {f"pertoken.decode.{name}" for name in decode.__all__} <= set(
        reference.names("pertoken.decode")
    )
    assert "pertoken.decode.constraint.RegexConstraint" in reference.names("pertoken.decode")


def test_the_drawing_follows_the_page(site: Path) -> None:
    shown = (site / "index.html").read_text(encoding="utf-8")
    assert hook.FIGURE not in shown
    assert '<figure class="life"><svg' in shown
    drawing = (ROOT / "docs/assets/life.svg").read_text(encoding="utf-8")
    assert all(f">{family}</text>" in drawing for family in methods.FAMILIES)


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    fetched = re.compile(r'<(?:script|img|iframe|link rel="stylesheet")[^>]*(?:src|href)="http')
    for page in [site / "index.html", *site.glob("gallery/*.html"), site / "methods/index.html"]:
        assert not fetched.search(page.read_text(encoding="utf-8")), page


@pytest.mark.parametrize("slug", CARDS)
def test_a_page_tells_what_is_known_of_the_method(slug: str) -> None:
    card, page = CARDS[slug], methods.page(CARDS[slug])
    plain = page.replace("**", "")
    assert card.title in page
    assert card.does in page
    assert card.use_when in plain
    assert card.headline in page
    if card.status == "planned":
        assert "Planned, not there yet" in page
        assert ":::" not in page
        return
    assert card.cost in page
    assert card.avoid_when in plain
    assert f"```python\n{card.call}\n```" in page
    module, _, name = (card.entry or "").partition(":")
    assert f"::: {module}.{name}\n" in page


def test_bars_that_fail_stand_with_their_reason() -> None:
    failed = 0
    for card in CARDS.values():
        report = methods.report_of(card)
        page = methods.page(card)
        for row in report.figures if report else ():
            if row.bar:
                assert f"| {text.cell(row.metric)} |" in page
            if row.holds is False:
                failed += 1
                assert re.search(
                    rf"^- .*\*{re.escape(row.metric)}\*.*: {re.escape(row.why or NO_REASON)}$",
                    page,
                    re.M,
                )
    assert failed


def test_the_catalogue_lists_every_method() -> None:
    page = methods.catalogue()
    assert all(f"[{slug}]({slug}.md)" in page for slug in CARDS)
    listed = str(methods.nav())
    assert all(f"methods/{slug}.md" in listed for slug in CARDS)


def test_every_command_is_shown_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    page = commands.page()
    assert pertoken(["--help"]) == 0
    listed = re.findall(r"^  ([a-z-]+)  ", capsys.readouterr().out.partition("Commands:")[2], re.M)
    assert listed
    for name in listed:
        assert f"## `pertoken {name}`" in page
    assert "## `pertoken cache save`" in page
    assert "--max-new-tokens" in page


def test_tables_of_a_run_join_only_where_they_are(tmp_path: Path) -> None:
    written: hook.Nav = [{"Start": "index.md"}, {"Guides": []}]
    assert "matrix.md" not in str(hook.nav(written, tmp_path))
    (tmp_path / "matrix.md").touch()
    shown = hook.nav(written, tmp_path)
    assert "matrix.md" in str(shown[2])
    assert "composition.md" not in str(shown)
    assert [*shown[3]] == ["Gallery"]


@pytest.mark.parametrize("name", gallery.SAMPLES)
def test_a_sample_is_there_and_its_command_too(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (gallery.FOLDER / f"{name}.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert str(Path.home()) not in page
    words = gallery.SAMPLES[name].words(Path("page.html"))
    path = words[: 2 if words[0] in ("premiums", "train") else 1]
    assert pertoken([*path, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in words if word.startswith("--"))


def test_the_gallery_is_small_and_pictures_are_of_it() -> None:
    assert sum(path.stat().st_size for path in gallery.FOLDER.iterdir()) < 1_500_000
    assert {path.stem for path in gallery.FOLDER.iterdir()} == set(gallery.SAMPLES)
    assert {name.removesuffix(".html") for name in methods.PICTURES.values()} <= {*gallery.SAMPLES}
    assert set(methods.PICTURES) <= set(CARDS)


def test_files_that_pages_name_are_there() -> None:
    for page in ROOT.glob("docs/**/*.md"):
        for path in re.findall(r"`((?:tests|bench|reports|src)/[\w/.-]+)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_tables_of_benches_are_those_of_their_reports() -> None:
    used = {name for page in ROOT.glob("docs/**/*.md") for name in FIELDS.findall(page.read_text())}
    assert used
    for name in used:
        shown = bench.fill(f"<!-- bench: {name} -->")
        assert shown.startswith("| what | here | bar | holds? |")
        assert f"`reports/bench/{name}.json`" in shown


def test_docstrings_become_markdown() -> None:
    assert doctest.testmod(text).failed == 0
    google = "Does it.\n\nArgs:\n    one: a number,\n        any.\n    two: another.\n\nMore."
    assert text.as_markdown(google, ["one", "two"]) == (
        "Does it.\n\n- `one`: a number,\n    any.\n- `two`: another.\n\nMore."
    )
    assert text.as_markdown("Note: no name here.", ["one"]) == "Note: no name here."


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


def test_what_the_public_interface_lost_since_the_last_tag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tmp_path / "src/pertoken/__init__.py"
    module.parent.mkdir(parents=True)
    module.write_text("def kept(a): ...\ndef gone(): ...\ndef _private(): ...\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    assert api.main(tmp_path) == 0
    assert capsys.readouterr().out == "no tag yet: nothing to compare with\n"
    git(tmp_path, "tag", "v0.1.0")
    module.write_text("def kept(a, b): ...\ndef gone(): ...\n")
    assert api.main(tmp_path) == 1
    assert "kept" in capsys.readouterr().out
    module.write_text("def kept(a): ...\n")
    assert api.main(tmp_path) == 1
    assert "gone" in capsys.readouterr().out
    module.write_text("def kept(a): ...\ndef gone(): ...\ndef new(): ...\n")
    assert api.main(tmp_path) == 0
    assert capsys.readouterr().out == "nothing that was public in v0.1.0 is gone or changed\n"
