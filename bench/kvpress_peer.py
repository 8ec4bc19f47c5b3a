"""Our evicting caches beside kvpress: what both keep of a prompt, and seconds to get there.

    python bench/kvpress_peer.py --out reports/bench/kvpress.json  # both installed, see README

Both run in one process on one model and the same prompts, and keep the same number of tokens per
layer. Agreement is the share of rows that both keep, over all layers and key heads. Time is that of
the prompt with compression, both from an empty cache, in turns.

Where kvpress has another rule there are two lines of agreement. Its ObservedAttentionPress ranks by
the average weight that a token got from the queries behind it, and H2O by the sum, beside the
newest half of the budget; so H2O is compared with that press as it is, without a bar, and with its
own scores turned back into sums and the newest half kept. That press needs eager attention, and is
given it. TOVAPress never drops the last token; TOVA does where its weight is among the lowest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

WINDOW, KERNEL, SINKS = 32, 7, 4
BARS = {"agreement": ">= 95", "speed": ">= 1"}  # fixed before the first run


@dataclass(frozen=True)
class Pair:
    """One method on both sides.

    cache: (model, budget) -> ours; press: (share to drop, budget) -> theirs; same: whether the
    peer has the same rule; timed: whether the peer as it is stands for the method.
    """

    name: str
    cache: Callable[[Any, int], Any]
    press: Callable[[float, int], Any]
    eager: bool = False
    same: bool = True
    timed: bool = True


def pairs() -> list[Pair]:
    """Every method that both have."""
    from kvpress import ObservedAttentionPress, SnapKVPress, StreamingLLMPress, TOVAPress

    from pertoken.cache import H2OCache, SnapKVCache, StreamingLLMCache, TOVACache, WindowCache

    def snapkv(model: Any, budget: int) -> Any:
        return SnapKVCache(model, budget, window=WINDOW, kernel=KERNEL)

    def sums(drop: float, budget: int) -> Any:
        press = ObservedAttentionPress(drop)
        average = press.score

        def score(module: Any, hidden: Any, keys: Any, *rest: Any) -> Any:
            return summed(average(module, hidden, keys, *rest), budget // 2)

        press.score = score
        return press

    return [
        Pair("window", WindowCache, lambda drop, _: StreamingLLMPress(drop, n_sink=0)),
        Pair(
            "streaming-llm",
            StreamingLLMCache,
            lambda drop, _: StreamingLLMPress(drop, n_sink=SINKS),
        ),
        Pair("snapkv", snapkv, lambda drop, _: SnapKVPress(drop, WINDOW, KERNEL)),
        Pair("tova", TOVACache, lambda drop, _: TOVAPress(drop)),
        Pair(
            "h2o, as ObservedAttention",
            H2OCache,
            lambda drop, _: ObservedAttentionPress(drop),
            eager=True,
            same=False,
        ),
        Pair("h2o, its scores summed", H2OCache, sums, eager=True, timed=False),
    ]


def summed(scores: Any, recent: int) -> Any:
    """Average weights [batch, key heads, rows] as sums, and the newest rows above all.

    >>> import torch
    >>> summed(torch.tensor([[[0.5, 0.5, 1.0]]]), 1).tolist()
    [[[1.5, 1.0, inf]]]
    """
    import torch

    count = scores.shape[-1]
    found = scores * torch.arange(count, 0, -1, device=scores.device)
    found[..., count - recent :] = torch.inf
    return found


def share_to_drop(time: int, budget: int) -> float:
    """The ratio with which kvpress keeps exactly `budget` of `time` rows.

    >>> int(421 * (1 - share_to_drop(421, 128)))
    128
    """
    return 1 - (budget + 0.5) / time


def agreement(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Share in percent of rows kept by both: one [key heads, kept] tensor of places per layer.

    >>> import torch
    >>> agreement([torch.tensor([[0, 1, 2, 3]])], [torch.tensor([[3, 2, 1, 9]])])
    75.0
    """
    both = total = 0
    for one, other in zip(ours, theirs, strict=True):
        for head, wanted in enumerate(other.tolist()):
            mine = one[min(head, len(one) - 1)].tolist()
            both += len(set(mine) & set(wanted))
            total += len(wanted)
    return 100 * both / total


@contextmanager
def served(model: Any, eager: bool = False) -> Iterator[None]:
    """kvpress on a transformers newer than it knows, and eager attention where it needs it.

    Its hooks want `cache_position`, which models no longer hand to their attention.
    """
    import torch

    def add(module: Any, _: Any, kwargs: dict[str, Any]) -> Any:
        if "cache_position" not in kwargs:
            past = kwargs["past_key_values"].get_seq_length(module.layer_idx)
            time = kwargs["hidden_states"].shape[1]
            kwargs["cache_position"] = torch.arange(past, past + time)
        return _, kwargs

    handles = [
        layer.self_attn.register_forward_pre_hook(add, with_kwargs=True)
        for layer in model.model.layers
    ]
    before = model.config._attn_implementation
    model.config._attn_implementation = "eager" if eager else before
    try:
        yield
    finally:
        model.config._attn_implementation = before
        for handle in handles:
            handle.remove()


def run_ours(pair: Pair, model: Any, ids: Any, budget: int) -> list[Any]:
    """Places [groups, budget] that our cache keeps, per layer."""
    with pair.cache(model, budget) as cache:
        model(ids, past_key_values=cache, logits_to_keep=1)
        return [rows.positions[0] for rows in cache.layers]


def run_theirs(pair: Pair, model: Any, ids: Any, budget: int, *, note: bool = False) -> list[Any]:
    """The prompt through a press; `note` also gives the places it keeps, which costs time."""
    from transformers import DynamicCache

    press = pair.press(share_to_drop(ids.shape[1], budget), budget)
    kept: list[Any] = []
    if note:
        score = press.score

        def noted(*given: Any) -> Any:
            scores = score(*given)
            kept.append(scores.topk(budget, dim=-1).indices[0])  # as ScorerPress.compress does
            return scores

        press.score = noted
    cache = DynamicCache()
    with served(model, pair.eager), press(model):
        model(ids, past_key_values=cache, logits_to_keep=1)
    if any(layer.keys.shape[2] != budget for layer in cache.layers):
        raise RuntimeError(f"{pair.name}: the peer kept another number of rows than {budget}")
    return kept


def measure(
    model: Any, chosen: Sequence[Pair], prompts: Sequence[Any], budget: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Agreement per prompt, and the timed turns, by the pair's name."""
    from pertoken.timing import alternate

    agreed, timed = {}, {}
    for pair in chosen:
        agreed[pair.name] = [
            agreement(
                run_ours(pair, model, ids, budget), run_theirs(pair, model, ids, budget, note=True)
            )
            for ids in prompts
        ]
        if pair.timed:
            timed[pair.name] = alternate(
                {
                    "ours": lambda i, p=pair: run_ours(p, model, prompts[i], budget),
                    "kvpress": lambda i, p=pair: run_theirs(p, model, prompts[i], budget),
                    "no eviction": lambda i: run_plain(model, prompts[i]),
                },
                len(prompts),
            )
        print(f"{pair.name} done", file=sys.stderr, flush=True)
    return agreed, timed


def run_plain(model: Any, ids: Any) -> None:
    """The prompt alone, for scale."""
    from transformers import DynamicCache

    model(ids, past_key_values=DynamicCache(), logits_to_keep=1)


def report(
    agreed: dict[str, list[float]],
    timed: dict[str, Any],
    same: dict[str, bool],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Rows with their bars, ready for JSON; no figure where all rounds were dropped."""
    from pertoken._bootstrap import bootstrap_ratio
    from pertoken.reproduce._bars import Bar
    from pertoken.reproduce._machine import machine, versions
    from pertoken.timing import spread

    rows: list[dict[str, Any]] = []
    for name, shares in agreed.items():
        mean = sum(shares) / len(shares)
        rows.append(
            {"metric": f"{name}: rows kept by both, percent", "here": mean, "least": min(shares)}
        )
        if same[name]:
            rows[-1] |= {
                "bar": BARS["agreement"],
                "holds": Bar.parse(BARS["agreement"]).holds(mean),
            }
    seconds = {}
    for name, run in timed.items():
        ours, theirs = run.seconds("ours"), run.seconds("kvpress")
        row: dict[str, Any] = {"metric": f"{name}: seconds of kvpress over ours", "here": None}
        if ours:
            ratio = spread([b / a for a, b in zip(ours, theirs, strict=True)])
            row |= {
                "here": sum(theirs) / sum(ours),
                "interval": list(bootstrap_ratio(theirs, ours, seed=0)),
                "quartiles": [ratio.low, ratio.median, ratio.high],
            }
        holds = row["here"] is not None and Bar.parse(BARS["speed"]).holds(row["here"])
        rows.append(row | {"bar": BARS["speed"], "holds": holds})
        seconds[name] = {each: run.seconds(each) for each in run.names} | run.noise()
    return {
        "settings": settings,
        "versions": versions(),
        "machine": machine(),
        "rows": rows,
        "seconds": seconds,
    }


def chosen_prompts(
    tokenizer: Any, path: Path | None, wanted: int, shortest: int, longest: int
) -> list[Any]:
    """Ids [1, time] of Spec-Bench prompts of the report half, spread over all that are long.

    Of a prompt with more than `longest` tokens the first ones.
    """
    import torch

    import pertoken
    from pertoken.reproduce._spec_bench import encode, select

    rows = pertoken.data("spec-bench", path=path)
    texts = [encode(tokenizer, prompt.text) for prompt in select(rows, split="report")]
    long = [ids for ids in texts if len(ids) >= shortest]
    if len(long) < wanted:
        raise pertoken.PertokenError(
            f"{len(long)} prompts have {shortest} tokens or more, {wanted} were asked for"
        )
    return [torch.tensor([long[i * len(long) // wanted][:longest]]) for i in range(wanted)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--budget", type=int, default=128, help="tokens kept per layer")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--shortest", type=int, default=256, help="tokens of the shortest prompt")
    parser.add_argument("--longest", type=int, default=512, help="tokens a prompt is cut to")
    parser.add_argument("--only", nargs="*", help="beginnings of the methods' names")
    parser.add_argument("--data", type=Path, help="your own copy of Spec-Bench")
    parser.add_argument("--threads", type=int, help="threads torch computes with")
    given = parser.parse_args()
    try:
        peer = {"kvpress": version("kvpress")}
    except ImportError:
        print("kvpress is not installed here (see bench/README.md)", file=sys.stderr)
        return 2

    import torch

    import pertoken

    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        model, tokenizer = pertoken.load(given.model, dtype=given.dtype)
        prompts = chosen_prompts(
            tokenizer, given.data, given.prompts, given.shortest, given.longest
        )
    except pertoken.PertokenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = [p for p in pairs() if not given.only or p.name.startswith(tuple(given.only))]
    with torch.no_grad():
        for pair in chosen:  # first calls pay for what later ones do not
            run_ours(pair, model, prompts[0], given.budget)
            run_theirs(pair, model, prompts[0], given.budget)
        agreed, timed = measure(model, chosen, prompts, given.budget)
    settings = {k: v for k, v in vars(given).items() if k not in ("out", "data")} | {
        "window": WINDOW,
        "kernel": KERNEL,
        "sinks": SINKS,
        "threads": torch.get_num_threads(),
        "prompt_tokens": [ids.shape[1] for ids in prompts],
        "peers": peer,
        "peer_settings": "a hook of ours hands it cache_position, as transformers did",
    }
    written = report(agreed, timed, {pair.name: pair.same for pair in chosen}, settings)
    for row in written["rows"]:
        print(f"{row['metric']}: {row['here']} {row.get('quartiles', '')} {row.get('bar', '')}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(written, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
