"""What the byte model is compared with: the token model asked naively, and with token healing.

naive: encode the prompt as it is; the next token's probability goes to its first byte.
healing: drop the prompt's last token; the next one must begin with the bytes of the dropped one,
and its probability goes to the byte behind them. A token that is exactly the dropped one ends at
the cut, so its share is spread as the naive distribution is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pertoken.reproduce._speculation import stop_ids

END = 256  # the outcome behind the 256 bytes
_NONE = 257  # where tokens without bytes go; left out of every distribution


class TokenGuesses:
    """Next bytes and continuations as the token model gives them.

    words: the bytes of each token id, empty or None for those that stand for no text.
    begin: ids before every text, those that the byte model puts there.
    """

    def __init__(
        self, model: Any, tokenizer: Any, words: Sequence[bytes | None], begin: Sequence[int] = ()
    ) -> None:
        self.model, self.tokenizer, self.begin = model, tokenizer, list(begin)
        self.words = [word or b"" for word in words]
        longest = 1 + max(map(len, self.words))
        padded = b"".join(word.ljust(longest, b"\0") for word in self.words)
        self._table = np.frombuffer(padded, dtype=np.uint8).reshape(-1, longest)
        self._lengths = np.array([len(word) for word in self.words])
        self._order = np.array(sorted(range(len(self.words)), key=self.words.__getitem__))
        self._sorted = [self.words[i] for i in self._order]
        first = np.where(self._lengths > 0, self._table[:, 0].astype(np.int64), _NONE)
        first[[i for i in stop_ids(model) if i < len(first)]] = END
        self._first = torch.from_numpy(first)

    def next_byte(self, prefix: str) -> dict[str, torch.Tensor]:
        """Probabilities [257] of the next byte, and of the end, by "naive" and "token healing"."""
        ids = self.encode(prefix)
        with torch.no_grad():
            logits = self.model(input_ids=ids, logits_to_keep=2, use_cache=False).logits
        before, after = logits[0].double().cpu().softmax(-1)[:, : len(self.words)]
        naive = _bucket(self._first, after)
        last = self.words[int(ids[0, -1])]
        found = self._starting_with(last)
        lengths = self._lengths[found]
        longer = found[lengths > len(last)]
        outcomes = torch.from_numpy(self._table[longer, len(last)].astype(np.int64))
        same = torch.from_numpy(found[lengths == len(last)])
        healed = _sums(outcomes, before[torch.from_numpy(longer)]) + before[same].sum() * naive
        return {"naive": naive, "token healing": healed / healed.sum()}

    def writes(self, prefix: str, truth: bytes, *, heal: bool) -> bool:
        """Whether greedy decoding behind the prefix begins with exactly the bytes `truth`."""
        from transformers import LogitsProcessorList, StoppingCriteriaList

        ids = self.encode(prefix)
        dropped = self.words[int(ids[0, -1])] if heal else b""
        if heal:
            ids = ids[:, :-1]
        wanted = dropped + truth
        start = ids.shape[1]
        allowed = torch.from_numpy(self._starting_with(dropped)).to(ids.device)

        def must_begin(now: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if not heal or now.shape[1] > start:
                return scores
            only = torch.full_like(scores, -torch.inf)
            only[:, allowed] = scores[:, allowed]
            return only

        def decided(now: torch.Tensor, _: torch.Tensor, **__: Any) -> torch.Tensor:
            written = self._text(now[0, start:])
            done = len(written) >= len(wanted) or not wanted.startswith(written)
            return torch.tensor([done], device=now.device)

        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=len(wanted),
            do_sample=False,
            logits_processor=LogitsProcessorList([must_begin]),
            stopping_criteria=StoppingCriteriaList([decided]),
        )
        return self._text(out[0, start:]).startswith(wanted)

    def encode(self, text: str) -> torch.Tensor:
        """Ids [1, time] of a text, with those before it."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([[*self.begin, *ids]], device=self.model.device)

    def _text(self, ids: torch.Tensor) -> bytes:
        return b"".join(self.words[i] for i in ids.tolist())

    def _starting_with(self, beginning: bytes) -> Any:
        """Ids of the tokens whose bytes begin with these, in the order of their bytes."""
        low = bisect_left(self._sorted, beginning)
        high = bisect_right(self._sorted, beginning + b"\xff" * self._table.shape[1])
        return self._order[low:high]


def _bucket(first: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    found = _sums(first, probs)
    return found / found.sum()


def _sums(outcomes: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """Probability of each of the 257 outcomes; the one of tokens without bytes is left out."""
    return torch.zeros(_NONE + 1, dtype=probs.dtype).index_add_(0, outcomes, probs)[:_NONE]
