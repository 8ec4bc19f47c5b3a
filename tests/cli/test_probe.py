"""`pertoken probe …` as a user types it, with a tiny model in a folder."""

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


def test_geometry_as_table_json_page_and_picture(
    tiny_folder: str, tmp_path: Path, capsys: Capture
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a line is a document\nand this is another\nthe third and last\n")
    paths = [tmp_path / name for name in ("out.json", "out.html", "out.svg")]
    options = ["--texts", str(texts), "--neighbours", "8,4", "--classes", "diagonal,affine"]
    options += ["--tested", "diagonal", "--json", str(paths[0]), "--html", str(paths[1])]
    assert main(["probe", "geometry", tiny_folder, *options, "--svg", str(paths[2])]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "T diagonal, its output in the layer's place" in out
    found = json.loads(paths[0].read_text())
    assert found["settings"]["documents"] == 3
    assert {(row["function"], row["neighbours"]) for row in found["summary"]} == {
        ("identity", None),
        *((name, count) for name in ("diagonal", "affine") for count in (8, 4)),
    }
    assert [effect["layer"] for effect in found["effects"]] == [0, 1]
    assert "<polyline" in paths[1].read_text()
    assert paths[2].read_text().startswith("<svg")


def test_geometry_of_a_model_with_a_state_and_the_sample(
    tiny_folder: str, tmp_path: Path, capsys: Capture
) -> None:
    config = transformers.MambaConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0
    )
    mamba = folder(transformers.MambaForCausalLM(config), tiny_folder, tmp_path / "mamba")
    capsys.readouterr()
    options = ["--fit", "global", "--limit", "4", "--tested", "none"]
    assert main(["probe", "geometry", mamba, *options]) == 0
    out = capsys.readouterr().out
    assert "orthogonal" in out
    assert "Spearman" not in out


def test_geometry_says_mistakes_in_one_line(
    tiny_folder: str, tmp_path: Path, capsys: Capture
) -> None:
    alone = tmp_path / "alone.txt"
    alone.write_text("one document\n")
    for options, words in (
        (["--texts", str(alone)], "give two or more"),
        (["--texts", str(tmp_path / "no.txt")], "no.txt"),
        (["--neighbours", "many"], "--neighbours takes whole numbers"),
        (["--neighbours", "100000"], "has only"),
        (["--classes", "rotation"], "unknown function class 'rotation'"),
        (["--svg", "same", "--html", "same"], "both want to write same"),
    ):
        assert main(["probe", "geometry", tiny_folder, *options]) == 2
        out, err = capsys.readouterr()
        assert out == ""
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


def test_options_are_refused_before_a_model_is_loaded(tmp_path: Path, capsys: Capture) -> None:
    words = tmp_path / "words.txt"
    words.write_text("four seven eleven letters language character strawberry", encoding="utf-8")
    asked = ["characters", "--words", str(words), "--each", "1"]
    for (command, *options), said in (
        (["residual", "--dtypes", "float32,float33"], "unknown dtype 'float33'"),
        (["geometry", "--fit", "locl"], "fit is"),
        (["geometry", "--classes", "rotation"], "unknown function class 'rotation'"),
        (["geometry", "--tested", "rotation"], "unknown function class 'rotation'"),
        ([*asked, "--forms", "plain,spelt"], "unknown form 'spelt'"),
        ([*asked, "--shots", "7"], "shots must be 0 to 6"),
        ([*asked, "--batch", "0"], "batch must be 1 or more"),
    ):
        assert main(["probe", command, str(tmp_path / "no-model"), *options]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert said in err


def test_the_group_alone_shows_its_help(capsys: Capture) -> None:
    assert main(["probe", "--help"]) == 0
    assert "residual" in capsys.readouterr().out
