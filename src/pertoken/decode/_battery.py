"""How the decoding methods are made for the laws of `pertoken.testing`, and what does not apply."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from pertoken.decode._ngram_counts import count
from pertoken.decode.awrs import AWRS
from pertoken.decode.balanced import Balanced
from pertoken.decode.byte_model import ByteModel
from pertoken.decode.cascade import Cascade
from pertoken.decode.cntp import CautiousDecoding
from pertoken.decode.goose import Goose
from pertoken.decode.knn_datastore import KNNDatastore
from pertoken.decode.knn_lm import KNNMemory
from pertoken.decode.lookahead import Lookahead
from pertoken.decode.ngram_style import Corpus, NGramStyle
from pertoken.decode.prompt_lookup import PromptLookup
from pertoken.decode.sift import Wording, sift
from pertoken.decode.suffix import SuffixTree
from pertoken.decode.token_recycling import TokenRecycling
from pertoken.testing import logits_laws
from pertoken.testing._case import Case
from pertoken.testing.battery import Subject
from pertoken.testing.laws import LawBroken
from pertoken.testing.models import tiny_model
from pertoken.testing.setups import decode
from pertoken.testing.trace import check_leaves_no_trace

__all__ = ["SUBJECTS"]


class Anything:
    """The constraint that allows every text."""

    def accepts(self, ids: Sequence[int]) -> bool:
        return True

    def complete(self, ids: Sequence[int]) -> bool:
        return True


def _bytes(model: Any, tokenizer: Any, prompt: str, seed: int) -> bytes:
    return ByteModel(model, tokenizer).sample(prompt[:9], 4, seed=seed)


def _style(**settings: Any) -> Any:
    """A style of random text in the 32 tokens of the laws' models."""
    draw = np.random.default_rng(0)
    texts = [draw.integers(0, 32, 400).tolist()]
    corpus = Corpus(count(texts, 32, 3), tokenizer="ids", sha256="", texts=1, tokens=400)
    return NGramStyle(corpus)(strength=1.0, **settings)


def _sift(model: Any, tokenizer: Any, prompt: str) -> Any:
    """With a wording that fits the laws' tiny models."""
    short = Wording(
        "Facts: {question}", "{question} {sticker}", "{prediction}", "{sticker}", "{text}"
    )
    return sift(prompt[:20], model, tokenizer=tokenizer, max_new_tokens=5, wording=short)


def _trials_together(case: Case) -> None:
    """All trials in one forward write what they write one after the other."""
    from pertoken.testing._trial_by_trial import trial_by_trial

    assert case.model is not None
    method = case.make()
    run: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "top_k": 0}
    for number, prompt in enumerate(case.prompts):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed + number)
            found = decode(case.model, method, prompt[None], **run)[0]
            torch.manual_seed(case.seed + number)
            expected = trial_by_trial(method, case.model, prompt[None], **run)
        if found != expected:
            raise LawBroken(f"together {found}, one after the other {expected}")


def _no_trace_of_trials(case: Case) -> None:
    ids = case.prompts[1][None]
    run: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6}
    run |= {"do_sample": True, "top_k": 0}
    check_leaves_no_trace(
        case.model, lambda model: model.generate(ids, custom_generate=case.make(), **run)
    )


class Letters:
    """A tokenizer of 32 letters, for tiny models."""

    pad_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 32 for letter in text]}


def _memory(model: Any = None) -> KNNMemory:
    """A memory of a few words, made by the very model."""
    model = tiny_model("llama", vocab_size=32) if model is None else model
    with TemporaryDirectory() as folder:
        texts = ["a cat and a dog", "the cat sat on the mat"]
        store = KNNDatastore.build(model, Letters(), texts, f"{folder}/store")
    return KNNMemory(store, k=9, temperature=9.0)


def _knn_scores(case: Case) -> None:
    logits_laws.check_processor_scores(lambda: _memory(case.model), vocab_size=32, seed=case.seed)


def _knn_rows(case: Case) -> None:
    logits_laws.check_processor_rows(lambda: _memory(case.model), vocab_size=32, seed=case.seed)


def _knn_trace(case: Case) -> None:
    ids = case.prompts[1][None]

    def decode(model: Any) -> None:
        run = {"max_new_tokens": 6, "do_sample": False, "logits_processor": [_memory(model)]}
        model.generate(ids, **run)

    check_leaves_no_trace(case.model, decode, rng=True)


def _cascade(model: Any, tokenizer: Any, prompt: str, seed: int) -> tuple[str, ...]:
    """Half of what is left of a prompt, of itself."""
    member = (model, tokenizer)
    made = Cascade(member, member, "chow-average", max_new_tokens=4, seed=seed)
    questions = [prompt[:size] for size in (3, 5, 7, 9)]
    return made.fit(made.answer(questions)).generate(questions, rate=0.5).texts


_SAMPLES = "it samples: there is no greedy text"
_KEEPS_THE_LIKELIEST = "it keeps the likeliest of several draws: not the model's own text"
_MARKS = (3, 5, 9)  # tokens that stand for punctuation

SUBJECTS = (
    Subject(
        "awrs",
        "generate",
        partial(AWRS, Anything()),
        {
            "lossless": _SAMPLES,
            "lossless with processors": _SAMPLES,
            "batch = single": "each row of a batch is a draw of its own",
        },
    ),
    Subject(
        "balanced",
        "generate",
        partial(Balanced, k=3),
        settings={"branching=5": partial(Balanced, k=5)},
    ),
    Subject("byte-probabilities", "text", _bytes),
    Subject(
        "cntp",
        "generate",
        partial(CautiousDecoding, punctuation=_MARKS, max_trials=4, cap=6),
        {
            "lossless": _KEEPS_THE_LIKELIEST,
            "lossless with processors": _KEEPS_THE_LIKELIEST,
            "batch = single": "each row of a batch is a draw of its own",
            "distribution": _KEEPS_THE_LIKELIEST,
        },
        laws={
            "trials together = one by one": _trials_together,
            "no trace": _no_trace_of_trials,
        },
        settings={
            "max_trials=1": partial(CautiousDecoding, punctuation=_MARKS, max_trials=1),
            "min_entropy=inf": partial(
                CautiousDecoding, punctuation=_MARKS, min_entropy=float("inf")
            ),
        },
    ),
    Subject(
        "goose",
        "generate",
        Goose,
        settings={
            "budget=7": partial(Goose, budget=7),
            "shape=paper": partial(Goose, shape="paper"),
        },
    ),
    Subject("ngram-style", "logits", _style),
    Subject("sift", "text", _sift),
    Subject(
        "knn-lm",
        "logits",
        _memory,
        laws={"scores": _knn_scores, "batch = single": _knn_rows, "no trace": _knn_trace},
    ),
    Subject("lm-cascades", "text", _cascade),
    *(
        Subject(kind.slug, "generate", kind, settings={"budget=7": partial(kind, budget=7)})
        for kind in (Lookahead, PromptLookup, SuffixTree, TokenRecycling)
    ),
)
