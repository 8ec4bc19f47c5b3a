"""`pertoken verify`: table, verdict, exit code, mistakes."""

import json
from pathlib import Path

import pytest
import torch

import pertoken
from pertoken.cli import main
from pertoken.cli.verify import parse_options
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, tiny_model

Capture = pytest.CaptureFixture[str]

DECODERS = """
def plain(model, input_ids, **arguments):
    total = arguments["generation_config"].max_length - input_ids.shape[1]
    return model.generate(input_ids, max_new_tokens=total, do_sample=False)

def spoiled(model, input_ids, **arguments):
    ids = plain(model, input_ids, **arguments)
    ids[:, -1] = 7
    return ids

class Late:
    def __init__(self, wrong=False):
        self.wrong = wrong
    def __call__(self, model, input_ids, **arguments):
        return (spoiled if self.wrong else plain)(model, input_ids, **arguments)

text = "not callable"
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with decoders and prompts, and tiny models instead of real ones."""

    def load(name: str, *, dtype: str | None = None, **_: object) -> tuple[object, object]:
        if name == "other-vocabulary":
            return tiny_model("llama", vocab_size=300), ByteTokenizer()
        kind = getattr(torch, dtype or "float64")
        return tiny_model("llama", vocab_size=258, dtype=kind), ByteTokenizer()

    monkeypatch.setattr(pertoken, "load", load)
    (tmp_path / "own_decoders.py").write_text(DECODERS)
    (tmp_path / "p.jsonl").write_text('{"prompt": "abc abc abc", "category": "x"}\n' * 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


RUN = ["--prompts", "p.jsonl", "--max-new-tokens", "6"]


def test_lossless_is_exit_code_0(capsys: Capture) -> None:
    assert main(["verify", "hf-prompt-lookup", *RUN]) == 0
    out, _ = capsys.readouterr()
    assert out.splitlines()[0].split() == ["prompt", "tokens", "verdict"]
    last = out.splitlines()[-1]
    assert last == "LOSSLESS: hf-prompt-lookup against hf: 2 identical; 2 prompts, 12 tokens"


def test_different_is_exit_code_1_and_says_where(capsys: Capture) -> None:
    assert main(["verify", "--callable", "own_decoders:spoiled", *RUN]) == 1
    out, err = capsys.readouterr()
    assert "error" not in err
    assert out.splitlines()[-1].startswith("NOT LOSSLESS: own_decoders:spoiled against hf: 2 diff")


def test_options_reach_a_class(capsys: Capture) -> None:
    run = ["verify", "--callable", "own_decoders:Late", *RUN, "--limit", "1"]
    assert main(run) == 0
    assert main([*run, "--option", "wrong=true"]) == 1
    assert "own_decoders:Late (wrong=true)" in capsys.readouterr().out


def test_json(capsys: Capture) -> None:
    assert main(["verify", "hf", *RUN, "--json", "-", "--dtype", "float32"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["lossless"] is True
    assert report["settings"]["dtype"] == "float32"
    assert [row["category"] for row in report["rows"]] == ["x", "x"]


def test_assistant(capsys: Capture) -> None:
    assert main(["verify", "--assistant", "smollm2", *RUN]) == 0
    assert "hf-assistant against hf" in capsys.readouterr().out
    assert main(["verify", "--assistant", "other-vocabulary", *RUN]) == 2
    assert "300 tokens and the model 258" in capsys.readouterr().err


def test_sample_without_a_model(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pertoken, "load", None)
    assert main(["verify", "hf", "--sample"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == (
        "LOSSLESS: hf: the model's distribution on 4 of 4 models, 80000 draws"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gose", *RUN], "did you mean 'goose'"),
        (["hf", "--against", "hff", *RUN], "'hff'"),
        (["hf", "--prompts", "none.txt"], "no prompt file none.txt"),
        (["hf", *RUN, "--max-new-tokens", "0"], "--max-new-tokens must be 1 or more, got 0"),
        (["hf", *RUN, "--max-new-tokens", "9999"], "do not fit the model's 512 positions"),
        (["hf", *RUN, "--limit", "0"], "1 or more, got 0"),
        (["hf", *RUN, "--option", "budget"], "KEY=VALUE, got 'budget'"),
        (["hf", "--assistant", "smollm2", *RUN], "name one way"),
        (["--callable", "own_decoders", *RUN], "MODULE:OBJECT"),
        (["--callable", "no_such_module:f", *RUN], "no_such_module"),
        (["--callable", "own_decoders:f", *RUN], "has no 'f'"),
        (["--callable", "own_decoders:text", *RUN], "not callable"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    capsys: Capture, arguments: list[str], message: str
) -> None:
    assert main(["verify", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_option_values() -> None:
    assert parse_options(["max-chain=3", "x=1.5", "name=a=b"]) == {
        "max_chain": 3,
        "x": 1.5,
        "name": "a=b",
    }
    with pytest.raises(PertokenError):
        parse_options(["=3"])
