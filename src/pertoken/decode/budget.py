"""How much to draft: measured cost of a forward pass, learned chance of acceptance.

``budget="auto"`` drafts the n nodes that are expected to bring most per second. The cost c(n) of a
pass over n tokens is measured once per model, device and number of threads, and kept on disk; the
gain is the sum of the tree's values. Maximising a ratio of sums over many steps means taking, in
each step, the n with the greatest gain(n) - rate x c(n), where rate is the ratio reached so far
(Dinkelbach 1967): a doubtful draft is not verified just because the step would end a little ahead.
Nothing pays: n = 0, a plain step. (Ours; no paper of this family does it.)
"""

from __future__ import annotations

import json
import os
import time
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pertoken._takeover import implementation
from pertoken.timing import FOREIGN_LIMIT, foreign_share, read_cpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pertoken.decode.forward import TreeForward

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Numbers of tokens per pass at which the cost is measured; between them it is interpolated."""

_CONTEXT = 128  # tokens in the cache while measuring
_REPEATS = 5
_MEMORY = 64.0  # observations after which old ones fade, in calibration and in the rate


class Calibrator:
    """Counts how often guesses of a kind are right; old counts fade, unseen kinds have a prior.

    >>> cal = Calibrator()
    >>> cal.p("copy", prior=0.5)
    0.5
    >>> for _ in range(4): cal.update("copy", True)
    >>> cal.p("copy", prior=0.5)
    0.75
    """

    weight = 4.0  # a prior counts as much as this many observations

    def __init__(self) -> None:
        self.counts: dict[Hashable, list[float]] = {}

    def p(self, key: Hashable, prior: float) -> float:
        """Estimated probability that a guess of this kind is right."""
        found = self.counts.get(key)
        if found is None:
            return prior
        return (found[0] + prior * self.weight) / (found[1] + self.weight)

    def update(self, key: Hashable, hit: bool) -> None:
        """Count one guess of this kind."""
        found = self.counts.setdefault(key, [0.0, 0.0])
        if found[1] >= _MEMORY:
            fade = 1.0 - 1.0 / _MEMORY
            found[0] *= fade
            found[1] *= fade
        found[0] += hit
        found[1] += 1.0


class Planner:
    """Chooses how many nodes of a tree to verify.

    costs: seconds of a pass by its number of tokens, as `measure_costs` returns them.

    >>> plan = Planner({1: 1.0, 2: 1.1, 4: 1.2, 8: 2.0})
    >>> plan.nodes([0.9, 0.8, 0.7, 0.05])        # values in falling order
    3
    >>> plan.nodes([0.01])                       # does not pay for a pass over two tokens
    0
    """

    def __init__(self, costs: dict[int, float]) -> None:
        self.sizes = sorted(costs)
        self.costs: list[float] = []
        highest = 0.0
        for size in self.sizes:  # noise must not make more tokens look cheaper
            highest = max(highest, costs[size])
            self.costs.append(highest)
        self._gained = 4.0
        self._spent = 4.0 * self.costs[0]
        self._last = 8.0

    def cost(self, tokens: int) -> float:
        """Seconds of a pass over that many tokens, interpolated; beyond the last size linear."""
        place = bisect_left(self.sizes, tokens)
        if place == 0:
            return self.costs[0]
        place = min(place, len(self.sizes) - 1)
        x0, x1 = self.sizes[place - 1], self.sizes[place]
        y0, y1 = self.costs[place - 1], self.costs[place]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)

    @property
    def most(self) -> int:
        """Nodes worth drafting: some more than were worth verifying lately."""
        return int(min(self.sizes[-1] - 1, max(6, 2 * self._last)))

    def nodes(self, values: Sequence[float], rows: int = 1) -> int:
        """The number of nodes per row to verify.

        values: expected gain of the i-th node, summed over the rows, in falling order.
        """
        rate = self._gained / self._spent
        best, best_size, gain = rows - rate * self.cost(rows), 0, float(rows)
        for size, value in enumerate(values, start=1):
            gain += value
            net = gain - rate * self.cost(rows * (size + 1))
            if net > best:
                best, best_size = net, size
        self._last += 0.2 * (best_size - self._last)
        return best_size

    def record(self, gained: int, tokens: int) -> None:
        """A pass over `tokens` tokens committed `gained` tokens, both summed over the batch."""
        fade = 1.0 - 1.0 / _MEMORY
        self._gained = self._gained * fade + gained
        self._spent = self._spent * fade + self.cost(tokens)


_measured: dict[str, dict[int, float]] = {}


def measure_costs(forward: TreeForward, *, fresh: bool = False) -> dict[int, float]:
    """Seconds of a pass over 1, 2, … 64 tokens on this model and device, measured once.

    fresh: measure again although a measurement is kept in the cache folder.
    """
    key = _key(forward.model)
    if key not in _measured or fresh:
        path = _path()
        kept = None if fresh else _costs(_read(path).get(key))
        if kept is None:
            before = read_cpu()
            kept = _measure(forward)
            others = foreign_share(before, read_cpu())
            if others is None or others <= FOREIGN_LIMIT:  # else good for this process only
                _write(path, {**_read(path), key: {str(n): kept[n] for n in kept}})
        _measured[key] = kept
    return _measured[key]


def _measure(forward: TreeForward) -> dict[int, float]:
    from transformers import DynamicCache

    from pertoken.decode.rows import keep_rows, start_recording

    model = forward.model
    device = model.device
    context = min(_CONTEXT, (forward.max_positions or 1024) // 2)
    sizes = [n for n in SIZES if context + n <= (forward.max_positions or 1024)]
    vocab = model.get_input_embeddings().weight.shape[0]
    cache = DynamicCache()
    text = torch.arange(context, device=device).unsqueeze(0) % vocab
    mask = torch.ones_like(text)
    seconds: dict[int, list[float]] = {n: [] for n in sizes}
    with torch.no_grad():
        forward.text(text, mask, cache)
        start_recording(cache)
        for repeat in range(_REPEATS + 1):
            for n in sizes:
                tokens = torch.arange(n, device=device).unsqueeze(0) % vocab
                visible = torch.ones(1, n, n, dtype=torch.bool, device=device).tril()
                start = time.perf_counter()
                if n == 1:
                    forward.text(tokens, torch.cat((mask, mask[:, :1]), -1), cache)
                else:
                    forward.tree(tokens, tokens * 0 + visible.sum(-1) - 1, visible, mask, cache)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if repeat:  # the first round warms up
                    seconds[n].append(time.perf_counter() - start)
                keep_rows(cache, mask, n, [[]])
    # The smallest of a few is the machine's own speed; the rest is what else ran meanwhile.
    return {n: min(found) for n, found in seconds.items()}


def _key(model: PreTrainedModel) -> str:
    config = model.config.get_text_config(decoder=True)
    return " ".join(
        str(part)
        for part in (
            type(model).__name__,
            model.num_parameters(),
            config.num_hidden_layers,
            config.vocab_size,
            implementation(config),
            str(model.dtype).removeprefix("torch."),
            model.device.type,
            torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "",
            f"threads={torch.get_num_threads()}",
            f"torch={torch.__version__}",
        )
        if part != ""
    )


def _path() -> Path:
    from pertoken._fetch import cache_root

    return cache_root() / "forward-costs.json"


def _costs(entry: Any) -> dict[int, float] | None:
    """Costs as they were kept, or None for what is not such an entry."""
    try:
        return {int(n): float(seconds) for n, seconds in entry.items()} or None
    except (AttributeError, TypeError, ValueError):
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, kept: dict[str, Any]) -> None:
    """Keep the measurement if the disk allows; without it the next process measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        part.replace(path)
    except OSError:
        return
