"""Texts read token by token with the model and the store, once for all weights and temperatures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pertoken.decode._knn_build import encode
from pertoken.decode._knn_states import read, windows
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from pertoken.decode.knn_datastore import KNNDatastore

__all__ = ["TokenReads", "joined", "read_ids", "read_texts"]

_NUMBERS = 1 << 24  # numbers of a tensor that is made on the way
_LOGITS = 256  # rows of logits that are made float64 at a time


@dataclass
class TokenReads:
    """The tokens of a text but the first, each as it was predicted.

    targets: ids [n]; base: log p_LM of them, nats [n]; entropy: of p_LM, nats [n]; distances,
    values: of their neighbours, [n, k]; last: the last key, [hidden].
    """

    targets: torch.Tensor
    base: torch.Tensor
    entropy: torch.Tensor
    distances: torch.Tensor
    values: torch.Tensor
    last: torch.Tensor

    @property
    def hit(self) -> torch.Tensor:
        """Whether a neighbour has the token, bool [n]."""
        return (self.values == self.targets[:, None]).any(-1)

    def votes(self, temperature: float) -> torch.Tensor:
        """Log of the share of each neighbour, [n, k]."""
        return (-self.distances.double() / temperature).log_softmax(-1)

    def mixed(self, weight: float, temperature: float) -> torch.Tensor:
        """Log-probability of the tokens under both together, nats [n]."""
        from pertoken.decode.knn_lm import interpolate

        other = self.values != self.targets[:, None]
        own = self.votes(temperature).masked_fill(other, -torch.inf).logsumexp(-1)
        return interpolate(self.base, own, weight)

    def retrieval_entropy(self, temperature: float) -> torch.Tensor:
        """Entropy of p_knn over tokens, nats [n]."""
        log_votes = self.votes(temperature)
        n, k = log_votes.shape
        found = log_votes.new_zeros(n)
        step = max(1, _NUMBERS // k**2)
        for start in range(0, n, step):
            votes, values = log_votes[start : start + step].exp(), self.values[start : start + step]
            same = (values[:, :, None] == values[:, None, :]).to(votes)
            mass = (same @ votes[..., None])[..., 0]  # of the token that a neighbour votes for
            found[start : start + step] = -torch.where(votes > 0, votes * mass.log(), 0.0).sum(-1)
        return found.clamp(min=0)


def read_ids(datastore: KNNDatastore, ids: Sequence[int], k: int, first: int = 0) -> TokenReads:
    """A text of two ids or more, read in windows as the store's own texts are.

    first: the tokens up to this number are read, but neither looked up nor predicted.
    """
    spared = datastore.spans(ids)
    found: list[TokenReads] = []
    for begin, start, stop in windows(len(ids), datastore.header["context"]):
        start = max(start, first)
        if start >= stop:
            continue
        model = datastore.model
        given = torch.tensor([ids[begin:stop]], device=model.device)
        keys, logits = read(model, given, logits=True)
        assert logits is not None
        targets = torch.tensor(ids[start + 1 : stop + 1])
        base, entropy = _scores(logits[0, start - begin :].cpu(), targets)
        near = datastore.search(keys[0, start - begin :], k, spared=spared)
        last = keys[0, -1].float().cpu()
        found.append(TokenReads(targets, base, entropy, near.distances, near.values, last))
    return joined(found)


def joined(reads: Sequence[TokenReads]) -> TokenReads:
    """Texts, or parts of one, as one."""
    names = ("targets", "base", "entropy", "distances", "values")
    parts = {name: torch.cat([getattr(each, name) for each in reads]) for name in names}
    return TokenReads(**parts, last=reads[-1].last)


def _scores(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of the targets [n] and entropy [n] of logits [n, vocab], in float64."""
    base, entropy = [], []
    for start in range(0, len(logits), _LOGITS):
        log_probs = logits[start : start + _LOGITS].double().log_softmax(-1)
        own = targets[start : start + _LOGITS, None]
        base.append(log_probs.gather(-1, own)[:, 0])
        probs = log_probs.exp()
        entropy.append(-torch.where(probs > 0, probs * log_probs, 0.0).sum(-1))
    return torch.cat(base), torch.cat(entropy)


def read_texts(
    datastore: KNNDatastore,
    texts: Sequence[str],
    k: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[TokenReads]:
    """Every text of two tokens or more; PertokenError where there is none."""
    ids = [encode(datastore.model, datastore.tokenizer, text) for text in texts]
    ids = [each for each in ids if len(each) > 1]
    if not ids:
        raise PertokenError(f"none of {len(texts)} texts has two tokens: nothing to predict")
    found = []
    for number, each in enumerate(ids):
        if progress is not None:
            progress("texts with their neighbours", number, len(ids))
        found.append(read_ids(datastore, each, k))
    return found
