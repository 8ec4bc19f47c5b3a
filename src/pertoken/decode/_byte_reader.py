"""Reading a text byte by byte under a token model: the cover, weighed and carried along.

See `pertoken.decode.byte_model` for what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import torch

from pertoken.canonical import Canonical, Lattice, Path
from pertoken.decode._branches import Branch, Branches
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["END", "MeanReader", "ModelReader", "Reader", "TokenModel", "Validity"]

Validity = Literal["renormalize", "truncate", "off"]
Floats = npt.NDArray[np.float64]
END = 256  # the outcome behind the 256 bytes


class Reader:
    """A text that is being read: the distribution of its next byte."""

    def log_probs(self) -> torch.Tensor:
        """Log-probabilities [257] of the next byte or the end."""
        raise NotImplementedError

    def log_prob(self, byte: int) -> float:
        """Log-probability of one next byte; the only question where the text is known ahead."""
        raise NotImplementedError

    def push(self, byte: int) -> None:
        """Read one more byte."""
        raise NotImplementedError


@dataclass
class TokenModel:
    """A model, what its tokenizer writes, and what becomes of tokens that it would not write.

    ends: ids that end a text; masks_trees: whether many paths go through one forward. The rest is
    told by readers: probability of invalid tokens at the last place, forwards, tokens fed.
    """

    model: PreTrainedModel
    canonical: Canonical
    ends: list[int]
    validity: Validity
    masks_trees: bool = True
    invalid_mass: float | None = None
    forwards: int = 0
    fed: int = 0

    def __post_init__(self) -> None:
        vocab = self.canonical.vocab
        self.place_of = np.full(vocab.size, -1, dtype=np.int64)  # of a token in vocab.order
        self.place_of[vocab.order] = np.arange(len(vocab.order))
        size = self.model.get_output_embeddings().weight.shape[0]
        self._order = torch.from_numpy(vocab.order).to(self.model.device)
        text = torch.zeros(size, dtype=torch.bool)
        text[vocab.order] = True
        self._rest = (~text).nonzero()[:, 0].to(self.model.device)  # ids that write nothing

    def token_probs(
        self, logits: torch.Tensor, path: Path, text: bytes
    ) -> tuple[Floats, float, float | None]:
        """Probabilities of the next tokens of a path, of the end, and of invalid tokens.

        logits: [vocab]; the tokens' probabilities are in the order of their bytes.
        """
        order = self.canonical.vocab.order
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = logits - logits.max()
        weights = scores[self._order].double().exp().cpu().numpy()
        end = float(scores[self.ends].double().exp().sum())
        whole = float(weights.sum()) + float(scores[self._rest].double().exp().sum())
        if self.validity == "off":
            return weights / whole, end / whole, None
        weights *= self.canonical.row(path, text)[order]
        end = end if self.canonical.complete(path, text) else 0.0
        valid = float(weights.sum()) + end
        total = valid if self.validity == "renormalize" and valid > 0.0 else whole
        weights /= total
        return weights, end / total, max(0.0, 1.0 - valid / whole)

    def leads_to(self, path: Path, text: bytes) -> bool:
        """Whether the forward of a path can matter to the byte of `text` behind it.

        Not if no valid token starts with it: then the path's own probability is all it gives.
        """
        if self.validity != "renormalize":
            return True
        vocab = self.canonical.vocab
        low, high = vocab.range(text[path.end : path.end + 1])
        return bool(self.canonical.row(path, text)[vocab.order[low:high]].any())


class Weighed:
    """What a model says of a path: its log-probability and what follows it.

    probs: of the next tokens in the order of their bytes, None until the path is read, and for one
    that need not be fed; logits: [vocab], from its forward until it is read.
    """

    __slots__ = ("branch", "end", "invalid", "log_prob", "logits", "probs")

    def __init__(self, branch: Branch | None, logits: torch.Tensor | None) -> None:
        self.branch, self.logits = branch, logits
        self.log_prob = -math.inf
        self.probs: Floats | None = None
        self.end = 0.0
        self.invalid: float | None = None


class ModelReader(Reader):
    """The cover of a growing text under one model.

    ahead: bytes that will be pushed. Their paths are fed together, many in one forward, and only
    `log_prob` of each of these bytes may be asked.
    """

    def __init__(
        self, source: TokenModel, prefix: bytes, context: Sequence[int], ahead: bytes = b""
    ) -> None:
        self._source, self._vocab = source, source.canonical.vocab
        self._branches = Branches(source.model, mask_trees=source.masks_trees)
        self._lattice = Lattice(source.canonical)
        self._reach: list[list[tuple[int, int, int]]] = [[]]
        self._weighed: dict[Path, Weighed] = {}
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
        found = self._parts()
        most = max((weighed.log_prob for weighed, *_ in found), default=-math.inf)
        for weighed, start, low, high in found:
            assert weighed.probs is not None
            following = self._vocab.byte_at(self._place - start, low, high)
            part = np.bincount(following, weighed.probs[low:high], minlength=END)
            mass[:END] += math.exp(weighed.log_prob - most) * part
        for weighed in self._ending():
            mass[END] += math.exp(weighed.log_prob - most) * weighed.end
        self._report()
        total = mass.sum()
        if not total > 0.0:
            raise PertokenError("the model gives no probability to anything that can follow here")
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(mass / total))

    def log_prob(self, byte: int) -> float:
        """Log-probability of one next byte, by its own share of every sum."""
        mass = total = 0.0
        found = self._parts()
        here = self._live(self._place)
        most = max((w.log_prob for w in (*here, *(w for w, *_ in found))), default=-math.inf)
        for weighed, start, low, high in found:
            assert weighed.probs is not None
            weight = math.exp(weighed.log_prob - most)
            total += weight * float(weighed.probs[low:high].sum())
            prefix = bytes(self._lattice.text[start : self._place]) + bytes([byte])
            low, high = self._vocab.range(prefix, low, high)
            mass += weight * float(weighed.probs[low:high].sum())
        total += sum(math.exp(w.log_prob - most) * w.end for w in self._ending())
        # What was not fed has nothing for this byte, and what follows it sums to one.
        total += sum(math.exp(w.log_prob - most) for w in here if w.probs is None)
        return math.log(mass / total) if mass > 0.0 else -math.inf

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

    def mass(self) -> float:
        """Log-probability of what was read, by its cover (lemma 1), without the settled beginning.

        With ``"renormalize"`` it is the sum of the `log_prob` of the bytes that were read.
        """
        weights = [weight for _, weight in self.ending()]
        weights += [float(np.logaddexp.reduce(more)) for _, _, more in self.reaching()]
        return float(np.logaddexp.reduce(weights))

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
        self._weighed[self._settled] = Weighed(branch, logits)
        rest = {path for chain in chains for path in chain[common:]}
        others = sorted(rest, key=lambda path: path.end)
        if others:
            self._feed(others)
        self._weigh([self._settled, *others])
        self._count()

    def _read(self, paths: Sequence[Path]) -> None:
        """Feed and weigh paths that end here; with bytes known ahead, feed following ones too."""
        if self._run == 1:
            new = [path for path in paths if self._log_prob(path) > -math.inf]
        else:
            new = self._needed(self._place, self._place + 1)
            if new:
                more = self._needed(self._place + 1, self._place + 2 * self._run)
                new += islice(more, max(0, self._run - len(new)))
        if new:
            self._feed(new)
        self._weigh(paths)

    def _needed(self, low: int, high: int) -> list[Path]:
        """The paths that end at places low to high - 1 and whose forwards matter, not fed yet."""
        text = bytes(self._lattice.text)
        paths = (path for at in self._lattice.paths[low : min(high, len(text))] for path in at)
        new = (path for path in paths if path not in self._weighed)
        return [path for path in new if self._source.leads_to(path, text)]

    def _weigh(self, paths: Sequence[Path]) -> None:
        text = bytes(self._lattice.text)
        for path in paths:
            weighed = self._weighed.setdefault(path, Weighed(None, None))
            weighed.log_prob = self._log_prob(path)
            if weighed.logits is not None:
                weighed.probs, weighed.end, weighed.invalid = self._source.token_probs(
                    weighed.logits, path, text[: path.end]
                )
                weighed.logits = None
            if self._run > 1:
                path.allowed = None  # as long as the vocabulary, and not needed any more

    def _feed(self, paths: Sequence[Path]) -> None:
        held = (weighed.branch for weighed in self._weighed.values())
        self._branches.keep([branch for branch in held if branch is not None])
        made: dict[Path, Branch] = {}
        for path in paths:
            assert path.parent is not None
            known = self._weighed.get(path.parent)
            made[path] = Branch(known.branch if known else made[path.parent], path.token)
        for path, logits in zip(paths, self._branches.feed(list(made.values())), strict=True):
            self._weighed[path] = Weighed(made[path], logits)
        self._count()

    def _count(self) -> None:
        self._source.forwards, self._source.fed = self._branches.forwards, self._branches.fed

    def _log_prob(self, path: Path) -> float:
        if path is self._settled:
            return 0.0
        parent = self._weighed.get(path.parent) if path.parent is not None else None
        if parent is None or parent.probs is None:
            return -math.inf
        chance = float(parent.probs[self._source.place_of[path.token]])
        return parent.log_prob + math.log(chance) if chance > 0.0 else -math.inf

    def _parts(self) -> list[tuple[Weighed, int, int, int]]:
        """Fed paths with tokens that reach beyond this place: (path, its end, low, high)."""
        parts = [*self._reach[self._place], (self._place, 0, len(self._vocab.order))]
        return [
            (weighed, start, low, high)
            for start, low, high in parts
            for weighed in self._live(start)
            if weighed.probs is not None
        ]

    def _ending(self) -> list[Weighed]:
        """The paths with which the text may end here."""
        # The empty text has no space before it.
        return self._live(0 if self._place == len(self._vocab.start) else self._place)

    def _live(self, place: int) -> list[Weighed]:
        found = (self._weighed.get(path) for path in self._lattice.paths[place])
        return [w for w in found if w is not None and w.log_prob > -math.inf]

    def _report(self) -> None:
        """Tell the invalid mass at this place, weighed over the paths that end here."""
        here = [w for w in self._live(self._place) if w.invalid is not None]
        shares = [math.exp(weighed.log_prob - here[0].log_prob) for weighed in here]
        masses = [share * (w.invalid or 0.0) for share, w in zip(shares, here, strict=True)]
        self._source.invalid_mass = sum(masses) / sum(shares) if here else None


class MeanReader(Reader):
    """The arithmetic mean of several readers' distributions, with weights that sum to 1."""

    def __init__(self, readers: Sequence[tuple[Reader, float]]) -> None:
        self._readers = readers

    def log_probs(self) -> torch.Tensor:
        weighed = [reader.log_probs() + math.log(weight) for reader, weight in self._readers]
        return torch.stack(weighed).logsumexp(0)

    def log_prob(self, byte: int) -> float:
        weighed = [reader.log_prob(byte) + math.log(weight) for reader, weight in self._readers]
        return float(np.logaddexp.reduce(weighed))

    def push(self, byte: int) -> None:
        for reader, _ in self._readers:
            reader.push(byte)
