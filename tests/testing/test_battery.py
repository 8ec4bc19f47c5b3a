"""Every finished method on every architecture: each law holds, or is skipped for a declared reason.

What a pair skips must be what `pertoken.testing.battery` declares, so that a law that no longer
applies is seen. docs/matrix.md shows the same table.
"""

from __future__ import annotations

from typing import Any

import pytest

from pertoken.testing import ARCHITECTURES, check_method
from pertoken.testing.battery import (
    SETTING_LAWS,
    SETTINGS,
    SUBJECTS,
    expected_skips,
    finished,
    laws_on,
    subject,
)

METHODS = finished()
NAMED = [(slug, setting) for slug, more in SETTINGS.items() for setting in more]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("slug", METHODS)
def test_method_on_architecture(slug: str, architecture: str) -> None:
    one = subject(slug)
    if not one.meets_model:
        pytest.skip(f"{slug} takes no model: its laws run once, in test_method_without_a_model")
    laws = laws_on(one, architecture)
    report = check_method(slug, architecture, laws=laws)
    assert report.skips.keys() == expected_skips(one, laws).keys(), report.table()
    for law in one.refuses:
        assert report.skips[law].startswith("refused by name: ")
    if not report.holds:
        pytest.skip(report.table())


@pytest.mark.parametrize("slug", [slug for slug in METHODS if not subject(slug).meets_model])
def test_method_without_a_model(slug: str) -> None:
    one = subject(slug)
    report = check_method(slug)
    assert report.skips == expected_skips(one, [each.law for each in report.laws])
    assert report.holds


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("slug", "setting"), NAMED, ids=lambda name: name)
def test_setting_on_architecture(slug: str, setting: str, architecture: str) -> None:
    made: Any = SETTINGS[slug][setting]
    report = check_method(made, architecture, plug=subject(slug).plug, laws=SETTING_LAWS)
    assert report.holds == SETTING_LAWS


def test_every_method_is_there_and_nothing_else() -> None:
    assert set(SUBJECTS) | set(SETTINGS) <= set(METHODS)
    assert len(METHODS) == len(set(METHODS)) >= 20
