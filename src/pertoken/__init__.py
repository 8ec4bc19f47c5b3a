"""Published per-token methods for language models: run them, compare them, check their claims.

Importing this package is quick and imports no framework: every public name is loaded when it is
first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pertoken.catalog import Card, get, methods
    from pertoken.compare import compare
    from pertoken.data import data
    from pertoken.errors import PertokenError
    from pertoken.loading import load
    from pertoken.prune import compress
    from pertoken.reproduce import reproduce
    from pertoken.signal import TokenSignal

    __version__: str

__all__ = [
    "Card",
    "PertokenError",
    "TokenSignal",
    "__version__",
    "compare",
    "compress",
    "data",
    "get",
    "load",
    "methods",
    "reproduce",
]

# Public name -> module that defines it.
_HOME = {
    "Card": "catalog",
    "PertokenError": "errors",
    "TokenSignal": "signal",
    "compare": "compare",
    "compress": "prune",
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


class _Package(ModuleType):
    """Keeps `pertoken.data` the function `data`, not the module of that name.

    Importing the submodule, at any time and by anyone, would otherwise put the module in the
    function's place. The module itself stays importable (`from pertoken.data import …`).
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
