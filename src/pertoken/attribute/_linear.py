"""A transformer that is linear in what its first block reads, as all else is held fixed.

What DecompX (2306.02873) holds fixed is what the model found for this very text:

    attention          the weights; values are mixed by them
    LayerNorm, RMSNorm  the deviation they divide by (LayerNorm still takes the mean away)
    activation         the ratio act(z) / z of every element ("GeLU_ZO" in the paper's code)
    gated product a b  half of it goes with a and half with b; or a is fixed (our readings)

So values stay the model's own, and the output is a sum over the tokens of the text and the biases.
A `Form` swaps the forward of the model's own small modules for the length of a `with`, so it needs
to know kinds of modules and no architecture; each is tried on numbers before it is trusted.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.activations import ACT2CLS
from transformers.pytorch_utils import Conv1D

from pertoken._blocks import replaced
from pertoken._takeover import Takeover, layer_windows, refuse_unfit, visible
from pertoken.errors import CannotServe, PertokenError, nearest
from pertoken.prompts import check_ids, positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GATES = ("half", "frozen")
Forward = Callable[..., Any]
Rule = Callable[["Form", Any, torch.Tensor], torch.Tensor]
"""`(form, module, input) -> output`, linear."""


class Form(ABC):
    """A model with all its nonlinear parts held fixed for the length of a `with`.

    what: who asks, for error messages. Raises PertokenError for a model that is in training mode,
    whose attention cannot be taken over, or with a module that cannot be made linear.
    """

    what: ClassVar[str]

    def __init__(self, model: PreTrainedModel, gate: str) -> None:
        if gate not in GATES:
            raise PertokenError(
                f"gate must be one of {', '.join(GATES)}, got {gate!r}{nearest(str(gate), GATES)}"
            )
        self.model, self.gate = model, gate
        self.blocks = stack(model, self.what)
        self._windows = layer_windows(model)
        self._takeover = Takeover(model)
        self._inside = False  # between the first block's input and the end
        forwards: dict[torch.nn.Module, Forward] = {}
        for name, module in model.named_modules():
            rule = rule_of(module, name, f"{self.what} cannot serve {type(model).__name__}")
            if rule is not None:
                forwards[module] = self._swap(name, module, rule)
        for number, block in enumerate(self.blocks):
            forwards[block] = self._block(number, block)
        self._forwards = forwards

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._inside = False
        with (
            self._takeover(self._attend),
            replaced(list(self._forwards), self._forwards.__getitem__),
        ):
            yield

    @abstractmethod
    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the first block shall read in place of `hidden` [1, time, hidden]."""

    @abstractmethod
    def times(
        self,
        x: torch.Tensor,
        factor: Callable[[torch.Tensor], torch.Tensor],
        of: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x times a factor that is held fixed: a function of the value of `of` (of x if None)."""

    @abstractmethod
    def plus(self, x: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
        """x with the bias of a module, which may have none."""

    def before_norm(self, x: torch.Tensor) -> torch.Tensor:
        """The input of a LayerNorm."""
        return x

    @abstractmethod
    def mix(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention whose weights are held fixed; allowed as in `_takeover.sdpa`."""

    def run(self, block: Forward, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """One block."""
        return block(hidden, *args, **kwargs)

    def seen(self, name: str, output: torch.Tensor) -> torch.Tensor:
        """Called with the output of every module, by name."""
        return output

    def _swap(self, name: str, module: torch.nn.Module, rule: Rule) -> Forward:
        own = module.forward

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._inside:  # embeddings are no part of it
                return own(x, *args, **kwargs)
            return self.seen(name, rule(self, module, x))

        return forward

    def _block(self, number: int, block: torch.nn.Module) -> Forward:
        own, name = block.forward, f"block {number}"

        def forward(*args: Any, **kwargs: Any) -> Any:
            args = args or (kwargs.pop("hidden_states"),)
            hidden = args[0]
            if number == 0:
                self._inside = True
                hidden = self.seen("embeddings", self.enter(hidden))
            output = self.run(own, hidden, *args[1:], **kwargs)
            self.seen(name, output[0] if isinstance(output, tuple) else output)
            return output

        return forward

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        window = self._windows[module.layer_idx] if is_causal(module) else None
        return self.mix(
            module, query, key, value, band(query.shape[-2], window, query.device), **kwargs
        )


def band(time: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which keys a query of a sliding layer sees, bool [1, 1, time, time]; None for others."""
    if window is None or window >= time:
        return None
    places = torch.arange(time, device=device)
    return visible(places, places, window)[None, None]


def is_causal(attention: Any) -> bool:
    """Whether a query of an attention module sees only what is before it."""
    return bool(getattr(attention, "is_causal", True))


def looks_ahead(model: PreTrainedModel) -> bool:
    """Is it an encoder, whose tokens see those behind them?"""
    return any(
        getattr(module, "is_causal", None) is False for module in model.get_decoder().modules()
    )


def stack(model: PreTrainedModel, what: str) -> list[torch.nn.Module]:
    """The blocks of a decoder or an encoder; refuses a model that cannot be taken apart."""
    refuse_unfit(model, what)
    if model.training:
        raise PertokenError("the model is in training mode (dropout): call model.eval() first")
    if found := blocks_of(model):
        return found
    raise CannotServe(f"{what} cannot serve {type(model).__name__}: it has no list of its blocks")


def blocks_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The blocks of a decoder or an encoder, none where there is no list of them."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return list(module)
    return []


def texts(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
) -> list[torch.Tensor]:
    """Where the tokens of each text stand, without padding; refuses empty texts.

    input_ids, attention_mask: [batch, time]. A text that runs alone cannot feel its padding.
    """
    if input_ids.dim() != 2:
        raise PertokenError(f"input_ids must be [batch, time], got {list(input_ids.shape)}")
    if not len(input_ids):
        raise PertokenError("there is no text: input_ids is empty")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise PertokenError(
            f"attention_mask {list(mask.shape)} and input_ids {list(input_ids.shape)} differ"
        )
    places = [row.nonzero()[:, 0] for row in mask]
    longest = max(len(each) for each in places)
    if not all(len(each) for each in places):
        raise PertokenError("a text is empty: the attention mask leaves no token")
    check_ids(model, [int(input_ids.max())])
    room = positions(model)
    if room is not None and longest > room:
        raise PertokenError(
            f"a text of {longest} tokens is longer than the {room} positions of "
            f"{type(model).__name__}: cut it into chunks"
        )
    return places


# ------------------------------------------------------------------------------- kinds of modules


def is_linear(module: torch.nn.Module) -> bool:
    """nn.Linear, or GPT-2's with the weight the other way round."""
    return type(module).forward in (torch.nn.Linear.forward, Conv1D.forward)


def is_norm(module: torch.nn.Module) -> bool:
    """LayerNorm, or an RMSNorm of any model (known by its name)."""
    return isinstance(module, torch.nn.LayerNorm) or "RMSNorm" in type(module).__name__


def weight_of(module: Any) -> torch.Tensor:
    """The weight of a linear module, [out, in]."""
    weight: torch.Tensor = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


_ACTIVATIONS = {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()} | {
    torch.nn.ReLU,
    torch.nn.GELU,
    torch.nn.SiLU,
    torch.nn.Tanh,
    torch.nn.LeakyReLU,
}


def rule_of(module: torch.nn.Module, name: str, refusal: str) -> Rule | None:
    """The linear form of a module; None for one that is left as it is."""
    if is_linear(module):
        return _linear
    if isinstance(module, torch.nn.LayerNorm):
        return _layer_norm
    if is_norm(module):
        if not _scales(module):
            raise CannotServe(f"{refusal}: {name} is no RMSNorm that is known")
        return _by_ratio(module)
    if type(module) in _ACTIVATIONS:
        if float(_try(module, torch.zeros(1)).abs()) > 0:
            raise CannotServe(f"{refusal}: its activation {type(module).__name__} is not 0 at 0")
        return _by_ratio(module)
    for children, rule, plain in (
        ({"gate_proj", "up_proj", "down_proj", "act_fn"}, _gated, _plain_gated),
        ({"dense", "dropout", "out_proj"}, _tanh_head, _plain_tanh_head),
    ):
        if children == set(dict(module.named_children())):
            probe = _probe(module)
            with torch.no_grad():
                if not torch.allclose(module(probe), plain(module, probe), rtol=1e-3, atol=1e-4):
                    raise CannotServe(f"{refusal}: {name} computes something unknown")
            return rule
    return None


def _probe(module: torch.nn.Module) -> torch.Tensor:
    """Some numbers [1, 2, in] for a module, of its type and on its device."""
    weight = next(module.parameters())
    width = next(each for each in module.modules() if is_linear(each))
    size = weight_of(width).shape[1]
    return torch.arange(2.0 * size).sin().view(1, 2, size).to(weight)


@torch.no_grad()
def _try(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    parameter = next(module.parameters(), x)
    result: torch.Tensor = module(x.to(parameter))
    return result


def _scales(norm: torch.nn.Module) -> bool:
    """Does a norm only scale: is its output the input times a gain, up to one factor per token?"""
    weight = next(norm.parameters(), None)
    if weight is None or weight.dim() != 1:
        return False
    norm = copy.deepcopy(norm).float()  # what a half rounds away would look like a bend
    x = torch.arange(1.0, len(weight) + 1).sin().to(weight.device) + 2
    gain, output = _try(norm, torch.ones_like(x)), _try(norm, x)
    scale = (output * gain * x).sum() / (gain * x).square().sum().clamp(min=1e-30)
    return torch.allclose(output, scale * gain * x, rtol=1e-2, atol=1e-3)


def _linear(form: Form, module: Any, x: torch.Tensor) -> torch.Tensor:
    return form.plus(torch.nn.functional.linear(x, weight_of(module)), module)


def _layer_norm(form: Form, module: Any, x: torch.Tensor) -> torch.Tensor:
    if len(module.normalized_shape) != 1:
        raise CannotServe("a LayerNorm over several dimensions cannot be decomposed")
    x = form.before_norm(x)
    centred = x - x.mean(-1, keepdim=True)

    def one_over_deviation(value: torch.Tensor) -> torch.Tensor:
        return (value.square().mean(-1, keepdim=True) + module.eps).rsqrt()

    result = form.times(centred, one_over_deviation)
    if module.weight is not None:
        result = result * module.weight.detach()
    return form.plus(result, module)


def _by_ratio(module: torch.nn.Module) -> Rule:
    """Output over input, element by element: of an activation, and of an RMSNorm too.

    Of an RMSNorm that is gain over rms, with the rounding of the model's own code, which computes
    it in float32 whatever the model's type. Where the input is 0 the ratio adds nothing to the
    sum; an activation gets its slope there.
    """
    own = module.forward
    slope = 0.0
    if type(module) in _ACTIVATIONS:
        low, high = _try(module, torch.tensor([-1e-3, 1e-3], dtype=torch.float64)).tolist()
        slope = (high - low) / 2e-3

    def ratio(value: torch.Tensor) -> torch.Tensor:
        zero = value == 0
        return torch.where(zero, slope, own(value) / value.masked_fill(zero, 1.0))

    return lambda form, module, x: form.times(x, ratio)


def _gated(form: Form, module: Any, x: torch.Tensor) -> torch.Tensor:
    """down(act(gate x) * up x), the feed-forward of Llama and most since."""
    gate, up = module.act_fn(module.gate_proj(x)), module.up_proj(x)
    product = form.times(up, _itself, of=gate)
    if form.gate == "half":
        product = (product + form.times(gate, _itself, of=up)) / 2
    result: torch.Tensor = module.down_proj(product)
    return result


def _plain_gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))
    return result


def _tanh_head(form: Form, module: Any, x: torch.Tensor) -> torch.Tensor:
    """The classification head of RoBERTa, which calls tanh as a function."""

    def ratio(value: torch.Tensor) -> torch.Tensor:
        zero = value == 0
        return torch.where(zero, 1.0, value.tanh() / value.masked_fill(zero, 1.0))

    result: torch.Tensor = module.out_proj(form.times(module.dense(x[:, 0]), ratio))
    return result


def _plain_tanh_head(module: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module.out_proj(module.dense(x[:, 0]).tanh())
    return result


def _itself(value: torch.Tensor) -> torch.Tensor:
    return value
