"""Which class DecompX is asked for, when it says which words of a mail can go.

    python bench/decompx_targets.py --out reports/bench/decompx_targets.json

FrugalPrompt's code keeps what speaks for label 0 of the encoder, whatever it predicts. In the
authors' own files random words then do better than DecompX on reviews, with mistakes all on one
side. Is it the target? Here MiniLM learns to tell spam (label 1) from ham (label 0) on development
mails, and rates the words of others, sentence by sentence, by their share in the logit of label 0,
of label 1, of the label it predicts for the sentence, or by the absolute value of the last, which
is the default of `pertoken.compress`; GlobEnc of the same encoder and random words stand beside it.
What is left of a mail goes to two decoders, each with a linear layer on its states that has learnt
on whole development mails, as in FrugalPrompt's reproduction (more of them here). No paper has
measured this.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from comparison import show_and_write

if TYPE_CHECKING:
    from pertoken.reproduce._frugal_tasks import Item

DECODERS = ("smollm2", "gemma3-270m")
TARGETS: dict[str, str | int] = {
    "label 0": 0,
    "label 1": 1,
    "predicted": "predicted",
    "absolute": "abs",
}
SHARES = (0.8, 0.6, 0.5)
JUDGED = 0.5  # the least share of the paper, where the mistakes of its files are counted
WHOLE = 1.0
LEARNT_ON = 240  # development mails, for the encoder and the linear layers
TRAINING = {"epochs": 3, "batch": 8, "rate": 5e-5, "warmup": 0.1}

Found = dict[str, dict[float, list[bool]]]
"""By rating and share: is each mail taken for spam; the whole mails are rated "whole"."""


def bars(decoder: str) -> dict[str, tuple[str, str, str, str]]:
    """Metric -> what is counted, of what, minus of what, the bar; fixed before the first run."""
    at = f"at {JUDGED:.0%}"
    return {
        f"{decoder}: taken for ham {at}, label 0 minus random": ("ham", "label 0", "random", "> 0"),
        f"{decoder}: taken for ham {at}, random minus label 1": ("ham", "random", "label 1", "> 0"),
        f"{decoder}: right {at}, random minus label 0": ("right", "random", "label 0", "> 0"),
        f"{decoder}: right {at}, predicted minus label 0": ("right", "predicted", "label 0", "> 0"),
        f"{decoder}: right {at}, absolute minus label 0": ("right", "absolute", "label 0", "> 0"),
        f"{decoder}: right {at}, absolute minus random": ("right", "absolute", "random", ">= 0"),
        f"{decoder}: right {at}, globenc minus random": ("right", "globenc", "random", ">= 0"),
    }


def report(
    encoder: Sequence[bool], found: dict[str, Found], labels: Sequence[int], **about: Any
) -> dict[str, Any]:
    """The written form: comparisons with their bars, and intervals over mails; figures, settings.

    encoder: is each whole mail taken for spam by the encoder; found: the same by decoder.
    """
    from pertoken._bootstrap import bootstrap_mean
    from pertoken.reproduce._bars import Bar

    spam = np.array(labels, bool)
    comparisons = []

    def judge(metric: str, values: np.ndarray[Any, Any], bar: str) -> None:
        value = float(values.mean())
        interval = bootstrap_mean(values.tolist())
        row = {"metric": metric, "here": value, "interval": interval, "bar": bar}
        comparisons.append({**row, "holds": Bar.parse(bar).holds(value)})

    def counted(what: str, taken: Sequence[bool]) -> np.ndarray[Any, Any]:
        guess = np.array(taken, bool)
        return ((guess == spam) if what == "right" else ~guess).astype(float)

    judge("minilm: right, whole mails", counted("right", encoder), ">= 0.85")
    figures: dict[str, dict[str, float]] = {}
    for decoder, own in found.items():
        judge(f"{decoder}: right, whole mails", counted("right", own["whole"][WHOLE]), ">= 0.75")
        for metric, (what, first, second, bar) in bars(decoder).items():
            pair = [counted(what, own[name][JUDGED]) for name in (first, second)]
            judge(metric, pair[0] - pair[1], bar)
        for rating, by_share in own.items():
            for share, taken in by_share.items():
                right = counted("right", taken)
                figures[f"{decoder}: {rating}, {share:.0%}"] = {
                    "right": float(right.mean()),
                    "right, ham": float(right[~spam].mean()),
                    "right, spam": float(right[spam].mean()),
                }
    return {"comparisons": comparisons, "figures": figures, **about}


def shortened(mail: Item, encoder: Any, tokenizer: Any, seed: int) -> dict[str, dict[float, str]]:
    """The mail's text by every rating at every share."""
    from pertoken.attribute.decompx import decompx
    from pertoken.prune import compress

    saliences: dict[str, Any] = {"globenc": "globenc", "random": "random"}
    saliences |= {name: partial(decompx, target=target) for name, target in TARGETS.items()}
    found: dict[str, dict[float, str]] = {"whole": {WHOLE: mail.body}}
    shorten: Callable[..., Any] = partial(compress, mail.body, protect_defaults=False, seed=seed)
    for name, salience in saliences.items():
        if name != "random":  # rated once for all shares
            salience = shorten(
                min(SHARES), salience=salience, model=encoder, tokenizer=tokenizer
            ).signal
        found[name] = {share: shorten(share, salience=salience).text for share in SHARES}
    return found


def learnt_encoder(mails: Sequence[Item], seed: int) -> tuple[Any, Any]:
    """MiniLM with a head of two labels, trained on the mails; and its tokenizer."""
    import torch
    from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup

    import pertoken
    from pertoken.loading import model_folder

    tokenizer = pertoken.load("minilm", kind="encoder")[1]
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        model_folder("minilm"), num_labels=2, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([label(mail) for mail in mails])
    steps = TRAINING["epochs"] * -(-len(mails) // TRAINING["batch"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAINING["rate"])
    warmup = round(TRAINING["warmup"] * steps)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    model.train()
    for _ in range(int(TRAINING["epochs"])):
        order = torch.randperm(len(mails), generator=generator)
        for part in order.split(int(TRAINING["batch"])):
            given = tokenizer(
                [mails[place].body for place in part.tolist()],
                padding=True,
                truncation=True,
                return_tensors="pt",
            )
            loss = model(**given, labels=labels[part]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval(), tokenizer


def label(mail: Item) -> int:
    """0 for ham, 1 for spam."""
    return mail.choices.index(mail.answer)


def taken_for_spam(model: Any, tokenizer: Any, text: str) -> bool:
    """What the encoder says of a whole text."""
    import torch

    with torch.no_grad():
        given = tokenizer(text, truncation=True, return_tensors="pt")
        return int(model(**given).logits.argmax()) == 1


def measure(
    dev: Sequence[Item], mails: Sequence[Item], seed: int
) -> tuple[list[bool], dict[str, Found]]:
    """What the encoder and each decoder take the mails for."""
    from rich.console import Console
    from rich.progress import track

    import pertoken
    from pertoken.reproduce._frugal_classifier import Classifier, learn

    console = Console(stderr=True)
    encoder, reads = learnt_encoder(dev, seed)
    said = [taken_for_spam(encoder, reads, mail.body) for mail in mails]
    rated = track(mails, "rating words", console=console)
    texts = [shortened(mail, encoder, reads, seed + mail.number) for mail in rated]
    found: dict[str, Found] = {}
    for name in DECODERS:
        model, tokenizer = pertoken.load(name, kind="decoder", dtype="float32")
        learnt = learn(model, tokenizer, [each.body for each in dev], [label(each) for each in dev])
        classifier = Classifier(model, tokenizer, learnt)
        own: Found = {rating: {share: [] for share in texts[0][rating]} for rating in texts[0]}
        for forms in track(texts, name, console=console):
            for rating, by_share in forms.items():
                for share, text in by_share.items():
                    own[rating][share].append(classifier.loss(text, 1) < math.log(2))
        found[name] = own
    return said, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mails", type=int, default=140, help="half spam, half ham")
    parser.add_argument("--split", choices=("dev", "report"), default="report")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.mails < 2 or given.mails % 2 or given.threads < 1:
        print("--mails must be even, 2 or more, and --threads 1 or more", file=sys.stderr)
        return 2

    import torch

    import pertoken
    from pertoken.loading import model_folder
    from pertoken.reproduce._frugal_tasks import classification
    from pertoken.reproduce._machine import machine, versions

    torch.set_num_threads(given.threads)
    try:  # what cannot be had is said before the training
        rows = pertoken.data("spam-assassin")
        for name in ("minilm", *DECODERS):
            model_folder(name)
    except pertoken.PertokenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    learn_on = classification(rows, LEARNT_ON, "dev")
    if given.split == "dev":  # to choose how to train: three quarters of the mails for the rest
        mails = learn_on[::4]
        learn_on = [mail for place, mail in enumerate(learn_on) if place % 4]
    else:
        mails = classification(rows, given.mails, "report")
        if len(mails) < given.mails:
            print(f"--mails is {given.mails}, and there are {len(mails)}", file=sys.stderr)
            return 2
    said, found = measure(learn_on, mails, given.seed)
    settings = {key: value for key, value in vars(given).items() if key != "out"}
    settings |= {
        "model": "minilm rates, " + " and ".join(DECODERS) + " read",
        "mails": len(mails),
        "learnt_on": len(learn_on),
        "training": TRAINING,
        "shares": SHARES,
    }
    about = {"settings": settings, "machine": machine("cpu"), "versions": versions()}
    show_and_write(report(said, found, [label(mail) for mail in mails], **about), given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
