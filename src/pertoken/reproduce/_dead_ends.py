"""A grammar with dead ends in the reproduction of AWRS: masking is wrong on it, SMC is not.

Texts over three letters and a stop token. A 1 must have a 2 behind it; the model likes to write 1,
but hardly ever a 2 behind it, and masking token by token sees that too late.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Row

PARTICLES = (100, 400, 1600)
RUNS = 24  # of every number of particles
LETTERS, STOP, LONGEST = (0, 1, 2), 3, 5
TABLE = [
    [0.20, 0.50, 0.15, 0.15],
    [0.75, 0.05, 0.05, 0.15],
    [0.25, 0.40, 0.20, 0.15],
    [0.25, 0.25, 0.25, 0.25],
]
Text = tuple[int, ...]


class DeadEnds:
    """Texts in which every 1 has a 2 behind it."""

    def accepts(self, ids: Sequence[int]) -> bool:
        return all(b == 2 for a, b in itertools.pairwise(ids) if a == 1)

    def complete(self, ids: Sequence[int]) -> bool:
        return self.accepts(ids) and (not ids or ids[-1] != 1)


def posterior() -> dict[Text, float]:
    """The model given that the text is allowed and at most `LONGEST` letters long, enumerated."""
    masses = {text: _mass(text) for text in _texts()}
    total = sum(masses.values())
    return {text: mass / total for text, mass in masses.items()}


def masking() -> dict[Text, float]:
    """What masking token by token draws from: every step renormalised by itself.

    It stops by its own chance, so longer texts and those that never end whole are among its draws;
    what is left is taken relative to the texts that are whole and short enough, as in `posterior`.
    """
    rule = DeadEnds()
    found = {}
    for text in _texts():
        chance = 1.0
        for place, token in enumerate([*text, STOP]):
            start, row = text[:place], TABLE[text[place - 1] if place else 0]
            allowed = [t for t in LETTERS if rule.accepts([*start, t])]
            allowed += [STOP] if rule.complete(start) else []
            chance *= row[token] / sum(row[t] for t in allowed)
        found[text] = chance
    total = sum(found.values())
    return {text: chance / total for text, chance in found.items()}


def total_variation(first: dict[Text, float], second: dict[Text, float]) -> float:
    """Half the sum of absolute differences."""
    texts = first.keys() | second.keys()
    return sum(abs(first.get(text, 0.0) - second.get(text, 0.0)) for text in texts) / 2


def _texts() -> Iterator[Text]:
    for length in range(LONGEST + 1):
        yield from filter(DeadEnds().complete, itertools.product(LETTERS, repeat=length))


def _mass(text: Text) -> float:
    return math.prod(TABLE[a][b] for a, b in itertools.pairwise([0, *text, STOP]))


def dead_end_rows(context: Context) -> list[Row]:
    import torch

    from pertoken.decode import smc
    from pertoken.testing import MockModel

    exact = posterior()
    model = MockModel(TABLE)
    model.generation_config.eos_token_id = STOP
    sizes = tuple(n // 10 for n in PARTICLES) if context.smoke else PARTICLES

    def distance(particles: int, seed: int) -> float:
        found = smc(
            model,
            DeadEnds(),
            torch.tensor([[0]]),
            particles=particles,
            max_new_tokens=LONGEST,
            seed=seed,
        )
        return total_variation(found.posterior(), exact)

    runs = 2 if context.smoke else RUNS
    means = {
        particles: sum(distance(particles, 1000 * context.seed + seed) for seed in range(runs))
        / runs
        for particles in context.track(sizes, "dead ends")
    }
    ratios = [means[a] / means[b] for a, b in itertools.pairwise(sizes)]
    return [
        Row(
            "dead ends: total variation of token masking",
            total_variation(masking(), exact),
            unit="TV",
            paper="distorted",
            paper_setting="stated of locally constrained decoding",
            why=f"both distributions exact, over {len(exact)} texts",
        ),
        Row(
            "dead ends: total variation of SMC, 4 x the particles, smallest ratio",
            min(ratios),
            unit="x",
            baseline=2.0,
            why="baseline: the rate of Monte Carlo; "
            + ", ".join(f"{n} particles: {mean:.4f}" for n, mean in means.items()),
        ),
        *(
            Row(f"dead ends: total variation of SMC, {n} particles", mean, unit="TV")
            for n, mean in means.items()
        ),
    ]
