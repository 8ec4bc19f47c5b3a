"""Proof: one file per paper runs its headline claim at the scale of one small machine.

A reproduction is a file ``reproduce/<slug>.py`` with

- ``BARS``: metric -> bar, such as ``{"goose / balanced, tokens per forward": ">= 1.12"}``,
  declared before anything runs and frozen by the harness;
- ``run(context) -> Reproduction``: measures, returns ``context.reproduction(rows, **settings)``;
  rows whose metric has no bar are information;
- where it differs from the default: ``VERSION`` (1; raise it when a change moves the figures),
  ``MODEL`` ("smollm2"), ``DTYPE``, ``SEED`` (0);
- ``REASONS``: metric -> why its bar does not hold here, where it does not;
- ``CAVEATS``: metric -> how to read a bar that holds, where that says less than it seems to.

The module can be called: ``pertoken.reproduce("goose", smoke=True)``.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pertoken._lazy import lazy

if TYPE_CHECKING:
    from pertoken.reproduce._context import Context
    from pertoken.reproduce._harness import available, refresh_reasons, reproduce
    from pertoken.reproduce._report import Report, Reproduction, Row, read_report

__all__ = [
    "Context",
    "Report",
    "Reproduction",
    "Row",
    "available",
    "read_report",
    "refresh_reasons",
    "reproduce",
]

_HOME = {
    "Context": "_context",
    "Report": "_report",
    "Reproduction": "_report",
    "Row": "_report",
    "available": "_harness",
    "read_report": "_report",
    "refresh_reasons": "_harness",
}


_load, _ = lazy(__name__, _HOME)


def __getattr__(name: str) -> Any:
    if name == "reproduce":
        # The module itself, which can be called: `pertoken.reproduce` is then one thing whether
        # the function was asked for first or the package was imported first.
        return sys.modules[__name__]
    return _load(name)


class _Callable(ModuleType):
    def __call__(self, slug: str, smoke: bool = False, **options: Any) -> Any:
        from pertoken.reproduce._harness import reproduce

        return reproduce(slug, smoke, **options)


sys.modules[__name__].__class__ = _Callable
