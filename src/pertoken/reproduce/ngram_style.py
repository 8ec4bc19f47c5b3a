"""Reproduction of n-gram style control (arXiv 2601.16224) on SmolLM2 and three corpora.

One author (Shakespeare's plays), many authors (mails of 2002), and a narrow register (school
mathematics) stand for the paper's Don Quixote, headlines and abstracts. Openings are continued at
every strength and read again (`pertoken.decode.style_figures`). Which small strength counts is
chosen on the development openings, one per corpus: the one at which the larger of both
perplexities' ratios to the frozen model is least. Figures are of the report openings, each
continued several times. Beside them the paper's baselines, read in the same way: a prompt with an
instruction and an excerpt, and a small LoRA.

A look at four development openings (plays only) came before the bars: at temperature 1 the base
perplexity does not explode at strength 1, the text repeats itself instead. Its bar, the paper's
claim, was kept, and one on repetition put beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Reproduction, Row
from pertoken.reproduce._style_lora import LORA, lora
from pertoken.reproduce._style_speed import median_overhead, seconds_per_million

VERSION = 1
DTYPE = "float32"
STRENGTHS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
SMALL = (0.02, 0.05, 0.1, 0.2)
DRAWS = 3  # continuations of each report opening; one of each development opening
NEW_TOKENS = 60
CHARACTERS = 3_000_000  # of a corpus
EXCERPT = 600  # characters in the prompt of the baseline
STEPS_TIMED = 60

BARS = {
    "style perplexity at the best small strength over the frozen model, worst corpus": "< 1",
    "base perplexity at the best small strength over the frozen model, worst corpus": "< 1",
    "base perplexity at strength 1 over the frozen model, least of the corpora": ">= 2",
    "repeated 4-grams at strength 1 minus the frozen model's, least of the corpora": ">= 0.1",
    "strength 0: share of texts that are the frozen model's": ">= 1",
    "seconds to train a million tokens": "< 30",
    "processor over the model's step, median": "<= 0.03",
}
_FAR = "base perplexity at strength 1 over the frozen model, least of the corpora"
REASONS: dict[str, str] = {
    _FAR: (
        "the base perplexity falls at every strength, much of it while texts hardly repeat "
        "themselves yet (rows of 0.1 and 0.2); why was not tested. At strength 1 the text runs in "
        "circles besides (the row on repeated 4-grams holds), and what has just been read is easy "
        "to predict"
    ),
}
_LOOPING = "repeated 4-grams at strength 1 minus the frozen model's, least of the corpora"
_SMALL = "{} perplexity at the best small strength over the frozen model, worst corpus"
CAVEATS: dict[str, str] = {
    _SMALL.format("style"): (
        "so by construction: the measure is what is added to the logits, and it falls with every "
        "strength. The paper's narrow range is not seen, nor its loss on corpora of many authors "
        "(rows of the strengths); eight openings, no interval"
    ),
    _SMALL.format("base"): (
        "not fluency: any sharper distribution lowers it, a lower temperature too, which was not "
        "tried; distinct bigrams fall with it (rows)"
    ),
}

SMOKE: dict[str, list[dict[str, Any]]] = {
    "shakespeare": [{"title": "A", "genre": "b", "speakers": ["C"], "speeches": ["to be or not"]}],
    "spam-assassin": [{"id": "1", "label": "ham", "group": "easy-ham-1", "text": "we met at noon"}],
    "gsm8k": [{"question": "1 and 1?", "answer": "<<1+1=2>>2\n#### 2"}],
}
Figures = dict[str, float]


def corpora(context: Context) -> dict[str, list[str]]:
    """The texts of each corpus, cut at `CHARACTERS`."""
    rows = {name: context.data(name, smoke_rows=smoke) for name, smoke in SMOKE.items()}
    texts = {
        "shakespeare": ["\n\n".join(row["speeches"]) for row in rows["shakespeare"]],
        "mails": [row["text"] for row in rows["spam-assassin"] if row["group"] == "easy-ham-1"],
        "mathematics": [
            f"{row['question']}\n{re.sub('<<.*?>>', '', row['answer']).split(chr(10) + '####')[0]}"
            for row in rows["gsm8k"]
        ],
    }
    return {name: _cut(each) for name, each in texts.items()}


def _cut(texts: Sequence[str]) -> list[str]:
    kept, left = [], CHARACTERS
    for text in texts:
        kept.append(text[:left])
        left -= len(text)
        if left <= 0:
            break
    return kept


class _Bench:
    """Model, styles and openings of a run, each made when it is first needed."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.texts = corpora(context)
        self._styles: dict[str, Any] = {}

    def style(self, corpus: str) -> Any:
        from pertoken.decode import NGramStyle

        if corpus not in self._styles:
            _, tokenizer = self.context.load()
            self._styles[corpus] = NGramStyle.train(self.texts[corpus], tokenizer)
        return self._styles[corpus]

    def openings(self, split: str) -> list[str]:
        from pertoken.decode.style_figures import OPENINGS

        if self.context.smoke:
            return list(OPENINGS[:1])
        return list(OPENINGS[::2]) if split == "dev" else list(OPENINGS[1::2]) * DRAWS

    def figures(
        self, split: str, corpus: str, strength: float, head: str = "", read: str = ""
    ) -> Figures:
        """The six figures of a cell. head: what stands before the opening when it is continued."""
        from pertoken.decode.style_figures import read_text, summary

        model, _ = self.context.load()
        processor = self.style(corpus)(strength=strength)
        texts = self.written(split, [processor], head)
        return _figures(
            summary(
                strength, [read_text(model, processor, *each) for each in texts], self.style(corpus)
            )
        )

    def written(self, split: str, processors: list[Any], head: str = "") -> Any:
        """(ids of the opening, new ids) of each opening."""
        from pertoken.decode.style_figures import write

        model, tokenizer = self.context.load()
        openings = self.openings(split)
        count = 4 if self.context.smoke else NEW_TOKENS
        found = write(
            model, tokenizer, [head + one for one in openings], processors, count, self.context.seed
        )
        return [
            (list(tokenizer(one)["input_ids"]), new)
            for one, (_, new) in zip(openings, found, strict=True)
        ]

    def prompted(self, corpus: str) -> Figures:
        """The baseline of a prompt: an instruction and an excerpt before the opening."""
        excerpt = self.texts[corpus][0][:EXCERPT]
        head = f"Write on in the style of this text:\n\n{excerpt}\n\n"
        return self.figures("report", corpus, 0.0, head)

    def tuned(self, corpus: str) -> Figures:
        """The baseline of a LoRA; its texts are read by the frozen model."""
        from pertoken.decode.style_figures import read_text, summary

        model, tokenizer = self.context.load()
        text = "\n\n".join(self.texts[corpus])[: CHARACTERS // 10]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with lora(model, ids, seed=self.context.seed, steps=1 if self.context.smoke else None):
            texts = self.written("report", [])
        style = self.style(corpus)
        return _figures(
            summary(0.0, [read_text(model, style(strength=0), *each) for each in texts], style)
        )

    def identical(self) -> float:
        """Share of texts at strength 0 that are those without a processor."""
        corpus = next(iter(self.texts))
        plain, zero = (self.written("dev", each) for each in ([], [self.style(corpus)(strength=0)]))
        return sum(a == b for a, b in zip(plain, zero, strict=True)) / len(plain)


def _figures(row: Any) -> Figures:
    names = ("style_perplexity", "base_perplexity", "divergence", "overlap", "distinct_2")
    return {name: getattr(row, name) for name in (*names, "repetition")}


def run(context: Context) -> Reproduction:
    """All rows; under an hour on two slow cores, kept cell by cell."""
    bench = _Bench(context)
    units: dict[Any, tuple[object, Callable[[], Any]]] = {}
    for corpus in bench.texts:
        for split, strengths in (("dev", (0.0, *SMALL)), ("report", STRENGTHS)):
            for strength in strengths:
                key = (split, corpus, strength)
                units[key] = (list(key), partial(bench.figures, *key))
        units["prompt", corpus] = (["prompt", corpus], partial(bench.prompted, corpus))
        units["lora", corpus] = (["lora", corpus], partial(bench.tuned, corpus))
    units["identical"] = (["identical"], bench.identical)
    found = context.remember_all(units, "cells")
    rows = _judged(found, list(bench.texts))
    for corpus in bench.texts:
        cells = {f"strength {s:g}": found["report", corpus, s] for s in STRENGTHS}
        cells |= {"prompt": found["prompt", corpus], "LoRA": found["lora", corpus]}
        for label, figures in cells.items():
            rows += [
                Row(f"{corpus}, {label}: {name.replace('_', ' ')}", value)
                for name, value in figures.items()
                # Of these two the frozen model is read, which does not differ from itself.
                if not (name == "divergence" and label in ("prompt", "LoRA"))
            ]
    return context.reproduction(
        rows + _speed(context, bench),
        small_strengths={c: _best(found, c) for c in bench.texts},
        strengths=list(STRENGTHS),
        draws=DRAWS,
        new_tokens=NEW_TOKENS,
        characters=CHARACTERS,
        lora=LORA,
        split="openings: even for the choice of the small strength, odd for the report",
        perplexities="of the new tokens behind the bare opening, by the frozen model in every row",
    )


def _best(found: dict[Any, Any], corpus: str) -> float:
    """The small strength whose worse perplexity is best on the development openings."""

    def worse(strength: float) -> float:
        return max(_ratios(found, "dev", corpus, strength))

    return min(SMALL, key=worse)


def _ratios(found: dict[Any, Any], split: str, corpus: str, strength: float) -> tuple[float, float]:
    """Style and base perplexity over the frozen model's."""
    steered, frozen = found[split, corpus, strength], found[split, corpus, 0.0]
    style, base = (
        steered[f"{name}_perplexity"] / frozen[f"{name}_perplexity"] for name in ("style", "base")
    )
    return style, base


def _judged(found: dict[Any, Any], names: list[str]) -> list[Row]:
    """The rows with bars that are not timed."""
    best = {name: _ratios(found, "report", name, _best(found, name)) for name in names}
    far = {name: _ratios(found, "report", name, 1.0)[1] for name in names}
    looping = {
        name: found["report", name, 1.0]["repetition"] - found["report", name, 0.0]["repetition"]
        for name in names
    }
    setting = "TinyLlama-1.1B, Don Quixote at 0.1; no gain on the two other corpora"
    rows = []
    for place, (which, paper) in enumerate((("style", "-24.7 %"), ("base", "-51.4 %"))):
        worst = max(names, key=lambda name: best[name][place])
        rows.append(
            Row(
                _SMALL.format(which),
                best[worst][place],
                "x",
                paper=paper,
                paper_setting=setting,
                baseline=", ".join(
                    f"{n} {best[n][place]:.3g} at {_best(found, n):g}" for n in names
                ),
            )
        )
    for metric, values, paper in ((_FAR, far, "extreme"), (_LOOPING, looping, "")):
        shown = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        rows.append(Row(metric, min(values.values()), paper=paper or None, baseline=shown))
    rows.append(Row("strength 0: share of texts that are the frozen model's", found["identical"]))
    return rows


def _speed(context: Context, bench: _Bench) -> list[Row]:
    model, tokenizer = context.load()
    corpus = next(iter(bench.texts))
    steps = 3 if context.smoke else STEPS_TIMED
    text = bench.texts[corpus][0]
    return [
        Row(
            "seconds to train a million tokens",
            seconds_per_million(tokenizer, bench.texts[corpus]),
            "s",
        ),
        Row(
            "processor over the model's step, median",
            median_overhead(model, tokenizer, bench.style(corpus), text, steps),
            "share",
        ),
    ]
