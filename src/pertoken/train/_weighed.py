"""What a trainer of TRL needs so that tokens count differently: a hook and a column.

TRL's trainers take the log-probability of every token from the model's output and sum them up.
`weighed` multiplies them there, for the length of one loss, so that everything else (objectives,
reference model, metrics, auxiliary losses) stays TRL's own, and weights of 1 give its loss to the
bit. `Column` carries a number per token through TRL's collator, which knows nothing of it.
`WeighedSFT` is both in `SFTTrainer`, with the divisor of the whole accumulated batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pertoken.errors import PertokenError

if TYPE_CHECKING:  # a trainer of TRL is behind the mixin in the class that is made
    _Trainer: Any
else:
    _Trainer = object

__all__ = ["Column", "WeighedSFT", "dropped", "refuse", "weighed"]

Weigh = Callable[[Any], torch.Tensor]
Feature = dict[str, Any]

_SFT = {
    "loss_type": "nll",
    "label_smoothing_factor": 0.0,
    "packing": False,
    "padding_free": False,
    "compute_loss_func": None,
}


@contextmanager
def weighed(models: Sequence[Any], weigh: Weigh) -> Iterator[None]:
    """While it lasts, log_probs [batch, time - 1] of the models' outputs are times `weigh(output)`.

    Only TRL's fused outputs have log_probs; others pass unchanged. A weight of 0 hides the token
    whatever its log-probability is.
    """

    def hook(_: Any, __: Any, output: Any) -> Any:
        log_probs = getattr(output, "log_probs", None)
        if log_probs is None:
            return output
        weights = weigh(output).to(log_probs)
        if weights.shape != log_probs.shape:
            raise PertokenError(
                f"weights {list(weights.shape)} do not fit log-probabilities "
                f"{list(log_probs.shape)}: one is wanted for each token but the first"
            )
        output.log_probs = torch.where(weights != 0, log_probs * weights, 0.0)
        return output

    with ExitStack() as stack:
        for model in models:
            stack.callback(model.register_forward_hook(hook).remove)
        yield


class Column:
    """A collator that also pads a column of numbers per token, [batch, time] as input_ids.

    collate: the trainer's own. name: of the column; where no row has it the batch goes without.
    numbers: of a row, one per token of the row as it is collated, several rows where TRL makes
    several of one (chosen and rejected).
    """

    def __init__(
        self, collate: Any, name: str, numbers: Callable[[Feature], Sequence[Sequence[float]]]
    ) -> None:
        self.collate, self.name, self.numbers = collate, name, numbers

    def __call__(self, features: Sequence[Feature]) -> dict[str, Any]:
        output: dict[str, Any] = self.collate(features)
        if not all(self.name in feature for feature in features):
            return output
        parts = [self.numbers(feature) for feature in features]
        for part, feature in zip(parts, features, strict=True):
            for row in part:
                if len(row) != len(feature.get("input_ids", row)):
                    raise PertokenError(
                        f"{len(row)} {self.name} for a row of {len(feature['input_ids'])} tokens: "
                        "give one for each token"
                    )
        rows = [row for part in zip(*parts, strict=True) for row in part]
        padded = torch.zeros(output["input_ids"].shape, dtype=torch.float32)
        if len(rows) != len(padded) or max(map(len, rows)) > padded.shape[1]:
            raise PertokenError(
                f"the collator made {list(padded.shape)} of {len(rows)} rows of up to "
                f"{max(map(len, rows))} tokens: {self.name} can't follow it"
            )
        for place, row in enumerate(rows):
            padded[place, : len(row)] = torch.tensor(row)
        output[self.name] = padded
        return output


def refuse(who: str, args: Any, more: dict[str, Any], carried: dict[str, Any]) -> None:
    """Raise PertokenError for an option that would be ignored or would break the weights.

    args: TRL's configuration, or None; more: keywords of the trainer; carried: option -> the only
    value that is.
    """
    for name, value in carried.items():
        given = more.get(name, getattr(args, name, value))
        if given != value:
            raise PertokenError(f"{who} does not support {name}={given!r}: leave it at {value!r}")


class WeighedSFT(_Trainer):
    """What makes tokens of TRL's `SFTTrainer` count differently; its children say how much.

    A child gives `_weigh` (weights [batch, time - 1] of a micro-batch, from the model's output)
    and `_total` (what the weights of a micro-batch sum up to, known before the forward), or None
    where the divisor stays the number of tokens.
    """

    _columns: tuple[str, ...] = ()
    _share: torch.Tensor | None = None

    def __init__(self, model: Any, args: Any = None, *rest: Any, **more: Any) -> None:
        refuse(type(self).__name__, args, more, _SFT)
        super().__init__(model, args, *rest, **more)
        plan = self.accelerator.parallelism_config
        if self._is_vision_dataset or (plan is not None and plan.sp_enabled):
            raise PertokenError(
                f"{type(self).__name__} carries neither images nor sequence parallelism"
            )

    def get_batch_samples(self, *args: Any, **more: Any) -> Any:
        """The micro-batches of a step, with the divisor of all of them."""
        batches, count = super().get_batch_samples(*args, **more)
        totals = [one for one in map(self._total, batches) if one is not None]
        self._share = None
        if count is not None and totals:
            total = torch.stack(totals).sum().to(self.accelerator.device)
            if self.args.average_tokens_across_devices and self.args.world_size > 1:
                total = self.accelerator.gather(total).sum()
            self._share = count / _above_zero(total)
        return batches, count

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss with weighted tokens; in evaluation without."""
        extra = {name: inputs.pop(name) for name in self._columns if name in inputs}
        loss = partial(super().compute_loss, model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training:
            return loss()
        for name in self._columns:
            if name not in extra:
                raise dropped(name)
        with weighed(
            [self.accelerator.unwrap_model(model)], partial(self._scaled, {**inputs, **extra})
        ):
            return loss()

    def _scaled(self, inputs: dict[str, Any], output: Any) -> torch.Tensor:
        """Weights that give the right mean though TRL divides by the number of tokens."""
        weights = self._weigh(inputs, output)
        total = self._total(inputs)
        if total is None:
            return weights
        share = self._share
        if share is None:  # no count of the accumulated batch: each micro-batch by itself
            share = output.label_mask.sum() / _above_zero(total)
        return weights * share.to(weights.device)

    def _weigh(self, inputs: dict[str, Any], output: Any) -> torch.Tensor:
        raise NotImplementedError

    def _total(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        raise NotImplementedError

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [
            one for one in self._columns if one not in self._signature_columns
        ]

    # TRL makes the collator when it is built and hands it on; every one is wrapped.
    @property
    def data_collator(self) -> Any:
        """TRL's collator, with the columns of this trainer."""
        return self._collator

    @data_collator.setter
    def data_collator(self, collator: Any) -> None:
        for name in self._columns:
            collator = Column(collator, name, partial(_one, name))
        self._collator = collator


def dropped(name: str) -> PertokenError:
    """What to raise for a column that did not reach the batch."""
    return PertokenError(
        f"the batch has no {name}: a collator or a transform on the way has dropped the column"
    )


def _above_zero(total: torch.Tensor) -> torch.Tensor:
    if not bool(total > 0):
        raise PertokenError(
            f"the weights of a batch sum to {float(total):g}, not above 0: they can't be the "
            'divisor; is there an answer in it? Weights of your own may have normalizer="tokens"'
        )
    return total


def _one(name: str, row: Feature) -> list[list[float]]:
    return [row[name]]
