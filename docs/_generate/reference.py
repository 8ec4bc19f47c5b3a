"""Reference pages: every public name of a family, and of the modules in it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pertoken
from pertoken.catalog import FAMILIES

PACKAGE = Path(pertoken.__file__).parent
# Packages with a page of their own, behind the one of `pertoken` itself.
ROOMS = {**FAMILIES, "testing": "laws and tiny models", "reproduce": "papers' claims, measured"}


def pages() -> dict[str, str]:
    """Path -> Markdown of each page of the reference."""
    return {path: _page(module) for path, module in _paths().items()}


def nav() -> list[dict[str, Any]]:
    """The pages in the order of a token's life."""
    return [{module: path} for path, module in _paths().items()]


def names(module: str) -> Iterator[str]:
    """The dotted path of every name on the page of a package.

    Its own public names, then those of its public modules that it does not have itself.

    >>> "pertoken.decode.Goose" in list(names("pertoken.decode"))
    True
    """
    folder = PACKAGE.joinpath(*module.split(".")[1:])
    own = public(folder / "__init__.py")
    yield from (f"{module}.{name}" for name in own if not name.startswith("__"))
    for path in sorted(folder.glob("*.py")):
        if not path.name.startswith("_"):
            inner = f"{module}.{path.stem}"
            yield from (f"{inner}.{name}" for name in public(path) if name not in own)


def public(path: Path) -> list[str]:
    """What `__all__` of a source file says; nothing where it has none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


def _paths() -> dict[str, str]:
    rooms = [room for room in ROOMS if (PACKAGE / room / "__init__.py").is_file()]
    return {"reference/pertoken.md": "pertoken"} | {
        f"reference/{room}.md": f"pertoken.{room}" for room in rooms
    }


def _page(module: str) -> str:
    room = module.partition(".")[2]
    parts = [f"# {module}", *([f"*{ROOMS[room]}*"] if room else [])]
    source = PACKAGE.joinpath(room, "__init__.py").read_text(encoding="utf-8")
    parts.append(ast.get_docstring(ast.parse(source)) or "")
    parts += [f"::: {name}" for name in names(module)]
    return "\n\n".join(parts) + "\n"
