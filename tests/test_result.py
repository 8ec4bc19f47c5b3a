"""What the base of all results gives: text, JSON, a frame, a page; whole files, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.result import Part, Result, cells, plain


class Pets(Result):
    def to_dict(self) -> dict[str, Any]:
        return {"pets": self.rows(), "mean": float("nan"), "name": "É \ud800"}

    def rows(self) -> list[dict[str, Any]]:
        return [{"name": "<b>", "legs": 4.0}, {"name": "eel", "tags": (1, 2)}]


def test_a_table_is_made_of_the_rows_with_the_keys_of_all_of_them() -> None:
    assert Pets().table().splitlines() == [
        "name  legs  tags",
        "<b>      4     -",
        "eel      -   1 2",
    ]


def test_json_holds_no_nan_and_is_whole_on_the_disk(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    text = Pets().to_json(file)
    assert json.loads(text)["mean"] is None
    # Half a surrogate pair cannot be written in UTF-8.
    assert file.read_bytes().decode() == text.replace("\ud800", "?") + "\n"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("write", [Pets().to_json, Pets().to_html])
def test_what_cannot_be_written_is_one_line_before_any_work(tmp_path: Path, write: Any) -> None:
    with pytest.raises(PertokenError, match="there is no folder"):
        write(tmp_path / "no" / "a")
    with pytest.raises(PertokenError, match="it is a folder"):
        write(str(tmp_path))


def test_a_page_stands_alone_and_escapes_what_it_shows(tmp_path: Path) -> None:
    page = Pets().to_html(tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert Pets()._repr_html_() in page


def test_a_frame_has_a_line_per_row() -> None:
    pandas = pytest.importorskip("pandas")
    frame = Pets().to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.name.tolist() == ["<b>", "eel"]


def test_plain_values_come_from_arrays_tensors_paths_and_tuples() -> None:
    found = plain(
        {"a": np.float32(0.5), 1: torch.tensor([1, 2]), "p": Path("x"), "n": np.array([np.nan])}
    )
    assert found == {"a": 0.5, "1": [1, 2], "p": "x", "n": [None]}


def test_a_part_without_lines_is_its_notes() -> None:
    assert Part("", [], ["one", "two"]).text() == "one\ntwo"
    assert Part("", cells([]), ["none"]).text() == "none"
