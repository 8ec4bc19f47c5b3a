"""What follows from keys and values being functions of the residual stream (KV-Direct).

arXiv 2603.19664. Keys and values of a block are made from the block's own input and nothing else:
K = R(W_k norm(h)), V = W_v norm(h), with R the rotation of the token's position. So they can be
made again (`reconstruction_error`), and a model decodes the same text without any cache
(`cache_free_decoding`).

The first is an identity of floating-point numbers where the same rows are projected at once, as
here and in the paper; other shapes of a matrix product round differently. The paper finds errors
above 0 in the sliding-window layers of Gemma-3 and blames positions relative to the window; in
transformers these layers rotate by absolute positions with a base of their own, so that the error
is 0 there too. The second holds up to rounding: where the texts part, it is judged whether the two
tokens nearly tie.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from pertoken.errors import PertokenError, nearest
from pertoken.probe._stream import (
    Progress,
    block_inputs,
    one_text,
    refuse_compiled,
    refuse_unfit,
)
from pertoken.prompts import positions
from pertoken.result import Part, Result, plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pertoken.testing.divergence import Verdict

NEW_TOKENS = 30
"""Tokens the paper decodes without a cache."""


@dataclass(frozen=True)
class LayerError:
    """Greatest difference of any number of a layer's keys and values; 0 means bit for bit."""

    dtype: str
    tokens: int
    layer: int
    window: int | None
    """Of a sliding-window layer, in tokens."""
    keys: float
    values: float

    @property
    def exact(self) -> bool:
        return self.keys == self.values == 0


@dataclass(frozen=True)
class Reconstruction(Result):
    """Keys and values made again from the stream, against those in the cache."""

    errors: list[LayerError]
    """One per dtype, length and layer."""

    _title = "Keys and values from the residual stream"

    @property
    def exact(self) -> bool:
        """Whether every number of every layer came out bit for bit."""
        return all(error.exact for error in self.errors)

    @property
    def greatest(self) -> float:
        """The greatest difference of all; NaN where the model itself overflows to NaN."""
        return _most(number for error in self.errors for number in (error.keys, error.values))

    def table(self, *, layers: bool = True) -> str:
        """One row per layer, or one for all layers of a kind."""
        return self._parts(layers)[0].text()

    def _parts(self, layers: bool = True) -> list[Part]:
        groups: dict[tuple[Any, ...], list[LayerError]] = {}
        for error in self.errors:
            key = (error.dtype, error.tokens, error.window, error.layer if layers else None)
            groups.setdefault(key, []).append(error)
        rows = [
            [
                dtype,
                str(tokens),
                f"{len(found)} {_kind(window)}" if layer is None else f"{layer} {_kind(window)}",
                f"{_most(error.keys for error in found):.3g}",
                f"{_most(error.values for error in found):.3g}",
                f"{sum(error.exact for error in found)} of {len(found)}",
            ]
            for (dtype, tokens, window, layer), found in groups.items()
        ]
        headings = ["dtype", "tokens", "layer" if layers else "layers"]
        headings += ["max |ΔK|", "max |ΔV|", "bit-exact"]
        return [Part("keys and values from the residual stream", [headings, *rows])]

    def to_dict(self) -> dict[str, Any]:
        """Whether all is exact, the greatest difference, and the rows as `errors`."""
        return {"exact": self.exact, "greatest": plain(self.greatest), "errors": self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        """A record per dtype, length and layer; None for NaN."""
        return [plain(asdict(error) | {"exact": error.exact}) for error in self.errors]


@torch.no_grad()
def reconstruction_error(
    model: PreTrainedModel,
    input_ids: torch.Tensor | Sequence[int],
    *,
    dtypes: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Reconstruction:
    """Make the keys and values of every layer again from its input, and compare.

    input_ids: [1, time] or [time], without pads.
    dtypes: such as ("float32", "bfloat16"), each tried on a copy of the model with its weights
        rounded; by default the model's own.
    lengths: how many of the ids are read, one run each; by default all.
    progress: called with (what, layers done, layers in all).
    Raises PertokenError for a model whose attention cannot be answered from outside, ids that are
    no text, an unknown dtype, a length the text does not have.

    >>> from pertoken.testing import tiny_model
    >>> reconstruction_error(tiny_model("gemma3"), [5, 6, 7], lengths=[2, 3]).exact
    True
    """
    from pertoken import _takeover

    refuse_unfit(model)
    refuse_compiled(model)
    _takeover.refuse_unfit(model, "reconstruction_error")
    ids = one_text(model, input_ids)
    for length in lengths or ():
        if not 1 <= length <= ids.shape[1]:
            raise PertokenError(f"lengths go from 1 to {ids.shape[1]}, the text's; got {length}")
    _refuse_unnumbered(model, ids.shape[1])
    errors = []
    for dtype in [dtype_named(name) for name in dtypes] if dtypes else [model.dtype]:
        same = dtype == model.dtype
        cast = model if same else _cast(model, dtype)
        for length in lengths or [ids.shape[1]]:
            errors += _layer_errors(cast, ids[:, :length], progress)
    return Reconstruction(errors)


def _layer_errors(
    model: PreTrainedModel, ids: torch.Tensor, progress: Progress | None
) -> list[LayerError]:
    from transformers import DynamicCache

    from pertoken._blocks import Blocks
    from pertoken._takeover import layer_windows

    tell = progress or (lambda what, done, total: None)
    blocks, windows = Blocks(model), layer_windows(model)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    # Made without the config, the cache keeps all rows of sliding-window layers too.
    cache = DynamicCache()
    with block_inputs(blocks.modules) as streams:
        model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    calls = blocks.enter(ids, positions).calls
    errors = []
    for layer, stream in enumerate(streams):
        tell("keys and values from the stream", layer, len(streams))
        keys, values = blocks.project(layer, stream, calls[layer])
        kept = cache.layers[layer]
        errors.append(
            LayerError(
                dtype=_name(model.dtype),
                tokens=ids.shape[1],
                layer=layer,
                window=windows[layer],
                keys=_greatest(keys, kept.keys),
                values=_greatest(values, kept.values),
            )
        )
    return errors


@dataclass(frozen=True)
class CacheFree(Result):
    """One text decoded greedily with a cache and without any."""

    prompt_tokens: int
    ids: list[int]
    """New tokens with a cache."""
    ids_without: list[int]
    verdict: Verdict
    """How the texts compare; its divergence holds the gap between the two best tokens there."""
    seconds: float
    seconds_without: float

    _title = "Greedy decoding without a cache"

    @property
    def equal(self) -> int:
        """New tokens before the texts part."""
        divergence = self.verdict.divergence
        return len(self.ids) if divergence is None else divergence.step

    @property
    def slower(self) -> float:
        """Seconds without a cache over seconds with one."""
        return self.seconds_without / self.seconds

    def rows(self) -> list[dict[str, Any]]:
        """One record: the figures, without the ids."""
        divergence = self.verdict.divergence
        return [
            {
                "prompt_tokens": self.prompt_tokens,
                "new_tokens": len(self.ids),
                "equal": self.equal,
                "outcome": self.verdict.outcome,
                "top2_gap": None if divergence is None else divergence.top2_gap,
                "seconds": self.seconds,
                "seconds_without": self.seconds_without,
                "slower": self.slower,
            }
        ]

    def _parts(self) -> list[Part]:
        divergence = self.verdict.divergence
        gap = "-" if divergence is None else f"{divergence.top2_gap:.3g}"
        row = [
            f"{self.equal} of {len(self.ids)}",
            self.verdict.outcome,
            gap,
            f"{self.seconds:.2f}",
            f"{self.seconds_without:.2f}",
            f"{self.slower:.2f}",
        ]
        headings = ["equal tokens", "verdict", "top-2 gap there", "s cached", "s without", "ratio"]
        title = f"greedy decoding without a cache, {self.prompt_tokens} tokens in front"
        return [Part(title, [headings, row])]

    def to_dict(self) -> dict[str, Any]:
        """The fields, what follows from them, and the verdict."""
        own = {key: value for key, value in vars(self).items() if key != "verdict"}
        return {**own, "equal": self.equal, "slower": self.slower, **self.verdict.to_dict()}


@torch.no_grad()
def cache_free_decoding(
    model: PreTrainedModel,
    input_ids: torch.Tensor | Sequence[int],
    max_new_tokens: int = NEW_TOKENS,
    *,
    progress: Progress | None = None,
) -> CacheFree:
    """Decode greedily with a cache and without, stop ids ignored, and compare the tokens.

    input_ids: [1, time] or [time], without pads. Without a cache every step reads the whole text.
    The seconds are of one run each, after a forward to warm up: a look, not a benchmark.
    progress: called with (what, tokens done, tokens in all).
    Raises PertokenError for a model without keys and values, ids that are no text, fewer than 1
    new token, a text longer than the model's positions.

    >>> from pertoken.testing import tiny_model
    >>> result = cache_free_decoding(tiny_model("llama"), [5, 6, 7], max_new_tokens=4)
    >>> result.equal, result.verdict.outcome
    (4, 'identical')
    """
    from pertoken.testing.divergence import compare_ids

    refuse_unfit(model)
    ids = one_text(model, input_ids)
    if max_new_tokens < 1:
        raise PertokenError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    _refuse_unnumbered(model, ids.shape[1] + max_new_tokens)
    tell = progress or (lambda what, done, total: None)
    model(input_ids=ids, use_cache=False)
    runs = []
    for cached in (True, False):
        what = "decoding with a cache" if cached else "decoding without a cache"
        began = time.perf_counter()
        new: list[int] = []
        for token in _greedy(model, ids, max_new_tokens, cached):
            new.append(token)
            tell(what, len(new), max_new_tokens)
        runs.append((new, time.perf_counter() - began))
    (with_cache, seconds), (without, seconds_without) = runs
    verdict = compare_ids(model, ids[0], with_cache, without)
    return CacheFree(ids.shape[1], with_cache, without, verdict, seconds, seconds_without)


def _greedy(
    model: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int, cached: bool
) -> Iterator[int]:
    """New tokens one by one; `cached` forwards read the new token only, others the whole text."""
    past: dict[str, Any] = {}
    text = ids
    for _ in range(max_new_tokens):
        read = text[:, -1:] if past else text
        positions = torch.arange(text.shape[1], device=text.device)[None, -read.shape[1] :]
        output = model(input_ids=read, position_ids=positions, use_cache=cached, **past)
        best = output.logits[:, -1:].argmax(-1)
        if cached:
            past = {"past_key_values": output.past_key_values}
        text = torch.cat((text, best), -1)
        yield int(best)


def _refuse_unnumbered(model: PreTrainedModel, tokens: int) -> None:
    """A text longer than a model's positions is refused: some models would fail in the middle."""
    limit = positions(model)
    if limit is not None and tokens > limit:
        raise PertokenError(
            f"{tokens} tokens are more than the {limit} positions of {type(model).__name__}"
        )


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of the model with its weights in another dtype."""
    # Weights only: rotary frequencies are buffers, and stay as exact as they were.
    cast = copy.deepcopy(model)
    for parameter in cast.parameters():
        parameter.data = parameter.data.to(dtype)
    return cast


def dtype_named(name: str) -> torch.dtype:
    from pertoken.loading import DTYPES

    found = getattr(torch, name, None) if name in DTYPES else None
    if not isinstance(found, torch.dtype):
        raise PertokenError(f"unknown dtype {name!r}{nearest(name, DTYPES)}: {', '.join(DTYPES)}")
    return found


def _greatest(made: torch.Tensor, kept: torch.Tensor) -> float:
    # Equal infinities are equal. NaN is not: Gemma-3's stream overflows in float16, and of a model
    # that computes nothing there is nothing to be said.
    return float((made - kept).abs().masked_fill(made == kept, 0.0).max())


def _most(numbers: Iterable[float]) -> float:
    """The greatest number, NaN if any is.

    >>> _most([1.0, float("nan"), 2.0]), _most([1.0, 2.0])
    (nan, 2.0)
    """
    return max(numbers, key=lambda number: (number != number, number))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(window: int | None) -> str:
    return "full" if window is None else f"window {window}"
