"""How the decoding methods are made for the laws of `pertoken.testing`, and what does not apply."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

from pertoken.decode.awrs import AWRS
from pertoken.decode.balanced import Balanced
from pertoken.decode.byte_model import ByteModel
from pertoken.decode.goose import Goose
from pertoken.decode.knn_datastore import KNNDatastore
from pertoken.decode.knn_lm import KNNMemory
from pertoken.decode.lookahead import Lookahead
from pertoken.decode.prompt_lookup import PromptLookup
from pertoken.decode.suffix import SuffixTree
from pertoken.decode.token_recycling import TokenRecycling
from pertoken.testing import logits_laws
from pertoken.testing._case import Case
from pertoken.testing.battery import Subject
from pertoken.testing.models import tiny_model
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


_SAMPLES = "it samples: there is no greedy text"

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
        "goose",
        "generate",
        Goose,
        settings={
            "budget=7": partial(Goose, budget=7),
            "shape=paper": partial(Goose, shape="paper"),
        },
    ),
    Subject(
        "knn-lm",
        "logits",
        _memory,
        laws={"scores": _knn_scores, "batch = single": _knn_rows, "no trace": _knn_trace},
    ),
    *(
        Subject(kind.slug, "generate", kind, settings={"budget=7": partial(kind, budget=7)})
        for kind in (Lookahead, PromptLookup, SuffixTree, TokenRecycling)
    ),
)
