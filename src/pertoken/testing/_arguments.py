"""Calling a method by the names of its arguments: model, tokenizer, prompt, log_probs, mask, …"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pertoken.errors import PertokenError

__all__ = ["CannotCall", "fill", "parameters", "takes_no"]

_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class CannotCall(PertokenError):
    """A method was given in a way in which no law can call it."""


def parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a callable by name, those bound by `functools.partial` left out."""
    bound = function.keywords if isinstance(function, partial) else {}
    try:
        found = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-ins have none
        return {}
    return {name: parameter for name, parameter in found.items() if name not in bound}


def takes_no(method: Any) -> bool:
    """Whether a callable can be called without arguments."""
    return not _needed(method)


def fill(function: Callable[..., Any], pool: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a pool of arguments that a function names.

    Raises CannotCall where it needs one that is not there.

    >>> fill(lambda model, seed=0: None, {"model": 1, "seed": 2, "prompt": 3})
    {'model': 1, 'seed': 2}
    """
    missing = [name for name in _needed(function) if name not in pool]
    if missing:
        raise CannotCall(
            f"the method needs {' and '.join(missing)}, which no law knows: bind it first, as in "
            f"functools.partial(method, {missing[0]}=...); known are {', '.join(pool)}"
        )
    return {name: pool[name] for name in parameters(function) if name in pool}


def _needed(function: Any) -> list[str]:
    known = parameters(function).values()
    return [p.name for p in known if p.default is p.empty and p.kind not in _REST]
