"""Accepted tokens per forward: our suffix drafter and Goose beside arctic-inference's suffix cache.

    python bench/greedy_texts.py --out texts.jsonl
    python bench/suffix_peer.py ours   --texts texts.jsonl --out ours.json
    python bench/suffix_peer.py arctic --texts texts.jsonl --out arctic.json   # any environment
    python bench/suffix_peer.py table  ours.json arctic.json

`arctic` needs numpy and arctic-inference alone, no torch. It replays the greedy texts: a draft is
accepted as far as it equals the text, and every forward adds the model's own next token, which is
what verification by the same model would do. `ours` replays our suffix drafter in the same way and
decodes with Goose for real, because Goose learns from the logits of rejected tokens, and says
whether it wrote the same text (`--only` chooses contenders: decoding takes minutes). All see every
prompt once, in the order of the file, and may draft as many tokens (`--budget`). Two settings each:

    cold  nothing is carried from one prompt to the next
    warm  outputs of earlier prompts may be drafted from
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Speculate = Callable[[list[int]], tuple[Sequence[int], Sequence[int]]]
"""Context ids -> (drafted tokens, index of each one's parent in the draft, -1 for none)."""

OURS = [
    f"{kind} {setting}"
    for setting in ("cold", "warm")
    for kind in ("suffix path", "suffix tree", "goose paper", "goose optimal")
]


def accepted(tokens: Sequence[int], parents: Sequence[int], truth: Sequence[int]) -> int:
    """How many drafted tokens agree with the text that really follows.

    The deepest path of the draft's tree that spells a beginning of `truth`; a chain has parents
    -1, 0, 1, …

    >>> accepted([5, 6, 9], [-1, 0, 1], [5, 6, 7])
    2
    >>> accepted([4, 5, 6], [-1, -1, 1], [5, 6, 7])
    2
    """
    depth: dict[int, int] = {-1: 0}
    best = 0
    for index, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        above = depth.get(parent)
        if above is not None and above < len(truth) and truth[above] == token:
            depth[index] = above + 1
            best = max(best, above + 1)
    return best


def replay(
    prompt: Sequence[int],
    output: Sequence[int],
    speculate: Speculate,
    commit: Callable[[list[int]], None],
) -> dict[str, Any]:
    """Decode a known text with a drafter: forwards, drafted and accepted tokens.

    The prefill yields the first token, as in real decoding; every forward after it commits the
    accepted tokens and one of the model's own, and never more than the text holds.
    """
    commit(list(output[:1]))
    done, forwards, drafted, taken = 1, 0, 0, 0
    while done < len(output):
        tokens, parents = speculate([*prompt, *output[:done]])
        hit = accepted(tokens, parents, output[done:])
        # The last token of a text is the model's own where the whole rest was drafted.
        step = min(hit + 1, len(output) - done)
        commit(list(output[done : done + step]))
        done += step
        forwards += 1
        drafted += len(tokens)
        taken += min(hit, step)
    return {
        "tokens": max(0, len(output) - 1),
        "forwards": forwards,
        "drafted": drafted,
        "hit": taken,
    }


def run_arctic(texts: list[dict[str, Any]], budget: int, tree: bool, warm: bool) -> list[Any]:
    """Replay every text through arctic-inference's suffix cache, in order."""
    import numpy as np
    from arctic_inference.suffix_decoding import SuffixDecodingCache

    def array(ids: Sequence[int]) -> Any:
        return np.ascontiguousarray(ids, dtype=np.int32)  # it refuses every other type

    cache = SuffixDecodingCache(max_tree_depth=64, max_cached_requests=1000 if warm else 0)
    results = []
    for number, text in enumerate(texts):
        spent = [0.0]

        def speculate(
            context: list[int], number: int = number, spent: list[float] = spent
        ) -> tuple[Sequence[int], Sequence[int]]:
            window = array(context[-64:])
            began = time.perf_counter()
            draft = cache.speculate(number, window, max_spec_tokens=budget, use_tree_spec=tree)
            spent[0] += time.perf_counter() - began
            return draft.token_ids, draft.parents

        cache.start_request(number, array(text["prompt_ids"]))
        result = replay(
            text["prompt_ids"],
            text["output_ids"],
            speculate,
            lambda ids, number=number: cache.add_active_response(number, array(ids)),
        )
        cache.stop_request(number)
        results.append(_labelled(text, result, seconds_draft=spent[0]))
    return results


def replay_ours(texts: list[dict[str, Any]], drafter: Any, budget: int) -> list[Any]:
    """Replay every text through one of our drafters that learns from text alone, in order."""
    results = []
    for text in texts:
        prompt, output = text["prompt_ids"], text["output_ids"]
        drafter.contexts = [list(prompt)]
        drafter.begin(1 + max(*prompt, *output))
        spent = [0.0]

        def speculate(
            context: list[int],
            end: int = len(prompt) + len(output),
            spent: list[float] = spent,
        ) -> tuple[Sequence[int], Sequence[int]]:
            room = end - len(context) - 1  # the model's own token takes one place
            if room < 1:
                return (), ()
            began = time.perf_counter()
            tree = drafter.propose(0, budget, room)
            spent[0] += time.perf_counter() - began
            return tree.tokens[1:], [parent - 1 for parent in tree.parents[1:]]

        result = replay(prompt, output, speculate, lambda ids: drafter.commit(0, ids))
        results.append(_labelled(text, result, seconds_draft=spent[0]))
    return results


def run_ours(texts: list[dict[str, Any]], model: Any, drafter: Any) -> list[Any]:
    """Decode every prompt with one of our drafters, in order; it keeps what its `keep` says."""
    import torch

    results = []
    for text in texts:
        prompt, output = text["prompt_ids"], text["output_ids"]
        inputs = torch.tensor([prompt], device=model.device)
        ids = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=len(output),
            do_sample=False,
            custom_generate=drafter,
        )
        stats = drafter.stats
        result = {
            "tokens": round(stats.accepted_per_forward * stats.forwards),
            "forwards": stats.forwards,
            "drafted": sum(stats.drafted.values()),
            "hit": sum(stats.accepted.values()),
            "identical": ids[0, len(prompt) :].tolist() == output,
        }
        results.append(_labelled(text, result, seconds_draft=stats.seconds_draft))
    return results


def _labelled(text: dict[str, Any], result: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "question_id": text["question_id"],
        "category": text["category"],
        "looping": _repeats(text["output_ids"]) >= 0.30,
        **result,
        **more,
    }


def _repeats(ids: Sequence[int]) -> float:
    # As pertoken.stats_text.repeated_4gram_share, which this environment may not have.
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def per_forward(results: Iterable[dict[str, Any]]) -> float:
    """Tokens per forward over all prompts; NaN for none."""
    rows = list(results)
    forwards = sum(row["forwards"] for row in rows)
    return sum(row["tokens"] for row in rows) / forwards if forwards else float("nan")


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Tokens per forward of each contender: all, outputs that do not loop, by category.

    Only prompts that every contender ran are counted.
    """
    common = set.intersection(*({row["question_id"] for row in rows} for rows in found.values()))
    kept = {
        name: [row for row in rows if row["question_id"] in common] for name, rows in found.items()
    }
    some = next(iter(kept.values()))
    categories = list(dict.fromkeys(row["category"] for row in some))
    heads = ["contender", "all", "not looping", *categories, "identical"]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join("---" for _ in heads) + " |"]
    for name, rows in kept.items():
        cells = [per_forward(rows), per_forward(row for row in rows if not row["looping"])]
        cells += [per_forward(row for row in rows if row["category"] == c) for c in categories]
        same = sum(row.get("identical", True) for row in rows)
        shown = " | ".join(f"{cell:.3f}" for cell in cells)
        lines.append(f"| {name} | {shown} | {same}/{len(rows)} |")
    return "\n".join(lines)


BARS = {  # fixed before the first run: tokens per forward over the peer's in the same setting
    ("suffix path cold", "arctic path cold"): 0.98,
    ("suffix tree cold", "arctic tree cold"): 0.98,
    ("suffix path warm", "arctic path warm"): 0.98,
    ("suffix tree warm", "arctic tree warm"): 0.98,
    ("goose optimal cold", "arctic path cold"): 1.0,
    ("goose optimal cold", "arctic tree cold"): 1.0,
}


def report(found: dict[str, list[dict[str, Any]]], settings: dict[str, Any]) -> dict[str, Any]:
    """Figures of every contender and the ratios that have a bar, ready for JSON."""
    from pertoken._bootstrap import bootstrap_ratio_of_ratios
    from pertoken.reproduce._machine import machine, versions

    def sums(name: str) -> tuple[list[float], list[float]]:
        rows = found[name]
        return [row["tokens"] for row in rows], [row["forwards"] for row in rows]

    ratios = []
    for (ours, theirs), bar in BARS.items():
        if ours in found and theirs in found:
            here = per_forward(found[ours]) / per_forward(found[theirs])
            low, high = bootstrap_ratio_of_ratios(sums(ours), sums(theirs), seed=0)
            ratios.append(
                {
                    "metric": f"tokens per forward: {ours} over {theirs}",
                    "here": here,
                    "interval": [low, high],
                    "bar": f">= {bar:g}",
                    "holds": here >= bar,
                }
            )
    figures = {
        name: {
            "all": per_forward(rows),
            "not looping": per_forward(row for row in rows if not row["looping"]),
            "identical": sum(row.get("identical", True) for row in rows),
            "prompts": len(rows),
        }
        for name, rows in found.items()
    }
    return {
        "settings": settings,
        "versions": versions(),
        "machine": machine(),
        "ratios": ratios,
        "tokens_per_forward": figures,
    }


def read_texts(path: Path, limit: int | None) -> list[dict[str, Any]]:
    """The first `limit` texts of a file of JSON lines."""
    if not path.is_file():
        raise SystemExit(f"error: no texts at {path}; write them with bench/greedy_texts.py")
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.strip()][:limit]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = parser.add_subparsers(dest="step", required=True)
    for step in ("ours", "arctic"):
        own = steps.add_parser(step)
        own.add_argument("--texts", type=Path, required=True)
        own.add_argument("--out", type=Path, required=True)
        own.add_argument("--budget", type=int, default=60, help="most tokens drafted a forward")
        own.add_argument("--limit", type=int, help="first prompts only")
        if step == "ours":
            own.add_argument("--model", default="smollm2")
            own.add_argument("--dtype", default="float32")
            own.add_argument("--only", nargs="+", choices=OURS, metavar="NAME", help=f"of {OURS}")
    last = steps.add_parser("table")
    last.add_argument("files", type=Path, nargs="+")
    last.add_argument(
        "--out", type=Path, help="write figures and ratios as JSON, in our environment"
    )
    given = parser.parse_args()
    if given.step == "table":
        found: dict[str, list[dict[str, Any]]] = {}
        settings: dict[str, Any] = {}
        for file in given.files:
            content = json.loads(file.read_text(encoding="utf-8"))
            found.update(content["results"])
            peers = settings.get("peers", {}) | content["settings"].pop("peers", {})
            settings |= content["settings"] | {"peers": peers}
        print(table(found))
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(report(found, settings), indent=2)
            given.out.write_text(text + "\n", encoding="utf-8")
        return 0
    texts = read_texts(given.texts, given.limit)
    if given.step == "arctic":
        try:
            from importlib.metadata import version

            import arctic_inference.suffix_decoding  # noqa: F401
        except ImportError:
            print("arctic-inference is not installed here (see bench/README.md)", file=sys.stderr)
            return 2
        results = {
            f"arctic {mode} {'warm' if warm else 'cold'}": run_arctic(
                texts, given.budget, mode == "tree", warm
            )
            for mode in ("path", "tree")
            for warm in (False, True)
        }
        peer = {"arctic-inference": version("arctic-inference")}
    else:
        results, peer = _ours(texts, given), {}
    settings = {"budget": given.budget, "prompts": len(texts), "peers": peer}
    if given.step == "ours":
        settings |= {"model": given.model, "dtype": given.dtype}
    given.out.write_text(json.dumps({"settings": settings, "results": results}), encoding="utf-8")
    print(table(results))
    return 0


def _ours(texts: list[dict[str, Any]], given: argparse.Namespace) -> dict[str, list[Any]]:
    import pertoken
    from pertoken.decode import Goose, SuffixTree

    model = None
    results = {}
    for name in given.only or OURS:
        kind, how, setting = name.split()
        keep = setting == "warm"
        if kind == "suffix":
            drafter = SuffixTree(mode=how, budget=given.budget, keep=keep)
            results[name] = replay_ours(texts, drafter, given.budget)
        else:
            if model is None:
                model, _ = pertoken.load(given.model, dtype=given.dtype)
            results[name] = run_ours(texts, model, Goose(shape=how, budget=given.budget, keep=keep))
    return results


if __name__ == "__main__":
    sys.exit(main())
