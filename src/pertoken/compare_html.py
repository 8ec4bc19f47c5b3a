"""The page of `compare`: its tables, and every text with each token coloured by its origin.

One file without anything from outside. Its security policy names the hashes of its own style and
script and allows nothing else, and texts reach the page as JSON and as text nodes only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from pertoken._html import asset, grid, report
from pertoken.compare_report import REFERENCE, MethodRow, identical, number, percent

if TYPE_CHECKING:
    from pertoken.compare_report import Comparison, Decoded
    from pertoken.prompts import Prompt

__all__ = ["page"]

SOURCES = {
    "bonus": "the model's own choice behind what was accepted",
    "spine": "a long copy of earlier text, drafted as the tree's spine",
    "branch": "a likely successor, drafted as a branch of the tree",
    "table": "a successor that the model itself ranked high earlier",
    "copy": "copied from where the last tokens stood before",
    "guess": "a sequence that the model made on the side",
    "suffix": "the most frequent continuation so far",
    "window": "a token of the lookahead window that was right by itself",
}
"""Origins with an explanation; "bonus" is the only one without a colour."""

_STYLES = 8  # s0 to s7 in the style sheet
_BAR = 120  # width of the longest bar, in pixels


def page(comparison: Comparison) -> str:
    """The whole page as HTML."""
    run = comparison.settings
    count = len(comparison.prompts)
    lead = (
        f"{count} prompt{'s' if count > 1 else ''}, at most {run['max_new_tokens']} new tokens "
        f"each, greedy, with {run['model']} in {run['dtype']} on {run['device']}"
    )
    by_category = ""
    if len(comparison.categories) > 1:
        by_category = "<h2>By category</h2>\n" + grid(comparison.category_cells())
    notes = "\n".join(f'<p class="faint">{escape(line)}</p>' for line in comparison.notes())
    main = f"""\
<h2>What each method brought</h2>
{_table(comparison)}
{by_category}
{notes}
<noscript><p>The texts with their tokens need JavaScript; the tables do not.</p></noscript>
{_VIEWER}
<script type="application/json" id="data">{_json(_data(comparison))}</script>"""
    return report(
        f"pertoken compare: {run['model']}",
        f"The same prompts, decoded in {len(comparison.methods)} ways",
        main,
        lead=f'<p class="faint">{escape(lead)}</p>',
        script=asset("compare.js"),
    )


_VIEWER = """\
<section id="viewer" hidden>
<h2>Where each token came from</h2>
<div class="picker">
<label>Prompt <select id="prompt"></select></label>
<label>Method <select id="method"></select></label>
</div>
<p id="verdict"></p>
<p id="note" class="faint"></p>
<details><summary>The prompt</summary><pre id="ask"></pre></details>
<ul id="legend" aria-label="Origins of the tokens"></ul>
<p class="faint screen">A bar begins each forward pass of the model.</p>
<div id="text" tabindex="0" role="group" aria-label="Text, token by token"></div>
<p id="detail" class="faint" aria-live="polite"></p>
</section>"""


def _table(comparison: Comparison) -> str:
    head = [
        "method",
        "identical",
        *comparison.quality_head,
        "tokens/s",
        "x plain",
        "",
        "middle half",
        "tokens/forward",
        "drafting",
    ]
    longest = max(
        (row.speed_up for row in comparison.method_rows if math.isfinite(row.speed_up)), default=1.0
    )
    body = "\n".join(_table_row(comparison, row, longest) for row in comparison.method_rows)
    cells = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    return (
        f'<div class="wide"><table>\n<thead><tr>{cells}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _table_row(comparison: Comparison, row: MethodRow, longest: float) -> str:
    bad = ' class="bad"' if row.different else ""
    middle = f"{number(row.spread.low)} – {number(row.spread.high)}" if row.prompts > 1 else ""
    quality = "".join(f"<td>{cell}</td>" for cell in comparison.quality_cells(row))
    return (
        f'<tr><th scope="row">{escape(row.method)}</th><td{bad}>{identical(row)}</td>{quality}'
        f"<td>{number(row.tokens_per_second, 1)}</td><td>{number(row.speed_up)}</td>"
        f'<td class="bar">{_bar(row.speed_up, longest)}</td><td>{middle}</td>'
        f"<td>{number(row.accepted_per_forward)}</td><td>{percent(row.draft_share)}</td></tr>"
    )


def _bar(value: float, longest: float) -> str:
    """A bar with a dashed line at 1, the speed of plain decoding."""
    if not math.isfinite(value):
        return ""
    longest = max(longest, 1.0)
    one, width = (f"{_BAR * share / longest:.1f}" for share in (1.0, value))
    return (
        f'<svg width="{_BAR + 2}" height="14" aria-hidden="true"><rect width="{width}" '
        f'height="10" y="2"/><line x1="{one}" x2="{one}" y1="0" y2="14"/></svg>'
    )


def _data(comparison: Comparison) -> dict[str, Any]:
    """What the script needs; a text that several methods share is there once."""
    found = [s for r in comparison.results for d in r.values() for s in d.sources or ()]
    names = [name for name in SOURCES if name in found]
    names += sorted(set(found) - set(SOURCES))
    best = max(
        (row for row in comparison.method_rows if comparison.results[0][row.method].sources),
        key=lambda row: row.accepted_per_forward if math.isfinite(row.accepted_per_forward) else 0,
        default=None,
    )
    start = best.method if best else comparison.methods[0]
    return {
        "methods": list(comparison.methods),
        "start": {"method": start, "prompt": _liveliest(comparison, start)},
        "sources": _sources(names),
        "prompts": [
            _prompt(comparison, prompt, by_method, looping, names)
            for prompt, by_method, looping in zip(
                comparison.prompts, comparison.results, comparison.looping, strict=True
            )
        ],
    }


def _liveliest(comparison: Comparison, method: str) -> int:
    """The prompt to begin with: the one whose text shows most origins and most drafted tokens."""

    def interest(index: int) -> tuple[int, int]:
        sources = comparison.results[index][method].sources or []
        return len(set(sources)), len(sources) - sources.count("bonus")

    return max(range(len(comparison.prompts)), key=interest)


def _sources(names: Sequence[str]) -> list[dict[str, str]]:
    """Name, explanation and style class of each origin; a known one looks the same on all pages."""
    coloured = [name for name in SOURCES if name != "bonus"]
    coloured += [name for name in names if name not in SOURCES]
    return [
        {
            "name": "bonus (model's own)" if name == "bonus" else name,
            "about": SOURCES.get(name, "drafted"),
            "style": "" if name == "bonus" else f"s{coloured.index(name) % _STYLES}",
        }
        for name in names
    ]


def _prompt(
    comparison: Comparison,
    prompt: Prompt,
    by_method: dict[str, Decoded],
    looping: bool,
    names: Sequence[str],
) -> dict[str, Any]:
    texts: list[list[int]] = []
    runs: dict[str, Any] = {}
    for method, result in by_method.items():
        if result.ids not in texts:
            texts.append(result.ids)
        whole = result.sources is not None and len(result.sources) == len(result.ids)
        runs[method] = {
            "text": texts.index(result.ids),
            "sources": [names.index(s) for s in result.sources or ()] if whole else None,
            "steps": result.step_lengths if whole else None,
            "line": _line(method, result, method in comparison.lossy),
        }
    return {
        "id": prompt.id,
        "category": prompt.category,
        "text": prompt.text,
        "looping": looping,
        "texts": [comparison.pieces(ids) for ids in texts],
        "runs": runs,
    }


def _line(method: str, result: Decoded, lossy: bool) -> str:
    """What one method did on one prompt, in one sentence."""
    passes = result.forwards + 1
    text = (
        f"{len(result.ids)} tokens in {result.seconds:.2f} s and {passes} forward "
        f"pass{'es' if passes > 1 else ''}"
    )
    outcome = result.verdict.outcome if result.verdict else "identical"
    if method == REFERENCE:
        return f"{text}; the reference"
    if lossy:
        return f"{text}; not lossless"
    if outcome == "identical":
        return f"{text}; identical to plain decoding"
    where = result.verdict.divergence.step if result.verdict and result.verdict.divergence else 0
    kind = "a numerical tie" if outcome == "numerical tie" else "DIFFERENT"
    return f"{text}; leaves plain decoding at token {where + 1}: {kind}"


def _json(data: Any) -> str:
    """JSON that cannot end its script element, whatever the texts hold."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
