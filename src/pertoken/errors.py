"""The one error a user can cause, and the hint for a mistyped name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["CannotServe", "PertokenError", "nearest"]


class PertokenError(ValueError):
    """A mistake the caller can mend: one line that names the thing and the mend."""


class CannotServe(PertokenError):
    """A method and a model that do not go together; other methods may serve the model."""


def nearest(name: str, options: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the options closest to `name`, or ``""``.

    The result is meant to be appended to an error message. Case, ``_`` and spaces do not count,
    and an abbreviation finds the names that contain it.

    >>> nearest("gose", ["goose", "token-recycling"])
    " (did you mean 'goose'?)"
    >>> nearest("recycling", ["goose", "token-recycling"])
    " (did you mean 'token-recycling'?)"
    >>> nearest("xyz", ["goose"])
    ''
    """
    spellings: dict[str, list[str]] = {}
    for option in options:
        spellings.setdefault(_plain(option), []).append(option)
    wanted = _plain(name)
    if not wanted:
        return ""
    close = get_close_matches(wanted, spellings, n=3, cutoff=0.7)
    if len(wanted) >= 3:
        close += [option for option in spellings if wanted in option and option not in close]
    found = [option for key in close for option in spellings[key]][:3]
    if not found:
        return ""
    return f" (did you mean {' or '.join(repr(option) for option in found)}?)"


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(" ", "-")
