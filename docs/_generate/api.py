"""What changed in the public interface since the last tag: ``make api``.

Exit code 1 where something that users may call was removed or changed, 0 else, and where there is
no tag yet.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe


def main(root: Path) -> int:
    """Print the changes against the last tag of the checkout in `root`; the exit code."""
    tag = last_tag(root)
    if tag is None:
        print("no tag yet: nothing to compare with")
        return 0
    old = griffe.load_git("pertoken", ref=tag, repo=root, search_paths=["src"])
    new = griffe.load("pertoken", search_paths=[root / "src"], resolve_aliases=True)
    broken = sorted(set(breakages(old, new)))
    print("\n".join(broken) or f"nothing that was public in {tag} is gone or changed")
    return 1 if broken else 0


def last_tag(root: Path) -> str | None:
    """The newest tag that HEAD comes from, None where there is none."""
    found = subprocess.run(
        ["git", "describe", "--tags", "--abbrev=0"], cwd=root, capture_output=True, text=True
    )
    return found.stdout.strip() or None if found.returncode == 0 else None


def breakages(
    old: griffe.Object | griffe.Alias, new: griffe.Object | griffe.Alias
) -> Iterator[str]:
    """A line for each: what, where, and how it was and is; private names do not count."""
    for change in griffe.find_breaking_changes(old, new):
        path = change.obj.path
        if not any(part.startswith("_") for part in path.split(".")):
            yield change.explain(griffe.ExplanationStyle.ONE_LINE)


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parents[2]))
