"""What a process holds in common: torch's switches, transformers' registries, random generators."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.nn.modules import module as torch_module
from transformers.activations import ACT2FN
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

_BACKENDS = ("cuda", "cudnn", "mkldnn", "opt_einsum", "nnpack")


class Same:
    """Equal only to a wrapper of the very same object, which it keeps alive."""

    def __init__(self, item: object) -> None:
        self.item = item

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.item is self.item

    __hash__ = None  # type: ignore[assignment]


def torch_state() -> dict[str, Any]:
    """torch's switches by name; values compare with ==."""
    state: dict[str, Any] = {
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "deterministic fill": getattr(torch.utils.deterministic, "fill_uninitialized_memory", None),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "autocast cache": torch.is_autocast_cache_enabled(),
        # A function mode or dispatch mode that was entered and not left.
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
    }
    for device in ("cpu", "cuda"):
        state[f"autocast on {device}"] = (
            torch.is_autocast_enabled(device),
            (torch.get_autocast_dtype(device)),
        )
    state.update(_backends())
    for attribute, value in vars(torch_module).items():
        if attribute.startswith("_global_") and isinstance(value, dict):
            what = attribute.strip("_").replace("_", " ")
            state[f"torch's {what}"] = [(key, Same(item)) for key, item in value.items()]
    return state


def registries() -> Iterator[tuple[str, Same]]:
    """The functions and classes that transformers finds by name, and how loud it is."""
    named: dict[str, Mapping[Any, Any]] = {
        "attention function": ALL_ATTENTION_FUNCTIONS,
        "mask function": ALL_MASK_ATTENTION_FUNCTIONS,
        "rotation": ROPE_INIT_FUNCTIONS,
        "activation": ACT2FN,
        "model type": CONFIG_MAPPING._extra_content,
    }
    for attribute, mapping in vars(modeling_auto).items():
        if attribute.startswith("MODEL_FOR_") and hasattr(mapping, "_extra_content"):
            named[f"registered {attribute}"] = mapping._extra_content
    for what, mapping in named.items():
        for name in mapping:
            # ACT2FN makes a new object for each look-up.
            item = dict.__getitem__(mapping, name) if isinstance(mapping, dict) else mapping[name]
            yield f"{what} '{name}'", Same(item)
    yield f"transformers' log level {logging.get_verbosity()}", Same(None)


def environment() -> dict[str, Any]:
    """Environment variables by name."""
    return {f"environment variable {name}": value for name, value in os.environ.items()}


def random_states() -> dict[str, Any]:
    """States of the global random generators: torch's, Python's, numpy's."""
    states: dict[str, Any] = {
        "the state of the global random generator": torch.random.get_rng_state().tolist(),
        "the state of Python's random generator": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["the state of CUDA's random generator"] = torch.cuda.get_rng_state().tolist()
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        states["the state of numpy's random generator"] = (kind, keys.tolist(), *rest)
    return states


def _backends() -> Iterator[tuple[str, Any]]:
    """Plain switches of torch.backends, such as cudnn.benchmark, and those of attention."""
    for name in _BACKENDS:
        backend = getattr(torch.backends, name, None)
        for attribute in ("benchmark", "deterministic", "enabled", "allow_tf32", "strategy"):
            try:
                value = getattr(backend, attribute, None)
            except (AttributeError, RuntimeError):  # not built into this torch
                continue
            if isinstance(value, bool | int | str):
                yield f"torch.backends.{name}.{attribute}", value
    ask: Callable[[], bool]
    for kind in ("flash", "mem_efficient", "math", "cudnn"):
        ask = getattr(torch.backends.cuda, f"{kind}_sdp_enabled", lambda: False)
        yield f"torch.backends.cuda.{kind}_sdp", ask()
