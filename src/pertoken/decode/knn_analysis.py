"""Which tokens retrieval helps: the analysis of 2305.14625.

Every token of held-out texts is predicted by the model alone and with the store. Their difference
Δ = log p - log p_LM is above 0 where retrieval helps; the paper finds that it seldom does, and that
the total falls all the same. A text that is in the store is looked up without its own entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pertoken._pieces import pieces
from pertoken.decode._chart import bars, page
from pertoken.decode._knn_tokens import TokenReads, joined, read_texts
from pertoken.result import Part, Result, figure, plain

if TYPE_CHECKING:
    from pertoken.decode.knn_lm import KNNMemory

__all__ = ["KNNEvaluation", "KNNGroup", "knn_evaluation", "token_class"]

_BUCKETS = ((0, "never"), (1, "1-9"), (10, "10-99"), (100, "100-999"), (1000, "1000 or more"))
_CLASSES = ("word begins", "word goes on", "number", "punctuation", "other")
_BINS = 40


@dataclass(frozen=True)
class KNNGroup:
    """Some of the tokens: all, those of a frequency in the store, of a class, or of one text.

    tokens: how many; base_perplexity, perplexity: of the model alone and with the store; worse: the
    share of them whose probability fell; mean_gain, mean_loss: mean Δ in nats of those that gained
    and of those that lost, None where there are none; found: the share that a neighbour has.
    """

    by: str
    name: str
    tokens: int
    base_perplexity: float
    perplexity: float
    worse: float
    mean_gain: float | None
    mean_loss: float | None
    found: float


@dataclass(frozen=True)
class KNNEvaluation(Result):
    """Tokens with a store against without.

    groups: see `KNNGroup`, all tokens first; texts: the same for each text; weight, k, temperature:
    of the memory; edges, counts: a histogram of Δ, nats.

    >>> one = KNNGroup("all", "all", 4, 10.0, 9.0, 0.75, 1.5, -0.2, 0.5)
    >>> print(KNNEvaluation((one,), (), 0.25, 64, 1.0, [-0.3, 0.0], [4]).table())
    tokens  number  perplexity  with the store  worse  mean gain  mean loss  found
    all          4       10.00            9.00  75.0%      1.500     -0.200  50.0%
    Δ in nats; no token can lose more than 0.288 (weight 0.25, k 64, temperature 1)
    """

    groups: tuple[KNNGroup, ...]
    texts: tuple[KNNGroup, ...]
    weight: float
    k: int
    temperature: float
    edges: list[float]
    counts: list[int]

    _title = "What a store does to every token"

    @property
    def total(self) -> KNNGroup:
        """All tokens."""
        return self.groups[0]

    @property
    def bound(self) -> float:
        """log(1 - weight): below this Δ no token can fall."""
        return math.log1p(-self.weight) if self.weight < 1 else -math.inf

    def rows(self) -> list[dict[str, Any]]:
        """A record per group."""
        return [plain(asdict(group)) for group in self.groups]

    def to_dict(self) -> dict[str, Any]:
        """Groups, texts, settings and histogram."""
        own = {name: value for name, value in vars(self).items() if name not in ("groups", "texts")}
        texts = [plain(asdict(group)) for group in self.texts]
        return plain({"groups": self.rows(), "texts": texts, "bound": self.bound, **own})

    def _parts(self) -> list[Part]:
        head = ["tokens", "number", "perplexity", "with the store", "worse"]
        head += ["mean gain", "mean loss", "found"]
        note = f"Δ in nats; no token can lose more than {-self.bound:.3f} (weight {self.weight:g}, "
        note += f"k {self.k}, temperature {self.temperature:.4g})"
        return [Part("", [head, *map(_line, self.groups)], [note])]

    def _page(self) -> str:
        over = "change of log p with the store, nats"
        chart = bars(f"tokens by the {over}", self.edges, self.counts, over=over)
        return page(self, "Who gains and who loses", [chart])

    def plot(self) -> Any:
        """How many tokens gained and lost how much, a plotly figure (extra `plot`)."""
        from pertoken._extras import need

        graph = need("plotly.graph_objects", "plot")
        middles = [(a + b) / 2 for a, b in zip(self.edges, self.edges[1:], strict=False)]
        title = f"{self.total.worse:.0%} of {self.total.tokens:,} tokens lose"
        x = {"title": "log p with the store - log p without (nats)"}
        bars = graph.Bar(x=middles, y=self.counts, name="tokens")
        return figure(bars, title=title, xaxis=x, yaxis={"title": "tokens", "type": "log"})


def _line(group: KNNGroup) -> list[str]:
    name = group.name if group.by == "all" else f"{group.by}: {group.name}"
    numbers = [f"{group.tokens:,}", f"{group.base_perplexity:.2f}", f"{group.perplexity:.2f}"]
    means = ["-" if x is None else f"{x:.3f}" for x in (group.mean_gain, group.mean_loss)]
    return [name, *numbers, f"{group.worse:.1%}", *means, f"{group.found:.1%}"]


def knn_evaluation(
    memory: KNNMemory,
    texts: Sequence[str],
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> KNNEvaluation:
    """Predict every token of the texts with a memory and without, and compare.

    texts: held out from the store; one that is in it is looked up without its own entries.
    progress: called with (what, texts done, texts in all). Raises PertokenError where there is no
    token to predict, or fewer than k entries beside a text's own.
    """
    store = memory.datastore
    reads = read_texts(store, texts, memory.k, progress)
    mixed = [each.mixed(memory.weight, memory.temperature) for each in reads]
    vocab = store.model.get_output_embeddings().weight.shape[0]
    counts = torch.from_numpy(np.bincount(store.values, minlength=vocab))
    classes = _classes(store.tokenizer, torch.cat([each.targets for each in reads]))
    groups = list(_groups(joined(reads), torch.cat(mixed), counts, classes))
    per_text = [
        _group("text", str(number), each, own, slice(None))
        for number, (each, own) in enumerate(zip(reads, mixed, strict=True), 1)
    ]
    change = torch.cat(mixed) - torch.cat([each.base for each in reads])
    numbers, edges = np.histogram(change.clamp(min=-50, max=50).numpy(), bins=_BINS)
    settings = (memory.weight, memory.k, memory.temperature)
    histogram = (edges.tolist(), numbers.tolist())
    return KNNEvaluation(tuple(groups), tuple(per_text), *settings, *histogram)


def _groups(
    reads: TokenReads, mixed: torch.Tensor, counts: torch.Tensor, classes: np.ndarray[Any, Any]
) -> Iterator[KNNGroup]:
    yield _group("all", "all", reads, mixed, slice(None))
    seen = counts[reads.targets]
    above = [least for least, _ in _BUCKETS[1:]]
    bucket = torch.bucketize(seen, torch.tensor(above), right=True)
    for number, (_, name) in enumerate(_BUCKETS):
        if bool((bucket == number).any()):
            yield _group("in the store", name, reads, mixed, bucket == number)
    for name in _CLASSES:
        chosen = torch.from_numpy(classes == name)
        if bool(chosen.any()):
            yield _group("class", name, reads, mixed, chosen)


def _group(
    by: str, name: str, reads: TokenReads, mixed: torch.Tensor, chosen: torch.Tensor | slice
) -> KNNGroup:
    base, own = reads.base[chosen], mixed[chosen]
    change = own - base
    gain, loss = change[change > 0], change[change < 0]
    return KNNGroup(
        by,
        name,
        len(base),
        float((-base.mean()).exp()),
        float((-own.mean()).exp()),
        float((change < 0).double().mean()),
        float(gain.mean()) if len(gain) else None,
        float(loss.mean()) if len(loss) else None,
        float(reads.hit[chosen].double().mean()),
    )


def _classes(tokenizer: Any, targets: torch.Tensor) -> np.ndarray[Any, Any]:
    """The class of every token, [n]."""
    ids, back = targets.unique(return_inverse=True)
    # Behind another token: some tokenizers drop a blank where a text begins.
    first = int(ids[0])
    texts = [pieces(tokenizer, [first, int(token)])[1] for token in ids]
    names = np.array([token_class(text) for text in texts])
    return names[back.numpy()]


def token_class(text: str) -> str:
    """What kind of token a text is: our coarse stand-in for parts of speech.

    >>> [token_class(text) for text in (" cat", "ed", " 12", ").", "\\n")]
    ['word begins', 'word goes on', 'number', 'punctuation', 'other']
    """
    bare = text.strip()
    if any(sign.isdigit() for sign in bare):
        return "number"
    if bare and any(sign.isalpha() for sign in bare):
        return "word begins" if text[0].isspace() else "word goes on"
    return "punctuation" if bare and "\ufffd" not in bare else "other"
