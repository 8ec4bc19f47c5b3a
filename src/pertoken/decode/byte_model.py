"""Byte probabilities (arXiv 2410.09303): a tokenized model as the model over bytes that it equals.

A prompt that ends inside a token forces the model onto a tokenization it has never seen. The exact
probability of a text is a sum over its *cover*: the canonical token sequences whose last token
reaches or crosses the end of the text (lemma 1 of the paper). Each member of the cover is a path T
that ends at some earlier place, and a token that goes on from there, so

    P(x_1..x_n) = sum over paths T of x_1..x_m, m < n, of P(T) * P(tokens starting x_m+1..x_n)

and the next byte's distribution follows from the members that reach beyond the end, and from the
next tokens of the paths that end exactly there. These need one forward of one token per byte.
The vocabulary lies sorted by its bytes, so that every sum is over a contiguous range.

A token that no canonical text could have at its place has probability 0 (the paper's proposition
1), but a model gives it some. `validity` says what becomes of that mass:

- ``"renormalize"``: the others are divided by what is left at every token. The result is the model
  restricted to canonical text; every identity of probabilities holds exactly.
- ``"truncate"``: it is dropped, and only the distribution of each next byte is normalised.
- ``"off"``: it is kept as if the token were right (the paper's fast mode): no rows of valid tokens
  are computed for the sums, only the paths themselves are canonical.

Our reading: a path is a beginning of a canonical sequence, which need not be one itself (see
`pertoken.canonical`; GPT-2's rule for blanks makes the difference), so two paths may end at one
place; texts end only where their tokens are canonical; a text begins behind the tokenizer's
beginning-of-text token; special tokens are never text, and "<|im_end|>" in a text is spelled out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pertoken._shown import Shown
from pertoken.canonical import Canonical, encode
from pertoken.decode._branches import Branches
from pertoken.decode._byte_reader import (
    END,
    MeanReader,
    ModelReader,
    Reader,
    TokenModel,
    Validity,
)
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ByteEnsemble", "ByteModel"]

_FIM = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


class _Bytes(Shown):
    """What a model and an ensemble have in common: texts byte by byte."""

    def _open(
        self, prefix: bytes, context: Sequence[int] | None = None, ahead: bytes = b""
    ) -> Reader:
        raise NotImplementedError

    def next_byte_log_probs(
        self, prefix: bytes | str, *, context: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Log-probabilities [257] (float64, nats) of the next byte; the last is the end of text.

        context: token ids before the text, such as a chat's, instead of the beginning-of-text
        token.
        Raises PertokenError for a prefix that the tokenizer cannot write or that is too long.
        """
        return self._open(_as_bytes(prefix), context).log_probs()

    def read(self, prefix: bytes | str, *, context: Sequence[int] | None = None) -> Reader:
        """A text to be read byte by byte, in about one forward of a token for each byte.

        Its ``log_probs()`` are the `next_byte_log_probs` of what was read; ``push(byte)`` reads on.
        """
        return self._open(_as_bytes(prefix), context)

    def score(self, text: bytes | str) -> torch.Tensor:
        """Log-probability [bytes] (float64, nats) of each byte given those before it.

        Raises PertokenError as `next_byte_log_probs` does.
        """
        text = _as_bytes(text)
        scores = torch.empty(len(text), dtype=torch.float64)
        reader = self._open(b"", ahead=text)
        for place, byte in enumerate(text):
            scores[place] = reader.log_prob(byte)
            if place + 1 < len(text):
                reader.push(byte)
        return scores

    def stream(
        self,
        prefix: bytes | str,
        max_bytes: int,
        *,
        seed: int | None = None,
        temperature: float = 1.0,
        context: Sequence[int] | None = None,
    ) -> Iterator[bytes]:
        """Draw a continuation and yield it byte by byte, until the text ends or `max_bytes`.

        temperature: T of p^(1/T) on the bytes' probabilities, as in the paper; 0 takes the most
        probable byte. seed: of a generator of its own; None draws from torch's.
        Where a character is cut by the prefix or by `max_bytes`, the bytes are no whole text.
        """
        if not (math.isfinite(temperature) and temperature >= 0):
            raise PertokenError(f"temperature must be a number from 0 on, got {temperature}")
        if max_bytes < 0:
            raise PertokenError(f"max_bytes must not be negative, got {max_bytes}")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        reader = self._open(_as_bytes(prefix), context)
        return _drawn(reader, max_bytes, temperature, generator)

    def sample(
        self,
        prefix: bytes | str,
        max_bytes: int,
        *,
        seed: int | None = None,
        temperature: float = 1.0,
        context: Sequence[int] | None = None,
    ) -> bytes:
        """The continuation that `stream` yields, without the prefix."""
        drawn = self.stream(prefix, max_bytes, seed=seed, temperature=temperature, context=context)
        return b"".join(drawn)


class ByteModel(_Bytes):
    """A token model as a model over bytes.

    Args:
        model: a decoder-only model of transformers; not changed.
        tokenizer: its fast tokenizer, of one of the kinds that `pertoken.byte_vocab` knows.
        validity: what becomes of the probability of tokens that canonical text does not have at
            their place, see the module. Which they are is exact; it costs a few milliseconds per
            forward on BPE vocabularies, and a pass over the vocabulary on Unigram ones.

    `begin` holds the ids that stand before every text where no context is given; without any, a
    prompt must be longer than its first token.

    `invalid_mass` is the probability that the model gave to such tokens at the last place that
    `next_byte_log_probs`, `sample` or `stream` came to (None with ``"off"``). `score` feeds all
    paths of a text in few forwards, and with ``"renormalize"`` only those that can matter.

    Raises PertokenError for models and tokenizers that it cannot serve.

    >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> from pertoken.testing import MockModel
    >>> backend = Tokenizer(models.BPE({"<s>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    >>> backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> backend.decoder = decoders.ByteLevel()
    >>> tokenizer = PreTrainedTokenizerFast(
    ...     tokenizer_object=backend, bos_token="<s>", eos_token="<s>")
    >>> model = MockModel([[0.1, 0.2, 0.3, 0.4], [0.5, 0.3, 0.1, 0.1], [0.25] * 4, [0.25] * 4])
    >>> bytewise = ByteModel(model, tokenizer)
    >>> probs = bytewise.next_byte_log_probs("a").exp()        # ab 0.4; a 0.2, never before b
    >>> [round(float(probs[byte]), 4) for byte in (*b"ab", 256)]
    [0.1481, 0.6667, 0.1852]
    >>> round(bytewise.invalid_mass, 4)
    0.1
    """

    slug = "byte-probabilities"

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, *, validity: Validity = "renormalize"
    ) -> None:
        if validity not in ("renormalize", "truncate", "off"):
            raise PertokenError(
                f'validity must be "renormalize", "truncate" or "off", not {validity!r}'
            )
        self.model, self.tokenizer, self.validity = model, tokenizer, validity
        self.canonical = Canonical(tokenizer)
        vocab = self.canonical.vocab
        size = model.get_output_embeddings().weight.shape[0]
        if int(vocab.order.max()) >= size:
            raise PertokenError(
                f"the tokenizer has more tokens ({vocab.size}) than the model ({size}): it is "
                "not this model's"
            )
        trees = Branches(model).masks_trees  # refuses unfit models now
        ends = _end_ids(model, tokenizer)
        self._source = TokenModel(model, self.canonical, ends, validity, trees)
        self.begin = _begin_ids(tokenizer)

    @property
    def invalid_mass(self) -> float | None:
        """Probability of tokens that do not belong at the last place; None if not known."""
        return self._source.invalid_mass

    @property
    def forwards(self) -> int:
        """Forward passes of the last call, without the settled beginning."""
        return self._source.forwards

    @property
    def fed(self) -> int:
        """Tokens fed by the last call, without the settled beginning."""
        return self._source.fed

    def cover(
        self, prefix: bytes | str, *, context: Sequence[int] | None = None
    ) -> list[tuple[list[int], float]]:
        """The cover of a text: (token ids, log-probability given the text), most probable first.

        The ids are whole, from the beginning of the text.
        """
        reader = ModelReader(self._source, _as_bytes(prefix), self._context(context))
        found = [(path.ids, weight) for path, weight in reader.ending()]
        for path, tokens, weights in reader.reaching():
            ids = path.ids
            pairs = zip(tokens.tolist(), weights.tolist(), strict=True)
            found.extend(([*ids, token], weight) for token, weight in pairs if weight > -math.inf)
        total = np.logaddexp.reduce([weight for _, weight in found])
        return sorted(((ids, float(w - total)) for ids, w in found), key=lambda pair: -pair[1])

    def infill(
        self,
        prefix: bytes | str,
        suffix: bytes | str,
        max_bytes: int,
        *,
        template: str | None = None,
        seed: int | None = None,
        temperature: float = 1.0,
    ) -> bytes:
        """Draw what stands between a prefix and a suffix; the prefix may end inside a token.

        template: a text with ``{suffix}`` that ends with ``{prefix}``, special tokens included. By
        default the tokenizer's own tokens for it, suffix first: ``<fim_prefix><fim_suffix>{suffix}
        <fim_middle>{prefix}``, so that the model goes on with the prefix itself.
        Raises PertokenError where there are no such tokens and no template.
        """
        before, after = self._template(template)
        tokenizer = self.tokenizer
        head = tokenizer(before, add_special_tokens=False)["input_ids"] if before else []
        middle = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
        context = [*head, *encode(self.canonical, _as_bytes(suffix)), *middle]
        if _added_begin(tokenizer) and context[: len(self.begin)] != self.begin:
            context = [*self.begin, *context]
        return self.sample(prefix, max_bytes, seed=seed, temperature=temperature, context=context)

    def _template(self, template: str | None) -> tuple[str, str]:
        """The text before and behind the suffix."""
        if template is None:
            known = self.tokenizer.get_vocab()
            for first, second, third in _FIM:
                if {first, second, third} <= set(known):
                    return first + second, third
            raise PertokenError(
                "the tokenizer has no fill-in-the-middle tokens; pass template=, a text with "
                "{suffix} that ends with {prefix}"
            )
        before, found, after = template.partition("{suffix}")
        if not found or not after.endswith("{prefix}") or template.count("{prefix}") != 1:
            raise PertokenError(
                "template must hold {suffix} and then end with {prefix}, for the text goes on "
                f"where the prefix ends; got {template!r}"
            )
        return before, after.removesuffix("{prefix}")

    def _context(self, context: Sequence[int] | None) -> list[int]:
        if context is not None:
            if not context:
                raise PertokenError("context is empty; give at least one token id")
            return list(context)
        return self.begin

    def _open(
        self, prefix: bytes, context: Sequence[int] | None = None, ahead: bytes = b""
    ) -> Reader:
        return ModelReader(self._source, prefix, self._context(context), ahead)


class ByteEnsemble(_Bytes):
    """The arithmetic mean of several models' next-byte distributions, whatever their tokens.

    Args:
        members: `ByteModel`s or ensembles.
        weights: one per member, not negative; divided by their sum. Equal by default.

    Raises PertokenError for no members and weights that do not fit.

        small, other = pertoken.load("smollm2"), pertoken.load("gemma3-270m")
        ByteEnsemble([ByteModel(*small), ByteModel(*other)]).sample("The cat", 40)
    """

    def __init__(
        self, members: Sequence[_Bytes], *, weights: Sequence[float] | None = None
    ) -> None:
        members = list(members)
        if not members:
            raise PertokenError("an ensemble needs at least one member")
        for member in members:
            if not isinstance(member, _Bytes):
                raise PertokenError(
                    f"a member of an ensemble must be a ByteModel, not {type(member).__name__}"
                )
        self.weights = weights
        shares = [1.0] * len(members) if weights is None else list(weights)
        if len(shares) != len(members):
            raise PertokenError(f"{len(members)} members need as many weights, got {len(shares)}")
        if not all(math.isfinite(weight) and weight >= 0 for weight in shares):
            raise PertokenError(f"weights must be numbers from 0 on, got {shares}")
        if not sum(shares) > 0:
            raise PertokenError("weights must not all be 0")
        self.members = members
        self._shares = [weight / sum(shares) for weight in shares]

    def _open(
        self, prefix: bytes, context: Sequence[int] | None = None, ahead: bytes = b""
    ) -> Reader:
        if context is not None:
            raise PertokenError("context is ids of one tokenizer; an ensemble has several")
        used = [
            (member._open(prefix, None, ahead), weight)
            for member, weight in zip(self.members, self._shares, strict=True)
            if weight > 0
        ]
        return MeanReader(used)


def _drawn(
    reader: Reader, max_bytes: int, temperature: float, generator: torch.Generator | None
) -> Iterator[bytes]:
    byte = END
    for place in range(max_bytes):
        if place:
            reader.push(byte)
        log_probs = reader.log_probs()
        if temperature == 0:
            byte = int(log_probs.argmax())
        else:
            probs = (log_probs / temperature).softmax(-1)
            byte = int(torch.multinomial(probs, 1, generator=generator))
        if byte == END:
            return
        yield bytes([byte])


def _as_bytes(text: bytes | str) -> bytes:
    if isinstance(text, str):
        try:
            return text.encode()
        except UnicodeEncodeError as error:
            raise PertokenError(f"the text is not valid Unicode: {error}") from error
    if isinstance(text, (bytes, bytearray)):
        return bytes(text)
    raise PertokenError(f"a text must be bytes or str, not {type(text).__name__}")


def _end_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The ids that end a text."""
    found = model.generation_config.eos_token_id
    ids = {found} if isinstance(found, int) else set(found or ())
    ids |= {tokenizer.eos_token_id} - {None}
    return sorted(ids)


def _begin_ids(tokenizer: Any) -> list[int]:
    """What stands before every text: what the tokenizer puts there, else its bos token."""
    found = _added_begin(tokenizer)
    if not found and tokenizer.bos_token_id is not None:
        found = [tokenizer.bos_token_id]
    return found


def _added_begin(tokenizer: Any) -> list[int]:
    whole = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    for place in range(len(whole)):
        if whole[place : place + len(bare)] == bare:
            return list(whole[:place])
    return []
