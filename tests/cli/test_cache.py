"""`pertoken cache` as a user types it, with a tiny model in a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pertoken
from pertoken.cli import main

Capture = pytest.CaptureFixture[str]
MESSAGES = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Three."}]
SPOKEN = "User: How many?\nAssistant: Three.\n"  # the tiny tokenizer has no chat template


@pytest.fixture
def conversation(tmp_path: Path) -> str:
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(map(json.dumps, MESSAGES)))
    return str(path)


def save(conversation: str, folder: str, out: Path, *options: str) -> int:
    return main(["cache", "save", conversation, str(out), "--model", folder, *options])


@pytest.mark.parametrize("level", ["raw", "int8", "tokens"])
def test_save_inspect_restore(
    tmp_path: Path, conversation: str, tiny_folder: str, capsys: Capture, level: str
) -> None:
    out = tmp_path / "talk.ptkv"
    assert save(conversation, tiny_folder, out, "--level", level) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: {len(SPOKEN)} tokens at level {level}, {out.stat().st_size:,} ")
    assert ("the model's cross-entropy is" in said) == (level == "tokens")
    assert main(["cache", "inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"level   {level}" in said
    assert "whole   yes, every part" in said
    assert main(["cache", "restore", str(out), "--model", tiny_folder]) == 0
    text, facts = capsys.readouterr()
    assert text == SPOKEN + "\n"
    rows = len(SPOKEN) - 1
    counts = (0, rows) if level == "tokens" else (rows, 0)
    assert f"keys and values of {counts[0]} read and checked, of {counts[1]} computed" in facts


def test_it_goes_on_as_without_a_file(
    tmp_path: Path, conversation: str, tiny_folder: str, capsys: Capture
) -> None:
    out = tmp_path / "talk.ptkv"
    assert save(conversation, tiny_folder, out) == 0
    capsys.readouterr()
    go_on = ["--continue", "Why?", "--max-new-tokens", "12"]
    assert main(["cache", "restore", str(out), "--model", tiny_folder, *go_on]) == 0
    text = capsys.readouterr().out
    model, tokenizer = pertoken.load(tiny_folder)
    ids = tokenizer(SPOKEN + "User: Why?\nAssistant:", return_tensors="pt")["input_ids"]
    new = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
    )[0, ids.shape[1] :]
    assert text == SPOKEN + "\n" + tokenizer.decode(new, skip_special_tokens=True) + "\n"


def test_inspect_as_json_and_of_a_damaged_file(
    tmp_path: Path, conversation: str, tiny_folder: str, capsys: Capture
) -> None:
    out = tmp_path / "talk.ptkv"
    assert save(conversation, tiny_folder, out) == 0
    capsys.readouterr()
    assert main(["cache", "inspect", str(out), "--json", "-"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["level"], found["tokens"], found["damage"]) == ("raw", len(SPOKEN), "")
    whole = out.read_bytes()
    out.write_bytes(whole + b"junk")
    assert main(["cache", "inspect", str(out)]) == 1
    assert "has 4 bytes of something else behind its last part" in capsys.readouterr().out
    out.write_bytes(whole[:-1])
    assert main(["cache", "inspect", str(out)]) == 1
    assert "cut short in keys and values, chunk 1 of 1" in capsys.readouterr().out
    assert main(["cache", "restore", str(out), "--model", tiny_folder]) == 0
    facts = capsys.readouterr().err
    assert f"keys and values of 0 read and checked, of {len(SPOKEN) - 1} computed" in facts
    assert "chunk 1 of 1: what is missing was computed from the ids" in facts


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["save", "{talk}", "{out}", "--level", "token"], "did you mean 'tokens'?"),
        (["save", "{broken}", "{out}"], "line 2: not JSON"),
        (["save", "{empty}", "{out}"], "is empty"),
        (["save", "{none}", "{out}"], "there is no conversation"),
        (["save", "{talk}", "{folder}/none/out.ptkv"], "there is no folder"),
        (["restore", "{none}"], "there is no file"),
        (["restore", "{talk}"], "is not a .ptkv file"),
        (["restore", "{talk}", "--max-new-tokens", "0"], "must be 1 or more"),
        (["inspect", "{talk}"], "is not a .ptkv file"),
    ],
)
def test_mistakes_are_one_line_before_a_model_is_loaded(
    tmp_path: Path, conversation: str, capsys: Capture, arguments: list[str], line: str
) -> None:
    (tmp_path / "broken.jsonl").write_text('{"role": "user", "content": "a"}\n{"role": "assi')
    (tmp_path / "empty.jsonl").write_text("")
    names = {
        "talk": conversation,
        "broken": str(tmp_path / "broken.jsonl"),
        "empty": str(tmp_path / "empty.jsonl"),
        "none": str(tmp_path / "none.jsonl"),
        "folder": str(tmp_path),
        "out": str(tmp_path / "out.ptkv"),
    }
    model = [] if arguments[0] == "inspect" else ["--model", str(tmp_path / "no-model")]
    assert main(["cache", *(one.format(**names) for one in arguments), *model]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert line in error
    assert not (tmp_path / "out.ptkv").exists()


def test_another_model_and_too_long_a_turn_are_one_line(
    tmp_path: Path, conversation: str, tiny_folder: str, capsys: Capture
) -> None:
    out = tmp_path / "talk.ptkv"
    assert save(conversation, tiny_folder, out) == 0
    restore = ["cache", "restore", str(out), "--model", tiny_folder]
    capsys.readouterr()
    assert main([*restore, "--dtype", "float64"]) == 2
    assert "it held float32, this one is float64" in capsys.readouterr().err
    assert main([*restore, "--continue", "x", "--max-new-tokens", "5000"]) == 2
    said, error = capsys.readouterr()
    assert "do not fit the model's 512 positions" in error
    assert not said  # the conversation was not brought back first
    assert main([*restore, "--continue", ""]) == 2
    assert "there is no text to go on with" in capsys.readouterr().err
