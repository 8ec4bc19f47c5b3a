"""`pertoken knn` and `generate --knn` as a user types them, with a tiny model in a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pertoken.cli import main
from pertoken.testing import tiny_model

Capture = pytest.CaptureFixture[str]
WORDS = "the cat sat on the mat and the dog lay on the hat. "


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory, tiny_folder: str) -> Path:
    """A folder with texts and a store."""
    folder = tmp_path_factory.mktemp("knn")
    lines = [{"text": WORDS + str(n)} for n in range(3)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "more").mkdir()
    (folder / "more" / "a.txt").write_text("a dog and a cat sat there, and the mat lay")
    command = ["knn", "build", str(folder / "corpus.jsonl"), str(folder / "store")]
    assert main([*command, "--model", tiny_folder, "--context", "32"]) == 0
    return folder


@pytest.fixture(autouse=True)
def inside(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(here)
    capsys.readouterr()


def test_building_again_opens_it(tiny_folder: str, capsys: Capture) -> None:
    command = ["knn", "build", "corpus.jsonl", "store", "--model", tiny_folder, "--context", "32"]
    assert main([*command, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["texts"] == 3
    assert found["entries"] == 3 * len(WORDS)


def test_eval_fits_and_tells(tiny_folder: str, capsys: Capture) -> None:
    fitted = ["--fit", "more", "--k", "8", "--html", "o.html", "--json", "o.json"]
    assert main(["knn", "eval", "store", "more", "--model", tiny_folder, *fitted]) == 0
    assert "no token can lose more than 0.288 (weight 0.25, k 8" in capsys.readouterr().out
    found = json.loads(Path("o.json").read_text())
    assert found["groups"][0]["tokens"] == 41
    assert found["temperature"] != 1.0
    assert "class: word goes on" in Path("o.html").read_text()


def test_continue_writes_both_ways(tiny_folder: str, capsys: Capture) -> None:
    small = ["--k", "8", "--prompt", "9", "--max-new-tokens", "5", "--model", tiny_folder]
    assert main(["knn", "continue", "store", "more/a.txt", *small]) == 0
    out = capsys.readouterr().out
    assert all(out.count(f"\n{name} ") == 1 for name in ("gold", "with the store", "model"))


def test_generate_looks_up(tiny_folder: str, capsys: Capture) -> None:
    command = ["generate", WORDS[:24], "--model", tiny_folder, "--max-new-tokens", "9"]
    assert main([*command, "--knn", "store", "--knn-weight", "1", "--knn-temperature", "0.1"]) == 0
    assert capsys.readouterr().out == "nd the do\n"
    near = ["--knn", "store", "--knn-weight", "1", "--knn-temperature", "1e9", "--knn-k"]
    assert main([*command, *near, "1"]) == 0
    assert capsys.readouterr().out == "nd the do\n"
    assert main([*command, *near, "153"]) == 0
    assert capsys.readouterr().out != "nd the do\n"  # the commonest letter of all
    texts = []
    for more in ([], ["--knn", "store", "--knn-weight", "0"]):
        assert main([*command, "--method", "hf", *more]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != "nd the do\n"


def test_generate_takes_a_memory_and_a_style(tiny_folder: str, capsys: Capture) -> None:
    Path("a.txt").write_text("be be be be")
    model = ["--model", tiny_folder]
    assert main(["style", "train", "a.txt", "--out", "be.style", *model]) == 0
    capsys.readouterr()

    def text(weight: str, strength: str) -> str:
        memory = ["--knn", "store", "--knn-weight", weight, "--knn-temperature", "0.1"]
        style = ["--style", "be.style", "--strength", strength]
        run = ["generate", WORDS[:24], *model, "--max-new-tokens", "9", *memory, *style]
        assert main(run) == 0
        return capsys.readouterr().out

    alone = ["--method", "hf", "--style", "be.style", "--strength", "1", "--max-new-tokens", "9"]
    assert main(["generate", WORDS[:24], *model, *alone]) == 0
    styled = capsys.readouterr().out
    assert text("1", "0") == "nd the do\n"
    assert text("0", "1") == styled
    assert text("0", "0") not in ("nd the do\n", styled)


def test_a_store_of_another_model_or_tokenizer_is_one_line(
    tiny_folder: str, tmp_path: Path, capsys: Capture
) -> None:
    for name in ("model", "tokenizer"):
        shutil.copytree(tiny_folder, tmp_path / name)
    tiny_model("llama", vocab_size=257, seed=1, dtype=torch.float32).save_pretrained(
        tmp_path / "model"
    )
    file = tmp_path / "tokenizer" / "tokenizer.json"
    changed = json.loads(file.read_text())
    changed["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(changed))
    capsys.readouterr()
    for name, what in (("model", "another model"), ("tokenizer", "another tokenizer")):
        for command in ("knn eval store more", "knn continue store more", "generate x --knn store"):
            assert main([*command.split(), "--model", str(tmp_path / name)]) == 2
            error = capsys.readouterr().err
            assert f"store was made with {Path(tiny_folder).name}, and this is {what}" in error
            assert error.count("\n") == 1
    assert main(["knn", "build", "corpus.jsonl", "store", "--model", str(tmp_path / "model")]) == 2
    assert "store is a store of another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("knn build nothing.txt s", "there is no corpus nothing.txt"),
        ("knn build empty.txt s", "the corpus empty.txt is empty"),
        ("knn build broken.jsonl s", 'broken.jsonl, line 1: an object such as {"text": "…"}'),
        ("knn build page.pdf s", "not page.pdf"),
        ("knn build more s --index x", "unknown index 'x'"),
        ("knn eval nowhere more", "nowhere is no KNN-LM store"),
        ("knn eval store more --k 999", "k must be from 1 to the 153 entries of store, got 999"),
        ("knn eval store more --weight 2", "weight must be from 0 to 1, got 2.0"),
        ("knn eval store more --fit more --weight 2", "weight must be from 0 to 1, got 2.0"),
        ("knn eval store more --fit more --k 999", "k must be from 1 to the 153 entries"),
        ("knn eval store more --fit more --temperature 2", "leave out --temperature"),
        ("knn continue store more --fit more --temperature 1", "leave out --temperature"),
        ("knn eval store empty.txt", "the corpus empty.txt is empty"),
        ("knn continue store more", "none of 1 texts has 64 + 128 tokens"),
        ("generate x --knn nowhere", "nowhere is no KNN-LM store"),
        ("generate x --knn store --method goose", "--knn decodes with hf: what goose drafts"),
        ("generate x --knn store --regex a", "--knn mixes two distributions and --regex"),
        ("generate x --knn-weight 0.1", "--knn-weight goes with --knn STORE"),
        ("generate x --knn-k 8", "--knn-k goes with --knn STORE"),
        ("generate x --knn store --knn-k 999", "k must be from 1 to the 153 entries of store"),
        ("generate x --knn store --knn-k 0", "--knn-k must be 1 or more, got 0"),
        ("generate x --method cntp --budget 3", "cntp drafts nothing: leave out --budget"),
    ],
)
def test_mistakes_are_one_line(tiny_folder: str, capsys: Capture, command: str, line: str) -> None:
    Path("empty.txt").touch()
    Path("page.pdf").touch()
    Path("broken.jsonl").write_text('{"txt": 1}\n')
    assert main([*command.split(), "--model", tiny_folder]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
