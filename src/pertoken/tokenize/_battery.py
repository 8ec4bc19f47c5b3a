"""How what acts on tokenizers is made for the laws of `pertoken.testing`."""

from __future__ import annotations

from functools import partial

from pertoken.testing.battery import Subject
from pertoken.tokenize.morphology import morphology_report
from pertoken.tokenize.numbers import NumberDirection
from pertoken.tokenize.premiums import token_premiums

__all__ = ["SUBJECTS"]

_TEXTS = {"eng": ["free and equal", "in dignity"], "tur": ["hür ve eşit", "haysiyet"]}

SUBJECTS = (
    Subject("number-tokenization", "tokenizer", NumberDirection("r2l")),
    Subject("token-premiums", "probe", partial(token_premiums, texts=_TEXTS)),
    Subject("turkish-standards", "probe", partial(morphology_report, words=["evler", "ev"])),
    Subject("turkish-subword", "probe", partial(morphology_report, analyzer="gold")),
)
