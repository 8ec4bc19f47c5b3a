"""Weighted texts: what is read from them, and what they are handed on as."""

from __future__ import annotations

import json
import math
import sys
from types import ModuleType

import pytest

from pertoken.decode import WeightedSamples
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer

ENCODE = ByteTokenizer().encode
FOUND = WeightedSamples(
    ids=[ENCODE("é"), ENCODE("b"), ENCODE("é"), ENCODE("c")],
    log_weights=[math.log(0.2), math.log(0.4), math.log(0.4), -math.inf],
    log_marginal=math.log(0.25),
    checks=17,
    resampled=1,
    decode=ByteTokenizer().decode,
)


def test_equal_texts_are_summed_and_the_dead_left_out() -> None:
    rows = FOUND.rows()
    assert [row["text"] for row in rows] == ["é", "b"]
    assert [row["probability"] for row in rows] == pytest.approx([0.6, 0.4])
    assert [row["particles"] for row in rows] == [2, 1]
    assert rows[1]["ids"] == ENCODE("b")
    assert FOUND.effective_sample_size == pytest.approx(1 / (0.2**2 + 0.4**2 + 0.4**2))


def test_json_is_whole_and_plain() -> None:
    data = json.loads(FOUND.to_json())
    assert data["posterior"] == FOUND.rows()
    assert data["ids"] == FOUND.ids
    assert data["log_weights"] == [*FOUND.log_weights[:3], None]
    assert (data["checks"], data["resampled"]) == (17, 1)
    assert "é" in FOUND.to_json()


def test_the_frame_holds_the_rows() -> None:
    pytest.importorskip("pandas")
    frame = FOUND.to_dataframe()
    assert list(frame.columns) == ["text", "probability", "particles", "ids"]
    assert frame.to_dict("records") == FOUND.rows()


def test_the_plot_shows_the_greatest_on_top() -> None:
    pytest.importorskip("plotly")
    figure = FOUND.plot()
    (bars,) = figure.data
    assert bars.orientation == "h"
    assert list(bars.x) == pytest.approx([0.4, 0.6])  # plotly draws from below
    assert list(figure.layout.yaxis.ticktext) == ["'b'", "'é'"]
    assert list(FOUND.plot(most=1).data[0].x) == pytest.approx([0.6])


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [("pandas", "dataframe", "to_dataframe"), ("plotly", "plot", "plot")],
)
def test_a_missing_package_is_named_by_its_extra(
    module: str, extra: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Blocked:
        def find_spec(self, name: str, *_: object) -> ModuleType | None:
            if name.partition(".")[0] == module:
                raise ModuleNotFoundError(name)
            return None

    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Blocked(), *sys.meta_path])
    with pytest.raises(PertokenError, match=rf"{module} is not installed: .*pertoken\[{extra}\]"):
        getattr(FOUND, call)()
