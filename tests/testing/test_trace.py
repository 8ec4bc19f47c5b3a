"""Every kind of leak planted on purpose: `check_leaves_no_trace` must see it and name it."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama import modeling_llama
from transformers.utils import logging

from pertoken.decode import Goose
from pertoken.testing import ARCHITECTURES, LawBroken, check_leaves_no_trace, tiny_model


@contextmanager
def hooked(model: PreTrainedModel, *, careless: bool = False) -> Iterator[None]:
    handle = model.get_decoder().layers[0].register_forward_hook(lambda *_: None)
    if careless:
        yield
        handle.remove()  # not reached when the body raises
        return
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_trace_of_a_clean_decoder(architecture: str) -> None:
    ids = torch.tensor([[5, 6, 7]])
    check_leaves_no_trace(
        tiny_model(architecture),
        lambda m: m.generate(ids, max_new_tokens=6, custom_generate=Goose()),
        rng=True,
    )


def test_no_trace_of_a_clean_context() -> None:
    check_leaves_no_trace(tiny_model("llama"), hooked)


def test_trace_of_a_context_that_forgets_on_error() -> None:
    with pytest.raises(LawBroken, match=r"after an error in the body: .*layers.0.*forward hooks"):
        check_leaves_no_trace(tiny_model("llama"), lambda m: hooked(m, careless=True))


def _leave_hook(model: PreTrainedModel) -> None:
    model.get_decoder().layers[0].register_forward_pre_hook(lambda *_: None)


def _swap_hook(model: PreTrainedModel) -> None:
    hooks = model.get_decoder().layers[0]._forward_hooks
    for key in list(hooks):
        hooks[key] = lambda *_: None


def _patch_forward(model: PreTrainedModel) -> None:
    module = model.get_decoder().layers[0]
    module.forward = module.forward


def _edit_weight(model: PreTrainedModel) -> None:
    next(model.parameters()).data[0, 0] += 1e-6


def _patch_config(model: PreTrainedModel) -> None:
    model.config.sliding_window = 4


def _switch_attention(model: PreTrainedModel) -> None:
    model.set_attn_implementation("eager")


def _register(model: PreTrainedModel) -> None:
    AttentionInterface.register("someones_own", lambda *_: None)


def _change_defaults(model: PreTrainedModel) -> None:
    model.generation_config.top_k = 7


def _other_config_below(model: PreTrainedModel) -> None:
    model.get_decoder().layers[0].self_attn.config = copy.deepcopy(model.config)


def _attribute_that_grows(model: PreTrainedModel) -> None:
    model.kept.append(1)


class OwnConfig(PreTrainedConfig):
    model_type = "someones_own"


class Function(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


TRACES: list[tuple[Callable[[PreTrainedModel], Any], str]] = [
    (_leave_hook, "forward pre hooks"),
    (_patch_forward, "attribute forward"),
    (_edit_weight, "tensor"),
    (_patch_config, "config"),
    (_other_config_below, "self_attn': config"),
    (_switch_attention, "attention implementation"),
    (_register, "someones_own"),
    (_change_defaults, "generation_config"),
    (_attribute_that_grows, "attribute kept"),
    (lambda m: m.train(), "training flag"),
    (lambda m: setattr(m, "my_cache", 1), "my_cache is new"),
    (lambda m: next(m.parameters()).requires_grad_(False), "tensor"),
    (lambda m: ROPE_INIT_FUNCTIONS.update(own=_register), "rotation 'own' is new"),
    (lambda m: ACT2FN.update(own=torch.nn.ReLU), "activation 'own' is new"),
    (lambda m: AutoConfig.register("someones_own", OwnConfig), "model type 'someones_own' is new"),
    (lambda m: torch.set_grad_enabled(False), "grad mode"),
    (lambda m: torch.autograd.set_detect_anomaly(True), "anomaly mode"),
    (lambda m: torch.set_default_dtype(torch.float64), "default dtype"),
    (lambda m: torch.set_default_device("meta"), "default device"),
    (lambda m: torch.set_num_threads(torch.get_num_threads() + 1), "threads"),
    (lambda m: torch.use_deterministic_algorithms(True, warn_only=True), "deterministic algor"),
    (lambda m: torch.set_float32_matmul_precision("medium"), "float32 matmul precision"),
    (lambda m: torch.set_autocast_enabled("cpu", True), "autocast on cpu"),
    (lambda m: torch.set_autocast_dtype("cpu", torch.float16), "autocast on cpu"),
    (lambda m: setattr(torch.backends.cudnn, "benchmark", True), "cudnn.benchmark"),
    (lambda m: torch.backends.cuda.enable_flash_sdp(False), "flash_sdp"),
    (
        lambda m: torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
        "global forward hooks",
    ),
    (lambda m: Function().__enter__(), "function modes"),
    (lambda m: Dispatch().__enter__(), "dispatch modes"),
    (lambda m: os.environ.update(SOMEONES_OWN="1"), "environment variable SOMEONES_OWN is new"),
    (lambda m: logging.set_verbosity_debug(), "log level"),
]


@pytest.fixture
def restore(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SOMEONES_OWN", raising=False)
    threads, level = torch.get_num_threads(), logging.get_verbosity()
    flash, half = torch.backends.cuda.flash_sdp_enabled(), torch.get_autocast_dtype("cpu")
    hooks = dict(torch.nn.modules.module._global_forward_hooks)
    functions, dispatches = torch._C._len_torch_function_stack(), _dispatches()
    yield
    while _dispatches() > dispatches:
        torch.utils._python_dispatch._pop_mode()
    while torch._C._len_torch_function_stack() > functions:
        torch._C._pop_torch_function_stack()
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.autograd.set_detect_anomaly(False)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.set_autocast_enabled("cpu", False)
    torch.set_autocast_dtype("cpu", half)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.nn.modules.module._global_forward_hooks.clear()
    torch.nn.modules.module._global_forward_hooks.update(hooks)
    os.environ.pop("SOMEONES_OWN", None)
    logging.set_verbosity(level)
    AttentionInterface._global_mapping.pop("someones_own", None)
    ROPE_INIT_FUNCTIONS.pop("own", None)
    ACT2FN.pop("own", None)
    CONFIG_MAPPING._extra_content.pop("someones_own", None)


def _dispatches() -> int:
    return torch._C._len_torch_dispatch_stack()


@pytest.mark.usefixtures("restore")
@pytest.mark.parametrize(("action", "named"), TRACES, ids=[named for _, named in TRACES])
def test_traces_are_found_and_named(action: Callable[..., Any], named: str) -> None:
    model = tiny_model("llama")
    model.kept = []
    with pytest.raises(LawBroken, match=named):
        check_leaves_no_trace(model, lambda m: (action(m), None)[1])


def test_a_replaced_hook_is_found_though_the_count_is_the_same() -> None:
    model = tiny_model("llama")
    model.get_decoder().layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(LawBroken, match="forward hooks changed"):
        check_leaves_no_trace(model, _swap_hook)


def test_a_patched_function_of_the_modelling_code_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def patch(model: PreTrainedModel) -> None:
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *_: None)

    with pytest.raises(LawBroken, match="apply_rotary_pos_emb"):
        check_leaves_no_trace(tiny_model("llama"), patch)


@pytest.mark.parametrize(
    ("draw", "named"),
    [
        (lambda: torch.rand(1), "global random generator"),
        (random.random, "Python's random generator"),
        (np.random.rand, "numpy's random generator"),
    ],
)
def test_random_draws_are_found_on_request(draw: Callable[[], Any], named: str) -> None:
    check_leaves_no_trace(tiny_model("llama"), lambda m: draw())
    with pytest.raises(LawBroken, match=named):
        check_leaves_no_trace(tiny_model("llama"), lambda m: draw(), rng=True)
