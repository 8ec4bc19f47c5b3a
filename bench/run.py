"""Side by side: ways of decoding the same prompts in turns, in one process.

    python bench/greedy_texts.py --out texts.jsonl
    python bench/run.py --texts texts.jsonl hf plain goose "goose:shape=optimal,budget=auto"

A contender is `hf` (transformers' own `generate`), `hf-prompt-lookup` (its prompt lookup, 10
tokens), or a name of the catalogue, with constructor arguments behind a colon. The first is what
the others are compared with. Every call gets a fresh drafter, every prompt comes once per
contender, turns rotate, and rounds under foreign load are dropped: see bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from ast import literal_eval
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pertoken.timing import AlternatingRun

HF: dict[str, dict[str, Any]] = {"hf": {}, "hf-prompt-lookup": {"prompt_lookup_num_tokens": 10}}


def contender(spec: str) -> Callable[[], dict[str, Any]]:
    """What a contender passes to `generate`, made anew for every call.

    >>> contender("hf-prompt-lookup")()
    {'prompt_lookup_num_tokens': 10}
    """
    if spec in HF:
        return lambda: dict(HF[spec])
    import pertoken

    name, _, text = spec.partition(":")
    options = dict(arguments(text))
    method = pertoken.get(name)
    method(**options)  # a wrong argument is said now, not after the first contender's run
    return lambda: {"custom_generate": method(**options)}


def arguments(text: str) -> list[tuple[str, Any]]:
    """Read ``budget=auto,shape=paper,keep=True``; words that are no literal are strings.

    >>> arguments("budget=8,shape=paper")
    [('budget', 8), ('shape', 'paper')]
    """
    pairs = []
    for part in filter(None, text.split(",")):
        key, sign, word = part.partition("=")
        if not sign:
            raise SystemExit(f"error: {part!r} is no argument; write name=value")
        try:
            value = literal_eval(word)
        except (ValueError, SyntaxError):
            value = word
        pairs.append((key.strip(), value))
    return pairs


def decode(
    model: Any, prompt: Sequence[int], new_tokens: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Decode one prompt greedily; new ids and, for our methods, how they came about."""
    import torch

    inputs = torch.tensor([list(prompt)], device=model.device)
    ids = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=new_tokens,
        do_sample=False,
        **options,
    )
    found = {"ids": ids[0, len(prompt) :].tolist()}
    stats = getattr(options.get("custom_generate"), "stats", None)
    if stats is not None:
        found |= {"per_forward": stats.accepted_per_forward, "draft_share": stats.draft_share}
    return found


def summarise(
    run: AlternatingRun, baseline: str, limit_tokens_per_second: float, keep: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Figures of each contender over the kept rounds whose index is in `keep`."""
    from pertoken.timing import spread

    rounds = [entry for entry in run.kept if entry.index in set(keep)]
    figures = {}
    for name in run.names:
        calls = [entry.calls[name] for entry in rounds]
        speeds = spread([len(call.value["ids"]) / call.seconds for call in calls])
        ours = sum(call.seconds for call in calls)
        theirs = sum(entry.calls[baseline].seconds for entry in rounds)
        per_forward = [c.value["per_forward"] for c in calls if "per_forward" in c.value]
        figures[name] = {
            "prompts": len(calls),
            "tokens_per_second": speeds.median,
            "quartiles": [speeds.low, speeds.high],
            "times_baseline": theirs / ours if ours else float("nan"),
            "share_of_bandwidth_limit": speeds.median / limit_tokens_per_second,
            "tokens_per_forward": sum(per_forward) / len(per_forward) if per_forward else None,
            "identical": sum(
                entry.calls[name].value["ids"] == entry.calls[baseline].value["ids"]
                for entry in rounds
            ),
        }
    return figures


def table(figures: dict[str, dict[str, Any]], title: str) -> str:
    """The figures of `summarise` as text."""
    lines = [title]
    for name, row in figures.items():
        low, high = row["quartiles"]
        forward = row["tokens_per_forward"]
        lines.append(
            f"  {name:34} {row['tokens_per_second']:7.1f} tokens/s ({low:.1f}-{high:.1f})"
            f"  x {row['times_baseline']:.2f}"
            f"  {row['share_of_bandwidth_limit']:4.0%} of the limit"
            f"  {'' if forward is None else f'{forward:.2f} a forward'}"
            f"  identical {row['identical']}/{row['prompts']}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("contenders", nargs="+")
    parser.add_argument("--texts", type=Path, required=True, help="from bench/greedy_texts.py")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, help="threads torch computes with")
    parser.add_argument("--limit", type=int, help="first prompts only")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    given = parser.parse_args()

    import torch

    import pertoken
    from pertoken.reproduce._machine import machine, versions
    from pertoken.stats_text import LOOPING_SHARE, repeated_4gram_share
    from pertoken.timing import alternate, bandwidth, bytes_per_token

    if not given.texts.is_file() or not given.texts.stat().st_size:
        print(f"error: no texts at {given.texts}; see bench/greedy_texts.py", file=sys.stderr)
        return 2
    lines = given.texts.read_text(encoding="utf-8").splitlines()[: given.limit]
    texts = [json.loads(line) for line in lines]
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        makers = {spec: contender(spec) for spec in dict.fromkeys(given.contenders)}
        model, _ = pertoken.load(given.model, dtype=given.dtype)
    except (pertoken.PertokenError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    def turn(make: Callable[[], dict[str, Any]]) -> Callable[[int], dict[str, Any]]:
        def call(index: int) -> dict[str, Any]:
            text = texts[index]
            return decode(model, text["prompt_ids"], len(text["output_ids"]), make())

        return call

    for make in makers.values():  # first calls pay for allocations that later ones do not
        decode(model, texts[0]["prompt_ids"][:16], 4, make())
    run = alternate({name: turn(make) for name, make in makers.items()}, len(texts))
    per_second = bandwidth()
    limit = per_second / bytes_per_token(model)
    everything = range(len(texts))
    calm = [i for i in everything if repeated_4gram_share(texts[i]["output_ids"]) < LOOPING_SHARE]
    baseline = next(iter(makers))
    figures = {
        "all outputs": summarise(run, baseline, limit, everything),
        "outputs that do not loop": summarise(run, baseline, limit, calm),
    }
    for title, rows in figures.items():
        print(table(rows, title))
    noise = run.noise()
    print(
        f"rounds kept {noise['rounds_kept']}, dropped {noise['rounds_dropped']}; memory reads "
        f"{per_second / 1e9:.1f} GB/s, so the limit without speculation is {limit:.0f} tokens/s"
    )
    if given.out:
        report = {
            "figures": figures,
            "noise": noise,
            "bandwidth": per_second,
            "model": given.model,
            "dtype": given.dtype,
            "versions": versions(),
            "machine": machine(),
        }
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
