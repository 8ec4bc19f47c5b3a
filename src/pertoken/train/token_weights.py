"""A weight per token in TRL's supervised and preference training: two mixins.

    from trl import SFTTrainer
    from pertoken.train import TokenWeightedSFT

    class Trainer(TokenWeightedSFT, SFTTrainer):
        pass

    Trainer(model, args=SFTConfig(...), train_dataset=data, weights="token_weights")

Weights come from a column of the training data, or from a function of a row. They are lists of
numbers, one per token of the row as TRL has tokenised it, before it is cut at `max_length`, or one
per token that is learned; or a `TokenSignal` (in a column: its JSON), whose values go to the tokens
by the characters they share.

In supervised training the loss of a token is times its weight; the divisor is that of the whole
accumulated batch. In preference training the log-ratio of policy and reference is (the weighted sum
over an answer takes the place of the plain one in every objective of TRL):

    Σ_t w_t (log π(y_t) - log π_ref(y_t))

Evaluation is TRL's own, unweighted, so that its loss compares between weightings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from pertoken._pieces import pieces
from pertoken.errors import PertokenError
from pertoken.signal import TokenSignal
from pertoken.train._weighed import Column, WeighedSFT, dropped, refuse, weighed

if TYPE_CHECKING:  # the trainers of TRL are behind the mixins in the class that is made
    _Trainer: Any
else:
    _Trainer = object

__all__ = ["WEIGHTS", "TokenWeightedDPO", "TokenWeightedSFT", "signal_weights"]

Row = dict[str, Any]
Source = str | Callable[[Row], Any]
"""The name of a column, or a function from a row to its weights."""

WEIGHTS = "token_weights"
"""The column of prepared data that holds a weight per token."""
_DPO = {"use_weighting": False, "padding_free": False}


def signal_weights(
    signal: TokenSignal, tokenizer: Any, input_ids: Sequence[int], outside: float = 1.0
) -> list[float]:
    """The values of a signal for the tokens of a row, by the characters they share.

    signal: one value per token of some text, which must stand once in what `input_ids` [time]
    decode to. The same tokens have the same values. Of other ones each has the mean over its
    characters, one that ends inside a character that character's. Where nothing was measured, and
    outside that text, it is `outside`. PertokenError for a signal with targets, and for a text that
    is not there, or twice.

    >>> from pertoken.testing import ByteTokenizer
    >>> ids = ByteTokenizer().encode("to be")
    >>> signal_weights(TokenSignal("be", [0.5], [(0, 2)], "w"), ByteTokenizer(), ids)
    [1.0, 1.0, 1.0, 0.5, 0.5]
    """
    if signal.targets:
        raise PertokenError(
            f"{signal!r} has a value per target: take one, signal.total() or signal.target(...)"
        )
    parts = pieces(tokenizer, input_ids)
    text = "".join(parts)
    if not signal.text or text.count(signal.text) != 1:
        raise PertokenError(
            f"the text of {signal!r} stands {text.count(signal.text) if signal.text else 0} times "
            f"in the tokens of the row, not once: {text[:60]!r}"
        )
    start = text.index(signal.text)
    values = np.full(len(text) + 1, np.nan)  # of the characters, and of the end
    for value, (first, last) in zip(signal.values, signal.offsets, strict=True):
        values[start + first : start + last] = value
    spans, found = _spans(parts), []
    for first, last in spans:
        own = values[first : max(last, first + 1)]
        own = own[~np.isnan(own)]
        found.append(float(own.mean()) if len(own) else outside)
    same = _same(spans, [(start + first, start + last) for first, last in signal.offsets])
    if same is not None:
        found[same] = [outside if math.isnan(one) else one for one in signal.values.tolist()]
    return found


def _spans(parts: Sequence[str]) -> list[tuple[int, int]]:
    """The characters (start, end) of each piece of a text."""
    ends = np.cumsum([0, *map(len, parts)], dtype=int).tolist()
    return list(pairwise(ends))


def _same(spans: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, int]]) -> slice | None:
    """Where the tokens of a row are those of a signal, one for one."""
    for place in range(len(spans) - len(wanted) + 1):
        if spans[place : place + len(wanted)] == wanted:
            return slice(place, place + len(wanted))
    return None


class TokenWeightedSFT(WeighedSFT):
    """A mixin for TRL's `SFTTrainer`: every token's loss is times its weight.

    weights: a column of the training data, or a function of a prepared row (with input_ids and
    labels) that gives the weights or a `TokenSignal`; see the module. normalizer: divide by the
    "tokens" of the accumulated batch, or by the sum of its "weights" (`weighted_nll`).

    A weight of 0 takes a token's gradient away, 1 everywhere is `SFTTrainer` to the bit, a negative
    one lowers the token's probability without bound. PertokenError before training for a missing
    column and weights of another number than tokens (the row is named), for packed or padding-free
    batches, label smoothing and other objectives than "nll"; and in training where the column was
    dropped on the way.

    >>> class Trainer(TokenWeightedSFT):  # and trl.SFTTrainer behind it
    ...     pass
    """

    _columns = (WEIGHTS,)

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *rest: Any,
        weights: Source = WEIGHTS,
        normalizer: Literal["tokens", "weights"] = "tokens",
        **more: Any,
    ) -> None:
        if normalizer not in ("tokens", "weights"):
            raise PertokenError(f'normalizer must be "tokens" or "weights", got {normalizer!r}')
        if (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"):
            raise PertokenError(
                f"{type(self).__name__} fits the weights where TRL prepares the rows: leave "
                "skip_prepare_dataset out of dataset_kwargs; rows with input_ids are taken as they "
                "are"
            )
        self._source, self._normalizer = weights, normalizer
        super().__init__(model, args, *rest, **more)

    def _weigh(self, inputs: dict[str, Any], output: Any) -> torch.Tensor:
        weights: torch.Tensor = inputs[WEIGHTS][:, 1:]
        return weights

    def _total(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        if self._normalizer == "tokens" or WEIGHTS not in inputs:
            return None
        learned = inputs["labels"][:, 1:] != -100
        return torch.where(learned, inputs[WEIGHTS][:, 1:], 0.0).sum()

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *rest: Any) -> Any:
        name = rest[-1]
        if name == "train":
            _require(dataset, [self._source])
        if name != "train":
            return super()._prepare_dataset(dataset, processing_class, args, *rest)
        whole = copy(args)  # weights are fitted to the row before TRL cuts it, then cut with it
        whole.max_length, whole.shuffle_dataset = None, False
        found = super()._prepare_dataset(dataset, processing_class, whole, *rest)
        kept = _kept(args.max_length, args.truncation_mode)

        def weigh(row: Row, index: int) -> Row:
            learned = [label != -100 for label in row["labels"]]
            given = _of(self._source, row, self._tokenizer, row["input_ids"])
            return {WEIGHTS: _fitted(given, learned, f"row {index}")[kept]}

        weighted = found.map(weigh, with_indices=True)
        packing, _, name = rest  # the formatting is done
        return super()._prepare_dataset(weighted, processing_class, args, packing, None, name)


class TokenWeightedDPO(_Trainer):
    """A mixin for TRL's `DPOTrainer`: every token's log-ratio is times its weight.

    chosen_weights, rejected_weights: a column of the training data each, or a function of a
    prepared row (with prompt_ids, chosen_ids and rejected_ids) that gives weights, one per token of
    that answer (its end among them), or a `TokenSignal`. One of the two may be left out: its
    tokens count 1. All objectives of TRL, a precomputed reference too; `use_weighting` is refused.

    Weights of 1 are `DPOTrainer` to the bit; 0 hides a token; rejected weights of 0 train on the
    chosen answers alone. PertokenError as of `TokenWeightedSFT`.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        *rest: Any,
        chosen_weights: Source | None = "chosen_weights",
        rejected_weights: Source | None = "rejected_weights",
        **more: Any,
    ) -> None:
        refuse(type(self).__name__, args, more, _DPO)
        self._sources = {"chosen": chosen_weights, "rejected": rejected_weights}
        super().__init__(model, ref_model, args, *rest, **more)
        if self._is_vision_dataset:
            raise PertokenError(f"{type(self).__name__} carries no images")

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
        if name != "train":
            return super()._prepare_dataset(dataset, processing_class, args, name)
        sources = self._read_from(dataset)
        found = super()._prepare_dataset(dataset, processing_class, args, name)
        return self._with_weights(found, sources, _kept(args.max_length, args.truncation_mode))

    def _read_from(self, dataset: Any) -> dict[str, Source]:
        """Where the weights of each side come from; PertokenError for columns that are missing."""
        columns = set(next(iter(dataset)))
        sources = {
            side: source
            for side, source in self._sources.items()
            if source is not None and not (source == f"{side}_weights" and source not in columns)
        }
        if not sources:
            raise PertokenError(
                "the training data has neither chosen_weights nor rejected_weights, only "
                f"{', '.join(sorted(columns))}"
            )
        _require(dataset, list(sources.values()))
        return sources

    def _with_weights(self, dataset: Any, sources: dict[str, Source], kept: slice) -> Any:
        """The prepared data with a weight per token of both texts, which TRL cuts to `kept`."""

        def weigh(row: Row, index: int) -> Row:
            made = {}
            for side in ("chosen", "rejected"):
                ids = row[f"{side}_ids"]
                given = _of(sources[side], row, self._tokenizer, ids) if side in sources else None
                whole = [1.0] * len(ids) if given is None else given
                made[side] = _fitted(whole, [True] * len(ids), f"row {index}, {side}")
            before = [1.0] * len(row["prompt_ids"])
            return {WEIGHTS: [before + made["chosen"], before + made["rejected"]]}

        return dataset.map(weigh, with_indices=True)

    @contextmanager
    def _weighing(self, model: Any, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The inputs without the weights, while models are weighted with them."""
        weights = inputs.get(WEIGHTS)
        rest = {name: value for name, value in inputs.items() if name != WEIGHTS}
        own = self.accelerator.unwrap_model(model)
        models = [own] if self.ref_model in (None, own) else [own, self.ref_model]
        if weights is None:
            yield rest
            return
        own_columns = weights[:, 1:]
        with weighed(models, lambda _: own_columns):
            yield rest

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self.model.training and WEIGHTS not in inputs:
            raise dropped(WEIGHTS)
        with self._weighing(model, inputs) as rest:
            return super()._compute_loss(model, rest, return_outputs)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """The reference's weighted sums, as TRL precomputes them."""
        with self._weighing(model, inputs) as rest:
            return super().compute_ref_log_probs(model, rest)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if WEIGHTS not in self._signature_columns:
            self._signature_columns.append(WEIGHTS)

    @property
    def data_collator(self) -> Any:
        """TRL's collator, with the weights."""
        return self._collator

    @data_collator.setter
    def data_collator(self, collator: Any) -> None:
        # The collator cuts prompt and answer at max_length, so the weights are cut with it.
        mode = getattr(collator, "truncation_mode", "keep_start")
        kept = _kept(getattr(collator, "max_length", None), mode)
        self._collator = Column(
            collator, WEIGHTS, lambda row: [weights[kept] for weights in row[WEIGHTS]]
        )


def _require(dataset: Any, sources: Sequence[Source | None]) -> None:
    """Raise PertokenError for a column that the training data does not have."""
    columns = list(next(iter(dataset)))
    for source in sources:
        if isinstance(source, str) and source not in columns:
            raise PertokenError(
                f"the training data has no column {source!r}, only {', '.join(columns)}"
            )


def _of(source: Source | None, row: Row, tokenizer: Any, ids: Sequence[int]) -> Any:
    """The weights of a row, a signal's already as numbers."""
    given = row[source] if isinstance(source, str) else source(row) if source else None
    if isinstance(given, str):
        given = TokenSignal.from_json(given)
    return signal_weights(given, tokenizer, ids) if isinstance(given, TokenSignal) else given


def _kept(longest: int | None, mode: str) -> slice:
    """What TRL leaves of a row."""
    if longest is None:
        return slice(None)
    return slice(None, longest) if mode == "keep_start" else slice(-longest, None)


def _fitted(given: Any, learned: Sequence[bool], where: str) -> list[float]:
    """One finite weight per token of a row.

    given: for each token, or for each that is learned; the others then have 1, which nothing reads.
    """
    if not isinstance(given, Sequence) or not all(isinstance(one, int | float) for one in given):
        raise PertokenError(f"{where}: weights must be a list of numbers or a signal")
    weights = [float(one) for one in given]
    if len(weights) != len(learned) and len(weights) == sum(learned):
        rest = iter(weights)
        weights = [next(rest) if one else 1.0 for one in learned]
    if len(weights) != len(learned):
        raise PertokenError(
            f"{where}: {len(weights)} weights for {len(learned)} tokens, {sum(learned)} of them "
            "learned; give one for each of either"
        )
    if not all(map(math.isfinite, weights)):
        raise PertokenError(f"{where}: a weight is NaN or infinite")
    return weights
