"""Byte probabilities by their definition: every token string is gone through, none is clever.

For tokenizers of a handful of tokens. What is canonical is found by encoding every short text, and
a text's probability is the sum over all token strings whose last token reaches or crosses its end.
Nothing here is used by `pertoken.decode.ByteModel`, which is held against it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

END = 256  # the outcome behind the 256 bytes


class BruteForce:
    """The next byte of any short text of a few letters.

    words: the bytes of each token id, None or empty for those that stand for no text.
    letters: what the texts consist of. more: what else may follow them. longest: letters of the
    texts asked for; texts of up to `beyond` letters more decide what is canonical.
    start: bytes that the tokenizer puts before every text.

    The model is asked behind the tokenizer's bos token; the eos token ends a text.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        words: Sequence[bytes | None],
        letters: str,
        *,
        longest: int = 3,
        more: str = "",
        beyond: int = 4,
        start: bytes = b"",
    ) -> None:
        self.model, self.tokenizer, self.start = model, tokenizer, start
        self.end = tokenizer.eos_token_id
        self.words = {token: word for token, word in enumerate(words) if word}
        self._probs: dict[tuple[int, ...], list[float]] = {}
        encode = tokenizer.backend_tokenizer.encode
        self.complete: set[tuple[int, ...]] = set()
        for count, extra in itertools.product(range(longest + 1), range(beyond + 1)):
            for signs in itertools.product(*[letters] * count, *[letters + more] * extra):
                self.complete.add(tuple(encode("".join(signs), add_special_tokens=False).ids))
        self.valid = {ids[:n] for ids in self.complete for n in range(len(ids) + 1)}
        texts = ("".join(signs).encode() for signs in itertools.product(letters, repeat=longest))
        self.prefixes = sorted({text[:n] for text in texts for n in range(len(text) + 1)})

    def probs(self, ids: tuple[int, ...]) -> list[float]:
        """The model's probabilities of the next token."""
        if ids not in self._probs:
            tokens = torch.tensor([[self.tokenizer.bos_token_id, *ids]])
            with torch.no_grad():
                self._probs[ids] = self.model(tokens).logits[0, -1].double().softmax(-1).tolist()
        return self._probs[ids]

    def following(self, ids: tuple[int, ...], validity: str) -> dict[int, float]:
        """Weights of the tokens, and of the end, behind a beginning of a canonical string."""
        probs = self.probs(ids)
        kept = {
            token: probs[token]
            for token in self.words
            if validity == "off" or (*ids, token) in self.valid
        }
        if validity == "off" or ids in self.complete:
            kept[self.end] = probs[self.end]
        total = sum(kept.values()) if validity == "renormalize" else 1.0
        return {token: weight / total for token, weight in kept.items()}

    def cover(self, text: bytes, validity: str) -> Iterator[tuple[tuple[int, ...], float]]:
        """Token strings whose last token reaches the end of the text, with their weights."""
        stack: list[tuple[tuple[int, ...], bytes, float]] = [((), b"", 1.0)]
        while stack:
            ids, spelled, weight = stack.pop()
            if len(spelled) >= len(text):
                yield ids, weight
            elif ids in self.valid:  # in "off" a wrong last token counts, but nothing follows it
                for token, share in self.following(ids, validity).items():
                    longer = spelled + self.words.get(token, b"")
                    common = min(len(longer), len(text))
                    if token != self.end and longer[:common] == text[:common]:
                        stack.append(((*ids, token), longer, weight * share))

    def next_byte(self, prefix: bytes, validity: str) -> torch.Tensor:
        """Probabilities [257] of the next byte, the last of them the end's."""
        text = self.start + prefix
        mass = torch.zeros(END + 1, dtype=torch.float64)
        for byte in range(256):
            mass[byte] = sum(weight for _, weight in self.cover(text + bytes([byte]), validity))
        for ids, weight in self.cover(text, validity):
            if ids in self.valid and b"".join(self.words[i] for i in ids) == text:
                mass[END] += weight * self.following(ids, validity).get(self.end, 0.0)
        if self.start and not prefix:  # the empty text has no leading space
            mass[END] = self.following((), validity).get(self.end, 0.0)
        return mass / mass.sum()


def six_tokens() -> Any:
    """A byte-level tokenizer of six tokens: the end, a, b, ab, aba, bb."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, "a": 1, "b": 2, "ab": 3, "aba": 4, "bb": 5}
    backend = Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "a"), ("b", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")
