"""What a long search has sampled so far, in a file of JSON lines: a kill costs the last line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pertoken._files import drop_cut_line, whole_lines
from pertoken.errors import PertokenError

__all__ = ["keep_row", "kept_rows"]

Row = dict[str, Any]


def kept_rows(path: Path, settings: Row) -> list[Row]:
    """The rows that `keep_row` has written with these settings; a line that was cut off is dropped.

    PertokenError for a file of something else, and for rows of other settings.
    """
    found: list[Row] = []
    for number, line in enumerate(whole_lines(path), 1):
        try:
            found.append(json.loads(line))
            given = found[-1]["settings"]
        except (ValueError, KeyError, TypeError):
            raise PertokenError(
                f"{path}, line {number}: no sampled answers; remove it, or give another place"
            ) from None
        if given != settings:
            raise PertokenError(
                f"{path} holds answers of other settings ({given}): remove it, or give another "
                "place"
            )
    drop_cut_line(path, '{"settings": ')
    return found


def keep_row(path: Path, settings: Row, row: Row) -> None:
    """Add a row."""
    line = json.dumps({"settings": settings, **row}, ensure_ascii=False) + "\n"
    with path.open("ab") as file:
        file.write(line.encode("utf-8", "replace"))
