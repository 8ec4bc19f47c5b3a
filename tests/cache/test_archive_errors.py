"""What save_cache and restore_cache refuse, in one line each, before anything is lost."""

import errno
import os
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

from pertoken.cache import archive as archive_module
from pertoken.cache import inspect_cache, restore_cache, save_cache
from pertoken.cache.archive import prefill
from pertoken.errors import PertokenError
from pertoken.testing import tiny_model

IDS = [5, 6, 7, 8, 9]


@pytest.fixture
def model() -> Any:
    return tiny_model("llama", dtype=torch.float32)


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(PertokenError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_are_none(tmp_path: Path, model: Any) -> None:
    path = tmp_path / "a.ptkv"
    for read in (inspect_cache, lambda p: restore_cache(p, model)):
        assert f"there is no file {tmp_path}" in refusal(read, tmp_path / "none.ptkv")
        assert "is a folder" in refusal(read, tmp_path)
        for content in (b"", b"\x89PTKV", b"PK\x03\x04 a zip file of some kind"):
            path.write_bytes(content)
            assert "is not a .ptkv file" in refusal(read, path)


def test_another_version_is_not_damage(tmp_path: Path, model: Any) -> None:
    path = tmp_path / "a.ptkv"
    save_cache(path, model, IDS)
    magic, size, _ = struct.unpack_from("<8sII", path.read_bytes())
    text = path.read_bytes()[16 : 16 + size].replace(b'"version":1', b'"version":2')
    crc = zlib.crc32(text, zlib.crc32(magic + struct.pack("<I", size)))
    path.write_bytes(struct.pack("<8sII", magic, size, crc) + text)
    assert "has format version 2; this pertoken reads version 1: update" in refusal(
        restore_cache, path, model
    )


def test_another_model_is_named(tmp_path: Path, model: Any) -> None:
    path = tmp_path / "a.ptkv"
    save_cache(path, model, IDS)
    line = refusal(restore_cache, path, tiny_model("qwen3", dtype=torch.float32))
    assert "made with another model: LlamaForCausalLM (fingerprint " in line
    assert "this is Qwen3ForCausalLM" in line
    assert "another model" in refusal(restore_cache, path, tiny_model("llama", seed=1))
    line = refusal(restore_cache, path, tiny_model("llama", dtype=torch.bfloat16))
    assert "it held float32, this one is bfloat16" in line
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1  # one weight of it was trained
    assert "another model" in refusal(restore_cache, path, model)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_a_full_disk_or_ctrl_c_leaves_the_old_file(
    tmp_path: Path,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    path = tmp_path / "a.ptkv"
    save_cache(path, model, IDS, chunk=2)
    old = path.read_bytes()
    plain, calls = archive_module.pack_rows, list[int]()

    def full(*arguments: Any) -> bytes:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return plain(*arguments)

    monkeypatch.setattr(archive_module, "pack_rows", full)
    with pytest.raises(type(error)):
        save_cache(path, model, [9, 8, 7, 6], chunk=2)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a.ptkv"]
    monkeypatch.undo()
    assert restore_cache(path, model).input_ids.tolist() == [IDS]


def test_places_that_take_no_file(tmp_path: Path, model: Any) -> None:
    assert "it is a folder" in refusal(save_cache, tmp_path, model, IDS)
    assert "there is no folder" in refusal(save_cache, tmp_path / "b" / "a", model, IDS)


@pytest.mark.parametrize(
    ("ids", "options", "line"),
    [
        (IDS, {"level": "token"}, "unknown level 'token' (did you mean 'tokens'?)"),
        (IDS, {"chunk": 0}, "chunk must be 1 token or more, got 0"),
        ([], {}, "the conversation is empty"),
        ([[1, 2], [3, 4]], {}, "holds one conversation, got 2 rows of ids"),
        ([1, 64], {}, "token id 64 is outside the model's vocabulary of 64"),
        ([1, -1], {"level": "tokens"}, "token id -1 is outside"),
        ([1.5], {}, "token ids must be integers, got torch.float32"),
    ],
)
def test_what_cannot_be_saved(
    tmp_path: Path, model: Any, ids: Any, options: Any, line: str
) -> None:
    assert line in refusal(save_cache, tmp_path / "a", model, ids, **options)
    assert os.listdir(tmp_path) == []


def test_caches_that_are_more_or_less_than_keys_and_values(tmp_path: Path, model: Any) -> None:
    def line(cache: Any, ids: Any = IDS, level: str = "raw") -> str:
        return refusal(save_cache, tmp_path / "a", model, ids, cache=cache, level=level)

    static = StaticCache(config=model.config, max_cache_len=16)
    model(torch.tensor([IDS]), past_key_values=static)
    assert "a StaticCache with StaticLayer can't be archived" in line(static)
    assert "StaticLayer can't be archived" in line(static, level="tokens")

    class Evicting(transformers.cache_utils.DynamicLayer):
        pass

    class Window(DynamicCache):
        pass

    assert "a Window can't be archived: give a DynamicCache" in line(Window(config=model.config))
    own = DynamicCache(config=model.config)
    own.layers[0] = Evicting()
    assert "a DynamicCache with Evicting can't be archived" in line(own)
    assert "the cache holds 3 tokens and the conversation has 5" in line(prefill(model, IDS[:3]))
    other = tiny_model("llama", layers=3, dtype=torch.float32)
    assert "it belongs to another model" in line(prefill(other, IDS))
    double = DynamicCache(config=model.config)
    model(torch.tensor([IDS, IDS]), past_key_values=double)
    assert "holds one conversation, the cache has 2 rows" in line(double)
    mixed = prefill(model, IDS)
    mixed.layers[1].keys = mixed.layers[1].keys.double()
    assert "the cache mixes dtypes: float32, float64" in line(mixed)
    broken = prefill(model, IDS)
    broken.layers[1].values[0, 0, 0, 0] = float("inf")
    assert 'values of the cache are not finite and have no int8 code; use level="raw"' in line(
        broken, level="int8"
    )
    assert os.listdir(tmp_path) == []


def test_models_that_cannot_be_archived(tmp_path: Path, model: Any) -> None:
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=1
    )
    mamba = transformers.MambaForCausalLM(config).eval()
    line = refusal(save_cache, tmp_path / "a", mamba, IDS)
    assert "MambaForCausalLM keeps a state beside keys and values" in line
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).eval()
    assert "is an encoder-decoder model" in refusal(save_cache, tmp_path / "a", t5, IDS)
    assert "call model.eval() first" in refusal(save_cache, tmp_path / "a", model.train(), IDS)


def test_more_tokens_than_positions(tmp_path: Path) -> None:
    gpt2 = tiny_model("gpt2", dtype=torch.float32, max_positions=8)
    for level in ("raw", "tokens"):
        line = refusal(save_cache, tmp_path / "a", gpt2, [5] * 12, level=level)
        assert "tokens do not fit the model's 8 positions" in line


def test_without_constriction_only_level_tokens_is_refused(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    save_cache(path, model, IDS, level="tokens")
    monkeypatch.setitem(sys.modules, "constriction", None)
    line = 'constriction is not installed: pip install "pertoken[archive]"'
    assert line in refusal(save_cache, tmp_path / "b", model, IDS, level="tokens")
    assert line in refusal(restore_cache, path, model)
    assert inspect_cache(path).damage == ""
    save_cache(path, model, IDS, level="int8")
    assert restore_cache(path, model).input_ids.tolist() == [IDS]
