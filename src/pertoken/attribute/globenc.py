"""GlobEnc: what each token brought to the [CLS] token, by the norms of attended vectors.

For a layer, the vector that token j brings to token i is what attention carries plus, for j = i,
the residual stream, followed through the two LayerNorms, each made linear by the deviation that it
found for token i:

    a_ij = sum_h alpha^h_ij W_O^h (W_V^h x_j + b_V^h) + [i = j] x_i
    u_ij = gamma_1 (a_ij - mean(a_ij)) / deviation_1(i)
    w_ij = gamma_2 (u_ij - mean(u_ij)) / deviation_2(i)
    N_ij = |w_ij|

Dropped are b_O, both betas, and the feed-forward layer but for what it does to deviation_2. The
layers are rolled out, R = N_L ... N_1, without an identity added and without rows normalised; the
scores are the row of [CLS]. On the way they are divided by the largest of them (ours): the ranking
is the same.
Source: Modarressi et al. 2022 (2205.03286), section 3, and its code.

Decoders put norms elsewhere (our reading, the paper has encoders alone): there the norm in front of
the attention is in the values that it carries, a norm right behind the attention (Gemma) is
made linear before x_i is added, and in place of the two LayerNorms is the norm that reads the
block's output: the next block's first one, at the end the final one, with the deviation (or root
mean square) that it found. Dropped are the feed-forward layer but for that deviation, b_O and beta.
The scores are the row of the last token.

No a_ij is ever made. |w_ij| = |sum_h alpha^h_ij z^h_j| / (deviations of i) with z^h_j the value
of head h behind W_O and both gammas, so N_ij^2 is a quadratic form in the weights alpha_ij, whose
matrix is the heads' Gram matrix at j. The product of the layers is taken from the top, a row at a
time, so nothing of size [time, time, heads] is held beyond a chunk of rows. Short texts of like
length run together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pertoken._blocks import replaced
from pertoken._padded import batches, right_padded
from pertoken._takeover import Takeover, layer_windows, sdpa
from pertoken.attribute._linear import (
    band,
    is_causal,
    is_linear,
    is_norm,
    looks_ahead,
    stack,
    texts,
    weight_of,
)
from pertoken.attribute._question import Question
from pertoken.attribute._scores import Scores
from pertoken.attribute._weights import attention_weights
from pertoken.attribute.quantity import Quantity
from pertoken.errors import CannotServe, PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["globenc", "rate"]

_CHUNK = 2**16  # attention weights of one head that are held at a time: they stay in the cache
_SAMPLE = 2**12  # numbers of a state that are compared with those of others
_TOKENS = 1024  # of short texts that run together: their states at all layers are held


@torch.no_grad()
def globenc(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """GlobEnc scores of texts, float64 [batch, time], 0 or more; only their ratios mean something.

    input_ids, attention_mask: [batch, time]; padding scores 0 and changes nothing. A head of the
    model is not run. For an encoder they are the row of the first token, for a decoder that of the
    last.
    Raises PertokenError for an encoder whose norms are not behind attention and feed-forward as in
    BERT and RoBERTa, any model whose attention cannot be taken over, an empty or too long text, and
    scores that are NaN. Source: GlobEnc, section 3; decoders are our reading, see the module.

    >>> from pertoken.testing import tiny_model
    >>> globenc(tiny_model("llama"), torch.tensor([[5, 6, 7]])).shape
    torch.Size([1, 3])
    """
    watch = _Watch(model)
    ahead = looks_ahead(model)
    places = texts(model, input_ids, attention_mask)
    scores = torch.zeros(input_ids.shape, dtype=torch.float64, device=input_ids.device)
    for rows in batches([len(real) for real in places], _TOKENS):
        ids, real = right_padded([input_ids[row, places[row]] for row in rows])
        asked = [[0 if ahead else len(places[row]) - 1] for row in rows]
        tokens = torch.tensor(asked, device=ids.device)
        found = rollout(watch(ids, real, tokens), tokens)[:, 0]
        for row, values in zip(rows, found, strict=True):
            scores[row, places[row]] = values[: len(places[row])]
    return scores


@torch.no_grad()
def rate(question: Question, quantity: Quantity, *, seed: int = 0) -> Scores:
    """Scores of the tokens before each target, [targets, time]; one forward for all.

    They depend on the place alone, not on the target or the quantity.
    """
    watch = _Watch(question.model)
    asked = torch.tensor([[place - 1 for place in question.places]], device=question.ids.device)
    found = rollout(watch(question.ids[None, : question.places[-1]], None, asked), asked)[0].cpu()
    values = torch.full((len(question.places), len(question.ids)), torch.nan, dtype=torch.float64)
    for number, place in enumerate(question.places):
        values[number, :place] = found[number, :place]
    return Scores(values)


@dataclass
class _Norm:
    """A norm made linear: x -> gain * (x - mean(x) if centred else x) * scale(token)."""

    gain: torch.Tensor  # [hidden]
    scale: torch.Tensor  # [batch, time]
    centred: bool

    def shape(self, x: torch.Tensor) -> torch.Tensor:
        """What it does to vectors [..., hidden], but for the scale."""
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * self.gain


@dataclass
class _Layer:
    """What is needed of one layer.

    entered: [batch, time, hidden]; query, key, value: [batch, heads, time, dim]; allowed: keys that
    a query may see, to broadcast to [batch, heads, time, time]; out: W_O [hidden, heads * dim];
    before: norms of what attention carries; after: norms of that with the residual stream.
    """

    entered: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float | None
    allowed: torch.Tensor | None
    causal: bool
    out: torch.Tensor
    before: list[_Norm] = field(default_factory=list)
    after: list[_Norm] = field(default_factory=list)


def rollout(layers: list[_Layer], asked: torch.Tensor) -> torch.Tensor:
    """Rows `asked` [batch, rows] of each text's product of all N, float64 [batch, rows, time].

    Divided by the largest of a text.
    """
    batch, time = layers[0].entered.shape[:2]
    rows = torch.nn.functional.one_hot(asked, time).double()
    step = max(1, _CHUNK // (batch * time))
    for layer in reversed(layers):
        used = rows.any(1).any(0).nonzero()[:, 0]  # the top layer needs the asked rows alone
        norms = _norms(layer)
        total = torch.zeros_like(rows)
        for part in used.split(step):
            n = norms(part).double()
            total[..., : n.shape[-1]] += rows[..., part] @ n
        rows = total / total.amax((1, 2), keepdim=True)
    if not bool(rows.isfinite().all()):
        raise PertokenError("a GlobEnc score is NaN: load the model in float32")
    return rows


def _norms(layer: _Layer) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function: tokens i [rows] -> N_ij [batch, rows, up to the last token seen]."""
    heads, groups = layer.query.shape[1], layer.value.shape[1]
    value = layer.value.repeat_interleave(heads // groups, 1)
    # Norms act on the columns of W_O, once for all tokens.
    carry = layer.out.T.unflatten(0, (heads, -1))  # [heads, dim, hidden]
    for norm in layer.before:
        carry = norm.shape(carry)
    behind = carry
    for norm in layer.after:
        behind = norm.shape(behind)
    carried = value.transpose(0, 1).flatten(1, 2) @ behind  # z, [heads, batch * time, hidden]
    carried = carried.transpose(0, 1)
    gram = (carried @ carried.mT).unflatten(0, (len(value), -1))  # [batch, time, heads, heads]
    scale_before, scale_after = _scale(layer.before), _scale(layer.after)

    def rows(part: torch.Tensor) -> torch.Tensor:
        weights = attention_weights(
            layer.query, layer.key, layer.scaling, layer.allowed, layer.causal, part
        )
        end = weights.shape[-2]
        by_key = weights.permute(1, 2, 0, 3).flatten(0, 1)  # [batch * end, heads, rows]
        square = (gram[:, :end].flatten(0, 1) @ by_key).mul_(by_key).sum(1)
        norms = square.clamp_(min=0).sqrt_().unflatten(0, (-1, end)).mT
        count = torch.arange(len(part), device=part.device)
        itself = weights[:, :, part, count].transpose(0, 1)  # [batch, heads, rows]
        own = (itself[..., None] * value[:, :, part]).transpose(1, 2).flatten(2)
        own = own @ carry.flatten(0, 1)
        if scale_before is not None:
            own, norms = own * scale_before[:, part, None], norms * scale_before[:, part, None]
        own = own + layer.entered[:, part]
        for norm in layer.after:
            own = norm.shape(own)
        norms[:, count, part] = own.norm(dim=-1)
        return norms if scale_after is None else norms * scale_after[:, part, None]

    return rows


def _scale(norms: list[_Norm]) -> torch.Tensor | None:
    """The product of the norms' scales [batch, time]."""
    return torch.stack([norm.scale for norm in norms]).prod(0) if norms else None


class _Watch:
    """Runs texts through a model and keeps what GlobEnc needs of every layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._blocks = stack(model, "globenc")
        self._decoder = model.get_decoder()
        self._windows = layer_windows(model)
        self._takeover = Takeover(model)
        self._ahead = looks_ahead(model)
        self._options = {} if self._ahead else {"use_cache": False}
        forwards: dict[torch.nn.Module, Callable[..., Any]] = {}
        for module in self._decoder.modules():
            if is_norm(module):
                forwards[module] = self._norm(module)
        for block in self._blocks:
            forwards[block] = self._block(block)
            for module in block.modules():
                if is_linear(module):
                    forwards[module] = self._linear(module)
        self._forwards = forwards

    def __call__(
        self, ids: torch.Tensor, real: torch.Tensor | None, asked: torch.Tensor
    ) -> list[_Layer]:
        """The layers for texts of ids [batch, time]; real: which are no padding, None if all.

        asked: [batch, rows], the tokens whose rows are wanted of the product. Where a text has one,
        only that token goes on behind the top layer's attention.
        """
        self._real = None if real is None else real[:, None, None]
        self._asked, self._shape = asked, ids.shape
        self._layers: list[_Layer] = []
        self._stage = "outside"
        self._last = ids.new_empty(0)  # what the last linear layer gave
        self._carried = self._last  # what attention carries into the residual stream
        self._pre_norm = False
        with (
            self._takeover(self._attend),
            replaced(list(self._forwards), self._forwards.__getitem__),
        ):
            self._decoder(input_ids=ids, return_dict=True, **self._options)
        norms = 1 if self._pre_norm else 2
        if any(len(layer.after) != norms for layer in self._layers):
            self._refuse("its norms stand as in no block that is known")
        if self._pre_norm and self._ahead:
            self._refuse("an encoder whose norms are not behind its layers, as BERT's are")
        return self._layers

    def _refuse(self, reason: str) -> None:
        raise CannotServe(f"globenc cannot serve {type(self._model).__name__}: {reason}")

    def _block(self, block: torch.nn.Module) -> Callable[..., Any]:
        own = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._entered = args[0] if args else kwargs["hidden_states"]
            self._stage, self._fits = "values", False
            output = own(*args, **kwargs)
            left = output[0] if isinstance(output, tuple) else output
            if not self._fits:
                # Both halves of the block read its input, and nothing what attention gave?
                both = (self._entered, self._carried, self._last)
                if not (self._pre_norm and _same(left, *both)):
                    self._refuse("its attention is not simply added to the residual stream")
            self._stage = "between"
            return output

        return forward

    def _linear(self, module: torch.nn.Module) -> Callable[..., Any]:
        own = module.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            if self._alone() and x.shape[:-1] == self._shape:
                x = x.take_along_dim(self._asked[..., None], 1)
            given: torch.Tensor = own(x)
            output = self._whole(given)
            if self._stage == "output":
                self._layers[-1].out = weight_of(module).to(self._layers[-1].value)
                self._carried, self._stage = output, "rest"
            self._last = output
            return given

        return forward

    def _norm(self, module: torch.nn.Module) -> Callable[..., Any]:
        own = module.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            given: torch.Tensor = own(x)
            x, output = self._whole(x), self._whole(given)
            if self._stage == "values" and _same(x, self._entered):
                self._pre_norm = True
                self._read(module, x, output)
            elif self._stage == "between":
                self._read(module, x, output)
            elif self._stage == "rest":
                reads_sum = _same(x, self._entered, self._carried)
                self._fits |= reads_sum
                if not reads_sum and _same(x, self._carried):
                    self._layers[-1].before.append(self._linear_norm(module, x, output))
                    self._carried = output
                elif not self._pre_norm and self._fits:
                    self._layers[-1].after.append(self._linear_norm(module, x, output))
            return given

        return forward

    def _alone(self) -> bool:
        """Is what follows needed of one token of a text? Behind the top attention none mix."""
        return len(self._layers) == len(self._blocks) and self._asked.shape[1] == 1

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        """What was found for one token of a text, as if for all."""
        batch, time = self._shape
        return x.expand(-1, time, -1) if x.shape[:-1] == (batch, 1) else x

    def _read(self, module: torch.nn.Module, x: torch.Tensor, output: torch.Tensor) -> None:
        """A norm reads what the last block left."""
        if self._pre_norm and self._layers and not self._layers[-1].after:
            self._layers[-1].after.append(self._linear_norm(module, x, output))

    def _linear_norm(self, module: Any, x: torch.Tensor, output: torch.Tensor) -> _Norm:
        """The linear form of a norm, from what it read and gave, [..., hidden] each."""
        wide = torch.promote_types(x.dtype, torch.float32)
        shape = self._entered.shape  # OPT flattens what its norms read
        x, output = x.reshape(shape).to(wide), output.reshape(shape).to(wide)
        if isinstance(module, torch.nn.LayerNorm):
            weight = module.weight
            gain = torch.ones_like(x[0, 0]) if weight is None else weight.detach().to(wide)
            scale = torch.native_layer_norm(x, shape[-1:], None, None, module.eps)[2]
            return _Norm(gain, scale[..., 0], centred=True)
        # The gain up to a factor, which the scale holds: no need to know how a model writes it.
        gain = type(module).forward(module, torch.ones_like(module.weight)).to(wide)
        plain = x * gain
        return _Norm(gain, (plain * output).sum(-1) / plain.square().sum(-1), centred=False)

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        causal, allowed = is_causal(module), self._real
        if causal:  # what is padded comes last: nobody sees it
            allowed = band(query.shape[-2], self._windows[module.layer_idx], query.device)
        wide = torch.promote_types(query.dtype, torch.float32)
        self._layers.append(
            _Layer(
                entered=self._entered.to(wide),
                query=query.to(wide),
                key=key.to(wide),
                value=value.to(wide),
                scaling=scaling,
                allowed=allowed,
                causal=causal,
                out=query.new_empty(0),  # the next linear layer is W_O
            )
        )
        self._stage = "output"
        return sdpa(module, query, key, value, allowed, scaling=scaling, **kwargs)


def _same(x: torch.Tensor, *parts: torch.Tensor) -> bool:
    """Is x the sum of the parts but for rounding, whatever their shapes? A sample is compared."""
    if any(part.numel() != x.numel() for part in parts):
        return False
    step = max(1, x.numel() // _SAMPLE) | 1  # a power of two would fall on few dimensions
    rounding = 4 * torch.finfo(x.dtype).eps
    wide = torch.promote_types(x.dtype, torch.float32)
    x, *others = (each.flatten()[::step].to(wide) for each in (x, *parts))
    terms = torch.stack(others)
    apart = (x - terms.sum(0)).abs() > rounding * terms.abs().sum(0)
    return not bool(apart.any())  # a NaN is said later
