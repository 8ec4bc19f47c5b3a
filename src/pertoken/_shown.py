"""How a method object shows itself: as the call that made it, less what is the default anyway."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

__all__ = ["Shown"]

# Shown by their class, of (model, tokenizer) that of the model.
_OBJECTS = ("model", "tokenizer", "streamer", "proposal", "predictor", "small", "large")


class Shown:
    """A base whose repr names the arguments that differ from the constructor's defaults.

    The arguments are looked up under their own names: a method keeps what it was given.

    >>> class Method(Shown):
    ...     def __init__(self, budget, *, layer=0, names=()):
    ...         self.budget, self.layer, self.names = budget, layer, list(names)
    >>> Method(4), Method(4, layer=2), Method("auto", names="ab")
    (Method(4), Method(4, layer=2), Method('auto', names=['a', 'b']))
    """

    def __repr__(self) -> str:
        parts = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = getattr(self, name)
            if parameter.default is not parameter.empty and _same(value, parameter.default):
                continue
            shown = value[0] if isinstance(value, tuple) and value else value
            text = type(shown).__name__ if name in _OBJECTS else repr(value)
            needed = parameter.default is parameter.empty
            parts.append(text if needed else f"{name}={text}")
        return f"{type(self).__name__}({', '.join(parts)})"


def _same(value: Any, default: Any) -> bool:
    if value is default:
        return True
    if isinstance(default, Collection) and not isinstance(default, str):
        return isinstance(value, Collection) and list(value) == list(default)
    return type(value) is type(default) and bool(value == default)
