"""How far an attribution can be trusted: soft normalised sufficiency and comprehensiveness.

Every element of every input embedding is kept or set to zero at random. For sufficiency it is kept
with the importance a of its token, for comprehensiveness with 1 - a. With d the distance of the
next-token distribution from that of the whole text, and S0 = 1 - d(all zero):

    sufficiency       = max(0, (1 - d(kept by a)) - S0) / (1 - S0)
    comprehensiveness = d(kept by 1 - a) / (1 - S0)

Both are better when larger. Source: ReAGent (2402.00794) and its code, after Zhao and Aletras 2023.

Importances sum to 1, so for sufficiency only about one token's worth of elements survives, whatever
the length: single draws are noisy. Here every method is measured on the same draws (ours). What a
method gives is made an importance by its absolute values over their sum (our reading; the authors
take the softmax of attention weights, and norms that sum to 1 of gradients). Tokens that nobody may
replace (special ones, the chat template) are never zeroed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pertoken._bootstrap import Interval, bootstrap, bootstrap_mean
from pertoken._extras import need
from pertoken._html import report
from pertoken.attribute._forward import last_logits, most_tokens
from pertoken.attribute._question import Prompt, Question, ask
from pertoken.attribute._scores import Scores, seeded
from pertoken.attribute.api import signal
from pertoken.attribute.methods import METHODS, find
from pertoken.attribute.quantity import Quantity
from pertoken.attribute.quantity import find as find_quantity
from pertoken.errors import CannotServe, PertokenError, nearest
from pertoken.result import Part, Result, figure, plain
from pertoken.signal import TokenSignal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["RANDOM", "Faithfulness", "evaluate_attribution", "importance", "soft_scores"]

RANDOM = "random"
"""The name of the reference: softmax of uniform numbers, drawn anew for every draw."""

DISTANCES = ("hellinger", "repo")
Floats = npt.NDArray[np.float64]


def importance(values: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """Importances [time] that sum to 1 over the free tokens, from scores of any sign.

    All the same where every score is zero. Raises PertokenError for a NaN among the free tokens.

    >>> importance(torch.tensor([3.0, -1.0, 9.0]), torch.tensor([True, True, False])).tolist()
    [0.75, 0.25, 0.0]
    """
    if bool(values[free].isnan().any()):
        raise PertokenError("a score is NaN: faithfulness needs one for every token")
    size = values.abs().masked_fill(~free, 0.0)
    total = size.sum()
    return size / total if float(total) > 0 else free.to(size) / free.sum()


def check_distance(distance: str) -> None:
    """Refuse a distance of distributions that there is not."""
    if distance not in DISTANCES:
        raise PertokenError(
            f"unknown distance {distance!r}{nearest(distance, DISTANCES)}: hellinger or repo"
        )


@torch.no_grad()
def soft_scores(
    question: Question,
    place: int,
    importances: torch.Tensor,
    *,
    seed: int = 0,
    distance: str = "hellinger",
) -> tuple[Floats, Floats]:
    """Sufficiency and comprehensiveness of importances, each [methods, draws].

    importances: [methods, draws, place] in [0, 1]; a draw's random numbers are the same for all
        methods. distance: "hellinger", or "repo" for what the authors' code computes, the sum of
        squares of (sqrt p - sqrt q) over sqrt 2.
    NaN where zeroing every token changes nothing.
    """
    check_distance(distance)
    if bool(importances.isnan().any()):
        raise PertokenError("an importance is NaN")
    methods, draws, _ = importances.shape
    model, free = question.model, question.free[:place]
    embeds = model.get_input_embeddings()(question.ids[None, :place])[0]
    ends = torch.stack((embeds, embeds.masked_fill(free[:, None], 0.0)))
    whole, nothing = last_logits(model, embeds=ends).softmax(-1)
    reach = float(_distance(whole, nothing[None], distance))  # 1 - S0

    # A stream of its own, apart from those of methods that draw.
    generator = seeded(seed, place - question.prompt, 2)
    chances = torch.stack((importances, 1 - importances)).to(embeds.device)
    chances = chances.permute(2, 0, 1, 3).flatten(1, 2)  # [draws, 2 * methods, place]
    rows = max(1, most_tokens(model) // place)
    at_once = max(1, rows // (2 * methods))
    parts = []
    for begin in range(0, draws, at_once):
        chance = chances[begin : begin + at_once]
        shape = (len(chance), 1, *embeds.shape)
        u = torch.rand(shape, generator=generator, dtype=torch.float64).to(embeds.device)
        for some in range(0, 2 * methods, rows):  # a long text's methods in turns
            kept = (u < chance[:, some : some + rows, :, None]) | ~free[:, None]
            masked = torch.where(kept, embeds, 0.0).flatten(0, 1)
            found = _distance(whole, last_logits(model, embeds=masked).softmax(-1), distance)
            parts.append(found.view(len(chance), -1).cpu())
    turns = -(-2 * methods // rows)
    by_draw = [torch.cat(parts[i : i + turns], 1) for i in range(0, len(parts), turns)]
    kept_by, dropped_by = torch.cat(by_draw).view(draws, 2, methods).permute(1, 2, 0)
    if reach <= 0:
        reach = math.nan
    sufficiency = (reach - kept_by).clamp(min=0) / reach
    return sufficiency.numpy(), (dropped_by / reach).numpy()


def _distance(p: torch.Tensor, q: torch.Tensor, kind: str) -> torch.Tensor:
    """Distance [rows] of distributions q [rows, vocab] from p [vocab]."""
    squares = (p.double().sqrt() - q.double().sqrt()).square().sum(-1)
    return squares / math.sqrt(2) if kind == "repo" else (squares / 2).sqrt()


@dataclass(frozen=True)
class MethodResult:
    """sufficiency, comprehensiveness: [prompts], or [draws] where there is one prompt;
    seconds: of one target token, the median over prompts."""

    name: str
    sufficiency: Floats
    comprehensiveness: Floats
    seconds: float


@dataclass(frozen=True)
class Faithfulness(Result):
    """What `evaluate_attribution` found; prints as its table.

    results: by name of the method, `random` among them. signals: for each prompt what each method
    gave, by its name. notes: what must be known.
    """

    results: dict[str, MethodResult]
    settings: dict[str, Any]
    signals: tuple[dict[str, TokenSignal], ...] = ()
    notes: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """A row per method: means, 95 % intervals, and the logarithm of the ratio to random."""
        base, seed = self.results[RANDOM], int(self.settings["seed"])
        rows = []
        for result in self.results.values():
            row: dict[str, Any] = {"method": result.name}
            for key in ("sufficiency", "comprehensiveness"):
                values, reference = getattr(result, key), getattr(base, key)
                row[key] = float(values.mean())
                row[f"{key}_interval"] = bootstrap_mean(values.tolist(), seed)
                row[f"{key}_ln_ratio"], row[f"{key}_ln_ratio_interval"] = _ln_ratio(
                    values, reference, seed
                )
            rows.append({**row, "seconds": result.seconds})
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Settings, rows, notes and the values behind them."""
        values = {
            name: {"sufficiency": result.sufficiency, "comprehensiveness": result.comprehensiveness}
            for name, result in self.results.items()
        }
        found: dict[str, Any] = plain(
            {"settings": self.settings, "rows": self.rows(), "notes": self.notes, "values": values}
        )
        return found

    def plot(self) -> Any:
        """Both metrics, a bar per method with its interval (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        rows = self.rows()
        bars = []
        for key in ("sufficiency", "comprehensiveness"):
            ends = [row[f"{key}_interval"] for row in rows]
            errors = {
                "array": [high - row[key] for row, (_, high) in zip(rows, ends, strict=True)],
                "arrayminus": [row[key] - low for row, (low, _) in zip(rows, ends, strict=True)],
            }
            names, values = [row["method"] for row in rows], [row[key] for row in rows]
            bars.append(graph.Bar(name=key, x=names, y=values, error_y=errors))
        return figure(bars, barmode="group", yaxis={"rangemode": "tozero"})

    def _parts(self) -> list[Part]:
        """The value, its interval, and ln of its ratio to random."""
        head = ["method", "sufficiency", "ln/random", "comprehensiveness", "ln/random", "seconds"]
        lines = [head]
        for row in self.rows():
            reference = row["method"] == RANDOM
            cells = [row["method"]]
            for key in ("sufficiency", "comprehensiveness"):
                low, high = row[f"{key}_interval"]
                cells.append(f"{row[key]:.3f} [{low:.3f}, {high:.3f}]")
                cells.append("" if reference else _signed(row[f"{key}_ln_ratio"]))
            lines.append([*cells, "" if reference else f"{row['seconds']:.3g}"])
        return [Part("", lines, [f"note: {note}" for note in self.notes])]

    def _page(self) -> str:
        """The table and, of each prompt, every method's coloured text."""
        from pertoken._signal_html import fragment

        texts = [fragment(signal) for each in self.signals for signal in each.values()]
        main = "\n".join([*(part.html() for part in self._parts()), *texts])
        return report("pertoken: which tokens mattered", "Which tokens mattered", main)

    def __str__(self) -> str:
        return self.table()


def _signed(number: float | None) -> str:
    return "" if number is None or not math.isfinite(number) else f"{number:+.2f}"


def _ln_ratio(values: Floats, reference: Floats, seed: int) -> tuple[float | None, Interval]:
    """ln of the ratio of the means, None where one is zero, and its interval."""

    def ratio(top: Floats, bottom: Floats) -> Floats:
        found: Floats = np.log(top.mean(-1) / bottom.mean(-1))
        return found

    top, bottom = float(values.mean()), float(reference.mean())
    interval = bootstrap(ratio, values.tolist(), reference.tolist(), seed=seed)
    return (math.log(top / bottom) if top > 0 and bottom > 0 else None), interval


def evaluate_attribution(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt | tuple[Prompt, str]],
    methods: Sequence[str] | None = None,
    *,
    target: int = 1,
    quantity: str | Quantity = "probability",
    draws: int = 20,
    distance: str = "hellinger",
    seed: int = 0,
    options: dict[str, dict[str, Any]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Faithfulness:
    """Faithfulness of attribution methods on prompts, with the seconds they take.

    prompts: texts or chats, or pairs of one and its target text; without, the model writes
        `target` tokens. methods: names, all if None (then one that the model cannot serve is left
        out with a note). options: of each method, by its name. draws: per target token, the same
        for all methods; at least 20 for a figure worth anything.
    Intervals are over prompts; with one prompt, over its draws. Prompt number i, from 0, draws with
    the seed + i: what prompts share by chance an interval over them would not show.
    Raises PertokenError for unknown names, no prompts, and scores that are NaN.

    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> model = tiny_model("llama", vocab_size=258)
    >>> found = evaluate_attribution(model, ByteTokenizer(), ["some words"], ["gradient-norm"])
    >>> list(found.results)
    ['gradient-norm', 'random']
    """
    names = list(METHODS) if methods is None else list(dict.fromkeys(methods))
    wanted = find_quantity(quantity)
    given = options or {}
    _check(names, prompts, given, draws, seed)
    check_distance(distance)
    runs: dict[str, Callable[..., Scores]] = {
        name: partial(find(name), quantity=wanted, **given.get(name, {})) for name in names
    }
    pairs = [prompt if isinstance(prompt, tuple) else (prompt, target) for prompt in prompts]
    questions = [ask(model, tokenizer, *pair) for pair in pairs]

    found: dict[str, list[_Measured]] = {name: [] for name in [*names, RANDOM]}
    signals: list[dict[str, TokenSignal]] = []
    notes: list[str] = []
    empty = 0
    for number, question in enumerate(questions):
        left_out = notes if methods is None and number == 0 else None
        told = partial(_tell, progress, number, len(questions))
        scores, seconds = _timed(question, runs, seed + number, left_out, told)
        signals.append({name: signal(question, scores[name], name, wanted) for name in scores})
        measured = _measure(question, scores, draws, seed + number, distance)
        if np.isnan(measured).any():
            empty += 1
            continue
        for row, name in enumerate([*scores, RANDOM]):
            each = _Measured(measured[0, row], measured[1, row], seconds.get(name, 0.0))
            found[name].append(each)
    if empty == len(questions):
        raise PertokenError("the model gives the same without any input: nothing can be measured")
    if empty:
        notes.append(f"{empty} prompts are left out: without any input the model says the same")
    left = len(questions) - empty
    results = {name: _result(name, own) for name, own in found.items() if own}
    settings = {
        "prompts": left,
        "target_tokens": sum(len(question.targets) for question in questions),
        "quantity": wanted.name,
        "draws": draws,
        "distance": distance,
        "seed": seed,
        "intervals_over": "prompts" if left > 1 else "draws",
        "options": {name: {k: str(v) for k, v in each.items()} for name, each in given.items()},
    }
    return Faithfulness(results, settings, tuple(signals), tuple(notes))


def _check(
    names: Sequence[str],
    prompts: Sequence[Any],
    options: Mapping[str, dict[str, Any]],
    draws: int,
    seed: int,
) -> None:
    """All that can be said before the first forward."""
    if isinstance(prompts, str):
        raise PertokenError("prompts is one text: give a list of them")
    for name in options:
        if name not in names:
            raise PertokenError(f"options for {name!r}, which is not among the methods")
    for name in names:
        find(name).filled(options.get(name, {}))
    if seed < 0:
        raise PertokenError(f"the seed must be 0 or more, got {seed}")
    if draws < 1:
        raise PertokenError(f"the number of draws must be 1 or more, got {draws}")
    if not names or not prompts:
        raise PertokenError("give at least one prompt and one method")


class _Measured(NamedTuple):
    """One prompt under one method."""

    suffices: Floats
    comprises: Floats
    seconds: float


def _result(name: str, measured: Sequence[_Measured]) -> MethodResult:
    return MethodResult(
        name,
        _units([each.suffices for each in measured]),
        _units([each.comprises for each in measured]),
        float(np.median([each.seconds for each in measured])),
    )


def _tell(
    progress: Callable[[str, int, int], None] | None, number: int, of: int, name: str
) -> None:
    if progress is not None:
        progress(name, number, of)


def _timed(
    question: Question,
    runs: dict[str, Callable[..., Scores]],
    seed: int,
    left_out: list[str] | None,
    tell: Callable[[str], None],
) -> tuple[dict[str, Scores], dict[str, float]]:
    """Scores by method, and its seconds a target token.

    left_out: where not None, a method that the model cannot serve leaves `runs` with a note here.
    """
    scores, seconds = {}, {}
    for name in list(runs):
        tell(name)
        began = time.perf_counter()
        try:
            scores[name] = runs[name](question, seed=seed)
        except CannotServe as error:
            if left_out is None:
                raise
            left_out.append(f"{name} is left out: {error}")
            del runs[name]
            continue
        seconds[name] = (time.perf_counter() - began) / len(question.targets)
    return scores, seconds


def _measure(
    question: Question, scores: dict[str, Scores], draws: int, seed: int, distance: str
) -> Floats:
    """[2, methods and random, draws]: the two metrics, means over the target tokens."""
    total = np.zeros((2, len(scores) + 1, draws))
    for number, place in enumerate(question.places):
        free = question.free[:place].cpu()
        own = [importance(each.values[number, :place], free) for each in scores.values()]
        # A stream of its own: the reference must not share numbers with the masks.
        u = torch.rand(draws, place, generator=seeded(seed, number, 1), dtype=torch.float64)
        drawn = u.masked_fill(~free, -torch.inf).softmax(-1)
        chances = torch.stack([*(each.expand(draws, -1) for each in own), drawn])
        pair = soft_scores(question, place, chances, seed=seed, distance=distance)
        total += np.stack(pair) / len(question.targets)
    return total


def _units(values: list[Floats]) -> Floats:
    """A number per prompt, the mean over draws; of a single prompt its draws."""
    return values[0] if len(values) == 1 else np.array([each.mean() for each in values])
