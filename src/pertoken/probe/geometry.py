"""What a layer does to each token by itself, and what it does beyond (arXiv 2604.02459).

A layer's output is split into a tokenwise part and a residual, y = T(x) + r: T sees the token's own
input x alone, r is what no map of a restricted class explains. Then T's output is put in the place
of y at one layer, and the model's next-token distributions are compared with its own: does the size
of r go with the change of the output?

Local fit, the paper's: T(x) = A(x) x, a linear map of its own for each token, fitted on the nearest
tokens of other documents. Global fit: one map for all tokens, fitted on other documents. A token is
never among those that its map was fitted on.

Our reading: 64 neighbours; classes that contain the identity, with an added constant in the linear
ones; ridge regression; each token is replaced alone, so that its answer tells of its own residual;
and the first token of a text, an attention sink in many models, takes no part in the fits of other
tokens and is not replaced.

Two traps. y and T(x) = x are nearly parallel already, because layers add to the stream: read every
cosine against the identity's row. And what is left as r depends on the class: a rich one explains
everything, so the curve over classes is the result, not one point of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pertoken.errors import PertokenError, nearest
from pertoken.probe._geometry_measures import measure, outlier_dimensions
from pertoken.probe._geometry_replace import (
    Reading,
    effects,
    read,
    refuse_other_paths,
    replacing,
)
from pertoken.probe._geometry_result import Fit, LayerGeometry, over_layers
from pertoken.probe._stream import Progress, blocks_of, one_text
from pertoken.probe._tokenwise import CLASSES, global_updates, local_updates, nearest_tokens
from pertoken.prompts import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["GLOBAL", "LOCAL", "RIDGE", "LayerGeometry", "layer_geometry"]

LOCAL = ("identity", "scalar", "diagonal", "low-rank", "affine")
"""The classes of a local fit by default: "orthogonal" on neighbourhoods takes twice as long as
all of these."""
GLOBAL = ("identity", "scalar", "diagonal", "orthogonal", "low-rank", "affine")
"""The classes of a global fit by default: "mlp" takes several times as long."""
RIDGE = 1.0
"""Of 0.01, 0.1, 1 and 10, chosen on development texts of the reproduction."""


@torch.no_grad()
def layer_geometry(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    fit: str = "local",
    classes: Sequence[str] | None = None,
    neighbours: int | Sequence[int] = 64,
    rank: int = 8,
    ridge: float = RIDGE,
    tested: Sequence[str] = ("low-rank",),
    alone: bool = True,
    length: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> LayerGeometry:
    """Split what each layer does into a tokenwise part and a residual, and compare the two.

    model: any decoder, with attention or with a state; it is left as it was.
    texts: two documents or more; `length` tokens of each are read at most.
    fit: "local", a map for each token, or "global", one for all.
    classes: of "identity" (always there), "scalar", "diagonal", "orthogonal", "low-rank", "affine"
        and, for a global fit, "mlp".
    neighbours: tokens of other documents that a local map is fitted on; several numbers show how
        much depends on it.
    rank: of the class "low-rank", and of the subspace whose share of energy is measured.
    ridge: of orthogonal, low-rank and affine maps, relative to the sizes of the inputs.
    tested: classes whose T(x) is put into the model, a forward pass per text and layer each.
    alone: each token is replaced alone, and the output's change is read at its own position; or,
        if False, all tokens but the first of a text at once, so that a change holds those in front.
    progress: called with (what, done, total).
    Raises PertokenError for a model without a list of blocks, activations that are not finite (the
    layer is named), fewer than two texts, fewer tokens of other documents than neighbours.

    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> model = tiny_model("llama", vocab_size=258)
    >>> found = layer_geometry(model, ByteTokenizer(), ["one text", "another"], neighbours=4)
    >>> [effect.layer for effect in found.effects], found.settings["tokens"]
    ([0, 1], 15)
    """
    blocks = blocks_of(model, attention=False)
    counts = [neighbours] if isinstance(neighbours, int) else list(neighbours)
    names = chosen_classes(fit, classes, tested)
    _refuse_settings(rank, ridge, length, counts)
    ids = _documents(model, tokenizer, texts, length)
    if fit == "local":
        _refuse_few(ids, max(counts))
    tell = progress or (lambda what, done, total: None)
    reading = read(model, blocks, ids, tell)
    how = replacing(model, blocks, reading, alone)
    if tested:
        refuse_other_paths(how)
    fits: list[Fit] = []
    outliers: list[list[int]] = []
    replaced: dict[tuple[str, int], torch.Tensor] = {}
    for layer in range(len(blocks)):
        tell("tokenwise maps", layer, len(blocks))
        x, y = reading.stream(layer), reading.stream(layer + 1)
        if fit == "local":
            maps = _local(x, y, reading, names, counts, rank, ridge)
        else:
            maps = _global(x, y, reading, names, rank, ridge, seed)
        large = outlier_dimensions(y[~reading.first])
        outliers.append(large.nonzero()[:, 0].tolist())
        for (name, count), mapped in maps.items():
            fits += _views(layer, name, count, (x, y, mapped), reading.first, large, rank)
            if name in tested and count in (None, counts[0]):
                replaced[name, layer] = mapped
    per_token = effects(how, replaced, tell)
    settings: dict[str, Any] = {"fit": fit, "documents": len(ids), "tokens": len(reading.first)}
    settings |= {"neighbours": counts if fit == "local" else None, "rank": rank, "ridge": ridge}
    settings |= {"alone": alone, "length": length, "seed": seed}
    return LayerGeometry(
        settings=settings,
        fits=fits,
        effects=[each.effect(seed) for each in per_token],
        over_layers=over_layers(per_token, seed),
        outliers=outliers,
    )


def _local(
    x: torch.Tensor,
    y: torch.Tensor,
    reading: Reading,
    names: Sequence[str],
    counts: Sequence[int],
    rank: int,
    ridge: float,
) -> dict[tuple[str, int | None], torch.Tensor]:
    """T(x) [tokens, hidden] by class and number of neighbours; the identity once."""
    near = nearest_tokens(x, reading.documents, reading.first, max(counts))
    maps: dict[tuple[str, int | None], torch.Tensor] = {("identity", None): x}
    others = [name for name in names if name != "identity"]
    for count in counts:
        found = local_updates(x, y - x, near[:, :count], others, ridge, rank)
        maps |= {(name, count): x + update for name, update in found.items()}
    return maps


def _global(
    x: torch.Tensor,
    y: torch.Tensor,
    reading: Reading,
    names: Sequence[str],
    rank: int,
    ridge: float,
    seed: int,
) -> dict[tuple[str, int | None], torch.Tensor]:
    """T(x) [tokens, hidden] by class."""
    places = reading.documents, reading.first
    found = global_updates(x, y - x, *places, names, ridge, rank, seed)
    return {(name, None): x + update for name, update in found.items()}


def _views(
    layer: int,
    name: str,
    count: int | None,
    vectors: Sequence[torch.Tensor],
    first: torch.Tensor,
    large: torch.Tensor,
    rank: int,
) -> list[Fit]:
    """One map measured on all there is, without first tokens, and without outlier dimensions too.

    vectors: x, y and T(x), [tokens, hidden].
    """
    rest = [vector[~first] for vector in vectors]
    bare = [vector[:, ~large] for vector in rest]
    views = {
        ("all", "all"): vectors,
        ("not first", "all"): rest,
        ("not first", "no outliers"): bare,
    }
    return [
        Fit(layer, name, count, tokens, dimensions, **measure(some[0], some[1], some[2], rank))
        for (tokens, dimensions), some in views.items()
    ]


def chosen_classes(fit: str, classes: Sequence[str] | None, tested: Sequence[str]) -> list[str]:
    """The classes in their order, the identity in front."""
    if fit not in ("local", "global"):
        raise PertokenError(f'fit is "local" or "global", got {fit!r}')
    if isinstance(classes, str) or isinstance(tested, str):
        raise PertokenError('classes and tested are lists of names, such as ["diagonal"]')
    wanted = list(classes if classes is not None else (LOCAL if fit == "local" else GLOBAL))
    for name in [*wanted, *tested]:
        if name not in CLASSES:
            raise PertokenError(
                f"unknown function class {name!r}{nearest(name, CLASSES)}: there are "
                f"{', '.join(CLASSES)}"
            )
    if fit == "local" and "mlp" in [*wanted, *tested]:
        raise PertokenError('the class "mlp" has no local fit: use fit="global"')
    return [name for name in CLASSES if name in {"identity", *wanted, *tested}]


def _refuse_settings(rank: int, ridge: float, length: int, counts: Sequence[int]) -> None:
    if not counts or min(counts) < 2:
        raise PertokenError(f"neighbours must be 2 or more, got {list(counts)}")
    if rank < 1:
        raise PertokenError(f"rank must be 1 or more, got {rank}")
    if not 0 <= ridge < float("inf"):
        raise PertokenError(f"ridge must be 0 or more, got {ridge}")
    if length < 2:
        raise PertokenError(
            f"length must be 2 or more, since first tokens stand apart; got {length}"
        )


def _documents(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], length: int
) -> list[torch.Tensor]:
    """The ids [1, time] of each text's beginning."""
    if isinstance(texts, str):
        raise PertokenError("texts is a list of documents, got one text: give several")
    if len(texts) < 2:
        raise PertokenError(
            f"got {len(texts)} text{'' if len(texts) == 1 else 's'}: maps are fitted on other "
            "documents than they are judged on, so give two or more"
        )
    room = positions(model)
    found = []
    for number, text in enumerate(texts, 1):
        ids = list(tokenizer(text)["input_ids"])[: min(length, room or length)]
        if len(ids) < 2:
            raise PertokenError(f"text {number} has fewer than 2 tokens: leave it out")
        found.append(one_text(model, ids))
    return found


def _refuse_few(ids: Sequence[torch.Tensor], count: int) -> None:
    """Raise where some document has not enough tokens of others, first ones left out."""
    sizes = [one.shape[1] - 1 for one in ids]
    fewest = sum(sizes) - max(sizes)
    if fewest < count:
        raise PertokenError(
            f"{count} neighbours of other documents are wanted, but the largest text has only "
            f"{fewest} (first tokens not counted): give more texts or fewer neighbours"
        )
