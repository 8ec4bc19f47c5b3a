"""ByteModel: equal to summing over all token strings, byte after byte, for every kind of tokenizer."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pertoken.decode import ByteEnsemble, ByteModel
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, check_leaves_no_trace, tiny_model

VALIDITY = ("renormalize", "truncate", "off")


def byte_level(*merges: str, letters: str = "ab", added: tuple[str, ...] = ()) -> Any:
    """A tokenizer with GPT-2's rules; merges as "a b", in its alphabet."""
    vocab = {"<s>": 0} | {letter: 1 + place for place, letter in enumerate(letters)}
    for merge in merges:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = Tokenizer(models.BPE(vocab, pairs))  # type: ignore[arg-type]
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return fast(backend, added)


def sentencepiece(
    *words: str, letters: str = "▁ab", added: tuple[str, ...] = (), lead: bool = False
) -> Any:
    """A tokenizer as converted from SentencePiece: all merges of each word, byte fallback."""
    vocab = {"<unk>": 0, "<s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for piece in (*letters, *words):
        vocab[piece] = len(vocab)
    merges = [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in vocab and word[cut:] in vocab
    ]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if lead else spaces
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return fast(backend, added)


def unigram(lead: bool = False) -> Any:
    pieces = [("<unk>", 0.0), ("<s>", 0.0)] + [(f"<0x{b:02X}>", -20.0) for b in range(256)]
    pieces += [("▁", -2.0), ("a", -2.5), ("b", -2.2), ("ab", -3.1), ("▁a", -3.0), ("aab", -5.0)]
    backend = Tokenizer(models.Unigram(pieces, 0, True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="first" if lead else "never", split=True
    )
    backend.decoder = decoders.Metaspace(prepend_scheme="first" if lead else "never")
    return fast(backend, ())


def fast(backend: Tokenizer, added: tuple[str, ...]) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")
    tokenizer.backend_tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    return tokenizer


# One character for every byte that may come first, and for every one behind the first of "é".
ANY = "".join(map(chr, (*range(256), *range(0x100, 0x800, 64), *range(0x800, 0xD800, 0x800))))
ANY += "\ue000\uf000\U00010000\U00040000\U00080000\U000c0000\U00100000"

# name: (tokenizer, letters of the texts, letters that may follow, virtual leading space)
TOKENIZERS: dict[str, tuple[Any, str, str, bytes]] = {
    "six tokens": (byte_level("a b", "ab a", "b b"), "ab", "", b""),
    "blanks": (
        byte_level("Ċ Ċ", "Ġ Ġ", "Ġ a", letters="abĊĠ"),
        "a \n",
        "b",
        b"",
    ),
    "cut characters": (byte_level("Ã ©", "a Ã", "Ġ a", letters="aÃ©ªĠ"), "aé ", "ê", b""),
    "contraction": (byte_level("' a", "l l", "' l", "' ll", letters="al'"), "al'", "", b""),
    "added text": (byte_level("a b", "b a", added=("bab", "aa", "aab")), "ab", "", b""),
    "sentencepiece": (sentencepiece("▁a", "ab", "▁ab", "▁▁"), "ab ", ANY, b""),
    "fallback": (sentencepiece("▁é", "aé", letters="▁aé"), "aéÀ", ANY, b""),
    "leading space": (sentencepiece("▁a", "ab", "▁ab", "▁▁", lead=True), "ab ", ANY, b" "),
    "unigram": (unigram(), "ab ", ANY, b""),
    "unigram, leading space": (unigram(lead=True), "ab", ANY, b" "),
}


class Brute:
    """The definitions, with every token string: slow, and no code of the library."""

    def __init__(self, name: str, length: int = 3, seed: int = 0) -> None:
        self.tokenizer, letters, more, self.start = TOKENIZERS[name]
        backend = self.tokenizer.backend_tokenizer
        self.model = tiny_model("llama", vocab_size=len(self.tokenizer) + 2, seed=seed)
        self.end = self.tokenizer.eos_token_id
        self.spelled = {i: spell(backend, i, self.end) for i in range(len(self.tokenizer))}
        self.complete: set[tuple[int, ...]] = set()
        for count, extra in itertools.product(range(length + 1), range(5 if len(more) < 9 else 2)):
            for signs in itertools.product(*[letters] * count, *[letters + more] * extra):
                self.complete.add(
                    tuple(backend.encode("".join(signs), add_special_tokens=False).ids)
                )
        self.valid = {ids[:n] for ids in self.complete for n in range(len(ids) + 1)}
        texts = ("".join(signs).encode() for signs in itertools.product(letters, repeat=length))
        self.prefixes = sorted({text[:n] for text in texts for n in range(len(text) + 1)})

    @lru_cache(maxsize=None)  # noqa: B019
    def probs(self, ids: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            tokens = torch.tensor([[self.tokenizer.bos_token_id, *ids]])
            return self.model(tokens).logits[0, -1].softmax(-1)

    def following(self, ids: tuple[int, ...], validity: str) -> dict[int, float]:
        """Weights of the next tokens (the end included) of a path."""
        probs = self.probs(ids).tolist()
        if validity == "off":
            return {
                i: probs[i] for i in (*self.spelled, self.end) if self.spelled[i] or i == self.end
            }
        kept = {i: probs[i] for i in self.spelled if self.spelled[i] and (*ids, i) in self.valid}
        if ids in self.complete:
            kept[self.end] = probs[self.end]
        total = sum(kept.values()) if validity == "renormalize" else 1.0
        return {i: p / total for i, p in kept.items()}

    def members(self, text: bytes, validity: str) -> Iterator[tuple[tuple[int, ...], float]]:
        """The cover: token strings whose last token reaches the end of the text, and weights."""
        stack: list[tuple[tuple[int, ...], bytes, float]] = [((), b"", 1.0)]
        while stack:
            ids, spelled, weight = stack.pop()
            if len(spelled) >= len(text):
                yield ids, weight
            elif ids in self.valid:  # in "off" a wrong last token counts, but nothing follows it
                for token, p in self.following(ids, validity).items():
                    longer = spelled + self.spelled[token]
                    n = min(len(longer), len(text))
                    if token != self.end and longer[:n] == text[:n]:
                        stack.append(((*ids, token), longer, weight * p))

    def next_byte(self, prefix: bytes, validity: str) -> torch.Tensor:
        text = self.start + prefix
        mass = torch.zeros(257, dtype=torch.float64)
        for byte in range(256):
            mass[byte] = sum(weight for _, weight in self.members(text + bytes([byte]), validity))
        for ids, weight in self.members(text, validity):
            whole = b"".join(self.spelled[i] for i in ids) == text
            if whole and ids in self.valid:
                mass[256] += weight * self.following(ids, validity).get(self.end, 0.0)
        if self.start and not prefix:
            mass[256] = self.following((), validity).get(self.end, 0.0)
        return mass / mass.sum()


def spell(backend: Tokenizer, token: int, end: int) -> bytes:
    text = backend.id_to_token(token)
    if token == end or text == "<unk>":
        return b""
    if text.startswith("<0x"):
        return bytes([int(text[3:5], 16)])
    if backend.normalizer is None and not isinstance(
        backend.pre_tokenizer, pre_tokenizers.Metaspace
    ):
        return text.replace("Ġ", " ").replace("Ċ", "\n").encode("latin-1")
    return text.replace("▁", " ").encode()


@lru_cache(maxsize=None)
def brute(name: str) -> Brute:
    return Brute(name)


@pytest.mark.parametrize("validity", VALIDITY)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_it_is_the_sum_over_all_token_strings(name: str, validity: str) -> None:
    exact = brute(name)
    bytewise = ByteModel(exact.model, exact.tokenizer, validity=validity)  # type: ignore[arg-type]
    for prefix in exact.prefixes:
        found = bytewise.next_byte_log_probs(prefix).exp()
        wanted = exact.next_byte(prefix, validity)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-10), (
            prefix,
            found.topk(3),
            wanted.topk(3),
        )
