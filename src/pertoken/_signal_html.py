"""The page and notebook view of a `TokenSignal`: coloured text, no script, self-contained."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, Any

from pertoken._html import document
from pertoken.signal import _LEVELS, _colour, _legend

if TYPE_CHECKING:
    from pertoken.signal import TokenSignal

__all__ = ["fragment", "page"]

_MOST = 100  # texts shown, one for each target


def fragment(signal: TokenSignal) -> str:
    """The signal as a piece of a page, with styles of its own on each token."""
    return f'<div style="font-family: sans-serif">{_body(signal, inline=True)}</div>'


def page(signal: TokenSignal) -> str:
    """The signal as a whole page."""
    body = f"<h1>{escape(signal.name)}</h1>\n{_body(signal, inline=False)}"
    return document(signal.name, body, style=_style())


def _body(signal: TokenSignal, *, inline: bool) -> str:
    parts = [_coloured(signal, signal.total().values, inline)]
    for place, target in enumerate(signal.targets[:_MOST]):
        told = f"<summary>for <code>{escape(target)}</code></summary>"
        parts.append(
            f"<details>{told}{_coloured(signal, signal.values[:, place], inline)}</details>"
        )
    left = len(signal.targets) - _MOST
    if left > 0:
        parts.append(f"<p>{left} more targets are not shown.</p>")
    legend = f"{signal.name}: {_legend(signal.values)}"
    if signal.targets:
        legend += "; the first text shows the mean over the targets"
    parts.append(f"<p><small>{escape(legend)}</small></p>")
    parts += [f"<p><small>{escape(note)}</small></p>" for note in signal.notes]
    return "\n".join(parts)


def _coloured(signal: TokenSignal, values: Any, inline: bool) -> str:
    spans = []
    for token, value, shade in zip(
        signal.tokens, values.tolist(), signal.shades(values), strict=True
    ):
        if not token:
            continue
        told = "not measured" if math.isnan(value) else f"{value:.4g}"
        look = ""
        if shade and inline:
            look = f' style="background: rgb{_colour(shade)}; color: black"'
        elif shade:
            look = f' class="{"p" if shade > 0 else "n"}{abs(shade)}"'
        spans.append(f'<span{look} title="{told}">{escape(token)}</span>')
    box = ' style="white-space: pre-wrap"' if inline else ""
    return f"<p{box}>{''.join(spans)}</p>"


def _style() -> str:
    rules = [
        "body { font: 16px/1.7 sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em; }",
        "h1 { font-size: 1.2em; }",
        "p { white-space: pre-wrap; overflow-wrap: anywhere; }",
        "span[class] { border-radius: 2px; }",
    ]
    for level in range(1, _LEVELS + 1):
        for side, sign in (("p", level), ("n", -level)):
            rules.append(f".{side}{level} {{ background: rgb{_colour(sign)}; color: #000; }}")
    return "\n".join(rules)
