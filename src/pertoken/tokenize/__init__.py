"""Text to ids: what a tokenizer costs, how it cuts numbers, and changing it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.tokenize.numbers import (
        NumberDirection,
        direction_of,
        format_number,
        grouping_of,
        number_cuts,
    )

__all__ = [
    "NumberDirection",
    "direction_of",
    "format_number",
    "grouping_of",
    "number_cuts",
]

_HOME = {
    "NumberDirection": "numbers",
    "direction_of": "numbers",
    "format_number": "numbers",
    "grouping_of": "numbers",
    "number_cuts": "numbers",
}

__getattr__, __dir__ = lazy(__name__, _HOME)
