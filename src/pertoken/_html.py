"""What self-contained pages share: their files, tables, and the hash a security policy allows."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib.resources import files

__all__ = ["asset", "grid", "source_hash"]


def asset(name: str) -> str:
    """The text of a file of the page's own: its style or its script."""
    return files("pertoken").joinpath("_page", name).read_text(encoding="utf-8")


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A table as HTML: the head, then lines whose first cell names them."""
    head, *body = lines
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in body
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def source_hash(text: str) -> str:
    """The source expression of the security policy that allows exactly this text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")
