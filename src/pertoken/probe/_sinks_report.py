"""What `find_sinks` found: its records, its tables, its picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from pertoken._extras import need
from pertoken._html import report
from pertoken.result import Part, Result, figure

SINK = 0.3
"""Share of a head's attention from which on the first token is called a sink (arXiv 2410.10781)."""

ROUNDING = 1e-5
"""By which the bound may be passed in float32."""


@dataclass(frozen=True)
class Taker:
    """A token that takes much attention; share: of all, mean over layers, heads and texts."""

    token: str
    share: float


@dataclass(frozen=True)
class StreamLayer:
    """The stream before block `layer` (behind the last for the last): its greatest number.

    median: of |h|, mean over tokens. dim, position, token: where the peak is.
    """

    layer: int
    peak: float
    median: float
    dim: int
    position: int
    token: str

    @property
    def ratio(self) -> float:
        """Peak over median."""
        return self.peak / self.median if self.median else float("nan")


@dataclass(frozen=True)
class SinkDim:
    """A dimension of the stream.

    average: H_j^avg. times: its mean without first tokens over the median of all dimensions. far:
    share of tokens and layers in which it is above 10 medians of that token. weight: of the norms
    that read it over their median weight, mean over norms. sink: whether it counts as one.
    """

    dim: int
    average: float
    times: float
    far: float
    weight: float | None
    sink: bool


@dataclass(frozen=True)
class NormShare:
    """One norm: r of the sinks (behind the first token, and of it), and what is left behind it.

    part: share of the output's energy in the sink dimensions. tightest: the greatest |RMSNorm(h)|
    over its bound; None, as epsilon, for a module that is neither RMSNorm nor LayerNorm.
    """

    norm: str
    share: float
    share_first: float
    part: float
    epsilon: float | None
    tightest: float | None


@dataclass(frozen=True)
class Sinks(Result):
    """Attention sinks, massive activations and residual sinks of a model.

    first: `[layers][heads]`, share of attention on the first token, mean over texts and all queries
    but the first. elsewhere: likewise, the greatest share of any other token. values: per layer,
    length of the first token's values over the mean of the others. dims: the residual sinks.
    rounding: by which the bound may be passed, of the model's dtype.
    """

    model: str
    texts: int
    tokens: int
    times: float
    first: list[list[float]]
    elsewhere: list[list[float]]
    values: list[float]
    takers: list[Taker]
    layers: list[StreamLayer]
    dims: list[int]
    ranked: list[SinkDim]
    norms: list[NormShare]
    rounding: float = ROUNDING

    _title = "Attention sinks and residual sinks"

    @property
    def sink_heads(self) -> float:
        """Share of heads whose first token takes more than 0.3 of their attention."""
        heads = [share for layer in self.first for share in layer]
        return sum(share > SINK for share in heads) / len(heads)

    @property
    def peak(self) -> StreamLayer:
        """Where the greatest number of the stream is."""
        return max(self.layers, key=lambda layer: layer.peak)

    @property
    def bound_holds(self) -> bool | None:
        """Whether the paper's bound holds at every norm that has one; None where none has."""
        known = [each.tightest for each in self.norms if each.tightest is not None]
        return all(each <= 1 + self.rounding for each in known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """The fields, what follows from them, and the peak."""
        more = {"sink_heads": self.sink_heads, "bound_holds": self.bound_holds}
        return asdict(self) | more | {"peak": asdict(self.peak)}

    def rows(self) -> list[dict[str, Any]]:
        """Records of heads, layers, dimensions, norms and tokens; `what` says which."""
        heads = [
            {"what": "head", "layer": layer, "head": head, "first": first, "elsewhere": other}
            for layer, pair in enumerate(zip(self.first, self.elsewhere, strict=True))
            for head, (first, other) in enumerate(zip(*pair, strict=True))
        ]
        records = {
            "layer": [asdict(each) | {"ratio": each.ratio} for each in self.layers],
            "dimension": [asdict(each) for each in self.ranked],
            "norm": [asdict(each) for each in self.norms],
            "token": [asdict(each) for each in self.takers],
        }
        return heads + [{"what": what} | row for what, found in records.items() for row in found]

    def plot(self) -> Any:
        """Attention on the first token, a map by layer and head (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        heat = graph.Heatmap(z=self.first, zmin=0, zmax=1)
        title = "attention on the first token"
        return figure(heat, title=title, xaxis={"title": "head"}, yaxis={"title": "layer"})

    def _parts(self) -> list[Part]:
        return [self._attention(), self._stream(), self._dimensions(), self._bounds()]

    def _attention(self) -> Part:
        lines = [
            ["layer", "first token", "most in a head", "sink heads", "other token", "|v| first"]
        ]
        for layer, (own, other) in enumerate(zip(self.first, self.elsewhere, strict=True)):
            heads = sum(share > SINK for share in own)
            lines.append(
                [
                    str(layer),
                    f"{sum(own) / len(own):.0%}",
                    f"{max(own):.0%}",
                    f"{heads} of {len(own)}",
                    f"{max(other):.0%}",
                    f"{self.values[layer]:.2f}",
                ]
            )
        most = ", ".join(f"{each.token!r} {each.share:.1%}" for each in self.takers)
        notes = [
            f"{self.sink_heads:.0%} of heads give the first token more than {SINK} of their "
            "attention.",
            f"Tokens that take most: {most}.",
            "|v| first: length of its values over the mean of the others'.",
        ]
        title = f"Attention sinks of {self.model}, {self.tokens} tokens of {self.texts} texts"
        return Part(title, lines, notes)

    def _stream(self) -> Part:
        lines = [["stream before block", "peak", "median", "ratio", "dimension", "token"]]
        for each in self.layers:
            place = str(each.layer) if each.layer < len(self.layers) - 1 else "end"
            at = f"{each.token!r} at {each.position}"
            figures = [f"{each.peak:.1f}", f"{each.median:.3f}", f"{each.ratio:.0f}"]
            lines.append([place, *figures, str(each.dim), at])
        return Part("Massive activations", lines)

    def _dimensions(self) -> Part:
        lines = [["dimension", "H avg", "x median", "far out", "norm weight", "sink"]]
        for each in self.ranked:
            weight = "-" if each.weight is None else f"{each.weight:.3f}"
            figures = [f"{each.average:.2f}", f"{each.times:.1f}", f"{each.far:.0%}", weight]
            lines.append([str(each.dim), *figures, "yes" if each.sink else ""])
        notes = [
            f"sink: above {self.times:g} medians without first tokens. far out: share of tokens "
            "and layers in which it is above 10 medians. norm weight: over the norms' median."
        ]
        if not self.dims:
            notes.append("No dimension is a residual sink by that measure.")
        return Part("Residual sinks", lines, notes)

    def _bounds(self) -> Part:
        lines = [["norm", "r", "r first", "left behind it", "epsilon", "size / bound"]]
        for each in self.norms:
            epsilon = "-" if each.epsilon is None else f"{each.epsilon:.3f}"
            tightest = "-" if each.tightest is None else f"{each.tightest:.3f}"
            shares = [f"{each.share:.3f}", f"{each.share_first:.3f}", f"{each.part:.2%}"]
            lines.append([each.norm, *shares, epsilon, tightest])
        whose = "the sinks" if self.dims else f"dimension {self.ranked[0].dim}"
        holds = {
            True: "holds at every norm",
            False: "does not hold everywhere",
            None: "was not checked: no norm is an RMSNorm or a LayerNorm",
        }[self.bound_holds]
        notes = [
            f"r: share of {whose} in the length of what the norm reads; left behind it: in the "
            f"energy of what it gives. The bound on |RMSNorm(h)| (size / bound at most 1) {holds}."
        ]
        return Part("Outliers at the norms", lines, notes)

    def _page(self) -> str:
        tables = Result._repr_html_(self)
        lead = f'<p class="faint">{escape(self.model)}</p>'
        return report(
            f"pertoken: {self._title}", self._title, _heat(self.first) + tables, lead=lead
        )


def _heat(shares: list[list[float]]) -> str:
    """Attention on the first token as a picture: a row per layer, a column per head."""
    size, left, top = 14, 60, 20
    width, height = left + size * len(shares[0]), top + size * len(shares)
    cells = "".join(
        f'<rect x="{left + size * head}" y="{top + size * layer}" width="{size - 1}" '
        f'height="{size - 1}" fill="#0068a6" fill-opacity="{share:.3f}" stroke="#888" '
        f'stroke-width="0.3"><title>layer {layer}, head {head}: {share:.0%}</title></rect>'
        for layer, row in enumerate(shares)
        for head, share in enumerate(row)
    )
    labels = "".join(
        f'<text x="{left - 6}" y="{top + size * layer + 11}" font-size="10" text-anchor="end" '
        f'fill="currentColor">{layer}</text>'
        for layer in range(len(shares))
    )
    return (
        "<h2>Attention on the first token</h2>\n"
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'aria-label="Attention on the first token, by layer (down) and head (across)">'
        f'<text x="{left}" y="12" font-size="10" fill="currentColor">heads</text>'
        f"{labels}{cells}</svg>\n"
    )
