"""Small pieces of Markdown, and docstrings as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

# `name: what it is` or `one, other: what they are`, at the beginning of a line.
_ENTRY = re.compile(r"^(?P<names>\*{0,2}[a-z_]\w*(?:, \*{0,2}[a-z_]\w*)*): (?=\S)")
_PROMPT = re.compile(r"^>>> ")


def cell(text: object) -> str:
    """Text for a cell of a table: one line, with the bars between cells escaped.

    >>> cell("a | b")
    'a \\\\| b'
    """
    return re.sub(r"[ \t\n]+", " ", str(text).replace("|", "\\|")).strip()


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown.

    >>> print(table(["a", "b"], [[1, "x|y"]]))
    | a | b |
    | --- | --- |
    | 1 | x\\|y |
    """
    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in (head, ["---"] * len(head))]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def as_markdown(docstring: str, names: Iterable[str] = ()) -> str:
    """A docstring of this house as Markdown.

    Examples become code blocks, and lines `name: text` that explain the given names a list, with
    or without the heading `Args:`.

    >>> print(as_markdown("Adds.\\n\\none, two: numbers,\\n    any.\\nMore.", ["one", "two"]))
    Adds.
    <BLANKLINE>
    - `one`, `two`: numbers,
        any.
    <BLANKLINE>
    More.
    >>> as_markdown(">>> 1 + 1\\n2")
    '```pycon\\n>>> 1 + 1\\n2\\n```'
    """
    known = set(names)
    lines: list[str] = []
    code = entry = False
    for line in _without_heading(docstring.splitlines()):
        if code and not line.strip():
            lines.append("```")
            code = False
        elif not code and _PROMPT.match(line):
            lines += ["```pycon"] if not lines or not lines[-1] else ["", "```pycon"]
            code, entry = True, False
        found = None if code else _ENTRY.match(line)
        if found and known & set(re.findall(r"\w+", found["names"])):
            if not entry and lines and lines[-1]:
                lines.append("")
            entry = True
            named = re.sub(r"[*\w]+", lambda name: f"`{name[0]}`", found["names"])
            line = f"- {named}: {line[found.end() :]}"
        elif entry and line and not line[0].isspace():
            lines += [""] if lines[-1] else []
            entry = False
        lines.append(line)
    if code:
        lines.append("```")
    return "\n".join(lines)


def _without_heading(lines: Iterable[str]) -> Iterator[str]:
    """The lines with what stands below `Args:` as if it stood there without that heading."""
    inside = False
    for line in lines:
        if line == "Args:":
            inside = True
            continue
        inside = inside and (not line or line.startswith("    "))
        yield line[4:] if inside else line
