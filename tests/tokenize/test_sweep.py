"""Sweeps: resumed without training again, on several processes, and with workers killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pertoken import PertokenError
from pertoken._pool import LOST, in_processes, on_ray
from pertoken.tokenize import corpus_token_counts, read_sweep, sweep, train_tokenizer
from pertoken.tokenize._cell import measure
from pertoken.tokenize._texts import read_texts

SENTENCES = {
    "eng": ["all are born free", "all are equal", "all have rights", "no one is a slave"],
    "deu": [
        "alle sind frei geboren",
        "alle sind gleich",
        "alle haben Rechte",
        "niemand ist Sklave",
    ],
    "ell": [
        "όλοι γεννιούνται ελεύθεροι",
        "όλοι είναι ίσοι",
        "όλοι έχουν δικαιώματα",
        "κανείς δούλος",
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = tmp_path / "texts"
    texts.mkdir()
    for language, lines in SENTENCES.items():
        (texts / f"{language}.txt").write_text("\n".join(lines * 3), encoding="utf-8")
    return texts


def plan(folder: Path, **more: Any) -> dict[str, Any]:
    return {"text": str(folder), "vocabularies": [260, 280], "kinds": ["bpe", "superword"], **more}


def refuse_to_train(*_: object) -> None:
    pytest.fail("a finished cell was trained again")


def test_a_cell_counts_each_fold_with_a_tokenizer_of_the_others(folder: Path) -> None:
    lines = SENTENCES["deu"] * 3
    row = measure("deu", 280, "bpe", folder / "deu.txt", None, 3, 0.9, 0)
    expected = 0
    for fold in range(3):
        seen = [line for at, line in enumerate(lines) if at % 3 != fold]
        expected += sum(corpus_token_counts(train_tokenizer(seen, 280), lines[fold::3]))
    assert row["tokens"] == expected
    assert row["bytes"] == sum(len(line.encode()) for line in lines)
    assert row["similarity"] == 1
    assert (row["script"], row["size"]) == ("LATIN", 280)


def test_length_of_used_tokens_is_in_characters(folder: Path) -> None:
    letters = measure("ell", 600, "character", folder / "ell.txt", folder / "ell.txt", 3, 0.9, 0)
    assert letters["token_length"] == 1
    lines = SENTENCES["ell"] * 3
    tokenizer = train_tokenizer(lines, 280)
    used = {each for line in lines for each in tokenizer(line)["input_ids"]}
    spelt = [bytes(_byte(sign) for sign in tokenizer.convert_ids_to_tokens(each)) for each in used]
    begun = [sum(byte & 0xC0 != 0x80 for byte in each) for each in spelt]
    row = measure("ell", 280, "bpe", folder / "ell.txt", folder / "ell.txt", 3, 0.9, 0)
    assert row["token_length"] == pytest.approx(sum(begun) / len(begun))


def _byte(sign: str) -> int:
    from tokenizers import decoders, pre_tokenizers

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    assert set(map(chr, plain)) < set(pre_tokenizers.ByteLevel.alphabet())
    assert decoders.ByteLevel().decode(["Ġ"]) == " "
    others = [byte for byte in range(256) if byte not in plain]
    return ord(sign) if ord(sign) < 256 else others[ord(sign) - 256]


def test_a_sweep_goes_on_behind_its_last_whole_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cells.jsonl"
    seen: list[tuple[int, int]] = []
    whole = sweep(plan(folder), out, progress=lambda what, done, total: seen.append((done, total)))
    assert seen == [(done, 12) for done in range(13)]
    assert len(whole.cells) == 12
    content = out.read_bytes()
    lines = content.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:7]) + lines[7][:20])  # killed while it wrote
    trained: list[tuple[Any, ...]] = []
    module = import_module("pertoken.tokenize.sweeps")

    def watched(*call: Any) -> Any:
        trained.append(call[:3])
        return measure(*call)

    monkeypatch.setattr(module, "measure", watched)
    again = sweep(plan(folder), out)
    assert len(trained) == 5

    def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert figures(again.cells) == figures(whole.cells)
    monkeypatch.setattr(module, "measure", refuse_to_train)
    assert sweep(plan(folder), out).cells == again.cells
    # Other languages and sizes of the same file are left where they are.
    less = sweep(plan(folder, languages=["eng", "ell"], vocabularies=[280], kinds=["bpe"]), out)
    assert [(row["language"], row["vocabulary"]) for row in less.cells] == [
        ("eng", 280),
        ("ell", 280),
    ]
    assert len(read_sweep(out).cells) == 12
    assert read_sweep(out, "deu").reference == "deu"
    with pytest.raises(PertokenError, match=r"'egn' is no language of .*: it has deu, .*eng"):
        read_sweep(out, "egn")


def test_only_what_changed_is_trained_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cells.jsonl"
    sweep(plan(folder), out)
    with (folder / "deu.txt").open("a", encoding="utf-8") as file:
        file.write("\nalle sind Menschen")
    sweep(plan(folder), out)
    assert len(out.read_text().splitlines()) == 12 + 4
    sweep(plan(folder, transition=0.95), out)
    assert len(out.read_text().splitlines()) == 12 + 4 + 6  # superword alone has a transition
    assert len(read_sweep(out).cells) == 12


def test_train_text_of_its_own_is_trained_on(folder: Path, tmp_path: Path) -> None:
    train = tmp_path / "train"
    train.mkdir()
    for language, lines in SENTENCES.items():
        (train / f"{language}.txt").write_text("\n".join(lines[:2] * 4), encoding="utf-8")
    found = sweep(plan(folder, train=str(train), kinds=["bpe"]), tmp_path / "cells.jsonl")
    tokenizer = train_tokenizer(SENTENCES["deu"][:2] * 4, 280)
    expected = sum(corpus_token_counts(tokenizer, SENTENCES["deu"] * 3))
    assert found.counts("bpe")["deu"][280] == expected


def test_processes_give_what_one_gives(folder: Path, tmp_path: Path) -> None:
    one = sweep(plan(folder), tmp_path / "one.jsonl")
    two = sweep(plan(folder), tmp_path / "two.jsonl", jobs=2)
    assert [row["tokens"] for row in two.cells] == [row["tokens"] for row in one.cells]
    assert not two.lost


def test_a_killed_worker_loses_its_call_alone() -> None:
    calls = [(signal.SIGURG,), (signal.SIGKILL,), *[(signal.SIGURG,)] * 3]
    found = dict(in_processes(signal.raise_signal, calls, 2))
    assert found.pop(1) is LOST
    assert found == {0: None, 2: None, 3: None, 4: None}


def test_what_a_worker_raises_is_raised_here() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        list(in_processes(int, [("1",), ("x",)], 2))
    assert not multiprocessing.active_children()


def test_a_sweep_with_a_killed_worker_says_so_and_the_next_run_mends_it(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cells.jsonl"
    killed: list[int] = []

    def kill_one(what: str, done: int, total: int) -> None:
        children = multiprocessing.active_children()
        if done >= 2 and children and not killed:
            pid = children[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    found = sweep(plan(folder), out, jobs=2, progress=kill_one)
    assert killed
    assert len(found.lost) == 1
    assert len(found.cells) == 11 == len(out.read_text().splitlines())
    mended = sweep(plan(folder), out)
    assert len(mended.cells) == 12
    assert not mended.lost
    assert len(out.read_text().splitlines()) == 12


def test_ray_gives_the_same_and_a_killed_worker_loses_its_call(
    folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    one = sweep(plan(folder), tmp_path / "one.jsonl")
    two = sweep(plan(folder), tmp_path / "two.jsonl", jobs=2, ray=True)
    assert [row["tokens"] for row in two.cells] == [row["tokens"] for row in one.cells]

    def die(at: int) -> int:
        if at == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return at

    found = dict(on_ray(die, [(0,), (1,), (2,), (3,)], 2))
    assert found.pop(1) is LOST
    assert found == {0: 0, 2: 2, 3: 3}


def test_ray_is_named_where_it_is_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PertokenError, match=r'pip install "pertoken\[ray\]"'):
        sweep(plan(folder), tmp_path / "cells.jsonl", ray=True)


def test_results_tell_laws_premiums_and_factors(folder: Path, tmp_path: Path) -> None:
    found = sweep(plan(folder, vocabularies=[258, 264, 272]), tmp_path / "cells.jsonl")
    laws = found.optimal("bpe")
    target = next(iter(laws.values())).target
    assert target == max(min(own.values()) for own in found.counts("bpe").values())
    assert all(law.b < 0 for law in laws.values())
    assert found.premiums("bpe", 264)["eng"] == 1
    explained = found.regression("bpe", 264, ["white_space"])
    assert explained.n == 3
    title, _, head, *body = found.table().split("\n\nbpe: ")[0].splitlines()
    assert title == "Corpus token counts over the languages"
    assert head.startswith("kind")
    assert len(body) == 6
    assert "the vocabulary at which each language takes" in found.table()
    assert len(found.to_dataframe()) == 18
    assert len(found.plot().data) == 6
    with pytest.raises(PertokenError, match="no kind 'unigram'"):
        found.counts("unigram")
    with pytest.raises(PertokenError, match=r"unknown factor 'script_'"):
        found.regression("bpe", 264, ["script_"])


def test_a_sweep_that_cannot_be_is_refused_before_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module("pertoken.tokenize.sweeps")
    monkeypatch.setattr(module, "measure", refuse_to_train)
    (folder / "fra.txt").write_bytes("né".encode("latin-1"))
    (folder / "ita.txt").write_text(" \n")
    (folder / "spa.txt").write_text("uno\ndos")
    languages = ["eng", "deu"]
    for more, line in [
        ({"languages": ["eng", "deuu"]}, r"unknown language 'deuu' \(did you mean 'deu'\?\)"),
        ({"languages": ["eng", "fra"]}, r"fra.txt is not UTF-8 \(byte 2\)"),
        ({"languages": ["eng", "ita"]}, "the text of ita is empty"),
        ({"languages": ["eng", "spa"]}, "spa has 2 lines, too few for 3 folds"),
        ({"languages": ["deu"]}, "the reference 'eng' is no language here"),
        ({"languages": []}, "languages is a list"),
        ({"vocabularies": [256]}, "256 is smaller than the alphabet of bpe: 257"),
        ({"vocabularies": []}, "takes vocabularies"),
        ({"kinds": ["unigrams"]}, r"did you mean 'unigram'\?"),
        ({"kinds": "bpe"}, "kinds is a list"),
        ({"folds": 1}, "folds must be 2 or more"),
        ({"seed": "x"}, "seed is a whole number"),
        ({"transition": 2}, "transition is a share"),
        ({"text": str(folder / "none")}, "no folder of texts"),
        ({"vocabulary": 3}, r"unknown setting 'vocabulary'.*'vocabularies'"),
    ]:
        with pytest.raises(PertokenError, match=line) as found:
            sweep({**plan(folder, languages=languages), **more}, tmp_path / "cells.jsonl")
        assert "\n" not in str(found.value)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"a": 1}) + "\n")
    with pytest.raises(PertokenError, match="is no file of a sweep"):
        sweep(plan(folder, languages=languages), other)
    with pytest.raises(PertokenError, match="no sweep at"):
        read_sweep(tmp_path / "none.jsonl")


def test_a_config_names_folders_from_where_it_lies(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "plan.toml"
    config.write_text('text = "texts"\nvocabularies = [260]\nlanguages = ["eng", "deu"]\n')
    assert len(sweep(config, tmp_path / "cells.jsonl").cells) == 2
    config.write_text("text = texts")
    with pytest.raises(PertokenError, match="is not TOML"):
        sweep(config, tmp_path / "cells.jsonl")
    with pytest.raises(PertokenError, match="cannot read"):
        sweep(tmp_path / "none.toml", tmp_path / "cells.jsonl")


def test_an_unknown_language_of_the_declaration_is_found_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [{"code": "deu_1996", "language": "German, Standard (1996)", "articles": ["a"]}]
    monkeypatch.setattr(import_module("pertoken.data"), "data", lambda _: rows)
    with pytest.raises(
        PertokenError, match=r"did you mean 'deu_1996 \(German, Standard \(1996\)\)'"
    ):
        read_texts("udhr", ["german"])
