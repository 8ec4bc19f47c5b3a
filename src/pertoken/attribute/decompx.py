"""DecompX: what each token brought to a model's output, added up through all its layers.

Every vector in a transformer is a sum over the tokens of the text: attention mixes such sums with
weights that are held fixed, norms and activations scale them by what they found, linear layers are
linear. So x_i = sum_k x_{i<-k} at every stage, from the embeddings to the logits, and the share of
token k in a logit is a number. Nothing is mixed on the way, unlike in rollout methods.

`decompose` propagates all x_{i<-k}, which takes time^2 * hidden numbers: for short texts. `decompx`
gives the same shares of one output for texts of any length: the network with all these factors held
fixed is linear, so the share of a token is its input vector times the gradient there (ours). One
forward and one backward (two forwards for long texts, whose activations are not kept). Biases are
not shared out in it: they are a part of their own, as with `biases="token"` in `decompose`.

x_{i<-k} starts at the input of the first block (positions are part of it), as in the paper. The
paper is about BERT and RoBERTa; for decoders (RMSNorm, gated products, norms behind the attention)
the rules are in `_linear.py`. Source: Modarressi et al. 2023 (2306.02873), sections 3.1 to 3.4, and
its code. The paper's code scores by the share in label 0, whichever label was predicted; here the
predicted label is the default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pertoken._padded import batches, right_padded
from pertoken._takeover import sdpa
from pertoken.attribute._forward import LONG, twice
from pertoken.attribute._linear import Form, looks_ahead, texts
from pertoken.attribute._parts import Parts
from pertoken.attribute._question import Question
from pertoken.attribute._scores import Scores
from pertoken.attribute.quantity import Quantity
from pertoken.errors import CannotServe, PertokenError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["decompose", "decompx", "rate"]

TARGETS = ("abs", "predicted", "norm")
MOST = 256  # tokens of a text that `decompose` takes
_NO_LOGITS = (
    "{} gives no logits: use a model that classifies texts or tokens, or one without a head"
)
Aim = Callable[[Any], torch.Tensor]
"""A model's output -> numbers linear in it, whose sum is explained."""


def decompx(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    target: str | int = "abs",
    place: int | None = None,
    gate: str = "half",
) -> torch.Tensor:
    """How much each token of the texts brought to the model's output, float64 [batch, time].

    input_ids, attention_mask: [batch, time]; padding scores 0 and changes nothing.
    target: "predicted": the share in the logit of the class, or next token, that the model
        predicts, signed; "abs": its absolute value; a number: the share in the logit of this class
        or token; "norm": the last hidden state, each token's vector projected on it, signed (our
        reading: the vectors' own norms need `decompose`). A model without a head has no classes:
        there "abs" and "predicted" take the projection.
    place: the position that is explained, counted without padding, negative from the end; the
        last one of a decoder and the first one ([CLS]) of an encoder by default; without meaning
        for a model that classifies whole texts.
    gate: how gated products are shared, "half" to both factors or "frozen" (all to the other one).
    Raises PertokenError for a model that cannot be decomposed, an empty or too long text, an
    unknown target, and scores that are NaN. Source: DecompX, section 3 (adjoint form: ours).

    >>> from pertoken.testing import tiny_model
    >>> decompx(tiny_model("llama"), torch.tensor([[5, 6, 7]])).shape
    torch.Size([1, 3])
    """
    if isinstance(target, str) and target not in TARGETS:
        raise PertokenError(
            f"unknown target {target!r}{nearest(target, TARGETS)}: a class or token id, or one of "
            f"{', '.join(TARGETS)}"
        )
    form = _Adjoint(model, gate)
    places = texts(model, input_ids, attention_mask)
    scores = torch.zeros(input_ids.shape, dtype=torch.float64, device=input_ids.device)
    at = [_at(model, place, len(real)) for real in places]
    if looks_ahead(model):
        together = batches([len(real) for real in places], LONG)
    else:  # a decoder's heads read the last position: its texts run one by one
        places = [real[: last + 1] for real, last in zip(places, at, strict=True)]
        together = [[row] for row in range(len(places))]
    for rows in together:
        ids, real = right_padded([input_ids[row, places[row]] for row in rows])
        aim = partial(_aim, model, [at[row] for row in rows], target)
        shares = form.shares(ids, aim, real, headless=target == "norm")
        for row, values in zip(rows, shares, strict=True):
            scores[row, places[row]] = values[: len(places[row])]
    return scores.abs() if target == "abs" else scores


def decompose(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    biases: str = "absdot",
    gate: str = "half",
    every_module: bool = False,
) -> dict[str, torch.Tensor]:
    """Every state of a model as a sum over the tokens it came from.

    input_ids: [1, time], one text; padding (0 in attention_mask) is left out.
    biases: how biases are shared out among the tokens: by "absdot" |<x_{i<-k}, b>|, the paper's
        choice; "dot"; "abssim", the absolute cosine; "norm" |x_{i<-k}|; "equal"; "cls", all to the
        first token; or "token": not at all, they are a part of their own.
    gate: how gated products are shared, "half" to both factors or "frozen" (all to the other one).
    every_module: give the output of every linear layer, norm and activation too, by their names in
        the model (what is inside an attention has its own shape [time + 1, …]).
    Returns "embeddings", "block 0", …, each [time + 1, time, hidden], where [k, i] is x_{i<-k} and
    the last k is what biases brought (zero where they are shared out); and last "output":
    [time + 1, classes], or [time + 1, time, …] for a model that says something at each position
    (a decoder: at the last one, [time + 1, vocab]). The sum over k is the model's own state, up to
    rounding (norms of Llama and Gemma round to float32, whatever the model's type).
    Holds (time + 1) * time * hidden numbers per state, and runs as long as time + 1 forwards.
    Raises PertokenError for a model that cannot be decomposed, and for more than 256 tokens.

    >>> from pertoken.testing import tiny_model
    >>> model, ids = tiny_model("gpt2"), torch.tensor([[5, 6, 7]])
    >>> states = decompose(model, ids)
    >>> list(states), list(states["block 1"].shape)
    (['embeddings', 'block 0', 'block 1', 'output'], [4, 3, 32])
    >>> bool((states["output"].sum(0) - model(ids).logits[0, -1]).abs().max() < 1e-10)
    True
    """
    if len(input_ids) != 1:
        raise PertokenError(f"decompose takes one text at a time, got {len(input_ids)}")
    states: dict[str, torch.Tensor] = {}

    def see(name: str, rows: torch.Tensor) -> None:
        if every_module or name == "embeddings" or name.startswith("block "):
            states[name] = rows

    form = Parts(model, gate, biases, see)
    (real,) = texts(model, input_ids, attention_mask)
    if len(real) > MOST:
        raise PertokenError(
            f"decompose takes up to {MOST} tokens, got {len(real)}: decompx takes more"
        )
    ids = input_ids[:, real]
    with torch.no_grad():
        wanted = _said(model, ids)
        with form():
            output = _said(model, ids)
    if not looks_ahead(model) and output.dim() == 3:
        output, wanted = output[:, -1], wanted[:, -1]
    if len(output) != len(real) + 1:
        raise CannotServe(
            f"decompose cannot serve {type(model).__name__}: use a causal language model or an "
            "encoder"
        )
    _check_sum(model, output.sum(0), wanted[0], output.abs().sum(0), output.dtype)
    states["output"] = output
    return states


def rate(question: Question, quantity: Quantity, *, seed: int = 0, gate: str = "half") -> Scores:
    """Each token's share in the quantity, [targets, time], signed.

    For a logit or a contrast of two these are DecompX's shares; for a probability or an entropy
    they are those of the logits, weighted by the quantity's gradient there (our reading).
    """
    form = _Adjoint(question.model, gate)
    values = torch.full((len(question.places), len(question.ids)), torch.nan, dtype=torch.float64)
    for number, place in enumerate(question.places):
        token = question.ids[place : place + 1]

        def aim(output: Any, token: torch.Tensor = token) -> torch.Tensor:
            logits = output.logits[:, -1]
            wide = torch.promote_types(logits.dtype, torch.float32)
            leaf = logits.detach().to(wide).requires_grad_()
            (slope,) = torch.autograd.grad(quantity(leaf, token).sum(), leaf)
            return logits * slope

        values[number, :place] = form.shares(question.ids[None, :place], aim)[0].cpu()
        question.progress(number + 1, len(question.places))
    return Scores(values)


class _Adjoint(Form):
    """The linear form for gradients: what is held fixed is detached."""

    what = "decompx"

    def shares(
        self,
        ids: torch.Tensor,
        aim: Aim,
        real: torch.Tensor | None = None,
        headless: bool = False,
    ) -> torch.Tensor:
        """Share of each token [batch, time] in what `aim` reads off the output, summed, float64.

        real: which tokens are no padding, None if all; padding is for encoders only.
        headless: the output of the model without its head.
        That shares and biases add up to it is checked: a model with a nonlinear part that nobody
        found is refused.
        """
        self._long = ids.shape[1] > LONG
        self._real = None if real is None else real[:, None, None]
        self._biases: dict[torch.nn.Module, torch.Tensor] = {}
        with torch.enable_grad(), self():
            aimed = aim(_run(self.model.base_model if headless else self.model, ids, real))
            leaves = [self._entered, *self._biases.values()]
            # No text feels another, so the gradient of the sum is that of each.
            gradients = torch.autograd.grad(aimed.sum(), leaves, allow_unused=True)
        terms = [
            gradient.double() * leaf.detach().double()
            for gradient, leaf in zip(gradients, leaves, strict=True)
            if gradient is not None
        ]
        said = aimed.detach().double().flatten(1)
        total = torch.stack([term.flatten(1).sum(1) for term in terms]).sum(0)
        # What cancels leaves its rounding behind, in the parts as in what is read off the output.
        size = torch.stack([term.flatten(1).abs().sum(1) for term in terms]).sum(0)
        size = size + said.abs().sum(1)
        said = said.sum(1)
        _check_sum(self.model, total, said, size, self._entered.dtype)
        return terms[0].sum(-1)

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        self._entered = hidden.detach().requires_grad_()
        return self._entered

    def run(self, block: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._long:
            return twice(block, hidden, *args, **kwargs)
        return block(hidden, *args, **kwargs)

    def times(
        self,
        x: torch.Tensor,
        factor: Callable[[torch.Tensor], torch.Tensor],
        of: torch.Tensor | None = None,
    ) -> torch.Tensor:
        with torch.no_grad():
            fixed = factor(x if of is None else of).detach()
        return x * fixed

    def plus(self, x: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
        bias = getattr(module, "bias", None)
        if bias is None:
            return x
        if module not in self._biases:  # one for each text, so that each sum can be checked
            shape = (len(self._entered), *[1] * (x.dim() - 2), len(bias))
            self._biases[module] = bias.detach().expand(shape).requires_grad_()
        return x + self._biases[module]

    def mix(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        allowed = allowed if self._real is None else self._real
        return sdpa(module, query.detach(), key.detach(), value, allowed, **kwargs)


def _run(model: PreTrainedModel, ids: torch.Tensor, real: torch.Tensor | None = None) -> Any:
    """The model's output for ids [batch, time], of a decoder at the last position alone."""
    names = inspect.signature(type(model).forward).parameters
    given: dict[str, Any] = {"input_ids": ids, "return_dict": True}
    if real is not None:  # for a head that reads all positions; attention is taken over
        given["attention_mask"] = real.long()
    if not looks_ahead(model):
        given["use_cache"] = False
        if "logits_to_keep" in names:
            given["logits_to_keep"] = 1
    return model(**given)


def _said(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head."""
    output = _run(model, ids)
    said = output.get("logits", output.get("last_hidden_state"))
    if said is None:
        raise PertokenError(_NO_LOGITS.format(type(model).__name__))
    found: torch.Tensor = said
    return found


def _aim(model: PreTrainedModel, at: list[int], target: str | int, output: Any) -> torch.Tensor:
    """What is explained of each text, [batch, …]: a logit, or the last hidden state's length."""
    logits, texts = output.get("logits"), range(len(at))
    if logits is None:
        if not isinstance(target, str):
            raise PertokenError(f"{type(model).__name__} has no classes, so no target {target}")
        if "last_hidden_state" not in output:
            raise PertokenError(_NO_LOGITS.format(type(model).__name__))
        state = output.last_hidden_state[texts, at]
        return state * state.detach() / state.detach().norm(dim=-1, keepdim=True)
    if logits.dim() == 3:  # a decoder's last position stands alone
        logits = logits[texts, 0 if logits.shape[1] == 1 else at]
    if isinstance(target, str):
        return logits.gather(-1, logits.argmax(-1, keepdim=True))
    if not 0 <= target < logits.shape[-1]:
        raise PertokenError(f"target must be in 0..{logits.shape[-1] - 1}, got {target}")
    return logits[:, target, None]


def _at(model: PreTrainedModel, place: int | None, time: int) -> int:
    if place is None:
        return 0 if looks_ahead(model) else time - 1
    if not -time <= place < time:
        raise PertokenError(f"place must be in {-time}..{time - 1}, got {place}")
    return place % time


def _check_sum(
    model: PreTrainedModel,
    found: torch.Tensor,
    wanted: torch.Tensor,
    size: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """Refuse a model whose parts do not add up, and say so of NaN."""
    name = type(model).__name__
    if not bool(found.isfinite().all()) or not bool(wanted.isfinite().all()):
        raise PertokenError(f"the output of {name} or a share in it is NaN: load it in float32")
    # Norms round to float32 even in a model in float64.
    tolerance = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) ** 0.5
    if bool(((found - wanted).abs() > tolerance * size).any()):
        raise CannotServe(
            f"{name} cannot be decomposed: what tokens and biases brought does not add up to its "
            "output, so it has a nonlinear part that is not known"
        )
