"""A model written as GGUF and converted back is the same model, bit by bit."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import pertoken
from pertoken import _gguf
from pertoken._gguf import convert_gguf, write_safetensors
from pertoken.errors import PertokenError

BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2 writes these as themselves
ALPHABET = [chr(byte) for byte in BYTES] + [chr(256 + extra) for extra in range(256 - len(BYTES))]
TOKENS = ["<unk>", "<s>", "</s>", *ALPHABET, "ĠĠ"]
PIECES = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
PIECES += [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "▁▁", *"abcdefgh", "ab", "▁a"]

LLAMA_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_NAMES = LLAMA_NAMES | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def permuted(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows as llama.cpp's converter orders those of the query and key projections."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, model: Any, names: dict[str, str], architecture: str, *, quantise: bool = False
) -> dict[str, torch.Tensor]:
    """Write `model` as llama.cpp does; returns the weights as they can be read back."""
    config, state = model.config, dict(model.state_dict())
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    gemma = architecture == "gemma3"
    if gemma:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base(1e6)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(PIECES)
        writer.add_token_scores([-float(i) for i in range(len(PIECES))])
        writer.add_token_types([3] * 5 + [6] * 256 + [1] * (len(PIECES) - 261))
        ids = (2, 1, 3, 0)
    else:
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(50_000.0)
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
        writer.add_token_merges(["Ġ Ġ"])
        ids = (1, 2, 0, 2)
    for add, number in zip(("bos", "eos", "unk", "pad"), ids, strict=True):
        getattr(writer, f"add_{add}_token_id")(number)
    theirs = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(config.num_hidden_layers):
        for short, long in names.items():
            theirs[f"model.layers.{layer}.{long}"] = f"blk.{layer}.{short}"
    back = {}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        if stem == "lm_head" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        kind = gguf.GGMLQuantizationType.F32
        if quantise and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
        kept = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
        back[name] = torch.from_numpy(kept.copy())
        if architecture == "llama" and stem.endswith("q_proj"):
            values = permuted(values, config.num_attention_heads)
        if architecture == "llama" and stem.endswith("k_proj"):
            values = permuted(values, config.num_key_value_heads)
        if gemma and stem.endswith("norm"):
            values = values + 1
        stored = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(f"{theirs[stem]}.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return back


def llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def gemma() -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(PIECES),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=8,
        max_position_embeddings=256,
    )
    model = Gemma3ForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):  # multiples of 1/64, so that 1 + w loses no bit
            weight.data = torch.randint(-32, 32, weight.shape) / 64
    return model


def assert_same_model(model: Any, other: Any) -> None:
    ids = torch.randint(5, 40, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_round_trip(tmp_path: Path, tied: bool) -> None:
    original = llama(tied)
    write_gguf(tmp_path / "tiny.gguf", original, LLAMA_NAMES, "llama")
    model, tokenizer = pertoken.load(tmp_path / "tiny.gguf")
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert_same_model(model, original)
    same_storage = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert same_storage == tied
    assert not model.training
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 2
    assert tokenizer.padding_side == "left"


def test_digits_stand_alone_whatever_is_before_them(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama(), LLAMA_NAMES, "llama")
    _, tokenizer = pertoken.load(tmp_path / "tiny.gguf")
    assert tokenizer.tokenize("x  7 12") == ["x", "ĠĠ", "7", "Ġ", "1", "2"]


def test_gemma_round_trip(tmp_path: Path) -> None:
    original = gemma()
    write_gguf(tmp_path / "tiny.gguf", original, GEMMA_NAMES, "gemma3")
    model, tokenizer = pertoken.load(tmp_path / "tiny.gguf")
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert_same_model(model, original)  # windows, rotary bases and embedding scale included
    assert tokenizer("ab").input_ids[0] == 2  # begins with <bos>
    assert tokenizer.decode(tokenizer("ab a").input_ids, skip_special_tokens=True) == "ab a"


def test_quantised_weights_are_those_of_the_file(tmp_path: Path) -> None:
    original = llama()
    kept = write_gguf(tmp_path / "tiny.gguf", original, LLAMA_NAMES, "llama", quantise=True)
    (tmp_path / "out").mkdir()
    facts = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert facts["weights"] == "float32, de-quantised from Q8_0"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == kept.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, kept[name]), name


def test_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama(), LLAMA_NAMES, "llama")
    first, _ = pertoken.load(tmp_path / "tiny.gguf")
    monkeypatch.setattr(_gguf, "convert_gguf", None)  # a second conversion would fail
    second, _ = pertoken.load(str(tmp_path / "tiny.gguf"))
    assert_same_model(first, second)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_no_half_written_model(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama(), LLAMA_NAMES, "llama")
    undo, seen = _gguf._undo, []

    def breaks(facts: Any, name: str, values: Any) -> Any:
        seen.append(name)
        if len(seen) == 5:
            raise error
        return undo(facts, name, values)

    monkeypatch.setattr(_gguf, "_undo", breaks)
    wanted = PertokenError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted):
        pertoken.load(tmp_path / "tiny.gguf")
    assert list((home / "models").iterdir()) == []
    monkeypatch.setattr(_gguf, "_undo", undo)
    pertoken.load(tmp_path / "tiny.gguf")


def test_no_room_is_said_before_the_work(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "tiny.gguf", llama(), LLAMA_NAMES, "llama")
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(_gguf.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(PertokenError, match=r"needs 0\.0 GB .* PERTOKEN_HOME"):
        pertoken.load(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "not a GGUF file"), (b"PK\3\4 zip", "not a GGUF file"), (b"GGUF\3\0\0\0", "cut short")],
)
def test_what_is_not_gguf(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(PertokenError, match=words) as caught:
        pertoken.load(tmp_path / "bad.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.99])
def test_truncated_gguf(tmp_path: Path, home: Path, share: float) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, llama(), LLAMA_NAMES, "llama")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(PertokenError, match="cut short or damaged"):
        pertoken.load(path)
    assert list((home / "models").iterdir()) == []


def test_scaled_rotary_positions_are_refused(tmp_path: Path) -> None:
    # Llama 3.1 stores its frequency factors as a tensor; dropping it would change long texts.
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(PertokenError, match="scaled rotary"):
        pertoken.load(path)


def test_other_architectures_go_through_transformers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is an optional helper")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        tie_word_embeddings=True,
    )
    original = Qwen3ForCausalLM(config).eval()
    names = LLAMA_NAMES | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
    write_gguf(tmp_path / "tiny.gguf", original, names, "qwen3")
    model, _ = pertoken.load(tmp_path / "tiny.gguf")
    assert not getattr(model, "is_quantized", False)
    assert_same_model(model, original)


def write_unknown(path: Path, architecture: str) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_tensor("blk.0.odd.weight", np.ones((8, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_other_architectures_say_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_unknown(tmp_path / "odd.gguf", "rwkv6")
    monkeypatch.setattr(_gguf, "find_spec", lambda name: None)
    with pytest.raises(PertokenError, match=r"'rwkv6' takes accelerate: pip install accelerate"):
        pertoken.load(tmp_path / "odd.gguf")


def test_architectures_nobody_reads_are_one_line(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is an optional helper")
    write_unknown(tmp_path / "odd.gguf", "rwkv6")
    with pytest.raises(PertokenError, match="transformers cannot read") as caught:
        pertoken.load(tmp_path / "odd.gguf")
    assert "\n" not in str(caught.value)


def test_safetensors_writer_agrees_with_the_library(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b.weight": np.float32([[1.5]]).T,
        "flipped": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    }
    path = tmp_path / "x.safetensors"
    shapes = {name: array.shape for name, array in arrays.items()}
    write_safetensors(path, shapes, iter(arrays.values()))
    for name, tensor in load_file(path).items():
        assert np.array_equal(tensor.numpy(), arrays[name])
