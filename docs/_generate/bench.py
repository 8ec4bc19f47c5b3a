"""Tables of what was measured beside peers, from reports/bench."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from _generate.text import table
from pertoken.catalog import reports_dir
from pertoken.reproduce._table import number

_PLACE = re.compile(r"^<!-- bench: (\w+) -->$", re.M)
_LISTS = ("ratios", "rows", "comparisons")  # where the benches keep their figures


def fill(markdown: str) -> str:
    """The text with the table of bench NAME for every line `<!-- bench: NAME -->`."""
    return _PLACE.sub(lambda place: _table(reports_dir() / "bench" / f"{place[1]}.json"), markdown)


def _table(path: Path) -> str:
    report = json.loads(path.read_text(encoding="utf-8"))
    lists = [found for name in _LISTS if isinstance(found := report.get(name), list)]
    rows = [row for found in lists for row in found]
    machine = report["machine"]
    shown = table(["what", "here", "bar", "holds?"], map(_cells, rows))
    peers = report["settings"].get("peers", {})
    against = ", ".join(f"{name} {version}" for name, version in peers.items())
    facts = [against, report["settings"].get("model", "")]
    facts += [f"{machine['threads']} threads of {machine['cpu']}"]
    return f"{shown}\n\n({', '.join(filter(None, facts))}; `reports/bench/{path.name}`)"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    text = number(row["here"])
    if (interval := row.get("interval")) is not None:
        low, high = interval
        text += f" ({number(low)}–{number(high)})"
    bar = str(row.get("bar") or "")
    return str(row["metric"]), text, bar, ("holds" if row["holds"] else "no") if bar else ""
