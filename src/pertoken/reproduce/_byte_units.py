"""What the byte model's reproduction measures on one text: units of plain numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from pertoken.reproduce._byte_baselines import TokenGuesses
from pertoken.reproduce._byte_texts import Text, line_cut, rest_of_line
from pertoken.reproduce._context import Context

Unit = dict[str, Any]
CONTENDERS = ("byte model", "token healing", "naive")


@dataclass(frozen=True)
class Contender:
    """One token model: asked through the byte model, and in the two usual ways."""

    model: Any
    bytes: Any
    tokens: TokenGuesses


class Models:
    """The two models, each loaded when it is first asked for."""

    def __init__(self, context: Context, second: str) -> None:
        self._context, self._second = context, second

    @cached_property
    def first(self) -> Contender:
        smoke = self._context.smoke
        return _contender(*(_tiny(["to", "tal", "re", "turn"]) if smoke else self._context.load()))

    @cached_property
    def second(self) -> Contender:
        context = self._context
        if context.smoke:
            return _contender(*_tiny(["th", "the", "ret", "tot"]))
        from pertoken.loading import load

        return _contender(*load(self._second, device=context.device, dtype=context.dtype))


def _contender(model: Any, tokenizer: Any) -> Contender:
    from pertoken.decode import ByteModel

    byte_model = ByteModel(model, tokenizer)
    guesses = TokenGuesses(
        model, tokenizer, byte_model.canonical.vocab.token_bytes, byte_model.begin
    )
    return Contender(model, byte_model, guesses)


def _tiny(words: list[str]) -> tuple[Any, Any]:
    """A random model, and a byte-level tokenizer that knows a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from pertoken.testing import tiny_model

    vocab = {
        sign: id for id, sign in enumerate(["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocab.setdefault(word[:end], len(vocab))
    backend = Tokenizer(models.BPE(vocab, list(dict.fromkeys(merges))))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")
    return tiny_model("llama", vocab_size=len(vocab)), tokenizer


def guess(models: Models, which: str, text: Text, places: list[int]) -> Unit:
    """How often each contender's likeliest next byte is the text's, and its bits of that byte."""
    contender = getattr(models, which)
    unit: Unit = {"cuts": len(places)}
    unit |= {name: {"hits": 0, "bits": 0.0} for name in CONTENDERS}
    for place in places:
        prefix, truth = text.data[:place], text.data[place]
        probs = contender.tokens.next_byte(prefix.decode())
        probs["byte model"] = contender.bytes.next_byte_log_probs(prefix).double().exp()
        for name in CONTENDERS:
            unit[name]["hits"] += int(probs[name].argmax()) == truth
            unit[name]["bits"] -= math.log2(max(float(probs[name][truth]), 1e-30))
    return unit


def line(models: Models, text: Text, seed: int) -> Unit:
    """Whether each contender writes the rest of a line exactly, greedily; {} without a cut."""
    contender = models.first
    words = contender.tokens.words
    ids = contender.tokens.encode(text.text)[0].tolist()
    place = line_cut(text, [words[i] for i in ids], seed)
    if place is None:
        return {}
    prefix, truth = text.data[:place], rest_of_line(text, place)
    return {
        "byte model": _writes(contender.bytes, prefix, truth),
        "token healing": contender.tokens.writes(prefix.decode(), truth, heal=True),
        "naive": contender.tokens.writes(prefix.decode(), truth, heal=False),
        "cut": place,
        "bytes": len(truth),
    }


def _writes(byte_model: Any, prefix: bytes, truth: bytes) -> bool:
    """Whether greedy decoding by bytes begins with exactly the bytes `truth`."""
    new = byte_model.stream(prefix, len(truth), temperature=0.0)
    written = b""
    for byte in new:
        written += byte
        if not truth.startswith(written):
            return False
    return written == truth


def log_probs(models: Models, which: str, text: Text, most: int) -> list[float]:
    """Log-probability of each of the first bytes of a text, in nats."""
    scored: torch.Tensor = getattr(models, which).bytes.score(text.data[:most])
    return [float(value) for value in scored]


def chain_error(models: Models, which: str, texts: list[bytes]) -> float:
    """How far the 257 outcomes are from sharing the probability of the text before them.

    The product of a text's normalised next-byte probabilities is its probability, as its cover
    gives it, iff at every place the 257 outcomes summed to what was there before they were
    normalised. Greatest relative error of that product at any place.
    """
    byte_model = getattr(models, which).bytes
    worst = 0.0
    for text in texts:
        reader, product = byte_model.read(b""), 0.0
        for byte in text:
            product += float(reader.log_probs()[byte])
            reader.push(byte)
            worst = max(worst, abs(math.expm1(product - reader.mass())))
    return worst


def steps_error(models: Models, which: str, data: bytes) -> float:
    """Scores of a text against asking byte by byte, greatest difference in nats."""
    byte_model = getattr(models, which).bytes
    scores = byte_model.score(data)
    single = [byte_model.next_byte_log_probs(data[:i])[data[i]] for i in range(len(data))]
    return float((scores - torch.stack(single)).abs().max())


def token_score(contender: Contender, text: str) -> float:
    """Log-probability of a text under the token model, as it is scored without bytes."""
    ids = contender.tokens.encode(text)
    with torch.no_grad():
        logits = contender.model(input_ids=ids, use_cache=False).logits[0, :-1]
    taken = logits.float().log_softmax(-1).gather(-1, ids[0, 1:, None])
    return float(taken.sum())


@contextmanager
def counted(model: Any) -> Iterator[dict[str, int]]:
    """Counts forward passes of the model, and the tokens that went through them."""
    counts = {"forwards": 0, "tokens": 0}

    def before(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named["input_ids"] if "input_ids" in named else arguments[0]
        counts["forwards"] += 1
        counts["tokens"] += ids.numel()

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield counts
    finally:
        handle.remove()


def sampling(models: Models, prefix: bytes, wanted: int, seed: int) -> Unit:
    """Forward passes and tokens that `wanted` sampled bytes take, the prompt's left out."""
    contender = models.first
    with counted(contender.model) as counts:
        stream = contender.bytes.stream(prefix, wanted + 1, temperature=1.0, seed=seed)
        next(stream, None)  # takes the prompt through the model
        begun = dict(counts)
        started = time.perf_counter()
        new = sum(1 for _ in stream)
        seconds = time.perf_counter() - started
    return {
        "bytes": new,
        "seconds": seconds,
        "forwards": counts["forwards"] - begun["forwards"],
        "tokens": counts["tokens"] - begun["tokens"],
    }


def brute_force_error(validity: Any, longest: int, seed: int) -> float:
    """Greatest error of a next-byte probability against summing over all token strings."""
    from pertoken.decode import ByteModel
    from pertoken.testing import tiny_model
    from pertoken.testing.byte_brute import BruteForce, six_tokens

    tokenizer = six_tokens()
    model = tiny_model("llama", vocab_size=len(tokenizer), seed=seed)
    byte_model = ByteModel(model, tokenizer, validity=validity)
    exact = BruteForce(
        model, tokenizer, byte_model.canonical.vocab.token_bytes, "ab", longest=longest
    )
    return max(
        float((byte_model.next_byte_log_probs(p).exp() - exact.next_byte(p, validity)).abs().max())
        for p in exact.prefixes
    )
