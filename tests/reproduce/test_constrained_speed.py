"""The measurement of speculation under a JSON schema runs whole, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from pertoken.reproduce._constrained_speed import (
    TASKS,
    constrained_rows,
    prompts_of,
    run_constrained,
)
from pertoken.reproduce._context import Context
from pertoken.testing import ByteTokenizer


def test_all_contenders_write_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path))
    context = Context("awrs", 1, smoke=True, dtype="float64")
    form = "fixed white space"
    units = run_constrained(context, form, new_tokens=24)
    rows = {row.metric: row for row in constrained_rows(units, form, seed=0)}
    for kind in ("forced tokens", "goose, auto budget"):
        assert rows[f"JSON schema, {form}, {kind}: same tokens as masking"].here == 1.0
        assert rows[f"JSON schema, {form}, {kind}: tokens per pass"].here > 1.0
        assert rows[f"JSON schema, {form}, {kind}: wall clock over masking"].here > 0.0


def test_every_task_has_a_schema_that_llguidance_knows() -> None:
    pytest.importorskip("llguidance")
    from pertoken.decode.grammar import JSONSchemaConstraint

    tokenizer = ByteTokenizer()
    assert set(prompts_of(tokenizer)) == set(TASKS)
    for _, schema in TASKS.values():
        constraint = JSONSchemaConstraint(schema, tokenizer=tokenizer)
        first = next(iter(schema["properties"]))
        assert constraint.accepts(tokenizer.encode('{"' + first))
