"""SIFT's bars on its control flow: 1 for the algorithm as it is, less for each wrong way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pertoken.decode import sift as algorithm
from pertoken.reproduce import _sift_flow as flow


def test_the_scripts_end_in_every_way() -> None:
    some = flow.scripts()
    found = algorithm.sift_all(list(some), flow.Scripted(flow.merged(some)), wording=flow.WORDING)
    assert list(found.ended.values()) == [8, 4, 2, 2]


def test_the_algorithm_passes() -> None:
    assert flow.branches() == flow.in_lockstep() == flow.resumed() == 1


def test_replies_of_another_question_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    asker = algorithm.asker

    def turned(*given: Any) -> Any:
        ask = asker(*given)
        return lambda texts: ask(texts)[::-1]

    monkeypatch.setattr(algorithm, "asker", turned)
    with pytest.raises(KeyError):  # the sticker of another question is asked about
        flow.in_lockstep()


@pytest.mark.parametrize("wrong", ["starts again", "keeps the cut line", "drops a whole line"])
def test_a_wrong_way_to_go_on_is_seen(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sifted_in = flow.sifted_in

    def broken(path: Path, about: dict[str, Any]) -> Any:
        content = path.read_bytes() if path.exists() else b""
        if wrong == "starts again":
            path.write_bytes(b"")
            return {}
        if wrong == "drops a whole line":
            lines = content.splitlines(keepends=True)
            path.write_bytes(b"".join(lines[:-1]))
            return sifted_in(path, about)
        found = sifted_in(path, about)
        path.write_bytes(content)
        return found

    monkeypatch.setattr(flow, "sifted_in", broken)
    assert flow.resumed() < 1
