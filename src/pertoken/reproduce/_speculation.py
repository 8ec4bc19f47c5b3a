"""What the reproductions of speculative decoders share: one run as plain numbers, and ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pertoken._bootstrap import bootstrap_ratio, bootstrap_ratio_of_ratios
from pertoken.reproduce._report import Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Unit = dict[str, Any]
Make = Callable[[], Any]

SMOKE_ROWS: list[dict[str, Any]] = [
    {"question_id": 1, "category": "qa", "turns": ["one two one two one"]},
    {"question_id": 3, "category": "rag", "turns": ["copy: abc abc abc"]},
]


def decode(model: PreTrainedModel, ids: Sequence[int], make: Make, new_tokens: int) -> Unit:
    """Decode one prompt greedily; make: gives a new drafter or a mapping of `generate` arguments.

    The unit holds ids, seconds and, for a drafter, tokens and forwards after the prefill, drafted
    and accepted counts and the share of time spent outside the model.
    """
    import torch

    setup = make()
    text = torch.tensor([list(ids)], device=model.device)
    arguments = setup if isinstance(setup, Mapping) else {"custom_generate": setup}
    started = time.perf_counter()
    out = model.generate(
        text,
        attention_mask=torch.ones_like(text),
        max_new_tokens=new_tokens,
        do_sample=False,
        **arguments,
    )
    seconds = time.perf_counter() - started
    unit: Unit = {"ids": out[0, len(ids) :].tolist(), "seconds": seconds}
    if not isinstance(setup, Mapping):
        stats = setup.stats
        unit |= {
            "tokens": stats.new_tokens - stats.first_tokens,
            "forwards": stats.row_steps,
            "drafted": dict(stats.drafted),
            "accepted": dict(stats.accepted),
            "seconds_outside": stats.seconds_draft,
            "seconds_steps": stats.seconds_draft + stats.seconds_verify,
        }
    return unit


def per_forward(units: Iterable[Unit]) -> tuple[list[float], list[float]]:
    """(tokens, forwards) of each unit, for ratios of sums."""
    units = list(units)
    return [u["tokens"] for u in units], [u["forwards"] for u in units]


def accepted(units: Iterable[Unit]) -> float:
    """Tokens per forward over all units."""
    tokens, forwards = per_forward(units)
    return sum(tokens) / sum(forwards) if sum(forwards) else float("nan")


def ratio_row(
    metric: str, first: Sequence[Unit], second: Sequence[Unit], seed: int, **more: Any
) -> Row:
    """Accepted tokens per forward of one method over another, on the same prompts."""
    return Row(
        metric,
        accepted(first) / accepted(second),
        unit="x",
        interval=bootstrap_ratio_of_ratios(per_forward(first), per_forward(second), seed=seed),
        baseline=accepted(second),
        **more,
    )


def speed_row(
    metric: str, fast: Sequence[float], slow: Sequence[float], seed: int, **more: Any
) -> Row:
    """Seconds of the slow contender over those of the fast one, summed over the same prompts."""
    if not fast:
        return Row(metric, float("nan"), unit="x", **more)
    return Row(
        metric,
        sum(slow) / sum(fast),
        unit="x",
        interval=bootstrap_ratio(list(slow), list(fast), seed=seed),
        baseline=1.0,
        **more,
    )


def fair_share(
    model: PreTrainedModel,
    prompts: Mapping[Any, Sequence[int]],
    units: Mapping[Any, Unit],
    reference: Mapping[Any, Unit],
    new_tokens: int,
    stops: frozenset[int],
    judged: dict[Any, Any],
) -> tuple[float, list[str]]:
    """(share of outputs identical to the reference or split by a numerical tie, the notes).

    judged: verdicts by prompt and text. Judging a divergence takes many forwards, and most
    drafters part from plain decoding at the same close call and write the same text behind it.
    """
    from pertoken.testing.divergence import compare_ids

    fine, notes = 0, []
    for key, unit in units.items():
        text = (key, tuple(unit["ids"]))
        if text not in judged:
            judged[text] = compare_ids(
                model,
                prompts[key],
                reference[key]["ids"],
                unit["ids"],
                max_new_tokens=new_tokens,
                stops=stops,
            )
        verdict = judged[text]
        fine += verdict.outcome != "different"
        if verdict.outcome != "identical":
            notes.append(f"{key}: {verdict.outcome}, {verdict.divergence}")
    return fine / len(units), notes


def stop_ids(model: PreTrainedModel) -> frozenset[int]:
    """The ids that end a text of this model."""
    found: Any = model.generation_config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)


def enumeration_error(model: PreTrainedModel, prompt: torch.Tensor) -> float:
    """One sampled step by exact enumeration: greatest error of any token's probability.

    Over every set of one to three drafted children: the probability that recursive rejection ends
    at each token, from its acceptance probabilities, against the model's own distribution.
    """
    from itertools import permutations

    import torch

    from pertoken.decode.accept import acceptance

    with torch.no_grad():
        probs = model(prompt).logits[0, -1].double().softmax(-1)
    worst = 0.0
    for size in (1, 2, 3):
        for children in permutations(range(len(probs)), size):
            accept, rest = acceptance(probs, torch.tensor(children))
            reached, found = 1.0, torch.zeros_like(probs)
            for child, chance in zip(children, accept.tolist(), strict=True):
                found[child] += reached * chance
                reached *= 1.0 - chance
            found += reached * rest
            worst = max(worst, float((found - probs).abs().max()))
    return worst
