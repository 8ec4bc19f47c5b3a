"""The rank of the query-key products of a model (KV-Direct, arXiv 2603.19664).

The scores of an attention head are x_q W_q^T W_k x_k with the stored weights W_q, W_k
[d_head, d_model]: a bilinear form on the stream of rank d_head at most. r*(e) is the least number
of singular values whose squares hold the share e of the sum of all squares. A small r* says that
the head looks at few directions only.

The paper writes W_q W_k^T and gives r*(0.9) = 21.2 of 64 on average for SmolLM2-135M. With weights
as torch stores them that product is another matrix: it is contracted over the stream, [d_head,
d_head], and it is no bilinear form of anything the head reads. The paper's figure is of that matrix
(our reading: it alone comes near 21.2 on SmolLM2-135M-Instruct, the scores' form does not), so both
are given.

Neither norms nor biases nor rotations are part of the product. The large form is never built:
with W_q^T = Q_q R_q and W_k^T = Q_k R_k its singular values are those of R_q R_k^T, which is
[d_head, d_head].
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from pertoken._extras import need
from pertoken.errors import PertokenError
from pertoken.probe._stream import Progress, blocks_of
from pertoken.result import Part, Result, figure

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class QueryKeyRank(Result):
    """r*(energy) of every head: `ranks` of the scores' form W_q^T W_k, `as_printed` of W_q W_k^T.

    Both are lists `[layers][heads]`; a query head is taken with the key head of its group.
    """

    energy: float
    head_dim: int
    ranks: list[list[int]]
    as_printed: list[list[int]]

    _title = "Rank of the query-key products"

    @property
    def mean(self) -> float:
        """r* of the scores' form, over all heads of all layers."""
        return _mean(self.ranks)

    @property
    def mean_as_printed(self) -> float:
        """r* of the printed product, over all heads of all layers."""
        return _mean(self.as_printed)

    @property
    def share(self) -> float:
        """`mean` as a share of the head's dimension."""
        return self.mean / self.head_dim

    def table(self, *, layers: bool = True) -> str:
        """One row per layer, or only the two rows of all layers together."""
        return self._parts(layers)[0].text()

    def _parts(self, layers: bool = True) -> list[Part]:
        headings = ["layer", "form", "least", "mean", "greatest", "mean / d_head"]
        rows = []
        for form, ranks in (
            ("scores W_q^T W_k", self.ranks),
            ("printed W_q W_k^T", self.as_printed),
        ):
            rows.append(["all", form, *self._figures([r for row in ranks for r in row])])
            if layers:
                rows += [[str(i), form, *self._figures(row)] for i, row in enumerate(ranks)]
        title = f"query-key products: r*({self.energy:g}) of {self.head_dim} dimensions"
        return [Part(title, [headings, *rows])]

    def to_dict(self) -> dict[str, Any]:
        """The fields and their means."""
        means = {"mean": self.mean, "mean_as_printed": self.mean_as_printed, "share": self.share}
        return asdict(self) | means

    def rows(self) -> list[dict[str, Any]]:
        """A record per head: layer, head, rank, rank_as_printed."""
        return [
            {"layer": layer, "head": head, "rank": rank, "rank_as_printed": printed}
            for layer, pair in enumerate(zip(self.ranks, self.as_printed, strict=True))
            for head, (rank, printed) in enumerate(zip(*pair, strict=True))
        ]

    def plot(self) -> Any:
        """Ranks by layer and head, a map of the scores' form (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        heat = graph.Heatmap(z=self.ranks, zmin=0, zmax=self.head_dim)
        return figure(heat, title=self._title, xaxis={"title": "head"}, yaxis={"title": "layer"})

    def _figures(self, ranks: list[int]) -> list[str]:
        mean = fmean(ranks)
        return [f"{min(ranks)}", f"{mean:.1f}", f"{max(ranks)}", f"{mean / self.head_dim:.0%}"]


@torch.no_grad()
def query_key_rank(
    model: PreTrainedModel, energy: float = 0.9, *, progress: Progress | None = None
) -> QueryKeyRank:
    """r*(energy) of the query-key product of every head of every layer.

    energy: share of the sum of squared singular values, above 0 and up to 1.
    progress: called with (what, layers done, layers in all).
    Raises PertokenError for a model without attention and for projections it cannot tell apart.

    >>> from pertoken.testing import tiny_model
    >>> result = query_key_rank(tiny_model("llama"))
    >>> len(result.ranks), len(result.ranks[0]), result.head_dim
    (2, 4, 8)
    """
    if not 0 < energy <= 1:
        raise PertokenError(f"energy is a share above 0 and up to 1, got {energy}")
    tell = progress or (lambda what, done, total: None)
    blocks = blocks_of(model)
    ranks, printed, head_dim = [], [], 0
    for done, block in enumerate(blocks):
        tell("rank of the query-key products", done, len(blocks))
        query, key = query_key_weights(model, block)
        head_dim = query.shape[1]
        triangles = [torch.linalg.qr(w.mT, mode="r").R for w in (query, key)]
        ranks.append(energy_rank(triangles[0] @ triangles[1].mT, energy))
        printed.append(energy_rank(query @ key.mT, energy))
    return QueryKeyRank(energy, head_dim, ranks, printed)


def energy_rank(matrices: torch.Tensor, energy: float) -> list[int]:
    """r*(energy) of each matrix of [heads, rows, columns].

    >>> energy_rank(torch.diag(torch.tensor([3.0, 1.0, 0.0]))[None], 0.9)
    [1]
    >>> energy_rank(torch.diag(torch.tensor([3.0, 1.0, 0.0]))[None], 0.95)
    [2]
    """
    squares = torch.linalg.svdvals(matrices).square()
    held = squares.cumsum(-1)
    # The last sum itself, not a second way to add up, so that energy 1 is reached.
    return (1 + (held < energy * held[:, -1:]).sum(-1)).tolist()


def query_key_weights(
    model: PreTrainedModel, block: torch.nn.Module
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_q and, repeated for the heads of its group, W_k of a block; [heads, d_head, d_model].

    In float32 or, for a float64 model, in float64.
    """
    attention = next(
        (m for n, m in block.named_children() if n in ("self_attn", "attn", "attention")), None
    )
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    found = _split(attention, heads) if attention is not None else None
    if found is None:
        raise PertokenError(
            f"{type(model).__name__}: where the query and key weights of {type(block).__name__} "
            "lie is not known; known are q_proj and k_proj, c_attn of GPT-2, query_key_value of "
            "GPT-NeoX and qkv_proj of Phi-3"
        )
    query, key = (w.to(torch.promote_types(w.dtype, torch.float32)) for w in found)
    dim = query.shape[0] // heads
    if query.shape[0] % heads or key.shape[0] % dim or heads % (key.shape[0] // dim):
        raise PertokenError(
            f"{type(model).__name__}: {query.shape[0]} query and {key.shape[0]} key rows do not "
            f"make {heads} heads"
        )
    group = heads * dim // key.shape[0]
    query, key = query.unflatten(0, (heads, dim)), key.unflatten(0, (-1, dim))
    return query, key.repeat_interleave(group, 0)


def _split(attention: torch.nn.Module, heads: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Weights of queries and of keys, [heads or key heads times d_head, d_model] each."""
    parts = dict(attention.named_children())
    kind = type(attention).__name__
    if "q_proj" in parts and "k_proj" in parts:
        return _weight(parts["q_proj"]), _weight(parts["k_proj"])
    if "c_attn" in parts and kind.startswith("GPT2"):
        query, key, _ = _weight(parts["c_attn"]).T.chunk(3)  # a Conv1D is stored the other way
        return query, key
    if "query_key_value" in parts and kind.startswith("GPTNeoX"):
        # Head by head: its queries, its keys, its values.
        fused = _weight(parts["query_key_value"]).unflatten(0, (heads, 3, -1))
        return fused[:, 0].flatten(0, 1), fused[:, 1].flatten(0, 1)
    dim = getattr(attention, "head_dim", None)
    if "qkv_proj" in parts and isinstance(dim, int):
        fused, rows = _weight(parts["qkv_proj"]), heads * dim
        return fused[:rows], fused[rows : rows + (len(fused) - rows) // 2]
    return None


def _weight(module: torch.nn.Module) -> torch.Tensor:
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise PertokenError(
            f"{type(module).__name__} holds quantised weights; load the model in floating point"
        )
    return weight


def _mean(ranks: list[list[int]]) -> float:
    return fmean(rank for layer in ranks for rank in layer)
