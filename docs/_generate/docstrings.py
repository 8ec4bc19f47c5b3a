"""Extension of griffe: mkdocstrings shows docstrings of this house as they are meant."""

from __future__ import annotations

from typing import Any

import griffe

from _generate.text import as_markdown


class HouseStyle(griffe.Extension):
    """Turns examples into code blocks and explained names into lists."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object; called once all of it is read."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, _names(obj))


def _names(obj: griffe.Object) -> list[str]:
    """What a docstring may explain: parameters, of a class those of its constructor, fields."""
    names = [one.name for one in getattr(obj, "parameters", ())]
    return [*names, *(name for name in obj.members if not name.startswith("_"))]
