"""The law for samplers: sampled text must follow the model's own distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from pertoken.errors import PertokenError
from pertoken.result import Part, Result, cells, plain
from pertoken.testing.laws import LawBroken
from pertoken.testing.setups import (
    Setup,
    as_prompts,
    decode,
    drafted_tokens,
    processors,
    setup_options,
    stop_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST_TEXTS = 20_000
_LEAST_EXPECTED = 5.0  # the usual rule for when chi-square describes a cell


@dataclass(frozen=True)
class ChiSquare:
    """One chi-square test of goodness of fit."""

    statistic: float
    degrees: int
    p_value: float


@dataclass(frozen=True)
class DistributionResult(Result):
    """What `check_distribution` found."""

    p_value: float
    """Smallest p-value over the lengths, times their number (Bonferroni), at most 1."""
    by_length: tuple[ChiSquare, ...]
    """The test on the first token, on the first two, ..."""
    draws: int
    impossible: tuple[tuple[int, ...], ...]
    """Sampled token sequences to which the model gives probability 0."""
    worst: tuple[tuple[tuple[int, ...], float, int], ...]
    """The cells furthest from expectation at full length: (tokens, expected, observed)."""
    drafted: int | None = None
    """Tokens the sampler drafted, where it counts them: without drafts little was tested."""

    _title = "Is it the model's distribution?"

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        found: dict[str, Any] = plain(asdict(self))
        return found

    def rows(self) -> list[dict[str, Any]]:
        """A record per length: tokens, statistic, degrees, p_value."""
        return [{"tokens": at, **asdict(test)} for at, test in enumerate(self.by_length, 1)]

    def _parts(self) -> list[Part]:
        drafted = "" if self.drafted is None else f", {self.drafted} tokens drafted"
        note = f"p = {self.p_value:.3g} over all lengths; {self.draws} draws{drafted}"
        return [Part("", cells(self.rows()), [note])]


def check_distribution(
    sampler: Setup,
    model: PreTrainedModel,
    prompt: Sequence[int] | torch.Tensor | None = None,
    *,
    draws: int = 20_000,
    steps: int = 4,
    seed: int = 0,
    alpha: float = 0.001,
    batch_size: int = 2_000,
    **options: Any,
) -> DistributionResult:
    """Sampled sequences of 1 to `steps` tokens must fit the model's own distribution.

    The expected counts come from exact enumeration of all vocab^steps texts, with the processors
    that `generate` builds for `options` (temperature, top_k, top_p, penalties; top-k is 50 unless
    you set it). A right sampler is rejected with probability `alpha`, fixed by `seed`; a text of
    probability 0 is never forgiven. Use a vocabulary of about 8; the global generator is restored.
    steps: most loops take the first token from the prompt's forward and draft only where two more
        may follow, so fewer than 3 steps test no draft and fewer than 4 no tree.
    batch_size: rows per `generate` call; 1 for set-ups that take no batch.
    Raises `LawBroken`.

    >>> from pertoken.testing import MockModel
    >>> coin = MockModel([[0.5, 0.5], [0.2, 0.8]])
    >>> check_distribution(None, coin, [0], draws=2000).p_value > 0.001
    True
    """
    if steps < 1 or draws < 1:
        raise PertokenError("check_distribution needs draws >= 1 and steps >= 1")
    row = as_prompts(model, None if prompt is None else [prompt])[0]
    run = {**options, "do_sample": True}
    expected = enumerate_texts(model, row, steps, **{**run, **setup_options(sampler)})
    observed, drafted = _sample(model, sampler, row, steps, draws, seed, batch_size, run)
    result = replace(compare_counts(expected, observed), drafted=drafted)
    if not result.impossible and not any(test.degrees for test in result.by_length):
        raise PertokenError(
            "nothing to test: one text takes nearly all probability; take another model, prompt "
            "or temperature, or more draws"
        )
    if result.impossible:
        example = result.impossible[0]
        early = " (it ended early)" if len(example) < steps else ""
        raise LawBroken(
            f"sampled {len(result.impossible)} sequences of probability 0, such as "
            f"{list(example)}{early}"
        )
    if result.p_value < alpha:
        tokens, wanted, seen = result.worst[0]
        raise LawBroken(
            f"not the model's distribution: p = {result.p_value:.2g} < {alpha:g} over {draws} "
            f"draws; tokens {list(tokens)} came {seen} times, expected {wanted:.1f}"
        )
    return result


@torch.no_grad()
def enumerate_texts(
    model: PreTrainedModel, prompt: torch.Tensor, steps: int, **options: Any
) -> dict[tuple[int, ...], float]:
    """Exact probability of every text of up to `steps` new tokens (shorter if it meets a stop id).

    Costs one forward per length over all prefixes at once: vocab^(steps-1) rows.
    """
    vocab = model.config.get_text_config().vocab_size
    if vocab**steps > _MOST_TEXTS:
        raise PertokenError(
            f"{vocab} tokens to the power of {steps} steps are too many texts to enumerate "
            f"(at most {_MOST_TEXTS}); use a model with a smaller vocabulary or fewer steps"
        )
    run = {**options, "do_sample": True}
    processor = processors(model, prompt[None], max_new_tokens=steps, **run)
    stops = stop_ids(model, options)
    finished: dict[tuple[int, ...], float] = {}
    open_texts: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(steps):
        if not open_texts:
            break
        new = torch.tensor(list(open_texts), dtype=torch.long).reshape(len(open_texts), -1)
        ids = torch.cat([prompt.repeat(len(open_texts), 1), new.to(prompt.device)], dim=1)
        logits = model(ids, use_cache=False).logits[:, -1].float()
        table = processor(ids, logits).double().softmax(-1).tolist()
        grown: dict[tuple[int, ...], float] = {}
        for (text, probability), after in zip(open_texts.items(), table, strict=True):
            for token, p in enumerate(after):
                if p > 0.0:
                    target = finished if token in stops else grown
                    target[(*text, token)] = probability * p
        open_texts = grown
    return {**finished, **open_texts}


def compare_counts(
    expected: Mapping[tuple[int, ...], float], observed: Mapping[tuple[int, ...], int]
) -> DistributionResult:
    """Chi-square of observed counts against probabilities, for prefixes of every length.

    Testing short prefixes too keeps the power that thousands of cells would spread thin.
    """
    draws = sum(observed.values())
    longest = max(len(text) for text in expected)
    tests = []
    for length in range(1, longest + 1):
        wanted, seen = _prefixes(expected, length), _prefixes(observed, length)
        tests.append(chi_square([p * draws for p in wanted.values()], [seen[t] for t in wanted]))
    worst = sorted(
        ((text, p * draws, observed.get(text, 0)) for text, p in expected.items()),
        key=lambda cell: -abs(cell[2] - cell[1]) / max(cell[1], _LEAST_EXPECTED) ** 0.5,
    )
    return DistributionResult(
        p_value=min(1.0, len(tests) * min(test.p_value for test in tests)),
        by_length=tuple(tests),
        draws=draws,
        impossible=tuple(text for text in observed if text not in expected),
        worst=tuple(worst[:3]),
    )


def chi_square(expected: Sequence[float], observed: Sequence[float]) -> ChiSquare:
    """Pearson's test, rare cells pooled until each expects 5 or more.

    >>> round(chi_square([10, 10, 10], [14, 8, 8]).p_value, 4)
    0.3012
    """
    cells: list[tuple[float, float]] = []
    rare_expected = rare_observed = 0.0
    for wanted, seen in sorted(zip(expected, observed, strict=True)):
        if rare_expected < _LEAST_EXPECTED and wanted < _LEAST_EXPECTED:
            rare_expected, rare_observed = rare_expected + wanted, rare_observed + seen
            if rare_expected >= _LEAST_EXPECTED:
                cells.append((rare_expected, rare_observed))
                rare_expected = rare_observed = 0.0
        else:
            cells.append((wanted, seen))
    if rare_expected and cells:  # what is left over joins the smallest cell
        cells.sort()
        cells[0] = (cells[0][0] + rare_expected, cells[0][1] + rare_observed)
    statistic = sum((seen - wanted) ** 2 / wanted for wanted, seen in cells)
    degrees = len(cells) - 1
    if degrees < 1:
        return ChiSquare(statistic, 0, 1.0)
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return ChiSquare(statistic, degrees, float(torch.special.gammaincc(half[0], half[1])))


def _prefixes(counts: Mapping[tuple[int, ...], float], length: int) -> Counter[tuple[int, ...]]:
    """Counts summed over texts with the same first `length` tokens."""
    summed: Counter[tuple[int, ...]] = Counter()
    for text, count in counts.items():
        summed[text[:length]] += count  # type: ignore[assignment]
    return summed


def _sample(
    model: PreTrainedModel,
    sampler: Setup,
    prompt: torch.Tensor,
    steps: int,
    draws: int,
    seed: int,
    batch_size: int,
    run: dict[str, Any],
) -> tuple[Counter[tuple[int, ...]], int | None]:
    """Counts of the texts drawn, and the tokens drafted on the way if they are counted."""
    seen: Counter[tuple[int, ...]] = Counter()
    drafted: list[int] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, draws, batch_size):
            rows = prompt.repeat(min(batch_size, draws - start), 1)
            texts = decode(model, sampler, rows, max_new_tokens=steps, **run)
            seen.update(tuple(text) for text in texts)
            if (count := drafted_tokens(sampler)) is not None:
                drafted.append(count)
    return seen, sum(drafted) if drafted else None
