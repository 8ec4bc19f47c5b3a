"""Every finished method on every architecture: each law holds, or is skipped for a declared reason.

What a pair skips must be what `_battery` of its family declares, so that a law that no longer
applies is seen. docs/matrix.md shows the same table.
"""

from __future__ import annotations

from typing import Any

import pytest

from pertoken.catalog import FAMILIES, card
from pertoken.testing import ARCHITECTURES, battery, check_method
from pertoken.testing.battery import (
    SETTING_LAWS,
    expected_skips,
    finished,
    laws_on,
    subject,
)

METHODS = finished()
NAMED = [(slug, setting) for slug in METHODS for setting in subject(slug).settings]


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
    made: Any = subject(slug).settings[setting]
    report = check_method(made, architecture, plug=subject(slug).plug, laws=SETTING_LAWS)
    assert report.holds == SETTING_LAWS


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_describes_is_there(family: str) -> None:
    described = battery._of_family(family)
    assert set(described) <= set(METHODS)
    assert all(card(slug).family == family for slug in described)
    assert all(card(slug).plug == one.plug for slug, one in described.items())
