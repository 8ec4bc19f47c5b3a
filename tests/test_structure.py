"""The layers of the house, and how large a part of it may grow."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pertoken
from pertoken.catalog import FAMILIES

SOURCE = Path(pertoken.__file__).parent
LONGEST_FILE = 500
LONGEST_FUNCTION = 60  # lines without the docstring

# Who may be imported by whom: a room may use those of lower layers and itself.
LAYERS = {"cli": 3, "reproduce": 3, "site": 3, **dict.fromkeys(FAMILIES, 1), "testing": 0}
GATHERERS = {  # modules that bring families together
    "__init__.py",
    "__main__.py",
    "compare.py",
    "compare_html.py",
    "compare_report.py",
    "testing/_bench.py",
    "testing/_compose_page.py",
    "testing/_pair_laws.py",
    "testing/_parts.py",
    "testing/compose.py",
}

FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def room(path: Path) -> str:
    """The first folder below the package, or the module's own name."""
    inside = path.relative_to(SOURCE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of every import of the package, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pertoken"):
            for alias in node.names:
                yield node.module or "", alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("pertoken"):
                    yield alias.name, ""


def target(module: str, name: str) -> str:
    """The room or shared module that an import reaches."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else name


def private(module: str, name: str) -> bool:
    return any(part.startswith("_") for part in [*module.split(".")[2:], name])


def test_imports_point_down() -> None:
    wrong = []
    for path, tree in TREES.items():
        own = room(path)
        if path.relative_to(SOURCE).as_posix() in GATHERERS:
            continue
        height = LAYERS.get(own, 0)
        for module, name in imports(tree):
            reached = target(module, name)
            if reached != own and LAYERS.get(reached, 0) > height:
                wrong.append(f"{path.relative_to(SOURCE)} imports {module} ({name})")
    assert not wrong, "\n".join(wrong)


def test_families_do_not_import_each_others_internals() -> None:
    wrong = [
        f"{path.relative_to(SOURCE)} imports {module} ({name})"
        for path, tree in TREES.items()
        for module, name in imports(tree)
        if room(path) in FAMILIES
        and target(module, name) in FAMILIES
        and target(module, name) != room(path)
        and private(module, name)
    ]
    assert not wrong, "what two families need belongs into the shared layer:\n" + "\n".join(wrong)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_file_or_function_is_too_long(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{lines} lines: split it"
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = lines_of(node)
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines: split it"


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function with its decorators and signature, without its docstring."""
    first = min([function.lineno, *(each.lineno for each in function.decorator_list)])
    length = (function.end_lineno or first) - first + 1
    if ast.get_docstring(function) is not None:
        text = function.body[0]
        length -= (text.end_lineno or text.lineno) - text.lineno + 1
    return length
