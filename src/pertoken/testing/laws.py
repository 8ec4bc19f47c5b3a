"""Laws for greedy decoders: the same tokens as plain decoding, alone and in a batch.

`check_distribution` is the law for samplers, `check_leaves_no_trace` the one for everything that
touches a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pertoken.testing.divergence import Verdict, compare_ids
from pertoken.testing.setups import (
    Setup,
    as_prompts,
    decode,
    left_pad,
    pad_id,
    processors,
    setup_options,
    stop_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Prompts = Sequence[Sequence[int] | torch.Tensor] | torch.Tensor


class LawBroken(AssertionError):
    """A method broke a law; the message says where, at which step and by how much.

    report: what `check_method` found in all, None where a law was called by itself.
    """

    report: Any = None


def check_lossless(
    decoder: Setup,
    model: PreTrainedModel,
    prompts: Prompts | None = None,
    *,
    max_new_tokens: int = 48,
    allow_ties: bool | None = None,
    reference: Setup = None,
    **options: Any,
) -> list[Verdict]:
    """Greedy ids must be those of plain `generate(do_sample=False)`, prompt by prompt.

    decoder: a `custom_generate` callable or a mapping of `generate` arguments.
    prompts: rows of ids without pads; four random ones of 3 to 30 tokens if not given.
    allow_ties: accept divergences that the dtype's measured noise explains; by default in every
        dtype but float64, where rounding has no say and ids must be equal.
    options: further arguments for both sides (`repetition_penalty=1.2`, `eos_token_id=3` ...).
    Returns a verdict per prompt; raises `LawBroken` at the first prompt that differs.

    >>> from pertoken.testing import tiny_model
    >>> verdicts = check_lossless({"prompt_lookup_num_tokens": 4}, tiny_model("llama"))
    >>> [verdict.outcome for verdict in verdicts]
    ['identical', 'identical', 'identical', 'identical']
    """
    if allow_ties is None:
        allow_ties = model.dtype != torch.float64
    verdicts = []
    for index, prompt in enumerate(as_prompts(model, prompts)):
        run = {"max_new_tokens": max_new_tokens, **options}
        expected = decode(model, reference, prompt[None], **run)[0]
        actual = decode(model, decoder, prompt[None], **run)[0]
        verdict = judge(model, prompt, expected, actual, reference, run)
        _demand(verdict, allow_ties, f"not lossless: prompt {index} ({len(prompt)} tokens)")
        verdicts.append(verdict)
    return verdicts


def check_batch_invariant(
    decoder: Setup,
    model: PreTrainedModel,
    prompts: Prompts | None = None,
    *,
    max_new_tokens: int = 32,
    allow_ties: bool | None = None,
    **options: Any,
) -> list[Verdict]:
    """One batch of left-padded prompts must give what each prompt gives alone, token by token.

    Parameters and result as in `check_lossless`; `prompts` should be of unequal length.
    """
    if allow_ties is None:
        allow_ties = model.dtype != torch.float64
    rows = as_prompts(model, prompts)
    run = {"max_new_tokens": max_new_tokens, **options}
    alone = [decode(model, decoder, row[None], **run)[0] for row in rows]
    ids, mask = left_pad(rows, pad_id(model))
    together = decode(model, decoder, ids, mask, **run)
    if len(together) != len(rows):
        raise LawBroken(f"a batch of {len(rows)} prompts came back as {len(together)} rows")
    verdicts = []
    for index, (row, expected, actual) in enumerate(zip(rows, alone, together, strict=True)):
        # A row that ended early by another rule than a stop id is filled up with pads.
        if set(actual[len(expected) :]) <= {pad_id(model)}:
            actual = actual[: len(expected)]
        verdict = judge(model, row, expected, actual, decoder, run)
        _demand(verdict, allow_ties, f"batch differs from single runs: row {index}")
        verdicts.append(verdict)
    return verdicts


def judge(
    model: PreTrainedModel,
    prompt: torch.Tensor,
    expected: list[int],
    actual: list[int],
    setup: Setup,
    run: dict[str, Any],
) -> Verdict:
    """`compare_ids` with the processors of the run, which are only built where ids differ."""
    if expected == actual:
        return Verdict("identical", len(expected))
    options = {**run, **setup_options(setup)}
    # Where other rules may end a text, its length says nothing.
    fixed = not options.keys() & {"stopping_criteria", "stop_strings", "max_time"}
    return compare_ids(
        model,
        prompt,
        expected,
        actual,
        processor=processors(model, prompt[None], **options),
        max_new_tokens=run["max_new_tokens"] if fixed else None,
        stops=stop_ids(model, options),
    )


def _demand(verdict: Verdict, allow_ties: bool, place: str) -> None:
    if verdict.outcome == "identical" or (allow_ties and verdict.outcome == "numerical tie"):
        return
    raise LawBroken(f"{place}, {verdict.divergence} [{verdict.outcome}]")
