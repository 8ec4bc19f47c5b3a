"""Published per-token methods for language models: run them, compare them, check their claims.

Importing this package is quick and imports no framework: every public name is loaded when it is
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pertoken.catalog import Card, get, methods
    from pertoken.compare import compare
    from pertoken.data import data
    from pertoken.errors import PertokenError
    from pertoken.loading import load
    from pertoken.reproduce import reproduce

    __version__: str

__all__ = [
    "Card",
    "PertokenError",
    "__version__",
    "compare",
    "data",
    "get",
    "load",
    "methods",
    "reproduce",
]

# Public name -> module that defines it. A name may be a submodule's own name (`pertoken.data`):
# the function is then what `pertoken.data` means, and `from pertoken.data import …` still works.
_HOME = {
    "Card": "catalog",
    "PertokenError": "errors",
    "compare": "compare",
    "data": "data",
    "get": "catalog",
    "load": "loading",
    "methods": "catalog",
    "reproduce": "reproduce",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _HOME:
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pertoken")
    except PackageNotFoundError:  # run from a source tree that was not installed
        return "0+source"
