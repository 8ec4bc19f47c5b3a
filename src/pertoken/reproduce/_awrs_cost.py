"""What a constraint costs in the reproduction of AWRS: questions, and seconds, per token."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pertoken._bootstrap import bootstrap_ratio
from pertoken.reproduce._constraint_cases import KINDS, Case, cases
from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Row

NEW_TOKENS = 32
TEXTS = 4  # drawn for each prompt
SLOW = 1e-3  # seconds that a slow predicate takes
ASKED = 200  # checks of which the cost of masking is computed
Unit = dict[str, Any]


Checks = dict[tuple[str, str, int], Unit]


def count_checks(context: Context, models: Mapping[str, tuple[Any, Any]]) -> Checks:
    """Texts under every constraint, by model, kind and case; counted, so in any number of jobs."""
    units = {}
    for name, (model, tokenizer) in models.items():
        for kind in KINDS:
            for case in _cases(context, kind):
                compute = partial(
                    draw, model, tokenizer, case, _length(context), TEXTS, context.seed
                )
                units[name, kind, case.number] = (["checks", name, kind, case.number], compute)
    return context.remember_all(units, "checks")


def cost_rows(context: Context, models: Mapping[str, tuple[Any, Any]], checks: Checks) -> list[Row]:
    """Checks per token on every kind of constraint, seconds with a slow one, masks both ways."""
    rows = []
    for name, (model, tokenizer) in models.items():
        vocab = model.config.get_text_config().vocab_size
        for kind in KINDS:
            found = [checks[name, kind, case.number] for case in _cases(context, kind)]
            rows.append(_checks_row(name, kind, vocab, found, context.seed))
        draw(model, tokenizer, cases("regex", "dev")[0], 2, 1)  # first calls allocate
        slow = [
            context.remember(
                ["slow", name, case.number],
                partial(slow_check, model, tokenizer, case, _length(context), vocab, context.seed),
            )
            for case in context.track(_cases(context, "predicate"), f"{name}, slow predicate")
        ]
        rows.append(_slow_row(name, slow, context.seed))
        both = [
            context.remember(
                ["masks", name, case.number],
                partial(both_ways, context, model, tokenizer, case, _length(context)),
            )
            for case in context.track(_cases(context, "schema"), f"{name}, masks")
        ]
        rows.append(_mask_row(name, [unit for unit in both if unit["kept"]], context.seed))
    return rows


def draw(
    model: Any,
    tokenizer: Any,
    case: Case,
    new_tokens: int,
    texts: int,
    seed: int = 0,
    slow: float = 0.0,
    **settings: Any,
) -> Unit:
    """Texts for one prompt, one row each: tokens, checks, seconds, seconds in the constraint."""
    import torch

    from pertoken.decode import AWRS
    from pertoken.errors import PertokenError

    class Counting(AWRS):
        tokens = 0

        def extend(self, *args: Any) -> bool:
            going = super().extend(*args)
            self.tokens += going
            return going

    constraint = _Timed(case.make(tokenizer), slow)
    sampler = Counting(constraint, **settings)
    ids = tokenizer(case.prompt, return_tensors="pt").input_ids.to(model.device)
    torch.manual_seed(seed + case.number)
    began, failed = time.perf_counter(), ""
    try:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            eos_token_id=stop_ids(model, tokenizer),
            max_new_tokens=new_tokens,
            num_return_sequences=texts,
            custom_generate=sampler,
        )
    except PertokenError as error:  # every row was given up: its questions count all the same
        failed = str(error)
    return {
        "tokens": sampler.tokens,
        "checks": sum(sampler.checks),
        "seconds": time.perf_counter() - began,
        "seconds_checks": constraint.seconds,
        "given_up": sum(weight == float("-inf") for weight in sampler.log_weights),
        "failed": failed,
    }


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """The model's own and the newline: a base model ends a line rather than a text."""
    own = model.generation_config.eos_token_id
    ids = [] if own is None else [own] if isinstance(own, int) else own
    return [*ids, *tokenizer.encode("\n", add_special_tokens=False)]


def slow_check(
    model: Any, tokenizer: Any, case: Case, new_tokens: int, vocab: int, seed: int
) -> Unit:
    """One text under a predicate of `SLOW` seconds, and what masking it would cost per token.

    Masking asks the whole vocabulary at every token; `ASKED` of its questions are asked and timed,
    and the time outside the constraint is that of the AWRS run.
    """
    unit = draw(model, tokenizer, case, new_tokens, 1, seed, slow=SLOW)
    constraint = _Timed(case.make(tokenizer), SLOW)
    start = tokenizer.encode(" A", add_special_tokens=False)
    for token in range(0, vocab, max(1, vocab // ASKED)):
        constraint.accepts([*start, token])
    outside = (unit["seconds"] - unit["seconds_checks"]) / max(1, unit["tokens"])
    masking = vocab * constraint.seconds / constraint.asked + outside
    return unit | {"masking_per_token": masking}


def both_ways(context: Context, model: Any, tokenizer: Any, case: Case, new_tokens: int) -> Unit:
    """Texts under a constraint that can tell its mask: asked token by token, and masked."""
    from pertoken.timing import alternate

    def turn(masked: bool, _: int) -> Unit:
        return draw(model, tokenizer, case, new_tokens, TEXTS, context.seed, masked=masked)

    contenders = {"asked": partial(turn, False), "masked": partial(turn, True)}
    run = alternate(contenders, 1, watch=0.0 if context.smoke else 0.5)
    calls = (run.kept or run.dropped)[0].calls
    return {name: call.value for name, call in calls.items()} | {"kept": bool(run.kept)}


class _Timed:
    """A constraint that takes its time and counts it."""

    def __init__(self, constraint: Any, slow: float) -> None:
        self._constraint, self._slow = constraint, slow
        self.seconds, self.asked = 0.0, 0
        for name in ("vocabulary", "allowed"):  # optional parts of a constraint
            if hasattr(constraint, name):
                setattr(self, name, getattr(constraint, name))

    def accepts(self, ids: Sequence[int]) -> bool:
        return self._ask(self._constraint.accepts, ids)

    def complete(self, ids: Sequence[int]) -> bool:
        return self._ask(self._constraint.complete, ids)

    def _ask(self, question: Any, ids: Sequence[int]) -> bool:
        began = time.perf_counter()
        if self._slow:
            time.sleep(self._slow)
        answer: bool = question(ids)
        self.seconds += time.perf_counter() - began
        self.asked += 1
        return answer


def _cases(context: Context, kind: str) -> list[Case]:
    found = cases(kind, "report")
    return found[:1] if context.smoke else found


def _length(context: Context) -> int:
    return 3 if context.smoke else NEW_TOKENS


def _checks_row(name: str, kind: str, vocab: int, units: Sequence[Unit], seed: int) -> Row:
    checks, tokens = [u["checks"] for u in units], [u["tokens"] for u in units]
    low, high = bootstrap_ratio(checks, tokens, seed=seed)
    given_up = sum(unit["given_up"] for unit in units)
    per_token = sum(checks) / sum(tokens) if sum(tokens) else float("nan")
    return Row(
        f"checks per token over vocabulary: {kind}, {name}",
        per_token / vocab,
        unit="share",
        interval=(low / vocab, high / vocab),
        baseline="1: masking asks about every token",
        paper="orders of magnitude fewer",
        paper_setting="Llama-3.1-8B, five domains",
        why=f"{per_token:.1f} checks a token of {vocab}; {sum(tokens)} tokens of {len(units)} "
        f"prompts, {given_up} texts given up",
    )


def _slow_row(name: str, units: Sequence[Unit], seed: int) -> Row:
    masking = [unit["masking_per_token"] * unit["tokens"] for unit in units]
    seconds = [unit["seconds"] for unit in units]
    tokens = sum(unit["tokens"] for unit in units)
    return Row(
        f"seconds per token at 1 ms a check: token masking over AWRS, {name}",
        sum(masking) / sum(seconds),
        unit="x",
        interval=bootstrap_ratio(masking, seconds, seed=seed),
        baseline=sum(seconds) / tokens if tokens else float("nan"),
        paper="over 50",
        paper_setting="Llama-3.1-8B, five domains",
        why=f"token masking's cost is computed: vocabulary x the mean of {ASKED} measured checks; "
        "baseline: seconds a token of AWRS",
    )


def _mask_row(name: str, units: Sequence[Unit], seed: int) -> Row:
    def per_token(way: str) -> list[float]:
        return [unit[way]["seconds"] / max(1, unit[way]["tokens"]) for unit in units]

    asked, masked = per_token("asked"), per_token("masked")
    return Row(
        f"seconds per token with llguidance, JSON schema: masked over asked, {name}",
        sum(masked) / sum(asked) if asked else float("nan"),
        unit="x",
        interval=bootstrap_ratio(masked, asked, seed=seed) if asked else None,
        baseline=sum(asked) / len(asked) if asked else float("nan"),
        why="both draw the same distribution; baseline: seconds a token, asked",
    )
