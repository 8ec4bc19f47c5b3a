"""Loss and backward of FiberPO beside PPO-clip at [64, 2048]: seconds and peak memory.

    python bench/fiberpo_loss.py --out reports/bench/fiberpo_loss.json --threads 1

Both take turns in one process on the same tensors, half of them padding or so, some bounds reached.
`ppo` is `pertoken.train.ppo_clip_loss`, which checks its input and counts closed tokens as FiberPO
does; the bars are against it. `bare ppo` is the formula alone, six operations without a check or a
count. Peak memory is what is allocated at once above the inputs, by torch's own profiler.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comparison import show_and_write

BARS = {  # fixed before the first run
    "time: fiberpo over ppo": "<= 1.05",
    "memory: fiberpo over ppo": "<= 1.1",
}
Call = Callable[[], None]


def contenders(batch: int, time: int, seed: int) -> dict[str, Call]:
    """Name -> one loss and backward on the shared tensors."""
    import torch

    from pertoken.train import fiberpo_loss, ppo_clip_loss

    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(batch, time, generator=generator)
    new = (old + 0.2 * torch.randn(batch, time, generator=generator)).requires_grad_()
    advantages = torch.randn(batch, generator=generator)
    lengths = torch.randint(time // 10, time + 1, (batch,), generator=generator)
    mask = torch.arange(time) < lengths[:, None]
    weights = mask.float()
    token, trajectory = (0.8, 1.28), (0.92, 1.09)

    def bare() -> torch.Tensor:
        ratio = torch.exp(new - old)
        a = advantages[:, None]
        values = -torch.min(ratio * a, ratio.clamp(*token) * a)
        return ((values * weights).sum(1) / weights.sum(1)).mean()

    def turn(loss: Callable[[], torch.Tensor]) -> Call:
        def run() -> None:
            new.grad = None
            loss().backward()

        return run

    made: dict[str, Call] = {"bare ppo": turn(bare)}
    made["ppo"] = turn(lambda: ppo_clip_loss(new, old, advantages, mask, token=token)[0])
    for name, variant in (("fiberpo", "paper"), ("fiberpo censor", "censor")):

        def gated(variant: Any = variant) -> torch.Tensor:
            return fiberpo_loss(
                new, old, advantages, mask, token=token, trajectory=trajectory, variant=variant
            )[0]

        made[name] = turn(gated)
    return made


def peak_bytes(call: Call) -> int:
    """The most that is allocated at once during a call, above what there was before."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    held = peak = 0
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def report(seconds: dict[str, list[float]], memory: dict[str, int], **about: Any) -> dict[str, Any]:
    """The written form: comparisons with their bars, figures, settings."""
    from pertoken.reproduce._bars import Bar

    def ratio(values: dict[str, Any], name: str, other: str) -> float:
        one, two = values[name], values[other]
        if isinstance(one, list):  # rounds are pairs: the machine's state is the same within one
            return statistics.median(a / b for a, b in zip(one, two, strict=True))
        return float(one / two)

    found = {
        "time: fiberpo over ppo": ratio(seconds, "fiberpo", "ppo"),
        "memory: fiberpo over ppo": ratio(memory, "fiberpo", "ppo"),
    }
    comparisons = [
        {
            "metric": metric,
            "here": here,
            "bar": BARS[metric],
            "holds": Bar.parse(BARS[metric]).holds(here),
        }
        for metric, here in found.items()
    ]
    figures = {
        name: {
            "milliseconds": 1000 * statistics.median(values),
            "mebibytes": memory[name] / 2**20,
            "time over bare ppo": ratio(seconds, name, "bare ppo"),
        }
        for name, values in seconds.items()
    }
    return {"comparisons": comparisons, "figures": figures, **about}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--time", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--calls", type=int, default=5, help="per contender and round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    import torch

    from pertoken.reproduce._machine import machine, versions
    from pertoken.timing import alternate

    torch.set_num_threads(given.threads)
    made = contenders(given.batch, given.time, given.seed)
    memory = {name: peak_bytes(call) for name, call in made.items()}

    def turn(call: Call) -> Callable[[int], None]:
        def run(_: int) -> None:
            for _ in range(given.calls):
                call()

        return run

    run = alternate({name: turn(call) for name, call in made.items()}, given.rounds)
    if not run.kept:
        print("all rounds were disturbed by other programs: nothing to show", file=sys.stderr)
        return 1
    seconds = {name: [value / given.calls for value in run.seconds(name)] for name in made}
    settings = {key: value for key, value in vars(given).items() if key != "out"}
    written = report(
        seconds,
        memory,
        settings=settings,
        noise=run.noise(),
        machine=machine("cpu"),
        versions=versions(),
    )
    show_and_write(written, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
