"""Our ReAGent beside inseq's: seconds of a target, and how faithful the importances of both are.

    python bench/inseq_peer.py --out reports/bench/inseq.json  # both installed, see README

Both run in one process on one model object, take turns, and explain one token of the same prompts,
the one that the model writes itself, with the same probes, ratio, rationale, top-k and most steps.
Both draw replacements uniformly from the same ids: inseq's sampler knows classes of tokens by part
of speech and reads them from a file, which here holds one class. Its code is left as it is; seconds
are those of its public `attribute`, which for this method adds no forward of its own (it tokenizes
the text, which ours has done before: milliseconds).

Where inseq 0.7.1 is not the same, read from its source:

- It replaces any token, special ones too, and keeps n of the rationale whatever the length; ours
  never replaces special tokens and keeps at most a quarter. So the prompts here have no special
  token and 4 n tokens or more, and the law of both is one.
- A probe that has stopped stays as it is, but goes through the model in every step until the last
  one has stopped. Ours leaves it out. A step sends every probe through the model twice, p(y | x)
  is computed once for each probe; logits are made at every position and sorted whole.
- Where no probe stops, its mean is 0 / 0: NaN. Ours takes the mean over all probes and says so.
  Targets for which one of the two had no probe stop are counted and left out of what is said about
  faithfulness; their seconds count.
- It adds float32 log-odds that are not clipped, and draws from torch's global generator, so the two
  never see the same random numbers: they agree in law, not number by number.

Each stops by its own luck. Therefore the rows that each sent through the model are counted, two of
them for a step of a probe, and seconds per row stand beside seconds per target: the ratio of
seconds is the ratio of rows times the ratio of seconds per row.

As both follow one law, the ratios of their faithfulness are 1 but for chance: read the bar on them
with the interval beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

METRICS = ("sufficiency", "comprehensiveness")
BARS = {  # fixed before the first run
    "seconds: ours over inseq": "<= 0.2",
    "sufficiency: ours over inseq": ">= 1",
    "comprehensiveness: ours over inseq": ">= 1",
}


@dataclass(frozen=True)
class Run:
    """One target explained once.

    importance: float64 [time], NaN where nothing was found; stopped: whether a probe stopped;
    rows: texts that went through the model.
    """

    importance: Any
    stopped: bool
    rows: int


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """The rows of each forward pass."""
    rows: list[int] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows.append(len(args[0] if args else kwargs["input_ids"]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def ordinary(tokenizer: Any) -> list[int]:
    """The ids that may stand in for a token: all but the special ones."""
    from pertoken._pieces import special_ids

    special = special_ids(tokenizer)
    return [token for token in range(len(tokenizer)) if token not in special]


def run_ours(question: Any, settings: dict[str, Any], seed: int) -> Run:
    from pertoken.attribute.quantity import find
    from pertoken.attribute.reagent import reagent

    with counted(question.model) as rows:
        found = reagent(question, find("probability"), seed=seed, replacer="uniform", **settings)
    return Run(found.values[0, : question.prompt], not found.notes, sum(rows))


class Peer:
    """inseq's ReAGent on the same model; one in a process, as it reads its folder once."""

    def __init__(self, model: Any, tokenizer: Any, settings: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["INSEQ_ARTIFACTS_CACHE"] = folder  # before the import
            from inseq import load_model

            cache = Path(folder, "pos_tag_sampler_cache")
            cache.mkdir()
            name = model.config.name_or_path.split("/")[-1]
            (cache / f"{name}.pkl").write_bytes(pickle.dumps({"any": ordinary(tokenizer)}))
            self._inseq = load_model(
                model,
                "reagent",
                tokenizer=copy.deepcopy(tokenizer),  # it sets tokens of its own
                device=str(model.device),
                keep_top_n=settings["keep"],
                stopping_condition_top_k=settings["top_k"],
                replacing_ratio=settings["ratio"],
                max_probe_steps=settings["max_steps"],
                num_probes=settings["probes"],
            )
        rationalizer = self._inseq.attribution_method.method.rationalizer
        self._evaluator = rationalizer.importance_score_evaluator

    def run(self, question: Any, max_steps: int, seed: int) -> Run:
        import torch

        self._evaluator.max_steps = max_steps
        torch.manual_seed(seed)
        with counted(question.model) as rows:
            out = self._inseq.attribute(
                question.text, whole(question), show_progress=False
            ).sequence_attributions[0]
        if [each.id for each in out.target] != question.ids.tolist():
            raise RuntimeError("the peer explained another text")
        # One value for each element of the embedding, all the same; the last row is the target's.
        values = out.target_attributions[: question.prompt, 0, 0].double()
        return Run(values, bool(self._evaluator.stop_mask.any()), sum(rows))


def whole(question: Any) -> str:
    """Prompt and target as a text."""
    return str(question.text + question.tokenizer.decode(question.ids[question.prompt :].tolist()))


def comparable(question: Any, keep: int) -> bool:
    """Whether both see the same ids, may replace every token, and keep as many."""
    ids = question.ids.tolist()
    return (
        question.tokenizer(whole(question))["input_ids"] == ids
        and bool(question.free.all())
        and question.prompt >= 4 * keep
    )


def chosen(model: Any, tokenizer: Any, texts: Iterable[str], keep: int, wanted: int) -> list[Any]:
    """Questions of the first prompts that are comparable; the model writes the target."""
    from pertoken.attribute._question import ask

    found: list[Any] = []
    for text in texts:
        if len(found) == wanted:
            break
        question = ask(model, tokenizer, text, 1)
        if comparable(question, keep):
            found.append(question)
    return found


def questions(model: Any, tokenizer: Any, split: Any, keep: int, wanted: int) -> list[Any]:
    """Half analogies, half cut prose, of ReAGent's reproduction."""
    import pertoken
    from pertoken.reproduce._reagent_prompts import analogies, prose

    half, spare = wanted // 2, wanted + 4
    kinds = [
        (half, analogies(split)),
        (wanted - half, prose(pertoken.data("gsm8k"), split, spare)),
    ]
    found = [
        question
        for count, asked in kinds
        for question in chosen(model, tokenizer, (each.prompt for each in asked), keep, count)
    ]
    if len(found) < wanted:
        raise pertoken.PertokenError(f"{wanted} prompts were asked for, {len(found)} can be used")
    return found


def faithful(question: Any, runs: dict[str, Run], draws: int, seed: int) -> dict[str, Any]:
    """Mean of both metrics for each importance and for random ones, on the same draws."""
    import torch

    from pertoken.attribute._scores import seeded
    from pertoken.attribute.faithfulness import importance, soft_scores

    place = question.prompt
    free = question.free[:place].cpu()
    given = [importance(run.importance, free).expand(draws, -1) for run in runs.values()]
    u = torch.rand(draws, place, generator=seeded(seed, 1), dtype=torch.float64)
    random = u.masked_fill(~free, -torch.inf).softmax(-1)
    pair = soft_scores(question, place, torch.stack([*given, random]), seed=seed)
    return {
        name: {metric: float(of[row].mean()) for metric, of in zip(METRICS, pair, strict=True)}
        for row, name in enumerate([*runs, "random"])
    }


def rank_correlation(one: Any, other: Any) -> float:
    """Spearman's, of two tensors without ties.

    >>> import torch
    >>> rank_correlation(torch.tensor([0.1, 0.5, 0.4]), torch.tensor([1.0, 9.0, 8.0]))
    1.0
    """
    import torch

    ranks = torch.stack([each.argsort().argsort().double() for each in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def measure(timed: Any, asked: Sequence[Any], draws: int) -> list[dict[str, Any]]:
    """A dict per target, in the order of the prompts; faithfulness where a probe of both stopped.

    seconds are None where the round was too noisy: the rest does not mind what else ran.
    """
    targets = []
    kept = {round_.index for round_ in timed.kept}
    for round_ in sorted([*timed.kept, *timed.dropped], key=lambda each: each.index):
        question = asked[round_.index]
        runs = {name: call.value for name, call in round_.calls.items()}
        target: dict[str, Any] = {
            "prompt": question.text,
            "target": question.targets[0],
            "tokens": question.prompt,
            "seconds": {name: call.seconds for name, call in round_.calls.items()}
            if round_.index in kept
            else None,
            "rows": {name: run.rows for name, run in runs.items()},
            "stopped": {name: run.stopped for name, run in runs.items()},
        }
        if all(run.stopped for run in runs.values()):
            target["faithfulness"] = faithful(question, runs, draws, seed=round_.index)
            target["rank_correlation"] = rank_correlation(
                *(run.importance for run in runs.values())
            )
        targets.append(target)
    return targets


def report(targets: Sequence[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Rows with their bars, ready for JSON; no figure where nothing is left to make it of."""
    from pertoken.reproduce._machine import machine, versions

    rows = [*_cost(targets), *_agreement(targets)]
    return {
        "settings": settings,
        "versions": versions(),
        "machine": machine(),
        "rows": rows,
        "targets": list(targets),
    }


def _cost(targets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    from pertoken.timing import spread

    timed = [target for target in targets if target["seconds"] is not None]
    seconds = {name: [each["seconds"][name] for each in timed] for name in ("ours", "inseq")}
    texts = {name: [each["rows"][name] for each in timed] for name in ("ours", "inseq")}
    rows = [_ratio("seconds: ours over inseq", seconds["ours"], seconds["inseq"])]
    if timed:
        each = spread([a / b for a, b in zip(seconds["ours"], seconds["inseq"], strict=True)])
        rows[0]["quartiles"] = [each.low, each.median, each.high]
    rows.append(_ratio("rows through the model: ours over inseq", texts["ours"], texts["inseq"]))
    for name in ("ours", "inseq"):
        rows.append(_ratio(f"seconds per row: {name}", seconds[name], texts[name]))
    for name in ("ours", "inseq"):
        row: dict[str, Any] = {"metric": f"seconds of a target: {name}", "here": None}
        if timed:
            each = spread(seconds[name])
            row |= {"here": each.median, "quartiles": [each.low, each.median, each.high]}
        rows.append(row)
    return rows


def _agreement(targets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    from statistics import median

    rated = [target for target in targets if "faithfulness" in target]
    rows: list[dict[str, Any]] = [
        {
            "metric": f"share of targets for which a probe stopped: {name}",
            "here": sum(each["stopped"][name] for each in targets) / len(targets),
        }
        for name in ("ours", "inseq")
    ]
    rows.append({"metric": "targets rated: a probe of both stopped", "here": len(rated)})
    for metric in METRICS:
        values = {
            name: [each["faithfulness"][name][metric] for each in rated]
            for name in ("ours", "inseq", "random")
        }
        rows.append(_ratio(f"{metric}: ours over inseq", values["ours"], values["inseq"]))
        for name in ("ours", "inseq"):
            rows.append(_ratio(f"{metric}: {name} over random", values[name], values["random"]))
    ranks = [each["rank_correlation"] for each in rated]
    rows.append({"metric": "rank correlation, median", "here": median(ranks) if ranks else None})
    return rows


def _ratio(metric: str, top: Sequence[float], bottom: Sequence[float]) -> dict[str, Any]:
    """Ratio of the sums with its interval over targets; None where there are none."""
    import math

    from pertoken._bootstrap import bootstrap_ratio

    if not bottom or not sum(bottom):
        return _judged({"metric": metric, "interval": None}, None)
    interval = bootstrap_ratio(top, bottom, seed=0)
    known = list(interval) if all(math.isfinite(end) for end in interval) else None
    return _judged({"metric": metric, "interval": known}, sum(top) / sum(bottom))


def _judged(row: dict[str, Any], figure: float | None) -> dict[str, Any]:
    from pertoken.reproduce._bars import Bar

    row["here"] = figure
    if row["metric"] in BARS:
        bar = BARS[row["metric"]]
        row |= {"bar": bar, "holds": Bar.parse(bar).holds(figure)}
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--split", choices=("dev", "report"), default="report")
    parser.add_argument("--probes", type=int, default=16, help="this and the next three: inseq's")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--keep", type=int, default=5, help="tokens of the rationale")
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=50, help="inseq's: 3000")
    parser.add_argument("--draws", type=int, default=20, help="draws of the faithfulness")
    parser.add_argument("--threads", type=int, help="threads torch computes with")
    given = parser.parse_args()
    for name in ("prompts", "draws", "max_steps", "probes", "keep", "top_k"):
        if getattr(given, name) < 1:
            print(f"--{name.replace('_', '-')} must be 1 or more", file=sys.stderr)
            return 2
    try:
        peer = {"inseq": version("inseq")}
    except ImportError:
        print("inseq is not installed here (see bench/README.md)", file=sys.stderr)
        return 2

    import torch

    import pertoken
    from pertoken.timing import alternate

    if given.threads:
        torch.set_num_threads(given.threads)
    names = ("probes", "ratio", "keep", "top_k", "max_steps")
    settings = {name: getattr(given, name) for name in names}
    try:
        model, tokenizer = pertoken.load(given.model, dtype=given.dtype)
        asked = questions(model, tokenizer, given.split, given.keep, given.prompts)
    except pertoken.PertokenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    theirs = Peer(model, tokenizer, settings)
    run_ours(asked[0], settings | {"max_steps": 1}, 0)  # first calls pay for what others do not
    theirs.run(asked[0], 1, 0)
    timed = alternate(
        {
            "ours": lambda i: run_ours(asked[i], settings, i),
            "inseq": lambda i: theirs.run(asked[i], given.max_steps, i),
        },
        len(asked),
    )
    about = {k: v for k, v in vars(given).items() if k != "out"} | {
        "threads": torch.get_num_threads(),
        "replacements": "uniform, special tokens left out",
        "target": "the token that the model writes",
        "distance": "hellinger",
        "noise": timed.noise(),
        "peers": peer,
        "peer_settings": "its part-of-speech classes are one class; else as installed",
    }
    written = report(measure(timed, asked, given.draws), about)
    print("rounds kept {rounds_kept}, dropped {rounds_dropped}".format(**timed.noise()))
    for row in written["rows"]:
        beside = row.get("quartiles") or row.get("interval") or ""
        print(f"{row['metric']}: {row['here']} {beside} {row.get('bar', '')}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(
        json.dumps(written, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
