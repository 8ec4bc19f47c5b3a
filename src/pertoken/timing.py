"""Fair timing on a shared machine: alternate, watch the others, show the limit.

Rules (used by reproductions and benches alike): contenders take turns within one process, each
prompt once per contender and with a fresh object, because caches make repeats look fast; the load
of other programs is read from the system's counters before and during each round, and a round in
which they used more than 15 % of the machine is dropped and counted; speeds stand beside what the
memory's bandwidth would allow.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pertoken.errors import PertokenError

if TYPE_CHECKING:
    import torch

__all__ = [
    "FOREIGN_LIMIT",
    "AlternatingRun",
    "CpuTimes",
    "Spread",
    "Timed",
    "alternate",
    "bandwidth",
    "bytes_per_token",
    "foreign_share",
    "read_cpu",
    "share_of_limit",
    "spread",
]

FOREIGN_LIMIT = 0.15
"""Share of the machine's processor time that other programs may use during a kept round."""

_TOO_SHORT = 0.2  # seconds; the counters tick every 10 ms, so a shorter window says nothing


@dataclass(frozen=True)
class CpuTimes:
    """Processor time since boot, in seconds summed over all cores.

    total: all states; busy: everything but idle and waiting for disks, time stolen by the host
    included; own: this process and its finished children.
    """

    total: float
    busy: float
    own: float


def read_cpu(stat: Path = Path("/proc/stat")) -> CpuTimes | None:
    """The system's counters now; None where the system has no ``/proc/stat``."""
    import os

    try:
        fields = stat.read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return None
    # user nice system idle iowait irq softirq steal; guest time is part of user already
    ticks = [int(value) for value in fields[1:9]]
    per_second = os.sysconf("SC_CLK_TCK")
    total = sum(ticks)
    return CpuTimes(
        total=total / per_second,
        busy=(total - ticks[3] - ticks[4]) / per_second,
        own=sum(os.times()[:4]),
    )


def foreign_share(before: CpuTimes | None, after: CpuTimes | None) -> float | None:
    """Share of the machine that other programs used between two readings, 0 to 1.

    None where it cannot be said: no counters, or a window too short for them.

    >>> foreign_share(CpuTimes(10, 5, 2), CpuTimes(14, 8, 4))  # 3 s busy, 2 of them ours
    0.25
    """
    if before is None or after is None or after.total - before.total < _TOO_SHORT:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return min(1.0, max(0.0, others / (after.total - before.total)))


@dataclass(frozen=True)
class Timed:
    """One call of one contender: seconds and what it returned."""

    seconds: float
    value: Any


@dataclass(frozen=True)
class Round:
    """One turn of every contender; `foreign` is the greatest share of others seen, if known."""

    index: int
    foreign: float | None
    calls: dict[str, Timed]


@dataclass
class AlternatingRun:
    """Kept and dropped rounds of `alternate`.

    dropped holds the rounds that stayed above the limit in every attempt; attempts counts all
    rounds that were run, so ``attempts - len(kept)`` is how many measurements were thrown away.
    """

    names: tuple[str, ...]
    kept: list[Round] = field(default_factory=list)
    dropped: list[Round] = field(default_factory=list)
    attempts: int = 0

    def seconds(self, name: str) -> list[float]:
        """Seconds of one contender, one per kept round, in the order of the rounds."""
        return [entry.calls[name].seconds for entry in self.kept]

    def values(self, name: str) -> list[Any]:
        """What the contender returned, one per kept round."""
        return [entry.calls[name].value for entry in self.kept]

    def speed_up(self, name: str, over: str) -> float:
        """Total seconds of `over` divided by those of `name`, kept rounds only; NaN with none."""
        own = sum(self.seconds(name))
        return sum(self.seconds(over)) / own if own else float("nan")

    @property
    def foreign(self) -> float | None:
        """The greatest foreign share among the kept rounds; None where it was never known."""
        known = [entry.foreign for entry in self.kept if entry.foreign is not None]
        return max(known, default=None)

    def noise(self) -> dict[str, Any]:
        """What a report says about the machine's quiet, ready for its settings."""
        return {
            "rounds_kept": len(self.kept),
            "rounds_dropped": len(self.dropped),
            "attempts": self.attempts,
            "foreign_share_max": self.foreign,
            "foreign_limit": FOREIGN_LIMIT,
        }


def alternate(
    contenders: Mapping[str, Callable[[int], Any]],
    rounds: int,
    *,
    retries: int = 1,
    watch: float = 1.0,
    limit: float = FOREIGN_LIMIT,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    counters: Callable[[], CpuTimes | None] = read_cpu,
) -> AlternatingRun:
    """Time contenders in turns: a b c, then b c a, then c a b …

    contenders: name -> function of the round's index (usually the index of a prompt). It must
        start afresh in every call: a cache that outlives the call makes the next round look fast.
    rounds: how many rounds are wanted, one per prompt.
    retries: how often a round is run again when others used more than `limit` of the machine,
        before it is dropped for all contenders.
    watch: seconds to read the counters before a round, while this process sleeps.
    clock, sleep, counters: replaced in tests.

    >>> run = alternate({"a": lambda i: i, "b": lambda i: -i}, rounds=3, watch=0)
    >>> run.values("b")
    [0, -1, -2]
    """
    if not contenders or rounds < 1:
        raise PertokenError("timing needs at least one contender and one round")
    names = tuple(contenders)
    run = AlternatingRun(names)
    for index in range(rounds):
        start = index % len(names)
        order = names[start:] + names[:start]
        for attempt in range(retries + 1):
            run.attempts += 1
            done = _round(contenders, order, index, watch, clock, sleep, counters)
            if done.foreign is None or done.foreign <= limit:
                run.kept.append(done)
                break
            if attempt == retries:
                run.dropped.append(done)
    return run


def _round(
    contenders: Mapping[str, Callable[[int], Any]],
    order: Sequence[str],
    index: int,
    watch: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    counters: Callable[[], CpuTimes | None],
) -> Round:
    shares = []
    reading = counters()
    if watch > 0:
        sleep(watch)
        shares.append(foreign_share(reading, reading := counters()))
    calls = {}
    for name in order:
        before, began = counters(), clock()
        value = contenders[name](index)
        calls[name] = Timed(clock() - began, value)
        shares.append(foreign_share(before, counters()))
    known = [share for share in shares if share is not None]
    return Round(index, max(known, default=None), calls)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of a few repeats; NaN for none.

    >>> spread([3.0, 1.0, 2.0])
    Spread(median=2.0, low=1.5, high=2.5)
    """
    if not values:
        return Spread(*[float("nan")] * 3)
    if len(values) == 1:
        return Spread(*[float(values[0])] * 3)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def bandwidth(seconds: float = 0.2, megabytes: int = 256, device: str = "cpu") -> float:
    """Memory bandwidth in bytes per second: the best pass of reading a block within `seconds`.

    The block is far larger than a cache; the threads are those torch computes with.
    """
    import torch

    block = torch.ones(megabytes * 2**20 // 4, dtype=torch.float32, device=device)
    best = 0.0
    end = time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < end:
        began = time.perf_counter()
        block.sum().item()  # .item() waits for the device
        best = max(best, block.nbytes / (time.perf_counter() - began))
    return best


def bytes_per_token(model: torch.nn.Module) -> int:
    """Bytes of weights that decoding one token reads: every weight once.

    Weights that are tied count once. An input embedding that is not tied to the output layer is
    left out, since a token reads one row of it.
    """
    weights = {weight.data_ptr(): weight.nbytes for weight in model.parameters()}
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if embedding is not None and output is not None:
        looked_up = embedding.weight.data_ptr()
        if looked_up != output.weight.data_ptr():
            weights.pop(looked_up, None)
    return sum(weights.values())


def share_of_limit(
    tokens_per_second: float, bytes_per_token: int, bytes_per_second: float
) -> float:
    """Speed as a share of what reading every weight once per token would allow.

    A speculative decoder can exceed 1: it reads the weights once for several tokens.

    >>> share_of_limit(25.0, 269_000_000, 30.5e9)
    0.2204...
    """
    return tokens_per_second * bytes_per_token / bytes_per_second
