"""Data sets of our own in place of the fetched ones, and small tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LANGUAGES = {
    "eng": ("eng", "English", "All are free and equal."),
    "deu_1996": ("deu", "German, Standard (1996)", "Alle sind frei und gleich."),
    "ell_monotonic": ("ell", "Greek", "Όλοι είναι ελεύθεροι."),
    "mya": ("mya", "Burmese", "လူတိုင်းသည် လွတ်လပ်သည်။"),
}


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with udhr and gsm8k in small, and no consent to brown."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {
            "code": code,
            "iso639_3": iso,
            "language": name,
            "direction": "ltr",
            "articles": [f"{text}\n{text}"] * 30,
        }
        for code, (iso, name, text) in LANGUAGES.items()
    ]
    (folder / "udhr.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    sums = {"question": "What is 12 + 30?", "answer": "<<12+30=42>>42\n#### 42"}
    (folder / "gsm8k_test.jsonl").write_text(json.dumps(sums))
    monkeypatch.setenv("PERTOKEN_DATA", str(folder))
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PERTOKEN_ACCEPT_LICENCE", raising=False)
    return folder


def of_bytes(merges: Sequence[tuple[str, str]] = (), extra: Sequence[str] = ()) -> Any:
    """A byte-level BPE: </s> and <|im_start|>, the bytes, the merges' tokens, and loose `extra`."""
    pieces = ["</s>", "<|im_start|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [left + right for left, right in merges] + list(extra)
    backend = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("</s>"), AddedToken("<|im_start|>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
