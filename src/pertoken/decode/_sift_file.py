"""Sifted questions in a file, a JSON line each: a run that was stopped goes on behind them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pertoken._files import drop_cut_line, whole_lines
from pertoken.decode.sift import Progress, Sifted, sift_all
from pertoken.errors import PertokenError

__all__ = ["sift_into", "sifted_in"]

About = dict[str, Any]
"""model and max_new_tokens, which stand in every line."""


def sift_into(
    path: Path,
    questions: Sequence[str],
    model: Any,
    done: dict[str, Sifted],
    about: About,
    *,
    batch: int = 8,
    progress: Progress | None = None,
    **options: Any,
) -> None:
    """Ask different questions, `batch` of them at a time, and write each batch behind the file.

    done: what is finished is put there too. options: of `sift_all`.
    """
    options["max_new_tokens"] = about["max_new_tokens"]
    for start in range(0, len(questions), batch):
        if progress is not None:
            progress("questions", start, len(questions))
        found = sift_all(questions[start : start + batch], model, batch=batch, **options).found
        lines = [json.dumps({**about, **one.to_dict()}, ensure_ascii=False) + "\n" for one in found]
        with path.open("ab") as file:
            file.write("".join(lines).encode("utf-8", "replace"))
        done |= {one.question: one for one in found}


def sifted_in(path: Path, about: About) -> dict[str, Sifted]:
    """The questions of an earlier run, by their text; a line cut off by a kill is dropped.

    PertokenError for lines of something else, or of a run with another model or length.
    """
    found = {}
    for number, line in enumerate(whole_lines(path), 1):
        try:
            row = json.loads(line)
            one = Sifted.from_dict(row)
            given = {name: row[name] for name in ("model", "max_new_tokens")}
        except (ValueError, KeyError, TypeError):
            raise PertokenError(
                f"{path}, line {number}: not a question that was sifted; give another --out"
            ) from None
        if given != about:
            raise PertokenError(
                f"{path} was written with {given['model']} and {given['max_new_tokens']} new "
                f"tokens, this run has {about['model']} and {about['max_new_tokens']}; give "
                "another --out"
            )
        found[one.question] = one
    drop_cut_line(path, '{"model": ')
    return found
