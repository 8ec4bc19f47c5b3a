"""`pertoken probe residual` as a user types it, with a tiny model in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from pertoken.cli import main

Capture = pytest.CaptureFixture[str]


def test_four_measurements_as_tables(tiny_folder: str, capsys: Capture) -> None:
    assert main(["probe", "residual", tiny_folder]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    titles = ("keys and values", "without a cache", "residual patching", "query-key products")
    assert [out.index(title) for title in titles] == sorted(out.index(title) for title in titles)
    assert "2 of 2" in out
    assert "30 of 30" in out


def test_every_layer_where_asked_for(tiny_folder: str, capsys: Capture) -> None:
    assert main(["probe", "residual", tiny_folder]) == 0
    short = capsys.readouterr().out
    assert main(["probe", "residual", tiny_folder, "--layers"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > len(short.splitlines())


def test_json_with_a_prompt_and_dtypes(tiny_folder: str, capsys: Capture) -> None:
    options = ["--prompt", "so be it", "--dtypes", "float64,bfloat16", "--json", "-"]
    assert main(["probe", "residual", tiny_folder, *options]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert found["prompt"] == "so be it"
    assert found["reconstruction"]["exact"]
    assert [e["dtype"] for e in found["reconstruction"]["errors"]] == 2 * ["float64"] + 2 * [
        "bfloat16"
    ]
    assert max(found["patching_all"]["to_donor"]) < 1e-12
    assert found["patching_last"]["replaced"] == 1
    assert found["cache_free"]["equal"] == 30
    assert len(found["query_key_rank"]["ranks"]) == 2


def folder(model: transformers.PreTrainedModel, tiny_folder: str, place: Path) -> str:
    transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(place)
    model.save_pretrained(place)
    return str(place)


def test_bad_input_is_one_line(tiny_folder: str, tmp_path: Path, capsys: Capture) -> None:
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=1)
    )
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=257, d_model=32, d_kv=8, d_ff=32, num_layers=1)
    )
    without_cache = folder(mamba, tiny_folder, tmp_path / "mamba")
    two_stacks = folder(t5, tiny_folder, tmp_path / "t5")
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    for arguments, words in (
        ([without_cache], "recurrent state"),
        ([two_stacks], "not a loadable causal model"),
        ([str(tmp_path / "empty")], "not a model's folder"),
        (["smollm"], "did you mean 'smollm2'"),
        ([tiny_folder, "--prompt", "  "], "--prompt is empty"),
        ([tiny_folder, "--dtype", "float31"], "unknown dtype"),
        ([tiny_folder, "--dtype", "float32", "--dtype", "half"], "unknown dtype"),
        ([tiny_folder, "--prompt", "x" * 600], "more than the 512 positions"),
    ):
        assert main(["probe", "residual", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert words in err


def test_sinks_as_tables_json_and_page(tiny_folder: str, tmp_path: Path, capsys: Capture) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("The cat sat on the mat.\nIt slept until noon.\nNot read.\n")
    command = ["probe", "sinks", tiny_folder, "--texts", str(texts), "--limit", "2"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "of 2 texts" in out
    page = tmp_path / "sinks.html"
    assert main([*command, "--json", "-", "--html", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == tiny_folder
    assert found["bound_holds"]
    assert "<svg" in page.read_text()
    for arguments, words in (
        ([tiny_folder, "--texts", str(tmp_path / "none.txt")], "none.txt"),
        ([tiny_folder, "--limit", "0"], "--limit must be 1 or more"),
    ):
        assert main(["probe", "sinks", *arguments]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert words in err


def test_the_group_alone_shows_its_help(capsys: Capture) -> None:
    assert main(["probe", "--help"]) == 0
    assert "residual" in capsys.readouterr().out
