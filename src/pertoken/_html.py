"""What self-contained pages share: their files, tables, and the hash a security policy allows."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib.resources import files

__all__ = ["asset", "document", "grid", "report"]


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


def report(
    title: str, heading: str, main: str, *, lead: str = "", style: str = "", script: str = ""
) -> str:
    """A page of tables and charts in the style that all of them share, `style` and `script` added.

    title, heading: text. lead: HTML, below the heading. main: HTML, all the rest.
    """
    body = f"""\
<header>
<h1>{escape(heading)}</h1>
{lead}
</header>
<main>
{main}
</main>"""
    return document(title, body, style=asset("page.css") + style, script=script)


def document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A whole page that loads nothing from outside.

    style, script: the only ones that its security policy allows; without a style the body may
    bring styles on its elements. The script stands behind the body.
    """
    allowed = f"'{_source_hash(style)}'" if style else "'unsafe-inline'"
    policy = f"default-src 'none'; style-src {allowed}"
    if script:
        policy += f"; script-src '{_source_hash(script)}'"
    text = f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; base-uri 'none'; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
{f"<style>{style}</style>" if style else ""}
</head>
<body>
{body}
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""
    # Half a surrogate pair is no character and could not be written as UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def _source_hash(text: str) -> str:
    """The source expression of the security policy that allows exactly this text."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")
