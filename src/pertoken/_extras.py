"""Optional packages: imported where they are used, named by their extra where they are missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pertoken.errors import PertokenError


def need(module: str, extra: str) -> Any:
    """Import a module of an extra; PertokenError with the install line where it is not there.

    >>> need("json", "none").dumps([1])
    '[1]'
    """
    try:
        return import_module(module)
    except ModuleNotFoundError:
        raise PertokenError(
            f'{module.partition(".")[0]} is not installed: pip install "pertoken[{extra}]"'
        ) from None
