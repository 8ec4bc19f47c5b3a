"""Python objects that an option names."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from pertoken.errors import PertokenError, nearest


def import_object(path: str, option: str) -> Any:
    """The object that "module:object" names; modules of the current folder are found too."""
    module, colon, name = path.partition(":")
    if not colon or not module or not name:
        raise PertokenError(f"{option} takes MODULE:OBJECT, got {path!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        raise PertokenError(f"{option} {path}: {error}") from error
    except Exception as error:
        raise PertokenError(
            f"{option} {path}: importing it raised {type(error).__name__} ({error})"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            hint = nearest(part, dir(found))
            raise PertokenError(f"{option} {path}: {module} has no {name!r}{hint}")
        found = getattr(found, part)
    return found
