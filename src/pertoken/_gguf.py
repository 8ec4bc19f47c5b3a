"""GGUF files to folders that transformers loads at once: config, safetensors, tokenizer.

Llama and Gemma 3 are converted here, one tensor at a time, so that memory holds one tensor and not
the model; the numbers are bit-equal to transformers' own reading. Other architectures go through
transformers, which needs `accelerate`. Weights are stored in float32 whatever their precision in
the file: what the rounding to a few bits took away does not come back.

Ids of a tokenizer read from a GGUF file follow the file, except that digits of the `smollm`
pre-tokenizer are split one by one, as that model was trained and as transformers does not do.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pertoken._fetch import progress
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

__all__ = ["check_gguf", "convert_gguf", "write_safetensors"]

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {
    "llama": _LAYER_NAMES | {"ffn_norm": "post_attention_layernorm"},
    "gemma3": _LAYER_NAMES
    | {
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}


def check_gguf(path: Path) -> None:
    """Refuse, in one line, what is not a GGUF file."""
    if not path.is_file():
        raise PertokenError(f"no such file: {path}")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise PertokenError(f"cannot read {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise PertokenError(f"{path} is not a GGUF file (it begins with {magic!r}, not b'GGUF')")


def convert_gguf(path: Path, folder: Path) -> dict[str, Any]:
    """Write config, weights (float32) and tokenizer of the GGUF file into `folder`.

    Returns what the file says of itself: {"architecture", "title", "licence", "weights"}.
    """
    check_gguf(path)
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, struct.error) as error:
        raise PertokenError(
            f"{path} is cut short or damaged: its GGUF header cannot be read"
        ) from error
    facts = _Facts(reader)
    _check_room(folder, 4 * sum(int(tensor.n_elements) for tensor in reader.tensors))
    if any(key.startswith(f"{facts.architecture}.rope.scaling") for key in reader.fields) or any(
        tensor.name.startswith("rope_") for tensor in reader.tensors
    ):
        raise PertokenError(
            f"{path} uses scaled rotary positions, which would be lost on the way from GGUF: load "
            "the model's own folder or Hub id instead"
        )
    names = [_target_name(facts.architecture, tensor.name) for tensor in reader.tensors]
    if all(names):
        _config(facts, tied="lm_head.weight" not in names).save_pretrained(folder)
        _generation_config(facts).save_pretrained(folder)
        sources = zip(reader.tensors, [name for name in names if name], strict=True)
        _write_weights(facts, list(sources), folder / "model.safetensors")
    else:
        _convert_with_transformers(path, facts.architecture, folder)
    _tokenizer(path, facts).save_pretrained(folder)
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return {
        "architecture": facts.architecture,
        "title": facts.get("general.name"),
        "licence": facts.get("general.license"),
        "weights": f"float32, de-quantised from {', '.join(sorted(kinds))}",
    }


class _Facts:
    """The key-value header of a GGUF file."""

    def __init__(self, reader: Any) -> None:
        self.fields = reader.fields
        self.architecture = str(self.get("general.architecture", "?"))

    def get(self, key: str, default: Any = None) -> Any:
        field = self.fields.get(key)
        return default if field is None else field.contents()

    def own(self, key: str) -> Any:
        """A value of the model's own section, which must be there."""
        value = self.get(f"{self.architecture}.{key}")
        if value is None:
            raise PertokenError(f"this GGUF file lacks {self.architecture}.{key}")
        return value

    @property
    def token_ids(self) -> dict[str, int | None]:
        """The special ids under the names that transformers configs use."""
        kinds = {"bos": "bos", "eos": "eos", "pad": "padding"}
        ids = {
            ours: self.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in kinds.items()
        }
        if ids["pad"] is None:
            ids["pad"] = ids["eos"]
        return {f"{kind}_token_id": value for kind, value in ids.items()}


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise PertokenError(
            f"the converted model needs {needed / 1e9:.1f} GB and the disk of {folder.parent} has "
            f"{free / 1e9:.1f} GB free: make room or point PERTOKEN_HOME at another folder"
        )


def _target_name(architecture: str, name: str) -> str | None:
    """The transformers name of a GGUF tensor; None if this file does not know it.

    >>> _target_name("llama", "blk.3.attn_q.weight")
    'model.layers.3.self_attn.q_proj.weight'
    """
    layers = _NAMES.get(architecture)
    if layers is None:
        return None
    ends = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in ends:
        return ends[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in layers:
        return None
    return f"model.layers.{match[1]}.{layers[match[2]]}.weight"


def _config(facts: _Facts, *, tied: bool) -> Any:
    vocab_size = facts.get(f"{facts.architecture}.vocab_size")
    shared = {
        "vocab_size": vocab_size or len(facts.fields["tokenizer.ggml.tokens"].data),
        "hidden_size": facts.own("embedding_length"),
        "intermediate_size": facts.own("feed_forward_length"),
        "num_hidden_layers": facts.own("block_count"),
        "num_attention_heads": facts.own("attention.head_count"),
        "num_key_value_heads": facts.own("attention.head_count_kv"),
        "max_position_embeddings": facts.own("context_length"),
        "rms_norm_eps": facts.own("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": tied,
        "dtype": "float32",
        **facts.token_ids,
    }
    rope = {"rope_type": "default", "rope_theta": facts.own("rope.freq_base")}
    if facts.architecture == "llama":
        from transformers import LlamaConfig

        return LlamaConfig(
            head_dim=facts.own("rope.dimension_count"),
            rope_parameters=rope,
            architectures=["LlamaForCausalLM"],
            **shared,
        )
    from transformers import Gemma3TextConfig

    # Gemma 3's local layers turn with base 10,000 and every sixth layer is global; GGUF files do
    # not say so, every reader of the format knows it.
    return Gemma3TextConfig(
        head_dim=facts.own("attention.key_length"),
        query_pre_attn_scalar=facts.own("attention.key_length"),
        sliding_window=facts.own("attention.sliding_window"),
        rope_parameters={
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        architectures=["Gemma3ForCausalLM"],
        **shared,
    )


def _generation_config(facts: _Facts) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(**facts.token_ids)


def _undo(facts: _Facts, name: str, values: Array) -> Array:
    """Undo what llama.cpp's converter changed in the tensor with the transformers name `name`."""
    if facts.architecture == "gemma3" and name.endswith("norm.weight"):
        return values - 1  # stored as 1 + w
    for projection, heads in (("q_proj", "head_count"), ("k_proj", "head_count_kv")):
        if facts.architecture == "llama" and f"{projection}.weight" in name:
            # The two halves of each rotary head lie interleaved, row by row.
            count, (rows, columns) = facts.own(f"attention.{heads}"), values.shape
            split = values.reshape(count, rows // count // 2, 2, columns)
            return split.swapaxes(1, 2).reshape(rows, columns)
    return values


def _write_weights(facts: _Facts, sources: list[tuple[Any, str]], path: Path) -> None:
    from gguf.quants import dequantize

    shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for tensor, name in sources}
    size = sum(int(tensor.n_elements) for tensor, _ in sources)

    def arrays() -> Iterator[Array]:
        with progress("converting to float32", size) as advance:
            for tensor, name in sources:
                values = dequantize(tensor.data, tensor.tensor_type)
                yield _undo(facts, name, values.reshape(shapes[name]))
                advance(int(tensor.n_elements))

    write_safetensors(path, shapes, arrays())


def write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], arrays: Iterable[Array]
) -> None:
    """Write float32 arrays, which come one by one in the order of `shapes`, as safetensors.

    The library's own writer wants all tensors in memory; the format is a length, a JSON header
    and the raw numbers.
    """
    import numpy as np

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the numbers aligned for memory mapping
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, not {shape}")
            file.write(np.ascontiguousarray(array, dtype="<f4").data)


def _tokenizer(path: Path, facts: _Facts) -> Any:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if facts.get("tokenizer.ggml.pre") == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _convert_with_transformers(path: Path, architecture: str, folder: Path) -> None:
    """Let transformers read an architecture that this file does not know."""
    if find_spec("accelerate") is None:
        raise PertokenError(
            f"reading the GGUF architecture {architecture!r} takes accelerate: "
            "pip install accelerate (llama and gemma3 files need nothing)"
        )
    import torch
    from transformers import AutoModelForCausalLM

    try:
        from transformers import GgufConfig

        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            # Without this the model calls itself quantised and cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
        )
    except (ImportError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise PertokenError(
            f"transformers cannot read the GGUF architecture {architecture!r} of {path.name}: "
            "load the model's own folder or Hub id instead"
        ) from error
    model.save_pretrained(folder)
