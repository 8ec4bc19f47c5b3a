"""Reproduction of "Say Anything but This" (arXiv 2601.14658) on two small models.

Words of sentences of Brown are marked, two in most, and the models replace them, as they are and
with all encodings of the marked words masked. The paper has articles of 100 to 600 words of XSUM
and models of 270M to 30B parameters; here one sentence is asked at a time, since models of this
size lose a longer text. Both are asked as base models are, by examples, which was settled on 32
development sentences: there SmolLM2 through its chat template kept no more of the text. Sampling is
the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

from pertoken._bootstrap import bootstrap_mean
from pertoken.errors import PertokenError
from pertoken.reproduce._context import Context
from pertoken.reproduce._report import Reproduction, Row
from pertoken.reproduce._word_models import REPORT, SECOND, TwoModels, brown_sentences

VERSION = 2  # 1 took a word copied behind another mark, a quote say, for a phantom edit
DTYPE = "float32"

TRIALS = 2000  # of each model, without the mask and with it
SHARE = 0.3  # of a sentence's words that are no stop words
WORDS = (12, 22)  # of a sentence, marks counted too
TOGETHER = 64  # sentences of a unit
BATCH = 32
SENSITIVE, ENCODINGS = 3, 4  # sentences of a unit, and other encodings of each of their words

LEAST = "trials, least of the models"
CANONICAL = "canonical or not, as brute force says"
EXAMPLES = "kinds of artifacts told right, of the paper's examples"
PLAIN = "phantom edits as it is, most of the models"
MASKED = "phantom edits with the mask, most of the models"
BARS = {
    LEAST: ">= 2000",
    CANONICAL: "== 1",
    EXAMPLES: "== 1",
    PLAIN: "> 0",
    MASKED: "<= 0.05",
}
REASONS: dict[str, str] = {}
CAVEATS = {
    **dict.fromkeys((LEAST, CANONICAL, EXAMPLES), "a check of the probe, not of the paper's claim"),
    PLAIN: "a handful of edits; those that shift white space may be copies with another mark "
    "beside the word, which version 1 counts",
    MASKED: "so by construction: a reply counts where the words beside the marked one are as "
    "asked, and the mask forbids all encodings of that one, the kept word too. Fewer replies can "
    "be read with it, and more of the other words change (rows of both)",
}

PAPER = {"one to one": 0.722, "as many": 0.78, "more": 0.197, "fewer": 0.023}
_SETTING = "11 models of 270M to 30B, XSUM, over 11,000 trials"
Unit = dict[str, Any]


def run(context: Context) -> Reproduction:
    """All rows, some sentences at a time."""
    texts = _texts(context)
    models = TwoModels(context)
    units: dict[tuple[str, int], tuple[object, Callable[[], Unit]]] = {}
    for which in ("first", "second"):
        for start in range(0, len(texts), TOGETHER):
            part = texts[start : start + TOGETHER]
            units[which, start] = ([which, start], partial(_asked, context, models, which, part))
    found = context.remember_all(units, "sentences")
    own = {
        name: [unit for key, unit in found.items() if key[0] == which]
        for which, name in (("first", context.model), ("second", SECOND))
    }
    trials = {name: [t for unit in parts for t in unit["trials"]] for name, parts in own.items()}
    rows = _judged(trials, context.seed)
    for name, parts in own.items():
        rows += _outcomes(name, trials[name], context.seed)
        rows += _replies(name, parts, context.seed)
    return context.reproduction(
        rows,
        second_model=SECOND,
        sentences=len(texts),
        share=SHARE,
        words_of_a_sentence=list(WORDS),
        batch=BATCH,
        chat=False,
        decoding="temperature 1, top-p 0.9, top-k 50",
        split="Brown; number of a text modulo 4: 1 development, 3 report",
    )


def _texts(context: Context) -> list[str]:
    """Sentences with their marks, until there are trials enough."""
    from pertoken.probe._marked import mark

    found: list[str] = []
    targets = 0
    for text in brown_sentences(context, REPORT, *WORDS):
        try:
            marked = mark(text, SHARE, context.seed)
        except PertokenError:  # no word to replace
            continue
        found.append(marked.marked)
        targets += len(marked.targets)
        if targets >= (1 if context.smoke else TRIALS):
            break
    return found


def _asked(context: Context, models: TwoModels, which: str, texts: Sequence[str]) -> Unit:
    """What a model does to some sentences, in both arms."""
    from pertoken.probe import encoding_sensitivity, token_consistency

    model, tokenizer = models.load(which)
    options: dict[str, Any] = {"max_new_tokens": 4} if context.smoke else {}
    found = token_consistency(
        model,
        tokenizer,
        texts,
        mask=True,
        chat=False,
        batch=BATCH,
        seed=context.seed,
        **options,
    )
    sensitivity = encoding_sensitivity(
        model, tokenizer, texts[:SENSITIVE], n=ENCODINGS, seed=context.seed
    )
    return {
        "trials": [
            [t.masked, t.outcome, t.artifact, len(t.ids_before), len(t.ids_after)]
            for t in found.trials
        ],
        "replies": [[r.masked, len(r.ids), r.noncanonical, r.changed] for r in found.replies],
        "sensitivity": [[each.kl, each.same_best] for each in sensitivity.found],
        "phantoms": [
            [t.masked, list(t.pieces_before), list(t.pieces_after)]
            for t in found.trials
            if t.outcome == "different"
        ],
    }


def _different(trials: Sequence[Any], masked: bool) -> list[float]:
    """Is each parsed trial of an arm a phantom edit?"""
    return [float(t[1] == "different") for t in trials if t[0] == masked and t[1] != "unparsed"]


def _judged(trials: dict[str, list[Any]], seed: int) -> list[Row]:
    """The rows with bars."""
    rows = [
        Row(LEAST, min(sum(not t[0] for t in own) for own in trials.values())),
        Row(CANONICAL, _brute_force(), "share"),
        Row(EXAMPLES, _examples(), "share"),
    ]
    for label, masked, paper in ((PLAIN, False, None), (MASKED, True, "0 to 5 %")):
        shares = {name: _different(own, masked) for name, own in trials.items()}
        most = max(shares, key=lambda name: _mean(shares[name]))
        rows.append(
            Row(
                label,
                _mean(shares[most]),
                "share",
                paper=paper,
                paper_setting=_SETTING if paper else "",
                interval=bootstrap_mean(shares[most], seed) if shares[most] else None,
                baseline=", ".join(f"{name} {_mean(own):.3g}" for name, own in shares.items()),
            )
        )
    return rows


def _outcomes(name: str, trials: Sequence[Any], seed: int) -> list[Row]:
    """Parse rate, outcomes and kinds of both arms."""
    from pertoken.probe._artifacts import ARTIFACTS, OTHER
    from pertoken.probe._consistency_report import OUTCOMES

    rows = []
    for masked, arm in ((False, "as it is"), (True, "masked")):
        own = [t for t in trials if t[0] == masked]
        parsed = [t for t in own if t[1] != "unparsed"]
        label = f"{name}, {arm}"
        rows.append(
            Row(
                f"{label}: parse rate",
                len(parsed) / len(own),
                "share",
                interval=bootstrap_mean([float(t[1] != "unparsed") for t in own], seed),
                baseline=f"{len(own)} trials",
            )
        )
        for outcome in OUTCOMES:
            hits = [float(t[1] == outcome) for t in parsed]
            ends = bootstrap_mean(hits, seed) if hits else None
            rows.append(Row(f"{label}: {outcome}", _mean(hits), "share", interval=ends))
        for kind in (*ARTIFACTS, OTHER):
            rows.append(Row(f"{label}: {kind}", sum(t[2] == kind for t in own), "phantom edits"))
    pairs = [(t[3], t[4]) for t in trials if not t[0] and t[1] == "different"]
    tests: dict[str, Callable[[int, int], bool]] = {
        "one to one": lambda before, after: (before, after) == (1, 1),
        "as many": lambda before, after: before == after,
        "more": lambda before, after: before < after,
        "fewer": lambda before, after: before > after,
    }
    for label, test in tests.items():
        share = _mean([float(test(*pair)) for pair in pairs])
        metric = f"{name}: tokens of phantom edits, {label}"
        setting = f"{_SETTING}; share of phantom edits"
        baseline = f"{len(pairs)} phantom edits"
        rows.append(
            Row(metric, share, "share", PAPER[label], setting, baseline=baseline),
        )
    return rows


def _replies(name: str, units: Sequence[Unit], seed: int) -> list[Row]:
    """What is not the tokenizer's own, other words changed, and the sensitivity to encodings."""
    rows = []
    for masked, arm in ((False, "as it is"), (True, "masked")):
        own = [r for unit in units for r in unit["replies"] if r[0] == masked]
        tokens = sum(r[1] for r in own)
        rows += [
            Row(
                f"{name}, {arm}: written tokens that are not the tokenizer's own",
                sum(r[1] * r[2] for r in own) / tokens if tokens else float("nan"),
                "share",
                baseline=f"{tokens} tokens",
            ),
            Row(
                f"{name}, {arm}: replies with such tokens",
                _mean([float(r[2] > 0) for r in own]),
                "share",
                interval=bootstrap_mean([float(r[2] > 0) for r in own], seed),
            ),
            Row(f"{name}, {arm}: other words changed, of a sentence", _mean([r[3] for r in own])),
        ]
    found = [each for unit in units for each in unit["sensitivity"]]
    divergences = [each[0] for each in found]
    same = [float(each[1]) for each in found]
    rows += [
        Row(
            f"{name}: divergence of the next token behind another encoding of a word",
            _mean(divergences),
            "nats",
            interval=bootstrap_mean(divergences, seed),
            baseline=f"{len(found)} encodings",
        ),
        Row(
            f"{name}: best next token stays behind another encoding",
            _mean(same),
            "share",
            interval=bootstrap_mean(same, seed),
        ),
    ]
    return rows


def _brute_force() -> float:
    """Share of all short rows of tokens that are judged as all texts' encodings say."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from pertoken.tokenize import is_canonical

    vocab = {token: place for place, token in enumerate(["a", "b", "Ġ", "ab", "abb", "Ġa"])}
    backend = Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "b"), ("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    texts = ["".join(each) for n in range(1, 7) for each in product("ab ", repeat=n)]
    own = {tuple(tokenizer.encode(text)) for text in texts}
    rows = list(product(range(len(vocab)), repeat=2))  # their texts have six letters at most
    return _mean([float(is_canonical(ids, tokenizer) == (ids in own)) for ids in rows])


def _examples() -> float:
    """Share of the paper's examples that are told right."""
    from pertoken.probe._artifacts import artifact

    examples = {
        "whitespace shift": ([" February"], ["February"]),
        "whitespace detached": ([" Saturday"], [" ", " Saturday"]),
        "newline": ([" However"], ["\n", "However"]),
        "resegmentation": ([" unbelievable"], ["un", "bel", "ievable"]),
        "proper noun": ([" Dorm", "er"], ["D", "orm", "er"]),
        "morphology": ([" repaid"], ["re", "paid"]),
        "acronym": ([" HIV"], ["H", "IV"]),
        "plural": ([" rights"], ["right", "s"]),
    }
    return _mean([float(artifact(*pair) == kind) for kind, pair in examples.items()])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
