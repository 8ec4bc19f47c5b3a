"""What the README shows can be run."""

import re
import shlex

import pytest

from pertoken.catalog import source_tree
from pertoken.cli import main

TREE = source_tree()
pytestmark = pytest.mark.skipif(TREE is None, reason="needs the source tree")
PAGES = sorted(str(path.relative_to(TREE)) for path in TREE.glob("docs/**/*.md")) if TREE else []
TEXTS = {
    name: (TREE / name).read_text(encoding="utf-8")
    for name in ("README.md", "CONTRIBUTING.md", *PAGES)
    if TREE is not None
}


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], re.M | re.S)


def commands() -> list[list[str]]:
    """Every command line of `pertoken` and `make` the texts show, without its comment."""
    lines = [line for page in TEXTS for block in blocks("sh", page) for line in block.splitlines()]
    for text in TEXTS.values():
        lines += re.findall(r"`((?:pertoken|make) [^`]+)`", text)
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.model
@pytest.mark.parametrize("example", blocks("python"))
def test_example_runs(example: str, smollm2: object, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(example, "README.md", "exec"), {})
    (figure,) = re.findall(r"^([\d.]+) tokens per forward pass$", capsys.readouterr().out, re.M)
    assert float(figure) >= 1


@pytest.mark.model
@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page: str, smollm2: object) -> None:
    """A page's blocks run in order, as one program."""
    if page in ("docs/training.md", "docs/weights.md"):
        pytest.importorskip("trl", reason="TRL is not installed")
    names: dict[str, object] = {}
    for example in blocks("python", page):
        exec(compile(example, page, "exec"), names)


_GROUPS = ("cache", "cascade", "knn", "premiums", "probe", "style", "train")


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_is_there(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] == "make":
        assert TREE is not None
        targets = re.findall(r"^([\w-]+):", (TREE / "Makefile").read_text(), re.M)
        assert words[1] in targets
        return
    path = words[1:3] if words[1] in _GROUPS else words[1:2]
    assert main([*path, "--help"]) == 0
    shown = capsys.readouterr().out
    for word in words[2:]:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", shown)
