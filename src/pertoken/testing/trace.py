"""The law for everything that touches a model: afterwards all is as it was."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers

from pertoken.testing._global_state import (
    Same,
    environment,
    random_states,
    registries,
    torch_state,
)
from pertoken.testing.laws import LawBroken
from pertoken.testing.setups import as_prompts, forward_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Action = Callable[["PreTrainedModel"], Any]

_PATCHABLE = (
    "transformers.cache_utils",
    "transformers.generation.utils",
    "transformers.masking_utils",
    "transformers.modeling_utils",
    "torch.nn.functional",
)


def check_leaves_no_trace(
    model: PreTrainedModel,
    action: Action | AbstractContextManager[Any],
    *,
    rng: bool = False,
    allow_registered: str = "pertoken_",
) -> None:
    """After `action(model)` the model and the library must be as before, also when it raises.

    action: called with the model; what it returns is entered if it is a context manager, with one
        forward inside. `lambda m: m.generate(ids, custom_generate=method)` checks a decoder,
        `Method` or `lambda m: Method(m)` a context. A context manager that can be entered
        several times may be given as it is.
    It runs once to its end, once with an error in the body, and with an error planted in the
    model's first, second and fifth forward. Compared: every module's class, attributes, hooks (by
    identity), training flag; weights, buffers, gradients; the configs and generation config;
    transformers' registries (attention, masks, rotations, activations, classes; names starting
    with `allow_registered` may be added once); patched functions of the modelling code; torch's
    global state (grad and inference mode, anomaly mode, default dtype and device, threads,
    deterministic flags, precision of products, autocast, backends, hooks on all modules, modes
    that were entered); environment variables; with `rng=True` the random states of torch, Python
    and numpy too. Raises `LawBroken` naming what changed.

    >>> from pertoken.testing import tiny_model
    >>> ids = torch.tensor([[5, 6]])
    >>> check_leaves_no_trace(tiny_model("gpt2"), lambda m: m.generate(ids, max_new_tokens=2))
    """
    _warm_up(model)

    def compare(when: str, run: Callable[[], None]) -> None:
        before = snapshot(model)
        random_before = random_states() if rng else {}
        run()
        changed = _changes(before, snapshot(model), allow_registered)
        random_after = random_states() if rng else {}
        changed += [name for name, state in random_before.items() if random_after[name] != state]
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise LawBroken(f"left a trace {when}: {'; '.join(changed[:5])}{more}")

    compare("after running", lambda: _run(model, action))
    compare("after an error in the body", lambda: _run(model, action, raising=True))
    for number in (1, 2, 5):
        compare(f"after an error in forward {number}", partial(_fail, model, action, number))


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Everything `check_leaves_no_trace` compares, by name; values compare with ==."""
    generation = getattr(model, "generation_config", None)  # an encoder has none
    state: dict[str, Any] = {
        "model.generation_config": generation and generation.to_dict(),
        **torch_state(),
        **environment(),
    }
    configs = {id(model.config): ("model.config", model.config)}
    for name, module in model.named_modules():
        for value in vars(module).values():
            if isinstance(value, transformers.PreTrainedConfig):
                configs.setdefault(id(value), (f"the config of module '{name}'", value))
    for name, config in configs.values():
        state[name] = config.to_dict(), sorted(vars(config))
        state[f"attention implementation in {name}"] = config._attn_implementation
    for name, module in model.named_modules():
        state.update(_module_state(f"module '{name}'" if name else "the model", module))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[f"tensor '{name}'"] = _tensor_state(tensor)
    state.update(registries())
    state.update(_code_state(model))
    return state


def _module_state(name: str, module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    yield f"{name}: class", type(module)
    yield f"{name}: training flag", module.training
    for attribute, value in vars(module).items():
        if "_hooks" in attribute or attribute in ("_parameters", "_buffers", "_modules"):
            items = value.items() if isinstance(value, dict) else []
            what = attribute.strip("_").replace("_", " ")
            yield f"{name}: {what}", [(key, Same(item)) for key, item in items]
        elif isinstance(value, transformers.PreTrainedConfig):
            yield f"{name}: {attribute}", Same(value)
        elif isinstance(value, dict | list | set):
            yield f"{name}: attribute {attribute}", (type(value), len(value))
        elif callable(value):
            yield f"{name}: attribute {attribute}", Same(value)
        elif isinstance(value, bool | int | float | str | type(None)):
            yield f"{name}: attribute {attribute}", value
        else:
            yield f"{name}: attribute {attribute}", type(value)


def _tensor_state(tensor: torch.Tensor) -> tuple[Any, ...]:
    gradient = Same(tensor.grad)
    values = tensor.detach().double()
    sums = (float(values.sum()), float(values.abs().sum()))
    return tensor.dtype, tuple(tensor.shape), tensor.requires_grad, gradient, sums


def _code_state(model: PreTrainedModel) -> Iterator[tuple[str, Same]]:
    """Functions and classes of the modelling code and of the library parts methods like to patch,
    with the methods of the model's own classes."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    classes.add(transformers.DynamicCache)
    for cls in classes:
        for attribute, value in vars(cls).items():
            if callable(value):
                yield f"{cls.__qualname__}.{attribute}", Same(value)
    for name in {*_PATCHABLE, *(type(module).__module__ for module in model.modules())}:
        for attribute, value in vars(sys.modules[name]).items():
            if callable(value):
                yield f"{name}.{attribute}", Same(value)


def _changes(before: dict[str, Any], after: dict[str, Any], allowed: str) -> list[str]:
    changed = []
    for name in {**before, **after}:
        if name not in before:
            if not (allowed and f"function '{allowed}" in name):
                changed.append(f"{name} is new")
        elif name not in after:
            changed.append(f"{name} is gone")
        elif before[name] != after[name]:
            changed.append(f"{name} changed")
    return changed


class _Planted(Exception):
    """The error this law raises on purpose."""


def _run(
    model: PreTrainedModel, action: Action | AbstractContextManager[Any], raising: bool = False
) -> None:
    started = action if isinstance(action, AbstractContextManager) else action(model)
    if not isinstance(started, AbstractContextManager):
        return
    try:
        with started:
            model(_some_ids(model))
            if raising:
                raise _Planted
    except _Planted:
        pass


def _fail(
    model: PreTrainedModel, action: Action | AbstractContextManager[Any], number: int
) -> None:
    try:
        with _failing_forward(model, number):
            _run(model, action)
    except _Planted:
        pass


@contextmanager
def _failing_forward(model: PreTrainedModel, number: int) -> Iterator[None]:
    """The decoder stack raises at its n-th forward. Works by a hook, gone when this ends."""
    left = number

    def count(module: torch.nn.Module, args: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise _Planted

    handle = model.get_decoder().register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _some_ids(model: PreTrainedModel) -> torch.Tensor:
    return as_prompts(model)[0][None]


@torch.no_grad()
def _warm_up(model: PreTrainedModel) -> None:
    """transformers leaves its own capture hooks at the first such forward; not our business."""
    if "output_hidden_states" in forward_parameters(model) or "kwargs" in forward_parameters(model):
        model(_some_ids(model), output_hidden_states=True)
    ids = _some_ids(model)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
