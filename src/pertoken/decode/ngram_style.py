"""A style prior in logit space: n-grams of a corpus pull a frozen model towards it.

Limits of n-gram Style Control for LLMs via Logit-Space Injection (arXiv 2601.16224). At each step

    logits'(x) = logits(x) + strength · Σ_n w_n · log p_n(x | last n - 1 tokens),   n = 1, 2, 3

over the orders whose context stands in the corpus. The paper's body could not be read, its abstract
leaves these open (our readings): w is (0.1, 0.3, 0.6), brought to sum 1 over the orders that match;
p_n is count + k over total + k · vocabulary, k = 0.01 ("add-k"), or mixes each order with the next
lower one ("jelinek-mercer"); nothing is counted across the end of a text, nor the end itself.

What was never seen has one and the same log p_n, the floor. A softmax does not see what is added to
all logits, so the floor is added to none of them, and log p_n - floor to what was seen: the same
distribution for little work.

Why it collapses: log p_n - floor reaches log(1 + count / k), often 10 nats, where a model's best
token leads by 1 to 3. At strength 1 the corpus outweighs the model. `normalize="gap"` (ours)
divides each step by its largest such gap, so that `strength` is the most a token gains, in nats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from pertoken._files import check_target, whole_file
from pertoken._shown import Shown
from pertoken._tokenizer_hash import tokenizer_hash, tokenizer_name
from pertoken.decode._ngram_counts import MAX_ORDER, Ngrams, count, from_tensors, to_tensors
from pertoken.errors import PertokenError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizer

__all__ = ["Corpus", "NGramStyle", "StyleProcessor", "check_strength"]

Smoothing = Literal["add-k", "jelinek-mercer"]
Floats = NDArray[np.float64]

_SMOOTHING = ("add-k", "jelinek-mercer")
_FORMAT = "pertoken-style-1"
_BATCH = 256  # texts given to the tokenizer at once


class Corpus:
    """What was counted. tables: one per order; tokenizer: its name, with its hash as `sha256`."""

    def __init__(
        self, tables: Sequence[Ngrams], *, tokenizer: str, sha256: str, texts: int, tokens: int
    ) -> None:
        self.tables, self.tokenizer, self.sha256 = tables, tokenizer, sha256
        self.texts, self.tokens = texts, tokens
        self.vocab_size = tables[0].vocab_size

    def __repr__(self) -> str:
        return f"<{self.tokens:,} tokens>"


class NGramStyle(Shown):
    """The n-grams of a corpus (arXiv 2601.16224); called, it makes a logits processor.

    Made by `train` or `load`. corpus: the counts. weights: one per order, the first of single
    tokens. smoothing: "add-k", each order by itself with k, or "jelinek-mercer", each order mixed
    with gamma parts of the next lower one, the lowest with the uniform distribution.
    Raises PertokenError for settings outside their range.

    >>> from pertoken.testing import ByteTokenizer
    >>> style = NGramStyle.train(["to be or not to be"], ByteTokenizer())
    >>> style, style(strength=0.3)
    (NGramStyle(<18 tokens>), StyleProcessor(NGramStyle(<18 tokens>), strength=0.3))

    It goes where processors go, beside constraints, caches and drafters:

        model.generate(**inputs, logits_processor=[style(strength=0.1)])
    """

    slug: ClassVar[str] = "ngram-style"

    def __init__(
        self,
        corpus: Corpus,
        *,
        weights: Sequence[float] = (0.1, 0.3, 0.6),
        smoothing: Smoothing = "add-k",
        k: float = 0.01,
        gamma: float = 0.3,
    ) -> None:
        _check(weights, smoothing, k, gamma)
        if len(weights) > len(corpus.tables):
            raise PertokenError(
                f"{len(weights)} weights, and the corpus was counted up to order "
                f"{len(corpus.tables)}: give no more weights than orders"
            )
        self.corpus, self.weights, self.smoothing = corpus, tuple(weights), smoothing
        self.k, self.gamma = k, gamma
        self._single = self._singles()
        self._on: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    @classmethod
    def train(
        cls,
        corpus: str | Iterable[str],
        tokenizer: PreTrainedTokenizer | Any,
        *,
        weights: Sequence[float] = (0.1, 0.3, 0.6),
        smoothing: Smoothing = "add-k",
        k: float = 0.01,
        gamma: float = 0.3,
    ) -> NGramStyle:
        """Count a text or texts in the ids of the tokenizer; a million tokens take seconds.

        Raises PertokenError where there is nothing to count.
        """
        _check(weights, smoothing, k, gamma)
        texts = [corpus] if isinstance(corpus, str) else list(corpus)
        for place, text in enumerate(texts, 1):
            if not isinstance(text, str):
                raise PertokenError(f"text {place} of the corpus is a {type(text).__name__}")
        quiet: dict[str, Any] = {"add_special_tokens": False}
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            quiet["verbose"] = False  # a text may be longer than the model's positions
        ids: list[list[int]] = []
        for start in range(0, len(texts), _BATCH):
            ids += tokenizer(texts[start : start + _BATCH], **quiet)["input_ids"]
        tokens = sum(map(len, ids))
        if not tokens:
            raise PertokenError("the corpus is empty: there is no token to learn a style from")
        counted = Corpus(
            count(ids, len(tokenizer), MAX_ORDER),
            tokenizer=tokenizer_name(tokenizer),
            sha256=tokenizer_hash(tokenizer),
            texts=len(texts),
            tokens=tokens,
        )
        return cls(counted, weights=weights, smoothing=smoothing, k=k, gamma=gamma)

    def __call__(self, *, strength: float = 0.1, normalize: str | None = None) -> StyleProcessor:
        """A processor for `logits_processor=[...]`; see `StyleProcessor`."""
        return StyleProcessor(self, strength=strength, normalize=normalize)

    def prior(self, ids: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """Σ_n w_n (log p_n - floor_n) of every next token, nats, [vocab] of the tokenizer.

        ids: the text so far, or at least its last two ids. like: gives device and dtype.
        """
        orders = zip(self.weights[1:], self.corpus.tables[1:], strict=False)
        seen = [(weight, table.behind(ids)) for weight, table in orders]
        matching = [(weight, *found) for weight, found in seen if found is not None]
        whole = self.weights[0] + sum(weight for weight, *_ in matching)
        # Mixed orders begin with the single tokens' chances; orders by themselves share the weight.
        first = self.weights[0] / whole if self.smoothing == "add-k" else 1.0
        values = self._singles_on(like) * first
        for tokens, gains in self._gains(matching):
            where = torch.from_numpy(tokens).to(like.device)
            values.index_add_(0, where, torch.from_numpy(gains / whole).to(values))
        return values

    def log_probs(self, ids: Sequence[int]) -> Floats:
        """log p of each token of a text behind those before it, nats, [time].

        The mixture of the orders whose context was seen, with the same weights; of
        "jelinek-mercer" its highest such order. A foreign id has the chance of an unseen one.
        """
        text = np.asarray(ids, dtype=np.int64)
        vocab = self.corpus.vocab_size
        mixed = np.full(len(text), 1 / vocab)
        total = np.zeros(len(text))
        sums = np.zeros(len(text))
        for weight, table in zip(self.weights, self.corpus.tables, strict=False):
            seen, context = table.of(text)
            matches = context > 0
            if self.smoothing == "add-k":
                own = (seen + self.k) / (context + self.k * vocab)
                sums += np.where(matches, weight * own, 0)
                total += np.where(matches, weight, 0)
            else:
                own = (1 - self.gamma) * seen / np.maximum(context, 1) + self.gamma * mixed
                mixed = np.where(matches, own, mixed)
        return np.log(sums / total if self.smoothing == "add-k" else mixed)

    def perplexity(self, ids: Sequence[int]) -> float:
        """exp of the mean surprise of a text's tokens under `log_probs`."""
        return float(np.exp(-self.log_probs(ids).mean()))

    def save(self, path: str | Path) -> None:
        """Write the style: counts, settings, and the tokenizer it belongs to (safetensors).

        Raises PertokenError where the file could not be written; what was there is left whole.
        """
        from safetensors.numpy import save

        target, corpus = Path(path), self.corpus
        check_target(target)
        about = {
            "tokenizer": corpus.tokenizer,
            "sha256": corpus.sha256,
            "vocab_size": corpus.vocab_size,
            "texts": corpus.texts,
            "tokens": corpus.tokens,
            "settings": {name: getattr(self, name) for name in _SETTINGS},
        }
        metadata = {"format": _FORMAT, "about": json.dumps(about)}
        with whole_file(target) as file:
            file.write(save(to_tensors(corpus.tables), metadata))

    @classmethod
    def load(cls, path: str | Path, tokenizer: PreTrainedTokenizer | Any) -> NGramStyle:
        """Read a style back.

        Raises PertokenError for a file that is none or damaged, and for another tokenizer than the
        one it was counted with.
        """
        about, arrays = _read(Path(path))
        if about["sha256"] != tokenizer_hash(tokenizer):
            raise PertokenError(
                f"{path} counts tokens of {about['tokenizer']}, and the tokenizer here, "
                f"{tokenizer_name(tokenizer)}, is another one: train the style again with it"
            )
        try:
            tables = from_tensors(arrays, about["vocab_size"])
            names = ("tokenizer", "sha256", "texts", "tokens")
            counted = Corpus(tables, **{name: about[name] for name in names})
            settings = {name: about["settings"][name] for name in _SETTINGS}
            return cls(counted, **settings | {"weights": tuple(settings["weights"])})
        except (KeyError, TypeError, ValueError) as error:
            raise PertokenError(f"{path} is damaged ({error}): train the style again") from None

    def _singles(self) -> Floats:
        """log p_1 - floor_1 of every token, [vocab]."""
        table = self.corpus.tables[0]
        counts = np.zeros(self.corpus.vocab_size)
        counts[table.keys] = table.counts
        if self.smoothing == "add-k":
            return np.asarray(np.log1p(counts / self.k))
        return np.asarray(np.log1p(self._raised(counts, counts.sum(), 1)))

    def _singles_on(self, like: torch.Tensor) -> torch.Tensor:
        key = like.device, like.dtype
        if key not in self._on:
            self._on[key] = torch.from_numpy(self._single).to(like)
        return self._on[key]

    def _gains(self, matching: Sequence[Any]) -> Iterator[tuple[NDArray[np.int64], Floats]]:
        """What each order above the first adds: tokens seen there, and their weighted gain."""
        if self.smoothing == "add-k":
            for weight, tokens, counts, _ in matching:
                yield tokens, weight * np.log1p(counts / self.k)
            return
        # Chances over the floor, which grow from order to order; what an order has not seen keeps
        # the ones of the order below.
        known, below = np.arange(self.corpus.vocab_size), np.exp(self._single)
        for place, (_, tokens, counts, total) in enumerate(matching):
            below = below[np.searchsorted(known, tokens)]
            own = below + self._raised(counts, total, place + 2)
            yield tokens, sum(weight for weight, *_ in matching[place:]) * np.log(own / below)
            known, below = tokens, own

    def _raised(self, counts: Any, total: Any, order: int) -> Any:
        """(1 - gamma) count / total, over the floor gamma^order / vocab of the mixed chances."""
        return (1 - self.gamma) * counts / total * self.corpus.vocab_size / self.gamma**order


class StyleProcessor(Shown, LogitsProcessor):
    """Adds a style to the logits: `logits_processor=[style(strength=0.1)]`.

    strength: 0 to 1; 0 leaves the logits bit by bit as they are. normalize: None, or "gap", which
    divides each step by its largest gain, so that strength is the most, in nats, a token gains.
    Raises PertokenError for a strength outside 0 to 1, and when it is called by a model with fewer
    tokens than the style's tokenizer has.
    """

    def __init__(
        self,
        style: NGramStyle,
        *,
        strength: float = 0.1,
        normalize: str | None = None,
    ) -> None:
        check_strength(strength)
        if normalize not in (None, "gap"):
            raise PertokenError(f"normalize is None or 'gap', not {normalize!r}")
        self.style, self.strength, self.normalize = style, strength, normalize

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [batch, vocab] behind texts [batch, time], with the style's prior added."""
        if self.strength == 0:
            return scores
        vocab = self.style.corpus.vocab_size
        if scores.shape[-1] < vocab:
            raise PertokenError(
                f"the style knows {vocab} tokens of {self.style.corpus.tokenizer}, the model has "
                f"{scores.shape[-1]}: train the style with the model's own tokenizer"
            )
        found = scores.clone()  # a model may have more rows than its tokenizer has tokens
        for row, ids in enumerate(input_ids[:, 1 - MAX_ORDER :].tolist()):
            prior = self.style.prior(ids, scores)
            most = float(prior.max()) if self.normalize else 1.0
            found[row, :vocab].add_(prior, alpha=self.strength / most)
        return found


_SETTINGS = ("weights", "smoothing", "k", "gamma")


def check_strength(strength: float) -> None:
    """Raise PertokenError for a strength outside 0 to 1."""
    if not 0 <= strength <= 1:
        raise PertokenError(f"strength must be between 0 and 1, got {strength:g}")


def _check(weights: Sequence[float], smoothing: str, k: float, gamma: float) -> None:
    """Refuse settings outside their range, before anything is counted."""
    if not 1 <= len(weights) <= MAX_ORDER or not all(0 < one < math.inf for one in weights):
        raise PertokenError(f"weights are 1 to {MAX_ORDER} numbers above 0, got {list(weights)}")
    if smoothing not in _SMOOTHING:
        raise PertokenError(
            f"unknown smoothing {smoothing!r}{nearest(str(smoothing), _SMOOTHING)}: "
            f"{' or '.join(_SMOOTHING)}"
        )
    if not 0 < k < math.inf:
        raise PertokenError(f"k must be above 0, got {k}")
    if not 0 < gamma < 1:
        raise PertokenError(f"gamma must lie between 0 and 1, got {gamma}")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file says of itself, and its arrays."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise PertokenError(f"there is no style file {path}")
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise PertokenError(f"{path} is no style file: `pertoken style train` writes one")
            names = list(file.keys())
            return json.loads(metadata["about"]), {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        if isinstance(error, PertokenError):
            raise
        raise PertokenError(f"{path} is no style file, or damaged: {error}") from None
