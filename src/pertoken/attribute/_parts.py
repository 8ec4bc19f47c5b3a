"""The full propagation of DecompX: every state of a model as a sum over the tokens it came from.

A text of n tokens runs through the model's own code as a batch of n + 1 rows: row k holds what
token k brought to every position, the last row what the biases did. Whatever is held fixed is read
off the sum of the rows, which is the model's own state.

A bias is shared out among the tokens where it arises, as the paper's code does: W_O b_V + b_O
behind the attention, in an encoder with the residual stream added; b_1, b_2 and every beta at once.
Weights are those of the paper's code but for its 1e-12 in the denominator, which would cost the sum
its accuracy: a bias stays with the biases' row where no token has a weight (our reading).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from pertoken.attribute._linear import Form, is_causal, is_norm, looks_ahead
from pertoken.attribute._weights import attention_weights
from pertoken.errors import PertokenError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BIASES = ("absdot", "abssim", "norm", "equal", "cls", "dot", "token")


class Parts(Form):
    """The rows; `see(name, rows)` is called with the output of every module."""

    what = "decompose"

    def __init__(
        self,
        model: PreTrainedModel,
        gate: str,
        biases: str,
        see: Callable[[str, torch.Tensor], None],
    ) -> None:
        if biases not in BIASES:
            raise PertokenError(
                f"biases must be one of {', '.join(BIASES)}, got {biases!r}"
                f"{nearest(str(biases), BIASES)}"
            )
        super().__init__(model, gate)
        self._biases, self._see = biases, see
        self._post_norm = looks_ahead(model)
        self._rows = 0
        # In a block: "values" up to the attention, "output" at its output projection, then "rest".
        self._stage = "rest"

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        time = hidden.shape[1]
        self._rows = time + 1
        rows = hidden.new_zeros(time + 1, *hidden.shape[1:])
        places = torch.arange(time, device=hidden.device)
        rows[places, places] = hidden[0]
        return rows

    def run(self, block: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._stage = "values"
        output = block(hidden, *args, **kwargs)
        self._stage = "rest"
        return output

    def times(
        self,
        x: torch.Tensor,
        factor: Callable[[torch.Tensor], torch.Tensor],
        of: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return (self._by_rows(x) * factor(self._total(x if of is None else of))).view_as(x)

    def plus(self, x: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
        bias = getattr(module, "bias", None)
        if bias is not None:
            self._by_rows(x)[-1] += bias
        if is_norm(module):
            return self._share(x)
        if self._stage == "values":
            return x  # a value's bias waits for the output projection
        waits = self._stage == "output" and self._post_norm  # for the residual stream
        self._stage = "rest"
        return x if waits else self._share(x)

    def mix(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
        *,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        weights = attention_weights(
            self._total(query), self._total(key), scaling, allowed, is_causal(module)
        )
        mixed = weights.transpose(0, 1).mT @ value.repeat_interleave(
            query.shape[1] // value.shape[1], 1
        )
        self._stage = "output"
        return mixed.transpose(1, 2), None

    def seen(self, name: str, output: torch.Tensor) -> torch.Tensor:
        self._see(name, output if len(output) == self._rows else self._by_rows(output))
        return output

    def _by_rows(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows * m, …] as [rows, m, …]; some models flatten batch and time."""
        return x.view(self._rows, -1, *x.shape[1:])

    def _total(self, x: torch.Tensor) -> torch.Tensor:
        return self._by_rows(x).sum(0)

    def before_norm(self, x: torch.Tensor) -> torch.Tensor:
        """The input of a norm, where biases that waited for the residual stream are shared out."""
        return self._share(x) if self._post_norm else x

    def _share(self, x: torch.Tensor) -> torch.Tensor:
        """The last row [m, …, width] shared out among the others."""
        if self._biases == "token":
            return x
        rows = self._by_rows(x)
        parts, bias = rows[:-1], rows[-1]
        if not bool(bias.any()):
            return x
        weights = _weights(self._biases, parts, bias)
        total = weights.sum(0)
        shared = (total != 0).unsqueeze(-1)
        weights = weights / total.masked_fill(total == 0, 1.0)
        given = torch.cat((parts + weights.unsqueeze(-1) * (bias * shared), (bias * ~shared)[None]))
        return given.view_as(x)


def _weights(kind: str, parts: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """How much of a bias [m, …, width] each of the parts [n, m, …, width] gets, not normalised."""
    if kind in ("dot", "absdot"):
        dots = (parts * bias).sum(-1)
        return dots if kind == "dot" else dots.abs()
    norms = parts.norm(dim=-1)
    if kind == "norm":
        return norms
    if kind == "equal":
        return (norms != 0).to(norms)
    if kind == "cls":
        first = torch.zeros_like(norms)
        first[0] = 1
        return first
    return torch.nn.functional.cosine_similarity(parts, bias.expand_as(parts), dim=-1).abs()
