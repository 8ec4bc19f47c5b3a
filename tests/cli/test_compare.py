"""`pertoken compare` as a user types it, with a tiny model in a folder."""

import errno
import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pertoken.cli import main
from pertoken.cli.compare import parse_budget
from pertoken.errors import PertokenError

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [{"prompt": "abc abc abc", "category": "x"}, {"prompt": "so so", "category": "y"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured costs of tiny models do not belong into the user's cache."""
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def run(tiny_folder: str) -> list[str]:
    return ["--model", tiny_folder, "--prompts", "p.jsonl", "--max-new-tokens", "8"]


def test_table_on_stdout_and_two_hints_at_the_end(run: list[str], capsys: Capture) -> None:
    assert main(["compare", "prompt-lookup", "hf", *run]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["method", "identical", "tokens/s"]
    assert [line.split()[0] for line in lines[1:4]] == ["plain", "prompt-lookup", "hf"]
    assert all("2 of 2" in line for line in lines[1:4])
    assert "x plain by category" in out
    hints = err.strip().splitlines()
    assert len(hints) == 2
    assert all(line.startswith("next: pertoken ") for line in hints)


def test_json_and_html_files(run: list[str], here: Path, capsys: Capture) -> None:
    assert main(["compare", "suffix", *run, "--json", "o.json", "--html", "o.html"]) == 0
    found = json.loads((here / "o.json").read_text())
    assert found["settings"]["max_new_tokens"] == 8
    assert found["settings"]["dtype"] == "float32"
    assert len(found["prompts"][0]["results"]["suffix"]["ids"]) == 8
    assert (here / "o.html").read_text().startswith("<!DOCTYPE html>")
    assert sorted(os.listdir(here)) == ["o.html", "o.json", "p.jsonl"]
    assert "next: open o.html" in capsys.readouterr().err


def test_json_alone_on_stdout(run: list[str], capsys: Capture) -> None:
    assert main(["compare", "hf", *run, "--json", "-", "--limit", "1"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["prompts"]) == 1
    assert err == ""


def test_options_reach_the_run(run: list[str], capsys: Capture) -> None:
    options = ["--budget", "3", "--keep", "--dtype", "float64", "--json", "-"]
    assert main(["compare", "suffix", *run, *options]) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    assert (settings["budget"], settings["keep"], settings["dtype"]) == (3, True, "float64")


def test_all_default_methods(run: list[str], capsys: Capture) -> None:
    assert main(["compare", *run, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lossless"]
    assert {"plain", "goose", "hf", "hf-prompt-lookup"} <= {r["method"] for r in found["rows"]}


def test_published_budgets_and_auto(run: list[str], capsys: Capture) -> None:
    for options, budget in (([], "auto"), (["--budget", "published"], None)):
        assert main(["compare", "suffix", *run, *options, "--json", "-"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["lossless"]
        assert found["settings"]["budget"] == budget


MISTAKES = [
    (["gose"], "did you mean 'goose'"),
    (["hf", "--prompts", "none.txt"], "no prompt file none.txt"),
    (["hf", "--prompts", "."], "is a folder"),
    (["hf", "--prompts", "empty.jsonl"], "empty.jsonl is empty"),
    (["hf", "--prompts", "broken.jsonl"], "broken.jsonl, line 2: not JSON"),
    (["hf", "--prompts", "blank.jsonl"], "line 1: the prompt is empty"),
    (
        ["hf", "--prompts", "half.jsonl"],
        "prompt '1': the prompt is not UTF-8 text: its character 3",
    ),
    (["hf", "--prompts", "p.csv"], ".jsonl files"),
    (["hf", "--max-new-tokens", "0"], "--max-new-tokens must be 1 or more, got 0"),
    (["hf", "--max-new-tokens", "600"], "do not fit the model's 512 positions"),
    (["hf", "--prompts", "long.txt"], "prompt '1': prompt of 3000 tokens"),
    (["hf", "--budget", "0"], "--budget is auto or a number from 1 on, not '0'"),
    (["hf", "--budget", "-1"], "not '-1'"),
    (["hf", "--budget", "many"], "not 'many'"),
    (["hf", "--limit", "0"], "1 or more, got 0"),
    (["hf", "--model", "smolm2"], "did you mean 'smollm2'"),
    (["hf", "--model", "./none"], "no such model folder"),
    (["hf", "--model", "."], "no config.json"),
    (["hf", "--dtype", "float31"], "did you mean"),
    (["hf", "--json", "none/o.json"], "there is no folder none"),
    (["hf", "--html", "none/o.html"], "there is no folder none"),
    (["hf", "--html", "."], "it is a folder"),
    (["hf", "--json", "o", "--html", "o"], "both want to write o"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(
    run: list[str], here: Path, capsys: Capture, arguments: list[str], message: str
) -> None:
    (here / "empty.jsonl").write_text("\n")
    (here / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (here / "blank.jsonl").write_text('{"prompt": " "}\n')
    (here / "half.jsonl").write_text('{"prompt": "a \\ud800 b"}')
    (here / "p.csv").write_text("a,b\n")
    (here / "long.txt").write_text("x" * 3000)
    before = sorted(os.listdir(here))
    assert main(["compare", *run, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(os.listdir(here)) == before


@pytest.mark.parametrize("where", ["_decode", "_judge_all", "_loaded"])
def test_ctrl_c_leaves_nothing_behind(
    run: list[str], here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("pertoken.compare"), where, interrupted)
    assert main(["compare", "hf", *run, "--json", "o.json", "--html", "o.html"]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == ("", "interrupted\n")
    assert os.listdir(here) == ["p.jsonl"]


def test_a_full_disk_is_one_line(
    run: list[str], here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert main(["compare", "hf", *run, "--limit", "1", "--json", "o.json"]) == 2
    assert capsys.readouterr().err == (
        "error: no space left on the disk for o.json; free some and run again\n"
    )
    assert os.listdir(here) == ["p.jsonl"]


def test_encoder_decoder_and_state_space_folders(
    here: Path, capsys: Capture, tiny_folder: str
) -> None:
    import shutil

    from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

    small = {"vocab_size": 257, "num_layers": 1}
    makers = {
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(**small, d_model=16, d_kv=4, d_ff=16, num_heads=2)
        ),
        "mamba": lambda: MambaForCausalLM(
            MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=1, state_size=4)
        ),
    }
    for name, make in makers.items():
        make().save_pretrained(here / name)
        for file in Path(tiny_folder).glob("tokenizer*"):
            shutil.copy(file, here / name)
        capsys.readouterr()  # transformers' own bars
        arguments = ["--model", f"./{name}", "--prompts", "p.jsonl", "--max-new-tokens", "4"]
        assert main(["compare", "prompt-lookup", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1


def test_budgets() -> None:
    assert parse_budget(" AUTO ") == "auto"
    with pytest.raises(PertokenError, match=r"not '1\.5'"):
        parse_budget("1.5")
