"""The blocks of a decoder one at a time, run by the model's own code.

`enter` gives what the first block would read for some tokens, and the arguments with which the
decoder would call each block (rotations, positions); `project` runs a block up to its attention and
gives the keys and values it would cache; `advance` runs a whole block with another's attention.
Nothing here knows the modules of an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pertoken._takeover import Attend, Takeover
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Entered:
    """hidden: [batch, time, hidden], the input of the first block; calls: the further arguments of
    every block for these very tokens."""

    hidden: torch.Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


class _Captured(Exception):
    """Ends a block at its attention."""


class Blocks:
    """The blocks of a model's decoder.

    >>> from pertoken.testing import tiny_model
    >>> blocks = Blocks(tiny_model("gemma3"))
    >>> entered = blocks.enter(torch.tensor([[5, 6, 7]]), torch.tensor([[0, 1, 2]]))
    >>> keys, values = blocks.project(0, entered.hidden, entered.calls[0])
    >>> list(keys.shape)
    [1, 2, 3, 8]
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.decoder = model.get_decoder()
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        lists = [
            module
            for module in self.decoder.children()
            if isinstance(module, torch.nn.ModuleList) and len(module) == count
        ]
        if len(lists) != 1:
            raise PertokenError(f"{type(model).__name__} has no single list of {count} blocks")
        self.modules = list(lists[0])
        # Keys and values need no queries: a block that projects them apart is spared that.
        self._queries = [
            [each for name, each in block.named_modules() if name.endswith("q_proj")]
            for block in self.modules
        ]
        self.takeover = Takeover(model)

    def enter(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Entered:
        """What the blocks are called with for tokens [batch, time] at these positions."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hidden: list[torch.Tensor] = []

        def note(*args: Any, **kwargs: Any) -> torch.Tensor:
            if args:
                first, rest = args[0], args[1:]
            else:
                first, rest = kwargs.pop("hidden_states"), ()
            hidden.append(first)
            calls.append((rest, kwargs))
            return first

        with self.takeover(_capture), replaced(self.modules, lambda _: note):
            # Not `self.decoder(...)`: a hook on the decoder is for forwards, and this is none.
            self.decoder.forward(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, return_dict=True
            )
        return Entered(hidden[0], calls)

    def project(
        self, layer: int, hidden: torch.Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [batch, key heads, time, dim] of a block, from its input.

        hidden: [batch, time, hidden]; call: of `enter` for the same tokens.
        """
        args, kwargs = call
        try:
            with self.takeover(_capture), replaced(self._queries[layer], _no_queries):
                self.modules[layer](hidden, *args, **kwargs)
        except _Captured as captured:
            keys, values = captured.args
            return keys, values
        raise PertokenError(f"block {layer} has no attention that a cache could answer")

    def advance(
        self,
        layer: int,
        hidden: torch.Tensor,
        call: tuple[tuple[Any, ...], dict[str, Any]],
        attend: Attend,
    ) -> torch.Tensor:
        """The output [batch, time, hidden] of a block whose attention is `attend`."""
        args, kwargs = call
        with self.takeover(attend):
            output = self.modules[layer](hidden, *args, **kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result


def _capture(module: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    raise _Captured(key, value)


def _no_queries(projection: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Zeros in the shape of a linear layer's output."""
    return lambda hidden: hidden.new_zeros(*hidden.shape[:-1], projection.out_features)


@contextmanager
def replaced(
    modules: list[torch.nn.Module], forward: Callable[[torch.nn.Module], Any]
) -> Iterator[None]:
    """The modules' forward is another function, made for each, for the length of a `with`."""
    before: list[tuple[torch.nn.Module, Any]] = []
    try:
        for module in modules:
            made = forward(module)
            before.append((module, vars(module).get("forward")))
            vars(module)["forward"] = made
        yield
    finally:
        for module, own in reversed(before):
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own
