"""What it costs to rate the words of a prompt: tokens per second, and GlobEnc beside a gradient.

    python bench/compress_speed.py --out reports/bench/compress_speed.json

`compress` reads documents of Brown with each salience in turns, a document a round; a rate is the
median over documents, in tokens of the prompt. `smollm2` reads for self-information, `minilm` for
the others. GlobEnc of 1,000 tokens stands beside one forward and one backward of the same model on
the same tokens, down to the input embeddings: gradients of the weights, which would double the
backward, are not asked for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comparison import show_and_write

SALIENCES = ("globenc", "decompx", "self-information")
PIECES = {"minilm": (2, 500), "smollm2": (1, 1000)}  # texts and their tokens
BARS = {  # fixed before the first run
    "tokens per second, compress with globenc": ">= 2000",
    "GlobEnc over forward and backward, minilm": "<= 1",
    "GlobEnc over forward and backward, smollm2": "<= 1",
}


def report(rates: dict[str, list[float]], costs: dict[str, list[float]], **about: Any) -> Any:
    """The written form: comparisons with their bars, figures, settings."""
    from dataclasses import asdict

    from pertoken.reproduce._bars import Bar
    from pertoken.timing import spread

    here = [statistics.median(rates["globenc"]), *map(statistics.median, costs.values())]
    comparisons = [
        {"metric": metric, "here": value, "bar": bar, "holds": Bar.parse(bar).holds(value)}
        for (metric, bar), value in zip(BARS.items(), here, strict=True)
    ]
    figures = {f"{name}: tokens per second": asdict(spread(each)) for name, each in rates.items()}
    figures |= {
        f"{name}: GlobEnc over forward and backward": asdict(spread(each))
        for name, each in costs.items()
    }
    return {"comparisons": comparisons, "figures": figures, **about}


def compressing(texts: list[str], counts: list[int]) -> dict[str, Callable[[int], int]]:
    """Name -> compress one document, by its number; gives its tokens."""
    from pertoken.prune import compress
    from pertoken.prune.frugalprompt import reader

    made: dict[str, Callable[[int], int]] = {}
    for salience in SALIENCES:
        own = reader(salience, None)

        def turn(number: int, salience: str = salience, own: Any = own) -> int:
            text = texts[number]
            compress(text, 0.7, salience=salience, model=own.model, tokenizer=own.tokenizer)
            return counts[number]

        made[salience] = turn
    return made


def rating(name: str, text: str) -> dict[str, Callable[[int], Any]]:
    """GlobEnc and a gradient of the same tokens of a text."""
    import torch

    import pertoken
    from pertoken.attribute.globenc import globenc

    model, tokenizer = pertoken.load(name, kind="encoder" if name == "minilm" else "decoder")
    texts, time = PIECES[name]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: texts * time])
    ids = ids.view(texts, time)
    model.requires_grad_(False)

    def gradient(number: int) -> None:
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        # Without a head, as GlobEnc runs it.
        model.base_model(inputs_embeds=embedded).last_hidden_state.sum().backward()

    return {"globenc": lambda number: globenc(model, ids), "gradient": gradient}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9, help="documents")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()

    import torch

    import pertoken
    from pertoken.reproduce._machine import machine, versions
    from pertoken.reproduce._tokenadapt_texts import prose
    from pertoken.timing import alternate

    torch.set_num_threads(given.threads)
    # The report's half of Brown, every eighth of it, so that all its categories are read.
    texts = [prose(row["words"]) for row in pertoken.data("brown")[1::8]]
    if not 1 <= given.rounds <= len(texts):
        print(f"--rounds must be 1 to {len(texts)}, got {given.rounds}", file=sys.stderr)
        return 2
    texts = texts[: given.rounds]
    tokenizer = pertoken.load("minilm", kind="encoder")[1]
    counts = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    contenders = compressing(texts, counts)
    for turn in contenders.values():
        turn(0)  # the first call of a model is slower
    run = alternate(contenders, given.rounds)
    rates = {
        name: [n / s for n, s in zip(run.values(name), run.seconds(name), strict=True)]
        for name in SALIENCES
    }
    noise, costs = {"compress": run.noise()}, {}
    for name in PIECES:
        pair = rating(name, " ".join(texts))
        for turn in pair.values():
            turn(0)
        beside = alternate(pair, given.rounds)
        both = zip(beside.seconds("globenc"), beside.seconds("gradient"), strict=True)
        costs[name] = [a / b for a, b in both]
        noise[name] = beside.noise()
    settings = {key: value for key, value in vars(given).items() if key != "out"} | noise
    written = report(rates, costs, settings=settings, machine=machine("cpu"), versions=versions())
    show_and_write(written, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
