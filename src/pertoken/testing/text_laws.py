"""Laws for functions over text, for probes, tokenizers and architectures."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

from pertoken.testing.laws import LawBroken

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = [
    "TEXTS",
    "check_deterministic",
    "check_keeps_all",
    "check_saves_and_loads",
    "check_tokenizer_batch",
    "check_tokenizer_round_trip",
    "check_tokenizer_saves",
    "tiny_tokenizer",
]

TEXTS = (
    "The cat sat on the mat. How many legs has it? Answer with one number.",
    "  two  blanks,\ttabs\nand a line's end \n",
    "1234567 + 89.0125 = 1,234,656.0125",
    "naïve café, ἀλφάβητον, 你好, 👩‍👩‍👧",
    "def f(x):\n    return x  # 100 %",
)
"""Texts on which tokenizers and compressors tend to go wrong."""

_LESSONS = """the cat sat on the mat and the dog on the log, as the cats sat on their mats
how many legs has a cat: answer with one number, or with a word, or not at all
1234567 + 1234567 = 2469134 and 2024 is 4 more than 2020, 300 less than 2324, 100 % of 2024
def function(value): return value
naïve café"""


def tiny_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, trained in milliseconds: words, and digits in groups of up to three.

    Any text comes back as it went in. "</s>" (id 0) ends a text; there is no chat template.

    >>> tokenizer = tiny_tokenizer()
    >>> tokenizer.decode(tokenizer("naïve 12345")["input_ids"])
    'naïve 12345'
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_LESSONS.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


def check_deterministic(call: Callable[[], Any]) -> None:
    """The same call must give the same result, whatever the global generators hold.

    call: without arguments, its seed bound. Results compare as their `to_dict()` or their fields,
    tensors bit by bit. The global generator is restored. Raises `LawBroken`.

    >>> check_deterministic(lambda: sorted("text"))
    >>> check_deterministic(lambda: torch.rand(1))
    Traceback (most recent call last):
    pertoken.testing.laws.LawBroken: the same call gave two results
    """
    found = []
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(_plain(call()))
    if found[0] != found[1]:
        raise LawBroken("the same call gave two results")


def check_keeps_all(shorten: Callable[[str, float], Any], texts: Sequence[str] = TEXTS) -> None:
    """With keep=1 a text must come back byte for byte; shorten: (text, keep) -> text or `.text`."""
    for text in texts:
        found = shorten(text, 1.0)
        kept = found if isinstance(found, str) else found.text
        if kept != text:
            raise LawBroken(f"keep=1 changed {text!r} to {kept!r}")


def check_tokenizer_round_trip(tokenizer: Any, texts: Sequence[str] = TEXTS) -> None:
    """`decode(encode(text))` must be the text."""
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if found != text:
            raise LawBroken(f"the round trip made {found!r} of {text!r}")


def check_tokenizer_batch(tokenizer: Any, texts: Sequence[str] = TEXTS) -> None:
    """Texts encoded together must have the ids that each has alone."""
    together = tokenizer(list(texts))["input_ids"]
    for text, ids in zip(texts, together, strict=True):
        if list(ids) != list(tokenizer(text)["input_ids"]):
            raise LawBroken(f"in a batch {text!r} has other ids than alone")


def check_tokenizer_saves(tokenizer: Any, texts: Sequence[str] = TEXTS) -> None:
    """Saved and loaded by `AutoTokenizer` it must give the same ids."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        loaded = AutoTokenizer.from_pretrained(folder)
    for text in texts:
        wanted, found = (list(each(text)["input_ids"]) for each in (tokenizer, loaded))
        if wanted != found:
            raise LawBroken(f"saved and loaded it encodes {text!r} in another way")


@torch.no_grad()
def check_saves_and_loads(model: PreTrainedModel) -> None:
    """Saved and loaded by its own class a model must have the same logits.

    Buffers that are made anew when it is loaded may differ in their last bit of float32.
    """
    ids = torch.tensor([[1, 2, 3, 4]], device=model.device)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, dtype=model.dtype).eval().to(model.device)
    wanted, found = model(ids).logits, loaded(ids).logits
    gap = float((found - wanted).abs().max()) if found.shape == wanted.shape else float("inf")
    if not gap <= 1e-5 * float(wanted.abs().max()):
        raise LawBroken(f"saved and loaded the model has other logits: they differ by {gap:.3g}")


def _plain(value: Any) -> Any:
    """A result as plain values that compare with ==, NaN too."""
    if hasattr(value, "to_dict") and not isinstance(value, type):
        value = value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if hasattr(value, "tolist"):  # tensors and arrays
        value = [str(value.dtype), value.tolist()]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
