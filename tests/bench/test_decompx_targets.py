"""The bench of DecompX's targets: what it counts, and that each target rates by its own class."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from pertoken.attribute.decompx import decompx
from pertoken.prune import compress
from pertoken.reproduce._frugal_tasks import Item

bench = pytest.importorskip("decompx_targets")

WORDS = ["buy", "now", "dear", "list", "free", "patch", "kernel", "offer", "thanks", "money"]


def test_shares_are_of_the_right_mails_and_judged_by_their_bars() -> None:
    labels = [0, 0, 1, 1]
    every = {share: [False, False, True, True] for share in bench.SHARES}
    as_ham = {share: [False] * 4 for share in bench.SHARES}
    own = dict.fromkeys(["label 1", "predicted", "absolute", "globenc", "random"], every)
    own |= {"label 0": as_ham, "whole": {bench.WHOLE: [False, True, True, True]}}
    written = bench.report([False, False, True, False], {"d": own}, labels, settings={"seed": 0})
    here = {row["metric"]: (row["here"], row["holds"]) for row in written["comparisons"]}
    assert here["minilm: right, whole mails"] == (0.75, False)
    assert here["d: right, whole mails"] == (0.75, True)
    assert here["d: taken for ham at 50%, label 0 minus random"] == (0.5, True)
    assert here["d: taken for ham at 50%, random minus label 1"] == (0.0, False)
    assert here["d: right at 50%, random minus label 0"] == (0.5, True)
    assert here["d: right at 50%, absolute minus random"] == (0.0, True)
    assert written["figures"]["d: label 0, 50%"] == {
        "right": 0.5,
        "right, ham": 1.0,
        "right, spam": 0.0,
    }
    assert written["settings"] == {"seed": 0}


def test_words_are_rated_by_the_target_and_once_for_all_shares() -> None:
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = {word: number for number, word in enumerate([*marks.values(), *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    backend.post_processor = processors.BertProcessing(ends[1], ends[0])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **marks)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    encoder: Any = BertForSequenceClassification(config).double().eval()
    mail = Item("classification", 1, "", " ".join(WORDS), "", "spam", ("ham", "spam"))
    found = bench.shortened(mail, encoder, tokenizer, 3)
    assert found["whole"] == {bench.WHOLE: mail.body}
    for name, target in bench.TARGETS.items():
        for share in bench.SHARES:
            small = compress(
                mail.body,
                share,
                salience=partial(decompx, target=target),
                model=encoder,
                tokenizer=tokenizer,
                protect_defaults=False,
            )
            assert found[name][share] == small.text
    assert found["label 0"][0.5] != found["label 1"][0.5]
    assert {len(text.split()) for text in found["random"].values()} == {5, 6, 8}
