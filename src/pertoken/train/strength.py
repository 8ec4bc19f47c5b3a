"""How well the losses of models on a document tell their abilities: predictive strength.

The parts of PreSelect (arXiv 2503.00808, section 2); `pertoken.train.preselection` puts them
together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from pertoken.errors import PertokenError
from pertoken.prompts import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["bits_per_character", "label_extremes", "predictive_strength", "select"]

BLOCK, STRIDE = 1900, 512
Floats = npt.NDArray[np.float64]
Progress = Callable[[str, int, int], None]


def bits_per_character(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    block: int = BLOCK,
    stride: int = STRIDE,
    progress: Progress | None = None,
) -> list[float]:
    """Loss of each text in bits, over its characters.

    block: tokens read at once; a longer text is read in blocks that begin `stride` tokens apart,
    and each token counts in the first that reaches it. Where the model has fewer positions both
    shrink in the same proportion.
    Raises PertokenError for an empty text, and where the tokenizer's ids are not the model's.

    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> tokenizer = ByteTokenizer()
    >>> model = tiny_model("llama", vocab_size=len(tokenizer), scale=0.0)     # all bytes alike
    >>> [bits] = bits_per_character(model, tokenizer, ["abc"])
    >>> round(bits, 6) == round(math.log2(len(tokenizer)), 6)
    True
    """
    from pertoken.tokenize import nats_per_text

    room = positions(model)
    window = min(block, (room or block + 1) - 1)  # one place is for the token in front
    apart = max(1, min(stride, block) * window // block)
    found = nats_per_text(model, tokenizer, texts, window=window, stride=apart, progress=progress)
    return [nats / math.log(2) / len(text) for (nats, _), text in zip(found, texts, strict=True)]


def predictive_strength(
    losses: Any,
    ability: Sequence[float],
    *,
    method: Literal["pairs", "spearman"] = "pairs",
    margin: float = 0.0,
) -> Floats:
    """How well the models' losses on each document tell their abilities, [documents].

    losses: [models, documents], in any unit that is the same within a document. ability: a number
    of each model, higher is abler. "pairs": share of the pairs of models, in [0, 1], in which the
    abler has the lower loss (the paper's; (Kendall's tau + 1) / 2 without ties); equal losses are
    not lower, and pairs whose abilities differ by no more than `margin` do not count. "spearman":
    the rank correlation with the falling loss, in [-1, 1], ties by their mean rank; NaN where all
    losses are equal. Raises PertokenError for a loss or an ability that is no number, and where no
    two models differ in ability.

    >>> predictive_strength([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]], [0.9, 0.5, 0.1]).tolist()
    [1.0, 0.0]
    """
    table, order = np.asarray(losses, dtype=float), np.asarray(ability, dtype=float)
    _check(table, order)
    if method not in ("pairs", "spearman"):
        raise PertokenError(f'method must be "pairs" or "spearman", not {method!r}')
    pairs = [
        (abler, other)
        for one, two in combinations(range(len(order)), 2)
        for abler, other in [(one, two) if order[one] > order[two] else (two, one)]
        if order[abler] - order[other] > margin
    ]
    if not pairs:
        raise PertokenError(
            f"no two of the {len(order)} models differ in ability by more than {margin:g}: models "
            "of different ability are needed"
        )
    if method == "spearman":
        return _spearman(-table, order)
    right = np.zeros(table.shape[1])
    for abler, other in pairs:
        right += table[abler] < table[other]
    return right / len(pairs)


def _check(table: Floats, order: Floats) -> None:
    if table.ndim != 2 or len(table) != len(order):
        raise PertokenError(
            f"losses must be [models, documents] with a row for each of {len(order)} abilities, "
            f"got {list(table.shape)}"
        )
    if not np.isfinite(order).all():
        raise PertokenError(f"ability {int(np.flatnonzero(~np.isfinite(order))[0])} is no number")
    if not np.isfinite(table).all():
        model, document = np.argwhere(~np.isfinite(table))[0]
        raise PertokenError(f"the loss of model {model} on document {document} is no number")


def _spearman(table: Floats, order: Floats) -> Floats:
    def ranks(values: Floats) -> Floats:  # of columns, ties by their mean rank, centred
        below = (values[:, None] > values[None]).sum(1) - (values[:, None] < values[None]).sum(1)
        return below / 2

    mine, theirs = ranks(table), ranks(order[:, None])
    with np.errstate(invalid="ignore"):
        return (mine * theirs).sum(0) / np.sqrt((mine**2).sum(0) * (theirs**2).sum(0))


def label_extremes(strength: Any) -> npt.NDArray[np.int8]:
    """1 for documents that order all models rightly, 0 for as many of the least strength, else -1.

    strength: [documents], of `predictive_strength`; at equal strength earlier documents go first.
    Where more than half order the models rightly all others are 0.
    Raises PertokenError where there are none of one kind.

    >>> label_extremes([1.0, 0.4, 0.1, 1.0, 0.2]).tolist()
    [1, -1, 0, 1, 0]
    """
    values = np.nan_to_num(np.asarray(strength, dtype=float), nan=-np.inf)
    if not values.size:
        raise PertokenError("there are no documents to label")
    wanted = values >= 1
    if not wanted.any():
        raise PertokenError(
            f"none of {values.size} documents orders all models rightly (best {values.max():.2f} "
            "of 1): take more documents, fewer models, or a margin between abilities"
        )
    if wanted.all():
        raise PertokenError(
            f"all {values.size} documents order the models rightly, so none is unwanted: are they "
            "checkpoints of one run? Models must differ in what they have read, or in size"
        )
    labels = np.full(values.size, -1, dtype=np.int8)
    others = np.flatnonzero(~wanted)
    worst = others[np.argsort(values[others], kind="stable")][: int(wanted.sum())]
    labels[wanted], labels[worst] = 1, 0
    return labels


def select(texts: Sequence[str], scores: Any, keep: float) -> npt.NDArray[np.bool_]:
    """Which documents are the best `keep` in (0, 1] of all characters, [documents].

    The highest scores first, up to the document that reaches the share; at equal scores earlier
    ones. Raises PertokenError for a score that is no number, and where there is no character.

    >>> select(["aaaa", "bb", "cc", "dd"], [0.1, 0.9, 0.5, 0.7], 0.4).tolist()
    [False, True, False, True]
    """
    values = np.asarray(scores, dtype=float)
    if not 0 < keep <= 1:
        raise PertokenError(f"the share to keep must be above 0 and at most 1, got {keep}")
    if len(values) != len(texts):
        raise PertokenError(f"{len(texts)} documents and {len(values)} scores")
    if np.isnan(values).any():
        raise PertokenError(f"the score of document {int(np.isnan(values).argmax())} is no number")
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    if not sizes.sum():
        raise PertokenError("there is nothing to select from: no document has a character")
    order = np.argsort(-values, kind="stable")
    before = np.cumsum(sizes[order]) - sizes[order]
    kept = np.zeros(len(values), dtype=bool)
    kept[order[before < keep * sizes.sum()]] = True
    return kept
