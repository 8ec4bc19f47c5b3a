"""What `layer_geometry` found: records by layer and function class, tables, pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pertoken._extras import need
from pertoken._files import check_target, write_whole
from pertoken.probe._geometry_measures import Floats, over_documents, spearman
from pertoken.probe._geometry_page import page, svg
from pertoken.result import Part, Result, figure, plain

_MEASURES = (
    "cosine",
    "update_cosine",
    "explained",
    "relative_error",
    "residual_cosine",
    "angle",
    "output_in_subspace",
    "residual_in_subspace",
)
_NOTES = (
    "identity: T(x) = x, what a cosine is worth without any fit",
    "cosine: of y and T(x); update cosine: of y - x and T(x) - x; explained: share of the squared "
    "size of y - x; angle: of y - T(x) and T(x), in degrees; in subspace: share of the squared "
    "size in the leading principal directions of T(x)",
)


@dataclass(frozen=True)
class Fit:
    """One class at one layer; means over tokens, NaN where a vector is 0."""

    layer: int
    function: str
    neighbours: int | None
    tokens: str
    """"all" or "not first"."""
    dimensions: str
    """"all" or "no outliers"."""
    cosine: float
    """Of the output y and the tokenwise part T(x)."""
    update_cosine: float
    """Of y - x and T(x) - x; NaN for the identity."""
    residual_cosine: float
    """Of the residual r = y - T(x) and T(x)."""
    residual_update_cosine: float
    """Of r and T(x) - x."""
    angle: float
    """Of r and T(x), in degrees."""
    error: float
    """Norm of r."""
    relative_error: float
    """Norm of r over that of y."""
    explained: float
    """1 - Σ|r|² / Σ|y - x|²: 0 for the identity, below 0 for what is worse."""
    output_in_subspace: float
    """Share of |y|² in the leading principal directions of T(x)."""
    residual_in_subspace: float
    """Share of |r|² there."""


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation and its 95 % interval over resampled documents."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Effect:
    """What happens to the output when a layer's output is replaced by T(x)."""

    layer: int
    function: str
    kl: float
    """KL(model || replaced) at the same position, nats, mean over tokens."""
    logit_change: float
    """Mean absolute change of a logit."""
    spearman: Correlation
    """Over tokens: norm of the residual and KL."""
    spearman_relative: Correlation
    """Norm of the residual over that of the output, and KL."""
    spearman_logits: Correlation
    """Norm of the residual and mean change of a logit."""


@dataclass(frozen=True)
class PerToken:
    """The columns behind an `Effect`, [tokens] each."""

    layer: int
    function: str
    documents: Any
    error: Floats
    relative_error: Floats
    kl: Floats
    logit_change: Floats

    def effect(self, seed: int) -> Effect:
        """Means and correlations."""
        pairs = {
            "spearman": (self.error, self.kl),
            "spearman_relative": (self.relative_error, self.kl),
            "spearman_logits": (self.error, self.logit_change),
        }
        return Effect(
            self.layer,
            self.function,
            float(self.kl.mean()),
            float(self.logit_change.mean()),
            **{name: self._correlation(*pair, seed) for name, pair in pairs.items()},
        )

    def _correlation(self, first: Floats, second: Floats, seed: int) -> Correlation:
        def drawn(counts: Floats) -> Floats:
            return spearman(first, second, counts[:, self.documents])

        count = int(self.documents.max()) + 1
        interval = over_documents(drawn, count, seed)
        return Correlation(float(spearman(first, second)), *interval)


def over_layers(found: Sequence[PerToken], seed: int) -> dict[str, dict[str, Correlation]]:
    """Spearman over layers of mean residual and mean KL, by class; absolute and relative."""
    return {
        name: {
            kind: _between(
                [
                    (getattr(each, kind), each.kl, each.documents)
                    for each in found
                    if each.function == name
                ],
                seed,
            )
            for kind in ("error", "relative_error")
        }
        for name in dict.fromkeys(each.function for each in found)
    }


def _between(layers: Sequence[tuple[Floats, Floats, Any]], seed: int) -> Correlation:
    """Of the layers' means; documents are resampled, layers stay."""
    documents = layers[0][2]
    count = int(documents.max()) + 1
    sizes = np.bincount(documents, minlength=count)
    sums = np.array(
        [[np.bincount(documents, column, count) for column in pair[:2]] for pair in layers]
    )

    def drawn(counts: Floats) -> Floats:
        means = np.einsum("nd,lcd->ncl", counts, sums) / (counts @ sizes)[:, None, None]
        return np.array([spearman(error, kl) for error, kl in means])

    interval = over_documents(drawn, count, seed)
    return Correlation(float(drawn(np.ones((1, count)))[0]), *interval)


@dataclass(frozen=True)
class LayerGeometry(Result):
    """Tokenwise part and residual of every layer, by function class."""

    settings: dict[str, Any]
    fits: list[Fit]
    """By layer, class, number of neighbours and view (tokens and dimensions that count)."""
    effects: list[Effect]
    """By tested class and layer."""
    over_layers: dict[str, dict[str, Correlation]]
    """By tested class: Spearman over layers of mean "error" or "relative_error" with mean KL."""
    outliers: list[list[int]]
    """The outlier dimensions of each layer's output."""

    _title = "What layers do to a token"

    def view(self, tokens: str = "not first", dimensions: str = "no outliers") -> list[Fit]:
        """The fits as measured on some tokens ("all", "not first") and dimensions ("all", …)."""
        return [one for one in self.fits if (one.tokens, one.dimensions) == (tokens, dimensions)]

    def curve(self, function: str, measure: str, neighbours: int | None = None) -> list[float]:
        """A measure of a class by layer, without first tokens and outlier dimensions.

        neighbours: by default the first number that was tried.
        """
        found = [one for one in self.view() if one.function == function]
        wanted = neighbours or (found[0].neighbours if found else None)
        return [getattr(one, measure) for one in found if one.neighbours == wanted]

    def summary(self, tokens: str = "not first", dimensions: str = "no outliers") -> list[Any]:
        """A record per class and number of neighbours: means over layers, the identity first."""
        groups: dict[tuple[str, int | None], list[Fit]] = {}
        for one in self.view(tokens, dimensions):
            groups.setdefault((one.function, one.neighbours), []).append(one)
        return [
            {"function": name, "neighbours": count}
            | {key: _mean([getattr(one, key) for one in found]) for key in _MEASURES}
            for (name, count), found in groups.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Settings, summary, records, effects, correlations over layers, outlier dimensions."""
        found: dict[str, Any] = plain(
            {
                "settings": self.settings,
                "summary": self.summary(),
                "fits": [asdict(one) for one in self.fits],
                "effects": [asdict(one) for one in self.effects],
                "over_layers": {
                    name: {kind: asdict(one) for kind, one in kinds.items()}
                    for name, kinds in self.over_layers.items()
                },
                "outliers": self.outliers,
            }
        )
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A record per layer, class, neighbours and view; the effect of tested classes beside."""
        effects = {(one.layer, one.function): _flat(one) for one in self.effects}
        first = (self.settings["neighbours"] or [None])[0]
        rows = []
        for one in self.fits:
            tested = one.neighbours in (None, first)
            beside = effects.get((one.layer, one.function), {}) if tested else {}
            rows.append(plain(asdict(one) | beside))
        return rows

    def _parts(self) -> list[Part]:
        said = self.settings
        about = f"{said['fit']} fit, {said['tokens']} tokens of {said['documents']} documents"
        views = {
            "without first tokens and outlier dimensions": ("not first", "no outliers"),
            "all tokens and dimensions": ("all", "all"),
        }
        parts = [
            Part(f"Means over layers, {view}; {about}", self._classes(*which), notes)
            for (view, which), notes in zip(views.items(), ((), _NOTES), strict=True)
        ]
        return parts + [self._layers(name) for name in self.over_layers]

    def _classes(self, tokens: str, dimensions: str) -> list[list[str]]:
        keys = [key.replace("_", " ") for key in _MEASURES]
        lines = [["T", "k", *keys]]
        for row in self.summary(tokens, dimensions):
            count = "" if row["neighbours"] is None else str(row["neighbours"])
            lines.append([row["function"], count, *(_text(row[key]) for key in _MEASURES)])
        return lines

    def _layers(self, name: str) -> Part:
        """By layer, a tested class beside the identity."""
        lines = [["layer", "cosine", "of identity", "explained", "angle", "KL", "Spearman", "95 %"]]
        columns = [self.curve(name, key) for key in ("cosine", "explained", "angle")]
        base = self.curve("identity", "cosine")
        for effect in (one for one in self.effects if one.function == name):
            cosine, explained, angle = (column[effect.layer] for column in columns)
            found = effect.spearman
            cells = [cosine, base[effect.layer], explained, angle, effect.kl, found.value]
            interval = f"{found.low:.2f} to {found.high:.2f}"
            lines.append([str(effect.layer), *map(_text, cells), interval])
        kinds = {"error": "mean |r|", "relative_error": "mean |r| / |y|"}
        notes = [
            f"over layers, {words} and mean KL: Spearman {_text(one.value)} "
            f"({one.low:.2f} to {one.high:.2f})"
            for kind, words in kinds.items()
            for one in [self.over_layers[name][kind]]
        ]
        return Part(
            f"By layer: T {name}, its output in the layer's place",
            lines,
            ["Spearman: over tokens, of |r| and KL", *notes],
        )

    def _curves(self) -> dict[str, dict[str, list[float]]]:
        """The curves of the pictures: their title, then values by layer under a name."""
        names = list(dict.fromkeys(one.function for one in self.fits))
        curves = {
            "share of the update explained": {
                name: self.curve(name, "explained") for name in names
            },
            "cosine of output and T(x)": {name: self.curve(name, "cosine") for name in names},
        }
        if self.effects:
            curves["Spearman of |r| and KL"] = {
                name: [one.spearman.value for one in self.effects if one.function == name]
                for name in self.over_layers
            }
        return curves

    def plot(self) -> Any:
        """The pictures of the page as one plotly figure (extra `plot`).

        ``plot().write_image("geometry.png")`` needs kaleido; `to_svg` needs nothing.
        """
        graph = need("plotly.graph_objects", "plot")
        curves = self._curves()
        traces, layout = [], {}
        for row, (title, lines) in enumerate(curves.items()):
            axis = "" if row == 0 else str(row + 1)
            domain = [1 - (row + 0.9) / len(curves), 1 - row / len(curves)]
            layout[f"yaxis{axis}"] = {"title": title, "domain": domain}
            for name, values in lines.items():
                traces.append(graph.Scatter(y=values, name=f"{title}: {name}", yaxis=f"y{axis}"))
        return figure(traces, xaxis={"title": "layer"}, height=320 * len(curves), **layout)

    def to_svg(self, path: str | Path | None = None) -> str:
        """The pictures of the page as SVG, also written to `path` if given.

        Raises PertokenError where the file could not be written.
        """
        text = svg(self._curves())
        if path is not None:
            check_target(Path(path))
            write_whole(Path(path), text)
        return text

    def _page(self) -> str:
        return page(f"pertoken: {self._title}", self._title, self._curves(), self._repr_html_())


def _flat(effect: Effect) -> dict[str, Any]:
    """An effect as columns of a row."""
    found: dict[str, Any] = {"kl": effect.kl, "logit_change": effect.logit_change}
    for name in ("spearman", "spearman_relative", "spearman_logits"):
        one: Correlation = getattr(effect, name)
        found |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
    return found


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _text(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "-"
