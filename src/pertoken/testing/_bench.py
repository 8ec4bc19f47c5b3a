"""A tiny model, a tokenizer that fits it, a constraint and a text: what methods are combined on.

Here also the two ways of decoding that owe nothing to `generate` or to a method, which the laws of
`compose` compare with: choosing token by token by hand, and weighing a text that is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList

from pertoken.testing.setups import left_pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STOP = 1
NEW = 10  # tokens decoded
_TEXT = "the cat saw 1234 cats; the cat saw 56 cats"


class Bench:
    """A model and tokenizer of the same vocabulary, and what is read and written on them.

    model: decoder-only, in float64 if texts are to be equal; tokenizer: a fast one.
    """

    text = _TEXT

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.constraint = Steps(model.get_output_embeddings().weight.shape[0])
        self._known: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What was made under this name, made now if it was not yet."""
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]

    @cached_property
    def ids(self) -> torch.Tensor:
        """The text's ids, [1, time]."""
        return torch.tensor([self.tokenizer(self.text, add_special_tokens=False)["input_ids"]])

    @cached_property
    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two prompts of unequal length, left-padded, and their mask [2, time]."""
        return left_pad([self.ids[0], self.ids[0, 3:20]], 0)

    @cached_property
    def plain(self) -> torch.Tensor:
        """What the model itself writes behind the text, [1, time]."""
        return self.write(self.ids)

    @cached_property
    def masked(self) -> torch.Tensor:
        """What it writes under the constraint, by a mask in transformers' own loop, [1, time]."""
        return self.write(self.ids, logits_processor=[self.mask()], eos_token_id=STOP)

    def write(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        """`generate` with these options, greedy unless they say otherwise, [batch, time]."""
        mask = torch.ones_like(ids) if mask is None else mask
        run: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, **options}
        out = self.model.generate(ids, attention_mask=mask, **run)
        return out if isinstance(out, torch.Tensor) else out.sequences

    def mask(self, shift: int = 0) -> Any:
        """A logits processor: the mask of the constraint, or of one like it."""
        from pertoken.decode.constrained import ConstraintMask

        constraint = Steps(self.constraint.size, shift) if shift else self.constraint
        return ConstraintMask(constraint, STOP)

    @torch.no_grad()
    def by_hand(
        self,
        choose: Callable[[torch.Tensor, torch.Tensor], int],
        cache: Any = None,
        ids: torch.Tensor | None = None,
        count: int = NEW,
    ) -> torch.Tensor:
        """The text that comes of choosing a token from each step's logits, [1, time].

        choose: gets the text [1, time] and the logits [1, vocab] in float32; cache: read through
        this, transformers' own if not given.
        """
        from transformers import DynamicCache

        text = self.ids if ids is None else ids
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        for _ in range(count):
            new = text[:, int(cache.get_seq_length()) :]
            output = self.model(
                input_ids=new, attention_mask=torch.ones_like(text), past_key_values=cache
            )
            token = choose(text, output.logits[:, -1].float())
            text = torch.cat((text, torch.tensor([[token]])), -1)
        return text

    def weight(
        self, new: Sequence[int], cache: Any = None, processors: Sequence[Any] = ()
    ) -> float:
        """Log of the mass (nats) that the constraint allows, summed over the new tokens' places."""
        total, place = 0.0, 0
        change = LogitsProcessorList(processors)

        def choose(text: torch.Tensor, logits: torch.Tensor) -> int:
            nonlocal total, place
            log_probs = change(text, logits).double().log_softmax(-1)[0]
            total += float(log_probs[self.constraint.may_follow(new[:place])].logsumexp(0))
            place += 1
            return int(new[place - 1])

        self.by_hand(choose, cache, count=len(new))
        return total

    @contextmanager
    def counted(self) -> Iterator[list[int]]:
        """A list that holds the number of the model's forwards within the `with`."""
        count = [0]

        def add(*_: Any) -> None:
            count[0] += 1

        handle = self.model.get_decoder().register_forward_pre_hook(add)
        try:
            yield count
        finally:
            handle.remove()


def tiny_bench(architecture: str = "llama", **options: Any) -> Bench:
    """A bench of a tiny model that prefers the tokens of its text.

    Those come again and again then, so that drafters which copy have something to copy, and most
    of it to take back.
    """
    from pertoken.testing.models import tiny_model

    tokenizer = tiny_tokenizer()
    model = tiny_model(architecture, vocab_size=len(tokenizer), **options)
    liked = torch.zeros(len(tokenizer), dtype=torch.bool)
    liked[tokenizer(_TEXT)["input_ids"]] = True
    with torch.no_grad():
        model.get_output_embeddings().weight[~liked] *= 0.1
    return Bench(model, tokenizer)


class Steps:
    """A constraint that can tell all: even and odd tokens in turn, and each fifth one is forced."""

    def __init__(self, size: int, shift: int = 0) -> None:
        self.size, self.shift = size, shift

    def __repr__(self) -> str:
        return "Steps()"

    def accepts(self, ids: Sequence[int]) -> bool:
        """May a text begin with these new tokens?"""
        return all(bool(self._at(place)[token]) for place, token in enumerate(ids))

    def complete(self, ids: Sequence[int]) -> bool:
        """Are they a text?"""
        return len(ids) >= 3

    def allowed(self, ids: Sequence[int]) -> torch.Tensor:
        """Ordinary tokens that may follow, bool [vocab]."""
        return self._at(len(ids)).clone()

    def forced(self, ids: Sequence[int]) -> list[int]:
        """The token that must follow, if one must."""
        allowed = self._at(len(ids)).nonzero()[:, 0].tolist()
        return allowed if len(allowed) == 1 else []

    def may_follow(self, ids: Sequence[int]) -> torch.Tensor:
        """Tokens that may follow, the stop id among them, bool [vocab]."""
        mask = self.allowed(ids)
        mask[STOP] = self.complete(ids)
        return mask

    def _at(self, place: int) -> torch.Tensor:
        tokens = torch.arange(self.size)
        if self.shift:
            return (tokens % 5 != self.shift) & (tokens > STOP)
        if place % 5 == 4:
            return tokens == 9
        return (tokens % 2 == place % 2) & (tokens > STOP)


def best(processors: Sequence[Any] = ()) -> Callable[[torch.Tensor, torch.Tensor], int]:
    """The greedy choice behind some logits processors, for `Bench.by_hand`."""
    change = LogitsProcessorList(processors)
    return lambda text, logits: int(change(text, logits).argmax())


def tiny_tokenizer(*more: str) -> Any:
    """A fast tokenizer of bytes and numbers of two digits; pad 0, stop 1, begin 2.

    more: further tokens of two letters.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pairs = [(a, b) for a in "0123456789" for b in "0123456789"]
    pairs += [(word[0], word[1]) for word in more]
    names = ["<pad>", "</s>", "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [a + b for a, b in pairs]
    backend = Tokenizer(models.BPE({name: place for place, name in enumerate(names)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )
