"""The linear classifier of FrugalPrompt's reproduction: learns what the states tell, no more."""

import json

import pytest
import torch

from pertoken.reproduce._frugal_classifier import Classifier, fit, learn
from pertoken.reproduce._frugal_tasks import classification
from pertoken.testing import ByteTokenizer, tiny_model

MAILS = [
    {"label": ("ham", "spam")[number // 2 % 2], "text": f"word{number} " * 50}
    for number in range(40)
]
COPY = {"label": "spam", "text": "Dear friend, " + "word2 " * 50}


def test_texts_with_other_letters_are_told_apart() -> None:
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), dtype=torch.float64)
    texts = ["ab" * 8, "ba" * 9, "yz" * 8, "zy" * 9]
    learnt = json.loads(json.dumps(learn(model, tokenizer, texts, [0, 0, 1, 1])))
    classifier = Classifier(model, tokenizer, learnt)
    assert classifier.loss("ab" * 10, 0) < 0.5 < classifier.loss("ab" * 10, 1)
    assert classifier.loss("zy" * 10, 1) < 0.5 < classifier.loss("zy" * 10, 0)


def test_the_fit_is_the_minimum() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    labels = torch.arange(12) % 2
    weight, bias = (part.requires_grad_() for part in fit(states, labels, decay=0.3))
    score = states @ weight + bias
    loss = torch.nn.functional.binary_cross_entropy_with_logits(score, labels.double())
    (loss + 0.15 * weight.square().sum()).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert float(weight.grad.abs().max()) == pytest.approx(0, abs=1e-6)
    assert float(bias.grad) == pytest.approx(0, abs=1e-6)


def test_learning_and_report_share_no_mail() -> None:
    learnt, reported = (classification(MAILS, 6, split) for split in ("dev", "report"))
    assert len(learnt) == len(reported) == 6
    assert not {mail.number for mail in learnt} & {mail.number for mail in reported}
    assert {mail.number % 2 for mail in learnt} == {0}
    again = classification([*MAILS[:3], COPY, *MAILS[3:]], 40, "report")
    assert 3 not in {mail.number for mail in again}
