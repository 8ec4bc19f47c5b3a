"""Reproduction of TokenAdapt and of supertokens (arXiv 2505.09738) on two small models.

SmolLM2 gets Gemma's tokenizer, one trained afresh and a supertokenizer; Gemma-3-270M gets SmolLM2's
tokenizer; each by TokenAdapt, its local part alone, ReTok, the mean and random rows. Every text of
the report split gives the ratio of the perplexity per byte after the transplant to the one before;
the bars are on medians over texts. The paper gives ratios of mean perplexities per token, between
larger models, over several languages, which outliers rule.

Settings are the paper's (τ 0.6, w_g 0.3, k 3). Chosen on the dev split: MiniLM as the embedder and
not the model's own states, and of the authors' two distributions of chunk lengths the wide one,
with 64,000 tokens (at 16,000, supertokens hardly gain). Tokenizers are trained on other rows of the
same data sets: six million characters, not the paper's corpus.
"""

from __future__ import annotations

import math
import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pertoken._bootstrap import bootstrap
from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Reproduction, Row
from pertoken.reproduce._tokenadapt_texts import KINDS, evaluated, training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1
DTYPE = "float32"
SECOND = "gemma3-270m"  # its terms must have been accepted: PERTOKEN_ACCEPT_LICENCE=gemma3-270m
EMBEDDER = "minilm"
COUNT = 8  # texts of a kind
VOCABULARY = 32_000
SUPERTOKENS = 64_000
LENGTHS = "wide"
HELD_OUT = 30  # texts of a kind for bytes per token
TIMED = 50_000  # tokens of the timed transplant
FUZZED = 10_000

# label -> (which model, which tokenizer)
TARGETS = {
    "SmolLM2 with Gemma's tokenizer": ("first", "gemma"),
    "SmolLM2 with a fresh BPE of 32,000": ("first", "bpe"),
    "Gemma-3-270M with SmolLM2's tokenizer": ("second", "smollm2"),
    "SmolLM2 with supertokens of 64,000": ("first", "supertokens"),
}
_JUDGED = list(TARGETS)[:3]
METHODS = ("tokenadapt", "local", "retok", "mean", "random")

BARS = {
    **{f"{label}: excess over 1, ReTok over TokenAdapt": ">= 1.5" for label in _JUDGED},
    **{f"{label}: ratio, mean over TokenAdapt": "> 1" for label in _JUDGED},
    **{f"{label}: ratio, random over TokenAdapt": "> 1" for label in _JUDGED},
    "own tokenizer: largest difference of logits": "<= 0",
    "transplants that fail a check (reload, chat template, greedy round trip)": "<= 0",
    "seconds of a transplant of 50,000 tokens": "< 180",
    "supertokens: bytes per token over BPE of the same size": ">= 1.15",
    "supertokens: fuzzed strings that come back": ">= 1",
    "supertokens: tokens changed by cutting long texts": "< 0.001",
}
_DRAWN_AWAY = (
    "most tokens of a text are copied ones here, most rows of so large a vocabulary are not: rows "
    "composed from the text's own tokens draw probability away from them, mean rows, all alike, "
    "draw hardly any (seen on development texts, between ReTok and the mean). Where new tokens are "
    "frequent, TokenAdapt is ahead of both (this target's row of other languages, six texts; in "
    "the other targets the mean is ahead there)"
)
REASONS = {
    "SmolLM2 with Gemma's tokenizer: excess over 1, ReTok over TokenAdapt": _DRAWN_AWAY,
    "SmolLM2 with Gemma's tokenizer: ratio, mean over TokenAdapt": _DRAWN_AWAY,
    "Gemma-3-270M with SmolLM2's tokenizer: excess over 1, ReTok over TokenAdapt": (
        "nearly all of SmolLM2's tokens are Gemma's too (row of tokens copied), so that the "
        "methods differ in few rows; the interval reaches below 1"
    ),
    "seconds of a transplant of 50,000 tokens": (
        "taken on one thread while other programs used both cores; by itself, on two threads and "
        "with strings read in smaller batches since, it is within the bar "
        "(reports/bench/transplant_time.json)"
    ),
}
_NO_RIVAL = "random rows are no rival: mean rows beat them in every target"
CAVEATS: dict[str, str] = {
    **dict.fromkeys((bar for bar in BARS if bar.endswith("random over TokenAdapt")), _NO_RIVAL),
    "supertokens: bytes per token over BPE of the same size": (
        "prose alone is below the bar, and some of the mails, which gain most, are near copies of "
        "mails that the tokenizers were trained on. No bar judges the model with these tokens: "
        "its perplexity per byte rises several times by every method, and TokenAdapt is hardly "
        "ahead of ReTok there (rows of supertokens)"
    ),
}

SMOKE: dict[str, list[dict[str, Any]]] = {
    "brown": [{"words": [["The", "cat", "sat", "."] * 60]}] * 8,
    "spam-assassin": [{"label": "ham", "text": "buy milk on the way home " * 12}] * 8,
    "gsm8k": [{"question": "1 and 1 and 1? " * 20, "answer": "<<1+1=2>>3\n#### 3"}] * 8,
    "humaneval": [{"prompt": "def f(x):\n" * 12, "canonical_solution": "    return x\n" * 12}] * 8,
    "udhr": [{"code": "fra", "articles": ["Tous les êtres humains"] * 30}],
}
Unit = dict[str, Any]
Floats = NDArray[np.float64]


class _Bench:
    """Models, tokenizers and texts of a run, each made when it is first needed."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._rows = {name: context.data(name, smoke_rows=SMOKE[name]) for name in SMOKE}
        self._made: dict[str, Any] = {}

    def training(self) -> list[str]:
        return training(self._rows)

    def texts(self, count: int = COUNT) -> dict[str, list[str]]:
        return evaluated(self._rows, "report", 1 if self.context.smoke else count)

    def model(self, which: str) -> tuple[PreTrainedModel, Any]:
        """(model, tokenizer) of the first or the second family."""
        if self.context.smoke:
            return self._once("tiny", self._tiny)
        if which == "first":
            return self.context.load()
        return self._once("second", self._second)

    def tokenizer(self, name: str) -> Any:
        """A tokenizer to transplant to."""
        if name == "bpe":
            return self.bpe(VOCABULARY)
        if name == "supertokens":
            return self._once("supertokens", self._supertokens)
        return self.model("second" if name == "gemma" else "first")[1]

    def bpe(self, size: int) -> Any:
        """Freshly trained, without supertokens."""
        size = 300 if self.context.smoke else size
        return self._once(f"bpe {size}", lambda: bpe(self.training(), size))

    def _supertokens(self) -> Any:
        from pertoken.tokenize import train_supertokens

        size = 300 if self.context.smoke else SUPERTOKENS
        return train_supertokens(self.training(), size, lengths=LENGTHS, seed=self.context.seed)

    def _second(self) -> Any:
        from pertoken.loading import load

        return load(SECOND, device=self.context.device, dtype=self.context.dtype, kind="decoder")

    def _tiny(self) -> Any:
        from pertoken.testing import tiny_model
        from pertoken.tokenize import train_supertokens

        tokenizer = train_supertokens(["a cat on the mat"] * 3, 280)
        return tiny_model("llama", vocab_size=len(tokenizer)), tokenizer

    def _once(self, name: str, make: Any) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


def bpe(texts: list[str], size: int) -> Any:
    """Byte-level BPE with GPT-2's cuts between words: what supertokens are measured against."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def run(context: Context) -> Reproduction:
    """All rows; most of an hour on two slow cores, kept target by target."""
    bench = _Bench(context)
    units: dict[str, Any] = {
        label: (["ratios", label], partial(_ratios, bench, label)) for label in TARGETS
    }
    units["laws"] = (["laws"], partial(_laws, bench))
    found = context.remember_all(units, "transplants")
    seconds = context.remember(["seconds"], partial(_seconds, bench))
    rows = [row for label in TARGETS for row in _table(label, found[label], context.seed)]
    rows += [row for label in _JUDGED for row in _judged(label, found[label], context.seed)]
    rows += _lawful(found, seconds)
    return context.reproduction(
        rows,
        second_model=SECOND,
        embedder=EMBEDDER,
        texts=COUNT,
        kinds=[*KINDS, "other languages"],
        split="report: row numbers that leave 3 when divided by 4",
        tokenizers="trained on row numbers that leave 0 or 2",
        supertokens={"vocab_size": SUPERTOKENS, "lengths": LENGTHS},
        method={"temperature": 0.6, "global_weight": 0.3, "neighbours": 3, "threshold": 0.0},
    )


def _ratios(bench: _Bench, label: str) -> Unit:
    """Nats and bytes of every text before and after, by each method, and the failed checks."""
    from pertoken.errors import PertokenError
    from pertoken.tokenize import Transplant, check_transplant, nats_per_text

    which, name = TARGETS[label]
    model, old = bench.model(which)
    texts = bench.texts()
    every = [text for kind in texts.values() for text in kind]
    embedder = "self" if bench.context.smoke else EMBEDDER
    prepared = Transplant(model, old, bench.tokenizer(name), embedder=embedder)
    found: Unit = {
        "kinds": [kind for kind, group in texts.items() for _ in group],
        "before": nats_per_text(model, old, every),
        "failed": [],
    }
    for method in METHODS:
        made, tokenizer = prepared.apply(method, seed=bench.context.seed)
        found[method] = nats_per_text(made, tokenizer, every)
        if method == "tokenadapt":
            found["counts"] = prepared.counts
            try:
                check_transplant(made, tokenizer)
            except PertokenError as error:
                found["failed"].append(str(error))
        del made
    return found


def _laws(bench: _Bench) -> Unit:
    """What needs no perplexity: identity, and supertokens' laws."""
    import torch

    from pertoken.tokenize import transplant

    model, old = bench.model("first")
    same, _ = transplant(model, old, old)
    texts = [text for group in bench.texts().values() for text in group]
    ids = torch.tensor([old(texts[0])["input_ids"]], device=model.device)
    with torch.no_grad():
        difference = (same(input_ids=ids).logits - model(input_ids=ids).logits).abs().max()
    del same
    words, across = bench.bpe(SUPERTOKENS), bench.tokenizer("supertokens")
    kinds = {kind: group for kind, group in bench.texts(HELD_OUT).items() if kind in KINDS}
    tokens = {
        kind: [sum(len(each(text)["input_ids"]) for text in group) for each in (words, across)]
        for kind, group in kinds.items()
    }
    fuzzed = fuzz(50 if bench.context.smoke else FUZZED, bench.context.seed)
    back = across.batch_decode(across(fuzzed, add_special_tokens=False)["input_ids"])
    return {
        "difference": float(difference),
        "bytes": sum(len(text.encode()) for group in kinds.values() for text in group),
        "tokens": tokens,
        "came back": sum(one == other for one, other in zip(fuzzed, back, strict=True)),
        "fuzzed": len(fuzzed),
        "changed": changed_by_cuts(across, "\n\n".join(bench.training()[:400])),
    }


def fuzz(count: int, seed: int) -> list[str]:
    """Strings of characters of every plane of Unicode, without surrogates.

    >>> all(text.encode() for text in fuzz(3, 0))
    True
    """
    generator = np.random.default_rng(seed)
    points = generator.integers(0, 0x10000, size=(count, 8))
    points += 0x10000 * generator.integers(0, 17, size=points.shape) * (points % 2)
    points[(points >= 0xD800) & (points < 0xE000)] = ord(" ")
    return ["".join(map(chr, row)) for row in points.tolist()]


def changed_by_cuts(tokenizer: Any, text: str) -> list[int]:
    """[tokens that an uncut text has not, tokens]."""
    from tokenizers import Tokenizer, pre_tokenizers

    whole = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    uncut, cut = (
        backend.encode(text, add_special_tokens=False)
        for backend in (whole, tokenizer.backend_tokenizer)
    )
    places = set(zip(uncut.ids, uncut.offsets, strict=True))
    changed = sum(each not in places for each in zip(cut.ids, cut.offsets, strict=True))
    return [changed, len(cut.ids)]


def _seconds(bench: _Bench) -> float:
    """Of a transplant by TokenAdapt to a fresh BPE, with the model's own states as embedder."""
    from pertoken.tokenize import transplant

    model, old = bench.model("first")
    new = bench.bpe(TIMED)
    began = time.perf_counter()
    transplant(model, old, new)
    return time.perf_counter() - began


def _of(unit: Unit, method: str, kinds: tuple[str, ...] = KINDS) -> list[float]:
    """Ratio of the perplexities per byte, after over before, of each text of these kinds."""
    found = []
    for kind, (nats, size), (before, _) in zip(
        unit["kinds"], unit[method], unit["before"], strict=True
    ):
        if kind in kinds:
            found.append(math.exp((nats - before) / size))
    return found


def _median(values: Floats) -> Floats:
    return np.asarray(np.median(values, axis=-1))


def _table(label: str, unit: Unit, seed: int) -> list[Row]:
    rows = []
    for method in METHODS:
        ratios = _of(unit, method)
        rows.append(
            Row(
                f"{label}: ratio of perplexities per byte, median, {method}",
                statistics.median(ratios),
                "x",
                interval=bootstrap(_median, ratios, seed=seed),
                baseline=f"mean {statistics.mean(ratios):.4g}",
            )
        )
        for kind in dict.fromkeys(unit["kinds"]):
            ratios = _of(unit, method, (kind,))
            rows.append(Row(f"{label}: {kind}, median, {method}", statistics.median(ratios), "x"))
    counts = unit["counts"]
    rows += [Row(f"{label}: tokens {how}", number) for how, number in counts.items()]
    return rows


def _excess(first: Floats, second: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((_median(first) - 1) / (_median(second) - 1))


def _over(first: Floats, second: Floats) -> Floats:
    return np.asarray(_median(first) / _median(second))


def _judged(label: str, unit: Unit, seed: int) -> list[Row]:
    ours = _of(unit, "tokenadapt")
    rows = []
    for name, method, statistic, paper, setting in (
        ("excess over 1, ReTok", "retok", _excess, 1.48, "Llama-3.2-3B, QTK-81K: mean, per token"),
        ("ratio, mean", "mean", _over, None, ""),
        ("ratio, random", "random", _over, None, ""),
    ):
        theirs = _of(unit, method)
        rows.append(
            Row(
                f"{label}: {name} over TokenAdapt",
                float(statistic(np.array(theirs), np.array(ours))),
                "x",
                paper=paper,
                paper_setting=setting,
                interval=bootstrap(statistic, theirs, ours, seed=seed),
                baseline=f"{statistics.median(theirs):.4g} against {statistics.median(ours):.4g}",
            )
        )
    return rows


def _lawful(found: dict[str, Unit], seconds: float) -> list[Row]:
    laws = found["laws"]
    failed = [line for label in TARGETS for line in found[label]["failed"]]
    words, across = (sum(pair[place] for pair in laws["tokens"].values()) for place in (0, 1))
    changed, cut = laws["changed"]
    of_kinds = [
        Row(f"supertokens: bytes per token over BPE of the same size, {kind}", one / other, "x")
        for kind, (one, other) in laws["tokens"].items()
    ]
    return [
        *of_kinds,
        Row("own tokenizer: largest difference of logits", laws["difference"]),
        Row(
            "transplants that fail a check (reload, chat template, greedy round trip)",
            len(failed),
            why="; ".join(failed),
        ),
        Row("seconds of a transplant of 50,000 tokens", seconds, "s"),
        Row(
            "supertokens: bytes per token over BPE of the same size",
            words / across,
            "x",
            paper=1.161,
            paper_setting="English, 128,000 tokens against Gemma-3's 262,144",
            baseline=f"{laws['bytes'] / words:.3g} against {laws['bytes'] / across:.3g}",
        ),
        Row("supertokens: fuzzed strings that come back", laws["came back"] / laws["fuzzed"]),
        Row("supertokens: tokens changed by cutting long texts", changed / cut),
    ]
