r"""Why ReAGent misses planted facts: what its steps add up, beside the same steps centred.

    python bench/reagent_sum.py --out reports/bench/reagent_sum.json
    python bench/reagent_sum.py --model gemma3-270m --facts 14 \
        --out reports/bench/reagent_sum_gemma3.json

In ReAGent's reproduction a fact that alone decides the answer is often not among the most important
tokens. Is it the random start of the importances, the number of steps, or the update? Here the rows
of ReAGent are drawn for the facts that the model repeats, without its stopping rule, and rated from
the same numbers in three ways: as the method does (a step is added where a token was replaced and
taken away elsewhere, from a random start), without the start, and with the mean of all steps taken
from each step first. A step is large whichever tokens are replaced as soon as the prediction is
lost anyway; then the sum counts how often a token was drawn, and that correlation is written down.
No paper has measured this.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from comparison import show_and_write

RATIOS = (0.3, 0.1)  # of single tokens and of sequences, in the authors' code
PROBES = 5
TOP = 0.2  # the share of tokens in which a fact is sought, as in the reproduction
BARS = {  # fixed before the first run on the report's facts: what, minus what, bar
    "fact found, steps centred": ("0.3 centred", None, ">= 0.9"),
    "fact found, steps centred minus ReAGent": ("0.3 centred", "0.3 sum", "> 0"),
    "fact found, without the start minus ReAGent": ("0.3 no start", "0.3 sum", "<= 0.1"),
    "correlation of ReAGent's sum with the times drawn": ("0.3 drawn", None, ">= 0.8"),
    "fact found, ReAGent with ratio 0.1": ("0.1 sum", None, ">= 0.8"),
    "fact found, ReAGent with ratio 0.1 minus 0.3": ("0.1 sum", "0.3 sum", "> 0"),
}


@dataclass(frozen=True)
class Drawn:
    """Rows of one target.

    mask: which tokens were replaced, bool [steps, probes, time]; step: what the update adds,
    [steps, probes]; start: [probes, time]; free: which may be replaced, bool [time].
    """

    mask: Any
    step: Any
    start: Any
    free: Any


def draw(question: Any, ratio: float, steps: int, seed: int) -> Drawn:
    """The rows that ReAGent's probes would draw, were none of them to stop."""
    import torch

    from pertoken.attribute._forward import read_rows
    from pertoken.attribute._replace import prepare
    from pertoken.attribute.quantity import find

    reagent, quantity = import_module("pertoken.attribute.reagent"), find("probability")
    target = reagent._begin(question, quantity, question.places[0], seed, PROBES, 8, 0)
    shape = (steps, 3, *target.s.shape)
    uniforms = torch.rand(shape, generator=target.generator, dtype=torch.float64)
    uniforms = uniforms.to(target.s.device)
    mask = (uniforms[:, 0] < ratio) & target.free
    rows = reagent._replaced(question, target, mask, prepare("lm_topk", question)(uniforms[:, 1]))
    wanted = question.ids[target.place].expand(len(rows))
    found = read_rows(
        question.model, [rows], lambda logits, part: quantity(logits, wanted[part]).double()
    )
    step = reagent._step(target.p0 - found, quantity.unit).view(steps, PROBES)
    return Drawn(mask.cpu(), step.cpu(), target.s.cpu(), target.free.cpu())


def sums(mask: Any, step: Any) -> Any:
    """Added up where a token was replaced, taken away elsewhere, [probes, time].

    >>> import torch
    >>> mask = torch.tensor([[[True, False]], [[True, True]]])
    >>> sums(mask, torch.tensor([[2.0], [1.0]])).tolist()
    [[3.0, -1.0]]
    """
    import torch

    return torch.where(mask, step[..., None], -step[..., None]).sum(0)


def rated(drawn: Drawn, fact: Any) -> dict[str, float]:
    """Is the fact (bool [time]) in the top share of tokens, by each rating; and what steps are.

    drawn: correlation of the sum with the times drawn, mean over probes.
    """
    import torch

    def hit(s: Any) -> float:
        importance = s.masked_fill(~drawn.free, -torch.inf).softmax(-1).mean(0)
        top = importance.topk(math.ceil(TOP * int(drawn.free.sum()))).indices
        return float(fact[top].any())

    plain = sums(drawn.mask, drawn.step)
    pairs = zip(plain[:, drawn.free], drawn.mask.sum(0)[:, drawn.free], strict=True)
    alike = [float(torch.corrcoef(torch.stack([s, n.double()]))[0, 1]) for s, n in pairs]
    replaced = drawn.mask[..., fact].any(-1)
    return {
        "sum": hit(drawn.start + plain),
        "no start": hit(plain),
        "centred": hit(sums(drawn.mask, drawn.step - drawn.step.mean())),
        "drawn": statistics.mean(alike),
        "step, fact replaced": float(drawn.step[replaced].mean()),
        "step, fact kept": float(drawn.step[~replaced].mean()),
    }


def report(found: Sequence[dict[str, float]], **about: Any) -> dict[str, Any]:
    """The written form; found: for each fact what `rated` gives, each name behind its ratio."""
    from pertoken._bootstrap import bootstrap_mean
    from pertoken.reproduce._bars import Bar

    comparisons = []
    for metric, (first, second, bar) in BARS.items():
        values = [each[first] - (each[second] if second else 0) for each in found]
        here = statistics.mean(values)
        row = {"metric": metric, "here": here, "interval": bootstrap_mean(values), "bar": bar}
        comparisons.append({**row, "holds": Bar.parse(bar).holds(here)})
    figures = {
        f"ratio {ratio}": {
            name.removeprefix(f"{ratio} "): statistics.mean(each[name] for each in found)
            for name in found[0]
            if name.startswith(f"{ratio} ")
        }
        for ratio in RATIOS
    }
    return {"comparisons": comparisons, "figures": figures, **about}


def questions(model: Any, tokenizer: Any, split: Any, count: int) -> list[tuple[Any, Any, int]]:
    """Question, where the fact is (bool [time]), and number, of the facts the model repeats."""
    import torch

    from pertoken.attribute._question import ask
    from pertoken.reproduce._reagent_prompts import planted

    found = []
    for each in planted(split, count):
        wanted = ask(model, tokenizer, each.prompt, each.target)
        if ask(model, tokenizer, each.prompt, len(wanted.targets)).targets != wanted.targets:
            continue
        begin, end = each.fact or (0, 0)
        spans = wanted.spans[: wanted.prompt]
        fact = [span is not None and span[0] < end and span[1] > begin for span in spans]
        found.append((wanted, torch.tensor(fact), each.number))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--facts", type=int, default=20, help="those the model repeats are rated")
    parser.add_argument("--steps", type=int, default=50, help="of every probe")
    parser.add_argument("--split", choices=("dev", "report"), default="report")
    given = parser.parse_args()
    for name in ("facts", "steps"):
        if getattr(given, name) < 1:
            print(f"--{name} must be 1 or more", file=sys.stderr)
            return 2

    import torch
    from rich.progress import track

    import pertoken
    from pertoken.reproduce._machine import machine, versions

    try:
        model, tokenizer = pertoken.load(given.model)
        asked = questions(model, tokenizer, given.split, given.facts)
        if not asked:
            raise pertoken.PertokenError(f"{given.model} repeats none of the facts")
    except pertoken.PertokenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = []
    with torch.no_grad():
        for question, fact, number in track(asked, "facts"):
            one: dict[str, float] = {}
            for ratio in RATIOS:
                values = rated(draw(question, ratio, given.steps, number), fact)
                one |= {f"{ratio} {name}": value for name, value in values.items()}
            found.append(one)
    settings = {key: value for key, value in vars(given).items() if key != "out"}
    settings |= {"probes": PROBES, "repeated": len(asked), "replacer": "lm_topk"}
    written = report(found, settings=settings, machine=machine("cpu"), versions=versions())
    show_and_write(written, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
