"""Our AWRS with SMC beside genlm-control's: seconds, questions, and whether the posteriors agree.

    python bench/awrs_peer.py --out reports/bench/awrs.json  # where both are installed, see README

Both run in one process on one model object, take turns, and ask the same Python constraint. Speed
is measured on regular expressions of the reproduction's report half, agreement on languages of a
few texts, where every run of both is pooled by its estimate of the marginal and the distance of the
two pools is compared with that of random halves of all runs.

The peer is given its best: the prompt's keys and values cached (which counts as its time), its wait
for a batch set to nothing, everything that it builds beforehand not counted. What it remembers of
texts seen is cleared before every run, because a repeat would measure its memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

SMALL = [
    ("My favourite city in Europe is", r" (?:Paris|London|Rome|Berlin)"),
    ("The colour of the old car was", r" (?:red|blue|green|black|white)(?: and (?:red|blue))?"),
    ("The shop is closed on", r" (?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)days?"),
    ("The number of legs of an insect is", r" (?:[2-8]|two|four|six|eight)"),
]
SMALL_TOKENS = 6
MAX_REJECTS = 1000  # ours by default; the peer has no limit, and would ask its whole vocabulary
BARS = {  # fixed before the first run
    "speed: seconds of genlm-control over ours": ">= 1",
    "posterior: permutation p, smallest of all languages": "> 0.001",
}
Posterior = dict[str, float]


@dataclass
class Run:
    """One call: probability by text, estimate of the constraint's probability, questions."""

    posterior: Posterior
    marginal: float
    checks: int

    def unnormalised(self) -> Posterior:
        return {text: self.marginal * chance for text, chance in self.posterior.items()}


class Counted:
    """A constraint that counts its questions."""

    def __init__(self, constraint: Any) -> None:
        self._constraint, self.checks = constraint, 0
        self.vocabulary = constraint.vocabulary

    def accepts(self, ids: Sequence[int]) -> bool:
        self.checks += 1
        return bool(self._constraint.accepts(ids))

    def complete(self, ids: Sequence[int]) -> bool:
        self.checks += 1
        return bool(self._constraint.complete(ids))


def ours(
    model: Any, tokenizer: Any, constraint: Counted, ids: Any, particles: int, most: int, seed: int
) -> Run:
    from pertoken import PertokenError
    from pertoken.decode import smc
    from pertoken.reproduce._awrs_cost import stop_ids

    before = constraint.checks
    try:
        found = smc(
            model,
            constraint,
            ids,
            particles=particles,
            max_new_tokens=most,
            max_rejects=MAX_REJECTS,
            eos_token_id=stop_ids(model, tokenizer),
            tokenizer=tokenizer,
            seed=seed,
        )
    except PertokenError:  # every particle died: an estimate of nought
        return Run({}, 0.0, constraint.checks - before)
    posterior: Posterior = {}
    for row in found.rows():
        posterior[row["text"]] = posterior.get(row["text"], 0.0) + row["probability"]
    return Run(posterior, math.exp(found.log_marginal), constraint.checks - before)


class Peer:
    """genlm-control on the same model: its samplers by constraint, built before the clock runs."""

    def __init__(self, model: Any, tokenizer: Any, particles: int) -> None:
        from genlm.backend.llm import AsyncTransformer
        from genlm.control import PromptedLLM

        from pertoken.reproduce._awrs_cost import stop_ids

        self._backend = AsyncTransformer(model, tokenizer, batch_size=particles, timeout=0.0)
        ends = [self._backend.byte_vocab[i].byte_string for i in stop_ids(model, tokenizer)]
        self._llm = PromptedLLM(self._backend, eos_byte_strings=ends)
        self._tokenizer, self._particles = tokenizer, particles

    def sampler(self, constraint: Counted) -> Any:
        from genlm.control import AWRS, Potential

        known = constraint.vocabulary.tolist()

        class Boolean(Potential):  # type: ignore[misc]
            async def prefix(self, context: Sequence[Any]) -> float:
                return 0.0 if constraint.accepts([t.token_id for t in context]) else -math.inf

            async def complete(self, context: Sequence[Any]) -> float:
                return 0.0 if constraint.complete([t.token_id for t in context]) else -math.inf

            async def logw_eos(self, context: Sequence[Any]) -> float:
                return await self.complete(context)  # its default asks the whole vocabulary

        condition = Boolean([t for t in self._llm.vocab if known[t.token_id]])
        return AWRS(self._llm, condition, max_rejects=MAX_REJECTS)

    def run(self, sampler: Any, constraint: Counted, ids: Any, most: int, seed: int) -> Run:
        import numpy as np
        import torch

        before = constraint.checks
        torch.manual_seed(seed)
        sampler.rng = np.random.default_rng(seed)
        prompt = ids[0].tolist()
        self._llm.prompt_ids = prompt
        self._backend.clear_cache()
        self._backend.cache_kv(prompt)
        found = asyncio.run(
            sampler.smc(
                n_particles=self._particles,
                ess_threshold=0.5,
                max_tokens=most + 1,  # its count has the stop token
                resampling_method="systematic",
            )
        )
        posterior: Posterior = {}
        for context, weight in zip(found.contexts, found.normalized_weights, strict=True):
            if weight > 0.0:
                text = self._tokenizer.decode([t.token_id for t in context[:-1]])
                posterior[text] = posterior.get(text, 0.0) + float(weight)
        return Run(posterior, math.exp(found.log_ml), constraint.checks - before)


def pooled(runs: Sequence[Run]) -> Posterior:
    """Posterior of all runs together, each weighed by its estimate of the marginal.

    >>> pooled([Run({"a": 1.0}, 0.3, 0), Run({"b": 1.0}, 0.1, 0)])
    {'a': 0.75, 'b': 0.25}
    """
    total = sum(run.marginal for run in runs)
    found: Posterior = {}
    for run in runs:
        for text, mass in run.unnormalised().items():
            found[text] = found.get(text, 0.0) + mass / total
    return found


def distance(first: Sequence[Run], second: Sequence[Run]) -> float:
    """Total variation between the pools; 1 where one of them is empty."""
    if not all(any(run.marginal > 0.0 for run in runs) for runs in (first, second)):
        return 1.0
    one, other = pooled(first), pooled(second)
    return sum(abs(one.get(t, 0.0) - other.get(t, 0.0)) for t in one.keys() | other.keys()) / 2


def permutation(first: Sequence[Run], second: Sequence[Run], draws: int = 2000) -> float:
    """Share of random splits of all runs whose pools are at least as far apart."""
    seen = distance(first, second)
    together, draw = [*first, *second], random.Random(0)
    beyond = 0
    for _ in range(draws):
        draw.shuffle(together)
        beyond += distance(together[: len(first)], together[len(first) :]) >= seen - 1e-12
    return (1 + beyond) / (1 + draws)


def report(
    speed: dict[str, list[dict[str, float]]],
    languages: dict[str, dict[str, list[Run]]],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Figures and the ratios that have a bar, ready for JSON.

    speed: by contender, one dict per round with seconds and checks; languages: runs by prompt and
    contender.
    """
    from pertoken._bootstrap import bootstrap_ratio
    from pertoken.reproduce._bars import Bar
    from pertoken.reproduce._machine import machine, versions

    def column(name: str, key: str) -> list[float]:
        return [round_[key] for round_ in speed[name]]

    def ratio(metric: str, key: str) -> dict[str, Any]:
        top, bottom = column("genlm-control", key), column("ours", key)
        if not top:  # every round was dropped: no figure
            return {"metric": metric, "here": None, "interval": None}
        interval = bootstrap_ratio(top, bottom, seed=0)
        return {"metric": metric, "here": sum(top) / sum(bottom), "interval": list(interval)}

    posteriors = []
    for prompt, runs in languages.items():
        mine, theirs = runs["ours"], runs["genlm-control"]
        half = len(mine) // 2
        posteriors.append(
            {
                "prompt": prompt,
                "total_variation": distance(mine, theirs),
                "total_variation_within_ours": distance(mine[:half], mine[half:]),
                "permutation_p": permutation(mine, theirs),
                "marginal": {
                    name: sum(run.marginal for run in those) / len(those)
                    for name, those in runs.items()
                },
                "posterior": {name: pooled(those) for name, those in runs.items()},
            }
        )
    least = min(row["permutation_p"] for row in posteriors)
    rows = [
        ratio("speed: seconds of genlm-control over ours", "seconds"),
        ratio("constraint checks of genlm-control over ours", "checks"),
        {"metric": "posterior: permutation p, smallest of all languages", "here": least},
    ]
    for row in rows:
        if row["metric"] in BARS:
            row["bar"] = BARS[row["metric"]]
            row["holds"] = Bar.parse(row["bar"]).holds(row["here"])
    return {
        "settings": settings,
        "versions": versions(),
        "machine": machine(),
        "ratios": rows,
        "seconds": {name: column(name, "seconds") for name in speed},
        "languages": posteriors,
    }


def compare(
    model: Any,
    tokenizer: Any,
    peer: Peer,
    prompts: Sequence[tuple[str, str]],
    rounds: int,
    particles: int,
    most: int,
) -> tuple[Any, list[tuple[str, int]]]:
    """Both on every prompt, `rounds` times, in turns; the run and (prompt, seed) of its rounds."""
    import torch

    from pertoken.decode.constraint import RegexConstraint
    from pertoken.timing import alternate

    prepared = []
    for prompt, pattern in prompts:
        constraint = Counted(RegexConstraint(pattern, tokenizer=tokenizer))
        ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
        prepared.append((constraint, peer.sampler(constraint), ids))
    turns = [(place, seed) for seed in range(rounds) for place in range(len(prompts))]

    def turn(mine: bool, index: int) -> Run:
        place, seed = turns[index]
        constraint, sampler, ids = prepared[place]
        if mine:
            return ours(model, tokenizer, constraint, ids, particles, most, seed)
        return peer.run(sampler, constraint, ids, most, seed)

    for mine in (True, False):  # first calls pay for what later ones do not
        turn(mine, 0)
    contenders: dict[str, Callable[[int], Run]] = {
        "ours": partial(turn, True),
        "genlm-control": partial(turn, False),
    }
    run = alternate(contenders, len(turns))
    return run, [(prompts[place][0], seed) for place, seed in turns]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--particles", type=int, default=10)
    parser.add_argument("--most", type=int, default=20, help="new tokens of the timed texts")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each prompt")
    parser.add_argument("--runs", type=int, default=16, help="runs of each small language")
    parser.add_argument("--limit", type=int, help="first prompts only")
    parser.add_argument("--threads", type=int, help="threads torch computes with")
    given = parser.parse_args()
    try:
        from importlib.metadata import version

        import genlm.control  # noqa: F401
    except ImportError:
        print("genlm-control is not installed here (see bench/README.md)", file=sys.stderr)
        return 2

    import torch

    import pertoken
    from pertoken.reproduce._constraint_cases import patterns

    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        model, tokenizer = pertoken.load(given.model, dtype=given.dtype)
    except pertoken.PertokenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    peer = Peer(model, tokenizer, given.particles)
    timed, _ = compare(
        model,
        tokenizer,
        peer,
        patterns("report")[: given.limit],
        given.rounds,
        given.particles,
        given.most,
    )
    speed = {
        name: [
            {"seconds": round_.calls[name].seconds, "checks": round_.calls[name].value.checks}
            for round_ in timed.kept
        ]
        for name in timed.names
    }
    small, turns = compare(
        model,
        tokenizer,
        peer,
        SMALL[: given.limit],
        given.runs,
        given.particles,
        SMALL_TOKENS,
    )
    languages: dict[str, dict[str, list[Run]]] = {}
    for round_ in [*small.kept, *small.dropped]:  # a posterior does not mind what else runs
        runs = languages.setdefault(turns[round_.index][0], {name: [] for name in small.names})
        for name, call in round_.calls.items():
            runs[name].append(call.value)
    settings = {
        "model": given.model,
        "dtype": given.dtype,
        "particles": given.particles,
        "ess_threshold": 0.5,
        "max_rejects": MAX_REJECTS,
        "resampling": "systematic",
        "stop_ids": "the model's own and the newline",
        "new_tokens": given.most,
        "new_tokens_small": SMALL_TOKENS,
        "prompts": len(patterns("report")[: given.limit]),
        "rounds": given.rounds,
        "runs_of_a_language": given.runs,
        "threads": torch.get_num_threads(),
        "noise": timed.noise(),
        "peers": {"genlm-control": version("genlm-control")},
        "peer_settings": "prompt cached, batch wait 0, caches cleared before every run",
    }
    found = report(speed, languages, settings)
    print("rounds kept {rounds_kept}, dropped {rounds_dropped}".format(**timed.noise()))
    for row in found["ratios"]:
        print(f"{row['metric']}: {row['here']} {row.get('interval', '')} {row.get('bar', '')}")
    for row in found["languages"]:
        print(
            f"  {row['prompt']}: p {row['permutation_p']:.3f}, distance "
            f"{row['total_variation']:.3f}, within ours {row['total_variation_within_ours']:.3f}"
        )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(
        json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
