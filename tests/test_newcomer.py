"""CONTRIBUTING's five steps, followed to the letter in a copy of the source tree, for a toy."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pertoken.catalog import source_tree

ROOT = source_tree()
pytestmark = pytest.mark.skipif(ROOT is None, reason="needs the source tree")

LAW = '''"""The laws of parrot."""

from pertoken.decode.parrot import Parrot
from pertoken.testing import check_method, compositions, tiny_model


def test_it_drafts_its_last_token_again() -> None:
    method = Parrot(budget=3)
    method.contexts = [[5, 7]]
    assert method.propose(0, budget=3, room=2).tokens == [7, 7, 7]


def test_all_laws_of_its_plug_hold() -> None:
    assert not check_method("parrot", tiny_model("gpt2")).broken


def test_it_goes_with_other_methods_or_says_why_not() -> None:
    found = compositions(["parrot", "kv-direct", "h2o", "constraint"])
    assert not found.broken
'''

METHOD = '''"""Parrot: a toy that drafts the last token again and again.

Idea: what was said once is said twice.
Claim: none.
Differences: none.
Limits: in most texts nothing is accepted, and every pass is dearer for it.
"""

from __future__ import annotations

from pertoken.decode.drafter import Drafter
from pertoken.decode.tree import TokenTree

__all__ = ["Parrot"]


class Parrot(Drafter):
    """Drafts a chain of the last token; the output is that of plain decoding.

    Example: ``model.generate(**inputs, max_new_tokens=64, custom_generate=Parrot())``
    """

    slug = "parrot"
    default_budget = 4

    def propose(self, row: int, budget: int, room: int) -> TokenTree:
        """One chain of at most `budget` tokens."""
        last = self.contexts[row][-1]
        tree = TokenTree(last)
        tree.add_chain(0, [last] * min(budget, room), source="echo")
        return tree
'''

REPRODUCTION = '''"""Does the headline claim of parrot hold here?"""

from __future__ import annotations

import torch

from pertoken.reproduce import Context, Reproduction, Row

# Metric -> bar, fixed before the first run.
BARS = {"tokens equal to plain decoding": ">= 1", "tokens per pass": ">= 2"}
MODEL = "tiny"


def run(context: Context) -> Reproduction:
    """Both rows, on a random model."""
    from pertoken.decode.parrot import Parrot
    from pertoken.testing import tiny_model

    model, method = tiny_model("llama"), Parrot()
    ids = torch.tensor([[5, 7, 7]])
    plain = model.generate(ids, max_new_tokens=16, do_sample=False)
    drafted = model.generate(ids, max_new_tokens=16, do_sample=False, custom_generate=method)
    equal = (plain == drafted).float().mean().item()
    rows = [
        Row("tokens equal to plain decoding", equal, "share", paper="all"),
        Row("tokens per pass", method.stats.accepted_per_forward, "tokens"),
    ]
    return context.reproduction(rows)
'''

CARD = """does = "Drafts the last token again."
use_when = "Use it to learn how a method is added."
avoid_when = "Leave it where you want speed."
cost = "One pass over a few more tokens a step."
headline = "What was said once is said twice."
headline_row = "tokens per pass"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    assert ROOT is not None
    for name in ("src", "reports"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_five_steps(tree: Path, run_module: Callable[..., str]) -> None:
    # 1. Start it.
    given = ("--title", "Parrot", "--family", "decode", "--arxiv", "2604.00001")
    run_module(tree, "pertoken", "new", "parrot", *given)
    # 2. Write the law. 3. Write the method. 4. Write the reproduction.
    test = tree / "tests" / "decode" / "test_parrot.py"
    assert "xfail" in test.read_text()
    test.write_text(LAW)
    (tree / "src" / "pertoken" / "decode" / "parrot.py").write_text(METHOD)
    (tree / "src" / "pertoken" / "reproduce" / "parrot.py").write_text(REPRODUCTION)
    # 5. Show it.
    catalog = tree / "src" / "pertoken" / "catalog.toml"
    rows = catalog.read_text()
    begin = rows.index('slug = "parrot"')
    end = rows.find("[[", begin)
    sentence = re.compile(r"^(does|use_when|headline) = .*\n", re.M)
    row = sentence.sub("", rows[begin:end]).rstrip() + "\n" + CARD + "\n"
    catalog.write_text(rows[:begin] + row + rows[end:])
    run_module(tree, "pertoken", "reproduce", "parrot", "--smoke")
    run_module(tree, "pertoken", "reproduce", "parrot")
    run_module(tree, "pertoken.reproduce.readme", "--root", str(tree))

    assert " passed" in run_module(tree, "pytest", "-q", "-p", "no:cacheprovider", str(test))
    python = [str(path) for path in tree.rglob("*parrot.py")]
    assert len(python) == 3
    run_module(tree, "ruff", "check", *python)
    listed = json.loads(run_module(tree, "pertoken", "list", "--json", "-"))
    (one,) = (each for each in listed if each["slug"] == "parrot")
    assert one["status"] == "ready"
    shown = " ".join(run_module(tree, "pertoken", "show", "parrot").split())
    assert "Leave it where you want speed." in shown
    assert "ready, 2 of 2 bars hold" in shown
    assert "[parrot](reports/parrot.json)" in (tree / "README.md").read_text()
