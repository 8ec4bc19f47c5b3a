"""KNN-LM: the next token from the model and from a corpus that it reads along (1911.00172).

The state of the context is looked up among those of a corpus (`KNNDatastore`). The k nearest
entries vote for the tokens that followed them, by their squared distance d:

    p_knn(y) ∝ Σ over neighbours with value y of exp(-d / temperature)
    p = weight · p_knn + (1 - weight) · p_LM                     (equations 2 and 3)

2305.14625 shows what that does. Perplexity falls, but for most tokens the probability falls too,
and open-ended text becomes no better: `knn_evaluation` and `knn_continuations` measure it on your
own corpus. A bound explains the first (ours): log p - log p_LM ≥ log(1 - weight), and a token that
no neighbour has loses exactly that, 0.288 nats at the default weight.

Where we differ. The original has no temperature; neulab's port for transformers has one, and the
states of another model may lie so that 1 puts all mass on one neighbour: `fit_temperature`. k is 64
here, 1,024 with the authors' 103 million keys. What an earlier processor forbids (-inf) stays
forbidden: retrieval votes among the rest.

Cost per step: reading the store once with ``index="flat"``, some of it with "ivfpq", and k keys.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

import torch
from transformers import LogitsProcessor

from pertoken._shown import Shown
from pertoken.decode._knn_states import Watch, key_place, read
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from pertoken.decode.knn_datastore import KNNDatastore, Neighbours

__all__ = ["KNNMemory", "fit_temperature", "interpolate", "retrieval_log_probs"]


class KNNMemory(Shown, LogitsProcessor):
    """A corpus to look up while decoding: ``logits_processor=[KNNMemory(store)]``.

    Args:
        datastore: a `KNNDatastore`; decode with its model.
        k: neighbours that vote.
        weight: of the retrieval, 0 … 1: λ of the paper. At 0 the scores pass untouched.
        temperature: of the vote, above 0, in units of squared distance.

    Two hooks on the model note the states that it computes anyway. They are gone when the memory
    is: after ``with KNNMemory(store) as memory``, `close()`, or as soon as nothing refers to it.
    Batches, left padding, sampling and beams are as without it. Where the states are not at hand
    (rows of drafts, after `close()`), the text is read again, whole; leading pad tokens of the
    tokenizer are then taken for padding.

    Raises PertokenError for settings out of range, k above the store's entries, `inputs_embeds`,
    and scores of another vocabulary.

    >>> import tempfile
    >>> from pertoken.decode import KNNDatastore
    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> model, tokenizer = tiny_model("llama", vocab_size=258), ByteTokenizer()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = KNNDatastore.build(model, tokenizer, ["a cat sat on a mat"], f"{folder}/store")
    ...     prompt = torch.tensor([tokenizer.encode("a cat s")])
    ...     out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=9,
    ...         do_sample=False, logits_processor=[KNNMemory(store, k=1, weight=0.99)])
    >>> tokenizer.decode(out[0])
    'a cat sat on a m'
    """

    slug = "knn-lm"

    def __init__(
        self,
        datastore: KNNDatastore,
        *,
        k: int = 64,
        weight: float = 0.25,
        temperature: float = 1.0,
    ) -> None:
        _check_k(k, datastore)
        check_weight(weight)
        if not 0 < temperature < math.inf:
            raise PertokenError(f"temperature must be above 0, got {temperature}")
        self.datastore, self.k, self.weight = datastore, k, weight
        self.temperature = temperature
        self._watch = Watch(datastore.model, key_place(datastore.model))
        self._close = weakref.finalize(self, self._watch.remove)
        self._close.atexit = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [batch, vocab] of both together; input_ids: [batch, time]."""
        if self.weight == 0:
            return scores
        rows = self.datastore.model.get_output_embeddings().weight.shape[0]
        if scores.shape[-1] != rows:
            raise PertokenError(
                f"{self.datastore} belongs to a model of {rows} tokens, not of {scores.shape[-1]}"
            )
        found = self.datastore.search(self.keys(input_ids), self.k)
        log_knn = retrieval_log_probs(found, rows, self.temperature).to(scores)
        log_probs = scores.log_softmax(-1)
        forbidden = log_probs == -torch.inf
        if bool(forbidden.any()):
            log_knn = log_knn.masked_fill(forbidden, -torch.inf)
            mass = log_knn.logsumexp(-1, keepdim=True)
            log_knn = torch.where(mass > -torch.inf, log_knn - mass, log_probs)
        return interpolate(log_probs, log_knn, self.weight)

    def keys(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The states [batch, hidden] behind texts [batch, time]: noted, or read again."""
        if input_ids.shape[1] == 0:
            raise PertokenError(
                "KNNMemory needs the prompt's input_ids: with inputs_embeds alone the text that "
                "it would look up is not known"
            )
        noted = self._watch.key_of(input_ids)
        if noted is not None:
            return noted
        pad = getattr(self.datastore.tokenizer, "pad_token_id", None)
        mask = ((input_ids != pad).cumsum(-1) > 0).long() if pad is not None else None
        keys, _ = read(self.datastore.model, input_ids.to(self.datastore.model.device), mask)
        return keys[:, -1]

    def close(self) -> None:
        """Take the hooks off the model. Further calls read the text again."""
        self._close()
        self._watch.ids = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_weight(weight: float) -> None:
    """Raise PertokenError for a weight of the retrieval that is none."""
    if not 0 <= weight <= 1:
        raise PertokenError(f"weight must be from 0 to 1, got {weight}")


def _check_k(k: int, datastore: KNNDatastore) -> None:
    if not isinstance(k, int) or not 1 <= k <= len(datastore):
        raise PertokenError(
            f"k must be from 1 to the {len(datastore):,} entries of {datastore.path}, got {k}"
        )


def retrieval_log_probs(
    found: Neighbours, vocab_size: int, temperature: float = 1.0
) -> torch.Tensor:
    """log p_knn [n, vocab_size] of what was found for n queries, -inf for tokens nobody votes for.

    Equation 2 of 1911.00172, with distances over a temperature.

    >>> from pertoken.decode.knn_datastore import Neighbours
    >>> one = torch.tensor([[0.0, 0.0, 1e9]])
    >>> found = Neighbours(one, torch.tensor([[2, 2, 1]]), torch.tensor([[5, 6, 7]]))
    >>> retrieval_log_probs(found, 4).exp().tolist()
    [[0.0, 0.0, 1.0, 0.0]]
    """
    votes = (-found.distances / temperature).softmax(-1)
    mass = votes.new_zeros(len(votes), vocab_size).scatter_add_(1, found.values, votes)
    return mass.log()


def interpolate(log_probs: torch.Tensor, log_knn: torch.Tensor, weight: float) -> torch.Tensor:
    """log(weight · p_knn + (1 - weight) · p_LM), of any one shape (equation 3 of 1911.00172).

    >>> interpolate(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, 1.0]).log(), 0.5).exp()
    tensor([0.2500, 0.7500])
    """
    if weight in (0, 1):
        return log_knn if weight else log_probs
    return torch.logaddexp(log_probs + math.log1p(-weight), log_knn + math.log(weight))


def fit_temperature(
    datastore: KNNDatastore,
    texts: Sequence[str],
    *,
    k: int = 64,
    weight: float = 0.25,
    progress: Callable[[str, int, int], None] | None = None,
) -> float:
    """The temperature with the least perplexity on validation texts (ours; the original has none).

    Looked for among 2^(i/4) times the mean distance of a neighbour, i = -40 … 16, where the loss
    may have more than one dip. A text that is in the store is scored without its own entries.
    progress: called with (what, texts done, texts in all). Raises PertokenError for settings out
    of range, and where the texts hold no token to predict.
    """
    from pertoken.decode._knn_tokens import read_texts

    _check_k(k, datastore)
    check_weight(weight)
    reads = read_texts(datastore, texts, k, progress)
    distances = torch.cat([each.distances for each in reads])
    scale = float(distances[distances.isfinite()].double().mean()) or 1.0
    tried = [scale * 2 ** (i / 4) for i in range(-40, 17)]

    def loss(temperature: float) -> float:
        sums = [each.mixed(weight, temperature).sum() for each in reads]
        return -float(torch.stack(sums).sum())

    return min(tried, key=loss)
