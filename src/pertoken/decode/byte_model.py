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
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from pertoken.canonical import Canonical, Lattice, Path, encode
from pertoken.decode._branches import Branch, Branches
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ByteEnsemble", "ByteModel"]

Validity = Literal["renormalize", "truncate", "off"]
END = 256  # the outcome behind the 256 bytes
_FIM = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


class _Bytes:
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
            scores[place] = reader.log_probs()[byte]
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

    begin: ids that stand before every text where no context is given.

    After a call, `invalid_mass` is the probability that the model gave to such tokens at the last
    place (None with ``"off"``), and `forwards` and `fed` count the forward passes and the tokens
    fed, without the settled beginning of a prefix.

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

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, *, validity: Validity = "renormalize"
    ) -> None:
        if validity not in ("renormalize", "truncate", "off"):
            raise PertokenError(
                f'validity must be "renormalize", "truncate" or "off", not {validity!r}'
            )
        self.model, self.tokenizer, self.validity = model, tokenizer, validity
        self.canonical = Canonical(tokenizer)
        self.vocab = self.canonical.vocab
        size = model.get_output_embeddings().weight.shape[0]
        if int(self.vocab.order.max()) >= size:
            raise PertokenError(
                f"the tokenizer has more tokens ({self.vocab.size}) than the model ({size}): it is "
                "not this model's"
            )
        self._ends = _end_ids(model, tokenizer)
        self.begin = _begin_ids(tokenizer)
        self.place_of = np.full(self.vocab.size, -1, dtype=np.int64)  # of a token in vocab.order
        self.place_of[self.vocab.order] = np.arange(len(self.vocab.order))
        self.masks_trees = Branches(model).masks_trees  # and refuses unfit models now
        self.invalid_mass: float | None = None
        self.forwards = self.fed = 0

    def __repr__(self) -> str:
        return f"ByteModel({type(self.model).__name__}, validity={self.validity!r})"

    def cover(
        self, prefix: bytes | str, *, context: Sequence[int] | None = None
    ) -> list[tuple[list[int], float]]:
        """The cover of a text: (token ids, log-probability in nats), most probable first.

        Their probabilities sum to that of the text (lemma 1), which is the product of the scores;
        with ``"truncate"`` and ``"off"`` to less or more, for those scores are normalised.
        """
        text = _as_bytes(prefix)
        reader = _ModelReader(self, b"", self._context(context), ahead=text)
        for byte in text:
            reader.push(byte)
        found = [(path.ids, weight) for path, weight in reader.ending()]
        for path, tokens, weights in reader.reaching():
            ids = path.ids
            pairs = zip(tokens.tolist(), weights.tolist(), strict=True)
            found.extend(([*ids, token], weight) for token, weight in pairs)
        whole = [(ids, float(weight)) for ids, weight in found if weight > -math.inf]
        return sorted(whole, key=lambda pair: -pair[1])

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
        return _ModelReader(self, prefix, self._context(context), ahead)

    def token_probs(
        self, logits: torch.Tensor, path: Path, text: bytes
    ) -> tuple[npt.NDArray[np.float64], float, float | None]:
        """Probabilities of the next tokens of a path, of the end, and of invalid tokens.

        logits: [vocab]; the tokens' probabilities are in the order of their bytes.
        """
        probs = logits.double().softmax(-1).cpu().numpy()
        tokens = probs[self.vocab.order]
        end = float(probs[self._ends].sum())
        if self.validity == "off":
            return tokens, end, None
        tokens = tokens * self.canonical.row(path, text)[self.vocab.order]
        end = end if self.canonical.complete(path, text) else 0.0
        valid = float(tokens.sum()) + end
        if self.validity == "renormalize" and valid > 0.0:
            tokens, end = tokens / valid, end / valid
        return tokens, end, max(0.0, 1.0 - valid)


class Reader:
    """A text that is being read: the distribution of its next byte."""

    def log_probs(self) -> torch.Tensor:
        """Log-probabilities [257] of the next byte or the end."""
        raise NotImplementedError

    def push(self, byte: int) -> None:
        """Read one more byte."""
        raise NotImplementedError


class _Weighed:
    """What a model says of a path: its log-probability and what follows it.

    probs: of the next tokens in the order of their bytes, None until the path is read; logits:
    [vocab], from its forward until then.
    """

    __slots__ = ("branch", "end", "invalid", "log_prob", "logits", "probs")

    def __init__(self, branch: Branch, logits: torch.Tensor) -> None:
        self.branch = branch
        self.logits: torch.Tensor | None = logits
        self.log_prob = -math.inf
        self.probs: npt.NDArray[np.float64] | None = None
        self.end = 0.0
        self.invalid: float | None = None


class _ModelReader(Reader):
    """The cover of a growing text under one model.

    ahead: bytes that will be pushed; their paths are fed together, many in one forward.
    """

    def __init__(
        self, owner: ByteModel, prefix: bytes, context: Sequence[int], ahead: bytes = b""
    ) -> None:
        self._owner, self._vocab = owner, owner.vocab
        self._branches = Branches(owner.model, mask_trees=owner.masks_trees)
        self._lattice = Lattice(owner.canonical)
        self._reach: list[list[tuple[int, int, int]]] = [[]]
        self._weighed: dict[Path, _Weighed] = {}
        for byte in self._vocab.start + prefix + ahead:
            self._grow(byte)
        self._place = len(self._vocab.start) + len(prefix)
        self._settled: Path | None = None
        # In one forward: as many paths as keep the logits at 64 MiB or so.
        self._run = max(16, min(512, 2**24 // self._vocab.size)) if ahead else 1
        self._begin(context)

    def log_probs(self) -> torch.Tensor:
        """Log-probabilities [257] of the next byte or the end."""
        mass = np.zeros(END + 1)
        parts = [*self._reach[self._place], (self._place, 0, len(self._vocab.order))]
        found = [
            (weighed, start, low, high)
            for start, low, high in parts
            for weighed in self._live(start)
        ]
        most = max((weighed.log_prob for weighed, *_ in found), default=-math.inf)
        for weighed, start, low, high in found:
            assert weighed.probs is not None
            following = self._vocab.byte_at(self._place - start, low, high)
            part = np.bincount(following, weighed.probs[low:high], minlength=END)
            mass[:END] += math.exp(weighed.log_prob - most) * part
        ends = self._live(self._place)
        if self._place == len(self._vocab.start):  # the empty text has no space before it
            ends = self._live(0)
        for weighed in ends:
            mass[END] += math.exp(weighed.log_prob - most) * weighed.end
        self._report()
        total = mass.sum()
        if not total > 0.0:
            raise PertokenError("the model gives no probability to anything that can follow here")
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(mass / total))

    def push(self, byte: int) -> None:
        """Read one more byte."""
        if self._place + 1 == len(self._lattice.paths):
            self._grow(byte)
        self._place += 1
        self._read(self._lattice.paths[self._place])
        kept = {start for start, *_ in self._reach[self._place]} | {self._place}
        for path in [path for path in self._weighed if path.end < self._place]:
            if path.end not in kept:
                del self._weighed[path]

    def ending(self) -> list[tuple[Path, float]]:
        """The cover's paths that end here, with their log-probabilities."""
        paths = self._lattice.paths[self._place]
        return [(path, self._weighed[path].log_prob) for path in paths if path in self._weighed]

    def reaching(self) -> Iterator[tuple[Path, npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
        """The other members: a path, last tokens, and the log-probabilities of the whole."""
        for start, low, high in self._reach[self._place]:
            for path in self._lattice.paths[start]:
                weighed = self._weighed.get(path)
                if weighed is not None and weighed.probs is not None:
                    with np.errstate(divide="ignore"):
                        weights = weighed.log_prob + np.log(weighed.probs[low:high])
                    yield path, self._vocab.order[low:high], weights

    def _grow(self, byte: int) -> None:
        lattice = self._lattice
        lattice.push(byte)
        self._reach.append(lattice.reaching)
        if not lattice.paths[-1] and not lattice.reaching:
            place = len(lattice.text) - len(self._vocab.start) - 1
            raise PertokenError(
                f"the tokenizer cannot write this text: byte 0x{byte:02x} at place {place} fits no "
                "encoding (is it UTF-8?)"
            )

    def _begin(self, context: Sequence[int]) -> None:
        """Feed what all paths of the cover begin with, then the rest of each.

        The common beginning is a factor of every sum and needs no probability.
        """
        starts = [start for start, *_ in self._reach[self._place]]
        paths = [path for at in {*starts, self._place} for path in self._lattice.paths[at]]
        chains = [path.chain for path in paths]
        common = 0
        while all(len(chain) > common and chain[common] is chains[0][common] for chain in chains):
            common += 1
        self._settled = chains[0][common - 1]
        settled = [*context, *self._settled.ids]
        if not settled:
            raise PertokenError(
                "the tokenizer has no beginning-of-text token, so the first token has no "
                "probability; give a longer prompt, or context=[id] with a token before texts"
            )
        branch, logits = self._branches.start(settled)
        self._weighed[self._settled] = _Weighed(branch, logits)
        rest = {path for chain in chains for path in chain[common:]}
        others = sorted(rest, key=lambda path: path.end)
        if others:
            self._feed(others)
        self._weigh([self._settled, *others])
        self._owner.forwards, self._owner.fed = self._branches.forwards, self._branches.fed

    def _read(self, paths: Sequence[Path]) -> None:
        """Feed and weigh paths that end here; with bytes known ahead, feed following ones too."""
        if self._run == 1:
            new = [path for path in paths if self._log_prob(path) > -math.inf]
        else:
            new = [path for path in paths if path not in self._weighed]
            if new:
                ahead = self._lattice.paths[self._place + 1 : self._place + self._run]
                more = (path for at in ahead for path in at if path not in self._weighed)
                new += islice(more, max(0, self._run - len(new)))
        if new:
            self._feed(new)
        self._weigh(paths)

    def _weigh(self, paths: Sequence[Path]) -> None:
        text = bytes(self._lattice.text)
        for path in paths:
            weighed = self._weighed.get(path)
            if weighed is None or weighed.logits is None:
                continue
            weighed.log_prob = self._log_prob(path)
            weighed.probs, weighed.end, weighed.invalid = self._owner.token_probs(
                weighed.logits, path, text[: path.end]
            )
            weighed.logits = None

    def _feed(self, paths: Sequence[Path]) -> None:
        self._branches.keep([weighed.branch for weighed in self._weighed.values()])
        made: dict[Path, Branch] = {}
        for path in paths:
            assert path.parent is not None
            known = self._weighed.get(path.parent)
            made[path] = Branch(known.branch if known else made[path.parent], path.token)
        for path, logits in zip(paths, self._branches.feed(list(made.values())), strict=True):
            self._weighed[path] = _Weighed(made[path], logits)
        self._owner.forwards, self._owner.fed = self._branches.forwards, self._branches.fed

    def _log_prob(self, path: Path) -> float:
        if path is self._settled:
            return 0.0
        parent = self._weighed.get(path.parent) if path.parent is not None else None
        if parent is None or parent.probs is None:
            return -math.inf
        chance = float(parent.probs[self._owner.place_of[path.token]])
        return parent.log_prob + math.log(chance) if chance > 0.0 else -math.inf

    def _live(self, place: int) -> list[_Weighed]:
        found = (self._weighed.get(path) for path in self._lattice.paths[place])
        return [w for w in found if w is not None and w.log_prob > -math.inf]

    def _report(self) -> None:
        """Hand the last place's invalid mass to the owner."""
        here = self._live(self._place)
        shares = [math.exp(weighed.log_prob - here[0].log_prob) for weighed in here]
        known = [(s, w.invalid) for s, w in zip(shares, here, strict=True) if w.invalid is not None]
        total = sum(share for share, _ in known)
        mean = sum(share * mass for share, mass in known) / total if known else None
        self._owner.invalid_mass = mean


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
        weights = [1.0] * len(members) if weights is None else list(weights)
        if len(weights) != len(members):
            raise PertokenError(f"{len(members)} members need as many weights, got {len(weights)}")
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise PertokenError(f"weights must be numbers from 0 on, got {weights}")
        if not sum(weights) > 0:
            raise PertokenError("weights must not all be 0")
        self.members = members
        self.weights = [weight / sum(weights) for weight in weights]

    def __repr__(self) -> str:
        return f"ByteEnsemble({self.members!r}, weights={self.weights!r})"

    def _open(
        self, prefix: bytes, context: Sequence[int] | None = None, ahead: bytes = b""
    ) -> Reader:
        if context is not None:
            raise PertokenError("context is ids of one tokenizer; an ensemble has several")
        used = [
            (member._open(prefix, None, ahead), weight)
            for member, weight in zip(self.members, self.weights, strict=True)
            if weight > 0
        ]
        return _MeanReader(used)


class _MeanReader(Reader):
    def __init__(self, readers: Sequence[tuple[Reader, float]]) -> None:
        self._readers = readers

    def log_probs(self) -> torch.Tensor:
        weighed = [reader.log_probs() + math.log(weight) for reader, weight in self._readers]
        return torch.stack(weighed).logsumexp(0)

    def push(self, byte: int) -> None:
        for reader, _ in self._readers:
            reader.push(byte)


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
