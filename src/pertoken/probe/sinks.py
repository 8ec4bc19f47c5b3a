"""Sinks of a model: the tokens that take the attention, the dimensions that are always huge.

arXiv 2601.22966. Texts are read twice. The first time it is noted

- how much attention each position receives, by layer and head. Attention goes through sdpa; the
  weights are made again for some queries at a time and only their sums are kept;
- how long the values of the first token are against those of the others;
- the greatest number of the stream in each layer, against its median (massive activations);
- H_j^avg, the mean of |h_j| over tokens and the layers 0 … D (the stream before each block and
  behind the last). A dimension is called a residual sink where the mean without first tokens is
  above `times` medians of all dimensions (our reading; the paper ranks them).

The second time, at every norm on the stream and for every token, with h what the norm reads,

    r = |h_sinks| / |h|,    |RMSNorm(h)|_rms <= |λ|_max sqrt((1 - r²) + ε² r²)

with ε = |λ_sinks|_max / |λ|_max (the paper's bound, told for several dimensions at once).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pertoken._takeover import Takeover, layer_windows, sdpa, visible
from pertoken._takeover import refuse_unfit as refuse_attention
from pertoken.errors import PertokenError
from pertoken.probe._anatomy import Anatomy, anatomy, centred, check_finite, gain
from pertoken.probe._sinks_report import ROUNDING, NormShare, SinkDim, Sinks, StreamLayer, Taker
from pertoken.probe._stream import Progress, block_inputs, refuse_unfit
from pertoken.prompts import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["find_sinks"]

_WEIGHTS = 2**22  # attention weights that are held at a time
_TAKERS = 3  # positions of a text that are noted
_FAR = 10.0  # |h_j| over the median of its token, from which on it counts as huge


@torch.no_grad()
def find_sinks(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: str | Sequence[str],
    *,
    times: float = 10.0,
    length: int = 512,
    progress: Progress | None = None,
) -> Sinks:
    """Attention sinks, massive activations and residual sinks of a model, over some texts.

    texts: at least one of two tokens or more; of each, `length` tokens at most are read.
    times: how many medians of all dimensions make one a residual sink.
    progress: called with (what, texts done, texts in all).
    Raises PertokenError for a model whose attention cannot be answered from outside or whose blocks
    are not understood, texts without two tokens, and numbers that are not finite (names the block).

    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> tokenizer = ByteTokenizer()
    >>> model = tiny_model("llama", vocab_size=len(tokenizer))
    >>> found = find_sinks(model, tokenizer, ["the cat sat", "on the mat"])
    >>> found.dims, len(found.first), found.bound_holds
    ([], 2, True)
    """
    refuse_unfit(model)
    refuse_attention(model, "find_sinks")
    if not times > 1:
        raise PertokenError(f"times must be above 1, got {times}")
    rows = _rows(model, tokenizer, [texts] if isinstance(texts, str) else texts, length)
    parts = anatomy(model)
    tell = progress or (lambda what, done, total: None)
    sums = _Sums(parts, layer_windows(model))
    for done, ids in enumerate(rows):
        tell("attention and stream", done, len(rows))
        sums.add(model, tokenizer, ids)
    dims, ranked = _dims(sums, parts, times)
    norms = [_NormSums(norm, dims or [ranked[0].dim]) for norm in parts.norms]
    for done, ids in enumerate(rows):
        tell("share of the outliers", done, len(rows))
        with ExitStack() as stack:
            for each in norms:
                handle = each.norm.register_forward_hook(each.note)
                stack.callback(handle.remove)
            model.get_decoder()(input_ids=ids, use_cache=False)
    return Sinks(
        model=type(model).__name__,
        texts=len(rows),
        tokens=sum(ids.shape[1] for ids in rows),
        times=times,
        first=_mean(sums.first, len(rows)),
        elsewhere=_mean(sums.elsewhere, len(rows)),
        values=[value / len(rows) for value in sums.values],
        takers=_takers(sums, len(rows)),
        layers=[sums.layer(place) for place in range(len(sums.peaks))],
        dims=dims,
        ranked=ranked,
        norms=[each.result(name) for name, each in zip(parts.names, norms, strict=True)],
        # A norm rounds twice: what it divides, and that times λ.
        rounding=max(ROUNDING, 2 * torch.finfo(model.dtype).eps),
    )


def _rows(
    model: PreTrainedModel, tokenizer: Any, texts: Sequence[str], length: int
) -> list[torch.Tensor]:
    """Ids [1, time] of every text."""
    if length < 2:
        raise PertokenError(f"length must be 2 or more, got {length}")
    limit = positions(model)
    rows = []
    for place, text in enumerate(texts):
        ids = list(tokenizer(text)["input_ids"])[: min(length, limit or length)]
        if len(ids) < 2:
            raise PertokenError(f"text {place} has {len(ids)} tokens: sinks need two or more")
        rows.append(torch.tensor([ids], device=model.device))
    if not rows:
        raise PertokenError("no text to look for sinks in")
    return rows


@dataclass
class _Sums:
    """What the first reading adds up."""

    parts: Anatomy
    windows: list[int | None]
    first: dict[int, torch.Tensor] = field(default_factory=dict)
    elsewhere: dict[int, torch.Tensor] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)
    takers: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    peaks: list[tuple[float, int, int, str]] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    magnitude: torch.Tensor | None = None  # [layers, hidden], of all tokens
    magnitude_first: torch.Tensor | None = None  # of first tokens
    far: torch.Tensor | None = None  # [hidden], tokens behind the first with |h_j| far out
    tokens: int = 0
    texts: int = 0

    def add(self, model: PreTrainedModel, tokenizer: Any, ids: torch.Tensor) -> None:
        """Read one text, ids [1, time]."""
        mass: dict[int, torch.Tensor] = {}
        lengths: dict[int, float] = {}

        def attend(module: Any, query: Any, key: Any, value: Any, *_: Any, **kwargs: Any) -> Any:
            layer = module.layer_idx
            places = torch.arange(ids.shape[1], device=ids.device)
            window = self.windows[layer]
            narrow = window is not None and ids.shape[1] > window
            allowed = visible(places, places, window) if narrow else None
            mass[layer] = _received(query, key, kwargs.get("scaling"), window)
            norms = value[0].double().norm(dim=-1)
            lengths[layer] = float((norms[:, 0] / norms[:, 1:].mean(-1)).mean())
            return sdpa(module, query, key, value, allowed, **kwargs)

        watched = [*self.parts.blocks, self.parts.final]
        with Takeover(model)(attend), block_inputs(watched) as streams:
            model.get_decoder()(input_ids=ids, use_cache=False)
        for place, stream in enumerate(streams[1:]):
            check_finite(model, place, stream)
        names = tokenizer.convert_ids_to_tokens(ids[0].tolist())
        self._add_attention(mass, lengths, names)
        self._add_stream([stream[0].double() for stream in streams], names)

    def _add_attention(
        self, mass: dict[int, torch.Tensor], lengths: dict[int, float], names: list[str]
    ) -> None:
        layers = sorted(mass)
        self.values = self.values or [0.0 for _ in layers]
        for place, layer in enumerate(layers):
            own = mass[layer]
            self.first[layer] = self.first.get(layer, 0) + own[:, 0]
            self.elsewhere[layer] = self.elsewhere.get(layer, 0) + own[:, 1:].amax(-1)
            self.values[place] += lengths[layer]
        whole = torch.stack([mass[layer].mean(0) for layer in layers]).mean(0)
        best = whole.topk(min(_TAKERS, len(whole)))
        for share, position in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            self.takers["the first token" if position == 0 else names[position]] += share

    def _add_stream(self, streams: list[torch.Tensor], names: list[str]) -> None:
        sizes = torch.stack(streams).abs()  # [layers, time, hidden]
        if self.magnitude is None:
            self.magnitude = torch.zeros_like(sizes[:, 0])
            self.magnitude_first = torch.zeros_like(sizes[:, 0])
            self.far = torch.zeros_like(sizes[0, 0])
            self.medians = [0.0 for _ in streams]
            self.peaks = [(-1.0, 0, 0, "") for _ in streams]
        assert self.magnitude_first is not None
        assert self.far is not None
        self.magnitude += sizes.sum(1)
        self.magnitude_first += sizes[:, 0]
        middle = sizes.median(-1).values
        self.far += (sizes[:, 1:] > _FAR * middle[:, 1:, None]).sum((0, 1))
        for place, size in enumerate(sizes):
            self.medians[place] += float(middle[place].mean())
            peak, where = size.flatten().max(0)
            position, dim = divmod(int(where), size.shape[-1])
            if float(peak) > self.peaks[place][0]:
                self.peaks[place] = (float(peak), position, dim, names[position])
        self.tokens += sizes.shape[1]
        self.texts += 1

    def layer(self, place: int) -> StreamLayer:
        """The greatest number of one layer of the stream."""
        peak, position, dim, token = self.peaks[place]
        return StreamLayer(place, peak, self.medians[place] / self.texts, dim, position, token)


def _received(query: Any, key: Any, scaling: float | None, window: int | None) -> torch.Tensor:
    """Share of attention that each key receives, [heads, keys], float64; each row adds up to 1.

    query [1, heads, time, dim], key [1, key heads, time, dim]. The first query is left out: it has
    nothing to choose.
    """
    key = key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)
    query = query[0] * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    heads, time, _ = query.shape
    places = torch.arange(time, device=query.device)
    total = torch.zeros(heads, time, dtype=torch.float64, device=query.device)
    step = max(1, _WEIGHTS // (heads * time))
    for start in range(1, time, step):
        own = places[start : start + step]
        scores = (query[:, own] @ key.mT).to(torch.promote_types(query.dtype, torch.float32))
        scores = scores.masked_fill(~visible(own, places, window), float("-inf"))
        total += scores.softmax(-1).double().sum(1)
    return total / (time - 1)


def _mean(sums: dict[int, torch.Tensor], count: int) -> list[list[float]]:
    return [(sums[layer] / count).tolist() for layer in sorted(sums)]


def _takers(sums: _Sums, count: int) -> list[Taker]:
    found = sorted(sums.takers.items(), key=lambda item: -item[1])
    return [Taker(token, share / count) for token, share in found[:8]]


def _dims(sums: _Sums, parts: Anatomy, times: float) -> tuple[list[int], list[SinkDim]]:
    """The residual sinks, and the dimensions that come first in H^avg."""
    assert sums.magnitude is not None
    assert sums.magnitude_first is not None
    assert sums.far is not None
    layers, behind = len(sums.magnitude), sums.tokens - sums.texts
    average = sums.magnitude.sum(0) / (layers * sums.tokens)
    later = (sums.magnitude - sums.magnitude_first).sum(0) / (layers * behind)
    middle = float(later.median()) or 1.0
    gains = [weight.abs() for norm in parts.norms if (weight := gain(norm)) is not None]
    relative = [weight / weight.median() for weight in gains]
    weights = torch.stack(relative).mean(0) if relative else None
    ranked: list[SinkDim] = []
    for dim in average.argsort(descending=True).tolist():
        over = float(later[dim]) / middle
        if len(ranked) >= 8 and over <= times:
            continue
        own = None if weights is None else float(weights[dim])
        far = float(sums.far[dim]) / (layers * behind)
        ranked.append(SinkDim(dim, float(average[dim]), over, far, own, over > times))
    return [each.dim for each in ranked if each.sink], ranked


class _NormSums:
    """What the second reading adds up at one norm."""

    def __init__(self, norm: torch.nn.Module, dims: list[int]) -> None:
        self.norm, self.dims, self.weight = norm, dims, gain(norm)
        self.share = self.first = self.part = self.tightest = 0.0
        self.tokens = self.texts = 0

    def note(self, norm: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        """A forward hook: what the norm read and gave, [1, time, hidden]; OPT: [time, hidden]."""
        read, gave = centred(norm, args[0].flatten(0, -2).double()), output.flatten(0, -2).double()
        bias = getattr(norm, "bias", None)
        gave = gave if bias is None else gave - bias.double()
        energy = read.square().sum(-1).clamp(min=1e-300)
        share = read[:, self.dims].square().sum(-1) / energy  # r²
        self.first += float(share[0].sqrt())
        self.share += float(share[1:].sqrt().sum())
        whole = gave.square().sum(-1).clamp(min=1e-300)
        self.part += float((gave[1:, self.dims].square().sum(-1) / whole[1:]).sum())
        if self.weight is not None:
            most = self.weight.abs().max()
            bound = most * ((1 - share) + (self.epsilon * self.epsilon) * share).clamp(min=0).sqrt()
            size = gave.square().mean(-1).sqrt()
            self.tightest = max(self.tightest, float((size / bound).max()))
        self.tokens += len(share) - 1
        self.texts += 1

    @property
    def epsilon(self) -> float:
        """The sinks' greatest weight over the norm's."""
        assert self.weight is not None
        return float(self.weight[self.dims].abs().max() / self.weight.abs().max())

    def result(self, name: str) -> NormShare:
        """Means over tokens behind the first, the first apart; the bound's tightest token."""
        known = self.weight is not None
        return NormShare(
            name,
            self.share / self.tokens,
            self.first / self.texts,
            self.part / self.tokens,
            self.epsilon if known else None,
            self.tightest if known else None,
        )
