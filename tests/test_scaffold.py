"""`pertoken new` writes files that import, lint and run, and never overwrites any."""

import shutil
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pertoken.catalog import FAMILIES, methods, parse, source_tree
from pertoken.cli import main
from pertoken.errors import PertokenError
from pertoken.scaffold import scaffold

CATALOG = "src/pertoken/catalog.toml"
ROOT = source_tree()
pytestmark = pytest.mark.skipif(ROOT is None, reason="needs the source tree")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the source tree without its tests."""
    assert ROOT is not None
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def planned() -> str:
    return next(one.slug for one in methods() if one.entry is None)


def files_of(tree: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_scaffolded_files_lint_import_and_run(
    known: bool, tree: Path, run_module: Callable[..., str]
) -> None:
    slug = planned() if known else "a-new-paper"
    given = {} if known else {"title": f"A New Paper: {'long ' * 20}title", "family": "decode"}
    paths = [str(path) for path in scaffold(slug, root=tree, **given)]
    python = [path for path in paths if path.endswith(".py")]
    assert len(python) >= 3
    run_module(tree, "ruff", "check", *python)
    run_module(tree, "ruff", "format", "--check", *python)
    (test,) = (path for path in paths if path.startswith("tests/"))
    assert "1 xfailed" in run_module(tree, "pytest", "-q", "-p", "no:cacheprovider", test)
    assert "planned" in run_module(tree, "pertoken", "show", slug)
    assert slug in run_module(tree, "pertoken", "list", "--json", "-")
    run_module(tree, "pertoken", "reproduce", slug, "--smoke")


@pytest.mark.parametrize("family", FAMILIES)
def test_types_and_format_hold_for_the_longest_name(
    family: str, tree: Path, run_module: Callable[..., str]
) -> None:
    slug = "a" * 14 + "-" + "b" * 15
    paths = scaffold(slug, root=tree, title="T" * 90, family=family, arxiv="2604.02047")
    python = [str(path) for path in paths if path.suffix == ".py"]
    run_module(tree, "ruff", "check", *python)
    run_module(tree, "ruff", "format", "--check", *python)


def test_known_paper_gets_its_entry_and_nothing_else(tree: Path) -> None:
    slug = planned()
    before = (tree / CATALOG).read_text()
    paths = scaffold(slug, root=tree)
    after = (tree / CATALOG).read_text()
    added = [line for line in after.splitlines() if line not in before.splitlines()]
    assert len(added) == 1
    assert after.replace(added[0] + "\n", "") == before
    card = parse(after)[slug]
    module = slug.replace("-", "_")
    assert card.entry is not None
    assert card.entry.startswith(f"pertoken.{card.family}.{module}:")
    assert Path(f"src/pertoken/{card.family}/{module}.py") in paths
    assert Path(f"tests/{card.family}/test_{module}.py") in paths
    assert Path(f"src/pertoken/reproduce/{module}.py") in paths
    assert all((tree / path).is_file() for path in paths)


def test_every_row_can_get_its_entry(tree: Path) -> None:
    slugs = [one.slug for one in methods() if one.entry is None]
    for slug in slugs:
        scaffold(slug, root=tree)
    cards = parse((tree / CATALOG).read_text())
    for one in methods():
        card = cards[one.slug]
        assert card.entry is not None
        assert replace(card, entry=one.entry) == one


@pytest.mark.parametrize(("plug", "wanted"), [(None, "generate"), ("logits", "logits")])
def test_the_row_says_the_plug(plug: str | None, wanted: str, tree: Path) -> None:
    scaffold("zebra", root=tree, title="Zebra", family="decode", plug=plug)
    assert parse((tree / CATALOG).read_text())["zebra"].plug == wanted
    with pytest.raises(PertokenError, match=r"unknown plug 'logit' .*'logits'"):
        scaffold("okapi", root=tree, title="Okapi", family="decode", plug="logit")


def test_unknown_paper_gets_a_row_among_its_family(tree: Path) -> None:
    scaffold("zebra", root=tree, title="Zebra: é “x”", family="cache", arxiv="2604.01234")
    rows = tomllib.loads((tree / CATALOG).read_text())["paper"]
    slugs = [row["slug"] for row in rows if row["family"] == "cache"]
    assert slugs == [*(one.slug for one in methods() if one.family == "cache"), "zebra"]
    (row,) = (row for row in rows if row["slug"] == "zebra")
    assert row["title"] == "Zebra: é “x”"
    assert row["arxiv"] == "2604.01234"
    assert row["entry"] == "pertoken.cache.zebra:Zebra"


@pytest.mark.parametrize(
    ("slug", "given", "message"),
    [
        ("goose", {}, "goose is there already"),
        ("prompt-lookup", {}, "there already"),
        ("awrss", {}, r"not in the catalogue \(did you mean 'awrs'\?\).*--title and --family"),
        ("new", {"title": "N"}, "--family"),
        ("new", {"title": "N", "family": "prunes"}, r"did you mean 'prune'\?"),
        ("new", {"title": "a\nb", "family": "prune"}, "--title"),
        ("new", {"title": ' """ ', "family": "prune"}, "--title"),
        ("new", {"title": " ", "family": "prune"}, "--title"),
        ("new", {"title": "N", "family": "prune", "arxiv": "x"}, "no arXiv number"),
        ("lambda", {"title": "N", "family": "prune"}, "word of Python"),
        ("x" * 31, {"title": "N", "family": "prune"}, "too long"),
        ("", {"title": "N", "family": "prune"}, "no slug"),
        ("../up", {"title": "N", "family": "prune"}, "no slug"),
        ("New", {"title": "N", "family": "prune"}, "no slug"),
        ("new_paper", {"title": "N", "family": "prune"}, "no slug"),
        ("errors", {"title": "N", "family": "reproduce"}, "unknown family"),
        ("tree", {"title": "N", "family": "decode"}, "tree.py is there already"),
        ("restok", {"family": "prune"}, "leave out --family"),
    ],
)
def test_refuses_and_writes_nothing(
    slug: str, given: dict[str, str], message: str, tree: Path
) -> None:
    (tree / "src/pertoken/decode").mkdir(exist_ok=True)
    (tree / "src/pertoken/decode/tree.py").touch()
    before = files_of(tree)
    with pytest.raises(PertokenError, match=message):
        scaffold(slug, root=tree, **given)
    assert files_of(tree) == before


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_never_overwrites(kind: int, tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = shutil.copytree(tree, tmp_path_factory.mktemp("other") / "tree")
    path = scaffold(planned(), root=other)[kind]
    (tree / path).parent.mkdir(parents=True, exist_ok=True)
    (tree / path).write_text("mine\n")
    before = files_of(tree)
    with pytest.raises(PertokenError, match="is there already; nothing was written"):
        scaffold(planned(), root=tree)
    assert files_of(tree) == before


def test_twice_is_refused(tree: Path) -> None:
    scaffold(planned(), root=tree)
    with pytest.raises(PertokenError, match="there already"):
        scaffold(planned(), root=tree)


def test_needs_a_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PertokenError, match="not a source tree of pertoken"):
        scaffold(planned(), root=tmp_path)
    monkeypatch.setattr("pertoken.scaffold.source_tree", lambda: None)
    with pytest.raises(PertokenError, match="without its sources"):
        scaffold(planned())


def test_command_prints_what_it_wrote(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--title", "New", "--family", "probe", "--root", str(tree)]
    assert main(["new", "new-paper", *arguments]) == 0
    printed = capsys.readouterr().out.split()
    assert "tests/probe/test_new_paper.py" in printed
    assert all((tree / path).is_file() for path in printed)
    assert main(["new", "new-paper", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: new-paper is there already")
