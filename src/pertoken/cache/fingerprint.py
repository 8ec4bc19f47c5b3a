"""One short name for "this very model": what keys and values depend on, hashed.

A cache is only good for the model that made it. The fingerprint is sha256 over

- the class and those settings of the configuration that differ from the class's defaults, without
  names, versions and ids of special tokens (the dtype counts with each weight);
- name, dtype, shape and every byte of all parameters and saved buffers, a tied weight once.

So a fine-tuned, merged, pruned or cast model has another one; the same weights on another device,
in another folder or with another attention back end have the same. No weight is left out: at about
1.4 GB/s on one core (measured, sha256 with CPU instructions) a sample would save little.

A model's fingerprint is kept as long as the model lives and is thrown away when a weight has
changed: each weight's address, its count of in-place changes (torch's `_version`), and 16 of its
values, because a change through `.data` is not counted.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["model_fingerprint", "model_name"]

_IGNORED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_BLOCK = 1 << 24  # bytes hashed at a time; a weight on another device is copied by blocks
_SAMPLES = 16

_known: weakref.WeakKeyDictionary[Any, tuple[bytes, str]] = weakref.WeakKeyDictionary()


def model_fingerprint(model: PreTrainedModel) -> str:
    """32 hexadecimal digits (128 bits of sha256) that name a model's architecture and weights.

    >>> from pertoken.testing import tiny_model
    >>> one, same, other = (tiny_model("llama", seed=seed) for seed in (0, 0, 1))
    >>> model_fingerprint(one) == model_fingerprint(same)
    True
    >>> model_fingerprint(one) == model_fingerprint(other)
    False
    """
    stamp = _stamp(model)
    known = _known.get(model)
    if known is None or known[0] != stamp:
        known = _known[model] = (stamp, _fingerprint(model))
    return known[1]


def model_name(model: PreTrainedModel) -> str:
    """A readable name: the last part of the name or folder it was loaded by, else its class."""
    path = str(getattr(model.config, "_name_or_path", "") or "").replace("\\", "/").rstrip("/")
    return path.rpartition("/")[2] or type(model).__name__


def _fingerprint(model: PreTrainedModel) -> str:
    digest = hashlib.sha256(type(model).__name__.encode())
    digest.update(json.dumps(_settings(model.config.to_diff_dict()), sort_keys=True).encode())
    for name, tensor in _weights(model):
        digest.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        flat = tensor.detach().contiguous().reshape(-1)
        step = max(1, _BLOCK // flat.element_size())
        for start in range(0, flat.numel(), step):
            block = flat[start : start + step].cpu().view(torch.uint8)
            digest.update(block.numpy().data)
    return digest.hexdigest()[:32]


def _settings(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _settings(v) for k, v in value.items() if str(k) not in _IGNORED}
    if isinstance(value, (list, tuple)):
        return [_settings(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _weights(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from sorted(model.named_parameters(), key=lambda pair: pair[0])
    saved = model.state_dict().keys()  # other buffers follow from the configuration
    yield from sorted(pair for pair in model.named_buffers() if pair[0] in saved)


def _stamp(model: PreTrainedModel) -> bytes:
    """What changes when a weight does, without reading all of it."""
    digest = hashlib.blake2b()
    for name, tensor in _weights(model):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].cpu()
        version = 0 if tensor.is_inference() else tensor._version
        digest.update(
            f"{name} {tensor.dtype} {list(tensor.shape)} {tensor.data_ptr()} {version}".encode()
        )
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps(_settings(model.config.to_diff_dict()), sort_keys=True).encode())
    return digest.digest()
