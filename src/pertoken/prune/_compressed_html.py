"""The page and notebook view of a compression: the prompt with what was dropped struck out."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from pertoken._html import document

if TYPE_CHECKING:
    from pertoken.prune.compressed import Compressed, CompressedPrompt

__all__ = ["fragment", "page"]

_STYLE = """\
.pt-compressed { font: 16px/1.7 sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em; }
.pt-compressed h1, .pt-compressed h2 { font-size: 1.1em; }
.pt-compressed p.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.pt-compressed del { color: #777; }
.pt-compressed mark { background: #cfe3ff; color: #000; }"""


def page(result: Compressed) -> str:
    """The result as a whole page."""
    body = f"""\
<div class="pt-compressed">
{_body(result)}
</div>"""
    return document("Compressed prompt", body, style=_STYLE)


def fragment(result: Compressed) -> str:
    """The result as a piece of a page."""
    return f'<style>{_STYLE}</style><div class="pt-compressed">{_body(result)}</div>'


def _body(result: Compressed) -> str:
    parts = [f"<h1>{escape(repr(result))}</h1>"]
    for title, part in result.titled():
        parts += [f"<h2>{escape(title)}</h2>"] * bool(title) + [_text(part)]
    parts.append("<p><small>struck out: dropped; blue: protected</small></p>")
    parts += [f"<p><small>{escape(note)}</small></p>" for note in result.notes]
    return "\n".join(parts)


def _text(part: CompressedPrompt) -> str:
    pieces, last = [], 0
    for word in part.words:
        pieces.append(escape(part.prompt[last : word.start]))
        told = "not rated" if word.score is None else f"salience {word.score:.3g}"
        if word.why:
            told += f"; {word.why}"
        tag = "del" if not word.kept else "mark" if word.why else "span"
        pieces.append(f'<{tag} title="{escape(told)}">{escape(word.text)}</{tag}>')
        last = word.end
    pieces.append(escape(part.prompt[last:]))
    return f'<p class="text">{"".join(pieces)}</p>'
