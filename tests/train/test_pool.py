"""Selecting from files: the same documents as in memory, whatever pieces, kind and kills."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pertoken import _pool
from pertoken.errors import PertokenError
from pertoken.train import NgramScorer, _pieces, pool, sample_documents, select, select_file
from pertoken.train.ngram_scorer import PLACES


@pytest.fixture(scope="module")
def scorer() -> NgramScorer:
    weights = np.random.default_rng(0).normal(size=PLACES).astype(np.float32)
    return NgramScorer(weights, ([], []))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    draw = np.random.default_rng(1)
    words = ["sea", "sum", "of", "two", "é", "three", "\n", "€"]
    made = [" ".join(draw.choice(words, size=draw.integers(0, 12))) for _ in range(300)]
    return [*made, *made[:40]]  # equal documents have equal scores


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pieces, "PIECE", 1000)
    monkeypatch.setattr(pool, "PIECE", 1000)


def lines(path: Path, texts: list[str], field: str = "text") -> Path:
    rows = [
        json.dumps({"id": n, field: text}, ensure_ascii=n % 2 == 0) for n, text in enumerate(texts)
    ]
    path.write_text("\n".join(rows), encoding="utf-8")  # without a line feed at the end
    return path


def ids(path: Path) -> list[int]:
    return [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("keep", [0.03, 0.5, 1.0])
def test_a_file_keeps_what_memory_keeps(
    keep: float, scorer: NgramScorer, texts: list[str], tmp_path: Path
) -> None:
    source = lines(tmp_path / "in.jsonl", texts)
    wanted = np.flatnonzero(select(texts, scorer.score(texts), keep)).tolist()
    found = select_file(source, tmp_path / "out.jsonl", scorer, keep)
    assert ids(tmp_path / "out.jsonl") == wanted
    raw = source.read_bytes().split(b"\n")
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(raw[n] + b"\n" for n in wanted)
    assert (found.documents, found.kept) == (len(texts), len(wanted))
    assert found.characters == sum(map(len, texts))
    assert found.kept_characters == sum(len(texts[n]) for n in wanted)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.jsonl", "out.jsonl"]


def test_parquet_and_folders_keep_the_same(
    scorer: NgramScorer, texts: list[str], tmp_path: Path
) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    wanted = np.flatnonzero(select(texts, scorer.score(texts), 0.2)).tolist()
    folder = tmp_path / "pool"
    folder.mkdir()
    for number, part in enumerate((slice(0, 100), slice(100, None))):
        rows = {"id": list(range(len(texts)))[part], "text": texts[part]}
        parquet.write_table(arrow.table(rows), folder / f"{number}.parquet", row_group_size=64)
    select_file(folder, tmp_path / "out.parquet", scorer, 0.2)
    found = parquet.read_table(tmp_path / "out.parquet")
    assert found["id"].to_pylist() == wanted
    assert found["text"].to_pylist() == [texts[n] for n in wanted]


def test_what_was_scored_is_not_scored_again(
    scorer: NgramScorer, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = lines(tmp_path / "in.jsonl", texts), tmp_path / "out.jsonl"
    score, read = pool._score_piece, []

    def interrupted(*call: Any) -> None:
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(call[2])
        score(*call)

    monkeypatch.setattr(pool, "_score_piece", interrupted)
    with pytest.raises(KeyboardInterrupt):
        select_file(source, out, scorer, 0.3)
    assert not out.exists()
    monkeypatch.setattr(pool, "_score_piece", lambda *call: (read.append(call[2]), score(*call)))
    other = NgramScorer(-scorer.weights, ([], []))
    with pytest.raises(PertokenError, match="scores of another pool, field or scorer"):
        select_file(source, out, other, 0.3)
    select_file(source, out, scorer, 0.3)
    assert len(read) == len(set(read)) == len(_pieces.pieces_of(source))
    assert ids(out) == np.flatnonzero(select(texts, scorer.score(texts), 0.3)).tolist()


def test_another_scorer_at_the_same_target_scores_itself(
    scorer: NgramScorer, texts: list[str], tmp_path: Path
) -> None:
    source, out = lines(tmp_path / "in.jsonl", texts), tmp_path / "out.jsonl"
    for own in (scorer, NgramScorer(-scorer.weights, ([], []))):
        select_file(source, out, own, 0.3)
        assert ids(out) == np.flatnonzero(select(texts, own.score(texts), 0.3)).tolist()


def test_processes_score_alike(scorer: NgramScorer, texts: list[str], tmp_path: Path) -> None:
    source = lines(tmp_path / "in.jsonl", texts)
    select_file(source, tmp_path / "one.jsonl", scorer, 0.3)
    select_file(source, tmp_path / "two.jsonl", scorer, 0.3, jobs=2)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_ray_scores_alike_from_relative_paths(
    scorer: NgramScorer, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's folder need not be ours: it gets whole paths."""
    pytest.importorskip("ray", reason="Ray is not installed")
    monkeypatch.chdir(tmp_path)
    source, given = lines(Path("in.jsonl"), texts), []

    def noted(work: Any, calls: Any, jobs: int) -> Any:
        given.extend(calls)
        return _pool.on_ray(work, calls, jobs)

    monkeypatch.setattr(pool, "on_ray", noted)
    select_file(source, Path("one.jsonl"), scorer, 0.3)
    select_file(source, Path("two.jsonl"), scorer, 0.3, jobs=2, ray=True)
    assert Path("one.jsonl").read_bytes() == Path("two.jsonl").read_bytes()
    assert len(given) == len(_pieces.pieces_of(source))
    assert all(folder.is_absolute() and piece.path.is_absolute() for folder, piece, *_ in given)


@pytest.mark.parametrize("name", ["WorkerCrashedError", "OutOfMemoryError", "NodeDiedError"])
def test_what_kills_a_worker_of_ray_costs_its_call_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exceptions = pytest.importorskip("ray.exceptions", reason="Ray is not installed")
    error = getattr(exceptions, name)
    killed = error() if name == "WorkerCrashedError" else error("killed")

    def get(done: Any) -> Any:
        if done[1] == 1:
            raise killed
        return done[0](done[1])

    cluster = SimpleNamespace(
        exceptions=exceptions,
        is_initialized=lambda: True,
        cluster_resources=lambda: {"CPU": 1.0},
        remote=lambda **_: lambda work: SimpleNamespace(remote=lambda at: (work, at)),
        wait=lambda left, **_: (left[:1], left[1:]),
        get=get,
    )
    monkeypatch.setattr(_pool, "need", lambda *_: cluster)
    found = dict(_pool.on_ray(abs, [(0,), (1,), (-2,)], 1))
    assert found == {0: 0, 1: _pool.LOST, 2: 2}


def test_a_sample_is_of_the_pool_and_the_same_again(texts: list[str], tmp_path: Path) -> None:
    source = lines(tmp_path / "in.jsonl", texts)
    found = sample_documents(source, 50, seed=3)
    assert len(found) == 50
    assert set(found) <= set(texts)
    assert found == sample_documents(source, 50, seed=3) != sample_documents(source, 50, seed=4)
    every = sample_documents(source, 10_000)
    assert sorted(every) == sorted(text for text in texts if text.strip())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"body": "b"}\n', r'line 2: {"text": "…"} is wanted'),
        ('{"text": "a"}\n\n{"text": \n', r"line 3: not JSON"),
        ('{"text": null}\n', r'line 1: {"text": "…"} is wanted'),
        ("[1]\n", r"line 1"),
        ("", r"is empty"),
        ('{"text": ""}\n', r"no document has text"),
    ],
)
def test_what_is_no_document_is_named(
    content: str, message: str, scorer: NgramScorer, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(PertokenError, match=message):
        select_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", scorer, 0.5)
    assert not (tmp_path / "out.jsonl").exists()


def test_broken_text_is_named_or_read(scorer: NgramScorer, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(PertokenError, match="line 2: not UTF-8"):
        select_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl", scorer, 0.5)
    (tmp_path / "half.jsonl").write_text('{"text": "a \\ud800"}\n')
    select_file(tmp_path / "half.jsonl", tmp_path / "kept.jsonl", scorer, 1.0)
    assert (tmp_path / "kept.jsonl").read_text() == '{"text": "a \\ud800"}\n'


def test_places_that_do_not_fit_are_refused(scorer: NgramScorer, tmp_path: Path) -> None:
    source = lines(tmp_path / "in.jsonl", ["a"])
    for given, target, message in [
        (tmp_path / "none.jsonl", "out.jsonl", "there is no file or folder"),
        (source, "out.parquet", "a target of the same kind"),
        (source, "in.jsonl", "is what is read"),
        (source, "no/out.jsonl", "there is no folder"),
        (lines(tmp_path / "in.txt", ["a"]), "out.jsonl", r"is no \.jsonl and no \.parquet"),
    ]:
        with pytest.raises(PertokenError, match=message):
            select_file(given, tmp_path / target, scorer, 0.5)
    with pytest.raises(PertokenError, match="at most 1, got 0"):
        select_file(source, tmp_path / "out.jsonl", scorer, 0.0)
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"id": [1], "text": ["a"]}), tmp_path / "in.parquet")
    with pytest.raises(PertokenError, match="has no column body, but id, text"):
        select_file(tmp_path / "in.parquet", tmp_path / "out.parquet", scorer, 0.5, field="body")
