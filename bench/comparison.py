"""What the benches of two contenders do with their result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def show_and_write(written: dict[str, Any], out: Path) -> None:
    """Print the comparisons with their bars, and the figures; write all of it to `out` as JSON."""
    for row in written["comparisons"]:
        print(
            f"{row['metric']}: {row['here']:.3f} ({row['bar']}) {'holds' if row['holds'] else '-'}"
        )
    for name, figures in written["figures"].items():
        print(name, json.dumps(figures))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
