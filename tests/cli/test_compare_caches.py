"""`pertoken compare-caches` as a user types it, with a tiny model in a folder."""

import json
import os
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from transformers.cache_utils import Cache, DynamicLayer

from pertoken.cache.named import CACHES
from pertoken.cli import main
from pertoken.cli.caches import parse_budgets, tokens_of
from pertoken.conversation import as_jsonl
from pertoken.errors import PertokenError

Capture = pytest.CaptureFixture[str]

TALK = [
    {"role": "user", "content": "abc abc"},
    {"role": "assistant", "content": "so so so"},
    {"role": "user", "content": "and then?"},
    {"role": "assistant", "content": "well"},
    {"role": "user", "content": "ab"},
]
# "User: abc abc\nAssistant:" and so on, one token per byte
GIVEN = 24 + 27 + 20


class Window(DynamicLayer):
    """Keeps the newest `size` rows: enough of a cache for a table."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.seen = size, 0

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
        self.seen += key_states.shape[2]
        keys, values = super().update(key_states, value_states)
        self.keys = keys[:, :, -self.size :].clone()
        self.values = values[:, :, -self.size :].clone()
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        stored = self.keys.shape[2] if self.is_initialized else 0
        return stored + query_length, self.seen - stored


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(CACHES, "window", lambda model, n: Cache(layers=[Window(n), Window(n)]))
    (tmp_path / "talk.jsonl").write_text(as_jsonl(TALK))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(tiny_folder: str) -> list[str]:
    return ["--model", tiny_folder, "--conversation", "talk.jsonl", "--max-new-tokens", "4"]


def test_table_with_a_line_per_cache_and_budget(run: list[str], capsys: Capture) -> None:
    assert main(["compare-caches", "full", "window", *run, "--budget", "4,25%,1000"]) == 0
    out, err = capsys.readouterr()
    table, notes = out.split("\n\n")
    lines = [re.split(r"\s{2,}", line) for line in table.splitlines()]
    share = str(round(0.25 * (GIVEN + 3 * 4)))
    assert lines[0][:4] == ["cache", "budget", "KL", "largest"]
    assert [line[:2] for line in lines[3:]] == [["window", b] for b in ("4", share, "1000")]
    assert lines[1][0] == "full (reference)"
    full, small, large = lines[2], lines[3], lines[5]
    assert full[:5] == ["full", "0", "0", "100 %", "1.000"]
    assert float(small[2]) > 0.01
    assert large[2:7] == ["0", "0", "100 %", "1.000", "100 %"]
    assert float(small[-2].removesuffix(" %")) < 10
    assert "3 turns, 12 tokens of answers that the full cache writes greedily, at most 4" in notes
    assert f"{GIVEN + 12} tokens in all" in notes
    assert err == ""


def test_the_answers_of_the_file_are_scored_as_written(run: list[str], capsys: Capture) -> None:
    arguments = ["--answers", "file", "--budget", "6", "--json", "-", "--dtype", "float64"]
    assert main(["compare-caches", "window", *run, *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["turns"] == 2  # the last question has no answer
    assert found["settings"]["tokens"] == 24 + 27 + 4 + 4
    (result,) = found["results"]
    assert (result["cache"], result["budget"]) == ("window", 6)
    assert result["settings"]["dtype"] == "float64"
    assert [len(answer) for answer in result["texts"][0]["answers"]] == [4, 4]
    assert result["summary"]["token_match"] is None
    assert result["summary"]["mean_kl"] > 0


def test_limit_and_chunk_reach_the_run(run: list[str], capsys: Capture) -> None:
    for chunk in ([], ["--chunk", "5"]):
        arguments = ["--limit", "1", "--budget", "4", "--json", "-", *chunk]
        assert main(["compare-caches", "window", *run, *arguments]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["settings"]["turns"] == 1
        # Read in one forward, the question is seen whole before anything is dropped.
        first = found["results"][0]["texts"][0]["kl"][0]
        assert (first > 0) == bool(chunk)


def test_json_and_html_files(run: list[str], here: Path, capsys: Capture) -> None:
    arguments = ["--budget", "4,8", "--json", "o.json", "--html", "o.html"]
    assert main(["compare-caches", "window", "fp8", *run, *arguments]) == 0
    found = json.loads((here / "o.json").read_text())
    assert [(r["cache"], r["budget"]) for r in found["results"]] == [
        ("window", 4),
        ("window", 8),
        ("fp8", None),
    ]
    assert found["settings"]["budgets"] == [4, 8]
    page = (here / "o.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<polyline") == 2 * 3  # a curve and its key
    assert page.count("<circle") == 3 * 3
    for part in re.findall(r"<svg.*?</svg>", page, re.S):
        ElementTree.fromstring(part)
    assert not re.search(r"https?:|@import|url\(|<script|style=", page)
    assert sorted(os.listdir(here)) == ["o.html", "o.json", "talk.jsonl"]
    assert capsys.readouterr().out.startswith("cache")


def test_the_sample_conversation_is_the_default(
    run: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = run[:2]
    arguments = [model, folder, "--limit", "2", "--max-new-tokens", "2", "--json", "-"]
    assert main(["compare-caches", "window", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["conversation"] == "built-in sample"


MISTAKES = [
    (["windw"], "unknown cache 'windw' (did you mean 'window'?)"),
    (["window", "--budget", "0"], "--budget takes tokens from 1 on, or shares up to 100%, not '0'"),
    (["window", "--budget", "-3"], "not '-3'"),
    (["window", "--budget", "many"], "not 'many'"),
    (["window", "--budget", "1.5"], "not '1.5'"),
    (["window", "--budget", "8,"], "not ''"),
    (["window", "--budget", "0%"], "not '0%'"),
    (["window", "--budget", "101%"], "not '101%'"),
    (["window", "--budget", "nan%"], "not 'nan%'"),
    (["window", "--answers", "mine"], "--answers is model or file, not 'mine'"),
    (["window", "--answers", "file", "--conversation", "asks.jsonl"], "question 1 of the"),
    (["window", "--answers", "file", "--limit", "1", "--conversation", "asks.jsonl"], "no answer"),
    (["window", "--max-new-tokens", "0"], "--max-new-tokens must be 1 or more, got 0"),
    (["window", "--max-new-tokens", "x"], "Invalid value for '--max-new-tokens'"),
    (["window", "--limit", "0"], "--limit must be 1 or more, got 0"),
    (["window", "--chunk", "0"], "--chunk must be 1 or more, got 0"),
    (["window", "--conversation", "none.jsonl"], "there is no conversation file none.jsonl"),
    (["window", "--conversation", "."], "is a folder"),
    (["window", "--conversation", "empty.jsonl"], "empty.jsonl is empty"),
    (["window", "--conversation", "broken.jsonl"], "broken.jsonl, line 2: not JSON"),
    (
        ["window", "--conversation", "role.jsonl"],
        "role.jsonl, line 1: the role is one of system",
    ),
    (["window", "--conversation", "latin.jsonl"], "latin.jsonl is not UTF-8 (byte 29)"),
    (["window", "--conversation", "long.jsonl"], "tokens long; the model has 512 positions"),
    (["window", "--model", "smolm2"], "did you mean 'smollm2'"),
    (["window", "--dtype", "float31"], "did you mean"),
    (["window", "--json", "none/o.json"], "there is no folder none"),
    (["window", "--html", "."], "it is a folder"),
    (["window", "--json", "o", "--html", "o"], "both want to write o"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(
    run: list[str], here: Path, capsys: Capture, arguments: list[str], message: str
) -> None:
    (here / "empty.jsonl").write_text("\n")
    (here / "broken.jsonl").write_text(as_jsonl(TALK[:1]) + '{"role": "user"\n')
    (here / "role.jsonl").write_text('{"role": "usr", "content": "Hi"}')
    (here / "latin.jsonl").write_bytes('{"role":"user", "content": "é"}'.encode("latin-1"))
    (here / "long.jsonl").write_text(as_jsonl([{"role": "user", "content": "x" * 600}]))
    (here / "asks.jsonl").write_text(as_jsonl([TALK[0], TALK[2]]))
    before = sorted(os.listdir(here))
    assert main(["compare-caches", *run, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(os.listdir(here)) == before


def test_what_a_cache_refuses_is_said_before_anything_is_decoded(
    run: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model: Any, budget: int) -> Cache:
        raise PertokenError(f"{budget} is less than one block")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setitem(CACHES, "tova", refuse)
    monkeypatch.setattr("pertoken.cache.fidelity.compare_caches", never)
    assert main(["compare-caches", "window", "tova", *run, "--budget", "4"]) == 2
    assert capsys.readouterr().err == "error: 4 is less than one block\n"


def test_ctrl_c_leaves_nothing_behind(
    run: list[str], here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pertoken.cache.fidelity._text", interrupted)
    arguments = ["--json", "o.json", "--html", "o.html"]
    assert main(["compare-caches", "window", *run, *arguments]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert os.listdir(here) == ["talk.jsonl"]


def test_budgets() -> None:
    assert parse_budgets(" 64,25%, 64,100% ") == [64, 0.25, 1.0]
    assert tokens_of(0.001, 100) == 1
