"""Each law for processors, texts, tokenizers and architectures once kept and once broken."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from transformers import RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from pertoken.testing import (
    ARCHITECTURES,
    TEXTS,
    LawBroken,
    check_deterministic,
    check_keeps_all,
    check_processor_rows,
    check_processor_scores,
    check_saves_and_loads,
    check_tokenizer_batch,
    check_tokenizer_round_trip,
    check_tokenizer_saves,
    tiny_model,
    tiny_tokenizer,
)

Process = Callable[[torch.Tensor, torch.Tensor], Any]


@pytest.mark.parametrize("make", [lambda: TopPLogitsWarper(0.6), lambda: lambda ids, s: s])
def test_right_processors(make: Callable[[], Any]) -> None:
    check_processor_scores(make)
    check_processor_rows(make)
    check_processor_rows(lambda: RepetitionPenaltyLogitsProcessor(1.3))


BROKEN: list[tuple[Process, str]] = [
    (lambda ids, s: s.add_(1), "changed the scores it was given in place"),
    (lambda ids, s: (ids.zero_(), s)[1], "changed input_ids in place"),
    (lambda ids, s: s[:, :-1], r"scores must be \[3, 64\], got \[3, 63\]"),
    (lambda ids, s: None, r"scores must be \[3, 64\], got NoneType"),
    (lambda ids, s: s.double(), "came as torch.float32 and went as torch.float64"),
    (lambda ids, s: s - s, "NaN or"),
    (lambda ids, s: s.masked_fill(s > -torch.inf, torch.inf), "NaN or"),
    (lambda ids, s: torch.full_like(s, -torch.inf), "nothing left that may follow"),
]


@pytest.mark.parametrize(("process", "said"), BROKEN, ids=[said for _, said in BROKEN])
def test_wrong_processors(process: Process, said: str) -> None:
    with pytest.raises(LawBroken, match=said):
        check_processor_scores(lambda: process)


def test_a_processor_that_mixes_rows() -> None:
    with pytest.raises(LawBroken, match="row 0 of a batch has other scores than alone"):
        check_processor_rows(lambda: lambda ids, s: s * len(s))


def test_determinism() -> None:
    nan = float("nan")
    check_deterministic(lambda: {"a": [nan, torch.tensor([nan])], "b": np.float64(nan)})
    check_deterministic(lambda: object())
    count = itertools.count()
    with pytest.raises(LawBroken, match="gave two results"):
        check_deterministic(lambda: (1, [next(count)]))
    state = torch.random.get_rng_state()
    with pytest.raises(LawBroken):
        check_deterministic(lambda: torch.rand(1))
    assert torch.equal(state, torch.random.get_rng_state())


def test_keep_all() -> None:
    check_keeps_all(lambda text, keep: text[: int(keep * len(text))])
    with pytest.raises(LawBroken, match="keep=1 changed"):
        check_keeps_all(lambda text, keep: text.strip())


def test_the_tiny_tokenizer_keeps_all_laws_and_groups_digits() -> None:
    tokenizer = tiny_tokenizer()
    check_tokenizer_round_trip(tokenizer)
    check_tokenizer_batch(tokenizer)
    check_tokenizer_saves(tokenizer)
    assert tokenizer.eos_token_id == 0
    assert 320 < len(tokenizer) <= 400
    assert max(len(token) for token in tokenizer.get_vocab() if token.isdigit()) == 3
    assert tokenizer.backend_tokenizer.to_str() == tiny_tokenizer().backend_tokenizer.to_str()


def test_wrong_tokenizers() -> None:
    lower = tiny_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(LawBroken, match="round trip made 'the cat"):
        check_tokenizer_round_trip(lower)

    class Batch:
        def __call__(self, text: Any, **_: Any) -> dict[str, Any]:
            rows = [[len(text)] * len(one) for one in ([text] if isinstance(text, str) else text)]
            return {"input_ids": rows[0] if isinstance(text, str) else rows}

    with pytest.raises(LawBroken, match="in a batch"):
        check_tokenizer_batch(Batch())

    class Unsaved:
        """What it saves is another one."""

        def __call__(self, text: str) -> Any:
            return lower(text)

        def save_pretrained(self, folder: str) -> None:
            tiny_tokenizer(300).save_pretrained(folder)

    with pytest.raises(LawBroken, match="saved and loaded it encodes"):
        check_tokenizer_saves(Unsaved())
    assert any(text != text.lower() for text in TEXTS)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_our_tiny_models_save_and_load(architecture: str) -> None:
    check_saves_and_loads(tiny_model(architecture))


def test_a_model_that_forgets_something() -> None:
    model = tiny_model("gpt2")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(LawBroken, match="has other logits"):
        check_saves_and_loads(model)
