"""What retrieval does to text that a model writes: the other half of 2305.14625.

Prompts are continued three ways: by the held-out text itself ("gold"), by the model with the store
("with the store") and without ("model"). Each continuation is then read by the same model and
looked up in the same store, and two entropies are followed over its length: of the retrieval and of
the model. The paper finds that on generated text the first grows, and faster than the second: the
store was made of real text, and the text at hand is less and less like it.

Quality is told by MAUVE (extra `mauve`), repetition (seq-rep-n: mean share of a text's n-grams that
it had before) and distinct-n (share of different n-grams among all of a source). The features of
MAUVE are the model's own: the last key of a text. The metric was made with GPT-2 large, so
that its figures compare the sources here and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pertoken._bootstrap import bootstrap_mean
from pertoken._extras import need
from pertoken._replies import drawing
from pertoken.decode._chart import lines, page
from pertoken.decode._knn_build import encode
from pertoken.decode._knn_tokens import read_ids
from pertoken.errors import PertokenError
from pertoken.result import Part, Result, figure, plain
from pertoken.stats_text import repeated_ngram_share

if TYPE_CHECKING:
    from pertoken.decode.knn_lm import KNNMemory

__all__ = [
    "KNNContinuations",
    "KNNSource",
    "continuations",
    "distinct",
    "entropies",
    "knn_continuations",
    "summary",
]

SOURCES = ("gold", "with the store", "model")
TOP_P = 0.8
AT_ONCE = 8  # prompts that are continued together
N_GRAMS = (1, 4)
_FEWEST_FOR_MAUVE = 20
Interval = tuple[float, float]


@dataclass(frozen=True)
class KNNSource:
    """One way of continuing, over all prompts.

    texts: continuations; retrieval, model: mean entropy in nats at each of their tokens, by its
    number; retrieval_slope, model_slope: mean over texts of the growth of each, nats per 100
    tokens, with intervals over texts; seq_rep, distinct: by n; mauve: 0 … 1 against gold, None
    where it was not measured.
    """

    name: str
    texts: int
    retrieval: list[float]
    model: list[float]
    retrieval_slope: float
    retrieval_interval: Interval
    model_slope: float
    model_interval: Interval
    seq_rep: dict[int, float]
    distinct: dict[int, float]
    mauve: float | None = None


@dataclass(frozen=True)
class KNNContinuations(Result):
    """Continuations of the same prompts from three sources.

    sources: see `KNNSource`; note: why there is no MAUVE, if there is none.
    """

    sources: tuple[KNNSource, ...]
    note: str = ""

    _title = "Retrieval on text that a model writes"

    def __getitem__(self, name: str) -> KNNSource:
        return next(each for each in self.sources if each.name == name)

    def rows(self) -> list[dict[str, Any]]:
        """A record per source: slopes and quality."""
        found = []
        for each in self.sources:
            row = asdict(each)
            for name in ("retrieval", "model"):
                row[f"{name}_entropy"] = float(np.mean(row.pop(name)))
                row[f"{name}_low"], row[f"{name}_high"] = row.pop(f"{name}_interval")
            for name in ("seq_rep", "distinct"):
                row |= {f"{name}_{n}": value for n, value in row.pop(name).items()}
            found.append(plain(row))
        return found

    def to_dict(self) -> dict[str, Any]:
        """The sources with the entropies along their length."""
        return plain({"sources": [asdict(each) for each in self.sources], "note": self.note})

    def _parts(self) -> list[Part]:
        head = ["text", "number", "retrieval entropy", "per 100 tokens", "model entropy"]
        head += ["per 100 tokens", *(f"seq-rep-{n}" for n in N_GRAMS)]
        head += [*(f"distinct-{n}" for n in N_GRAMS), "MAUVE"]
        lines = []
        for each in self.sources:
            line = [each.name, str(each.texts)]
            for name in ("retrieval", "model"):
                low, high = getattr(each, f"{name}_interval")
                slope = getattr(each, f"{name}_slope")
                line.append(f"{np.mean(getattr(each, name)):.3f}")
                line.append(f"{slope:+.3f} ({low:+.3f} … {high:+.3f})")
            line += [f"{value:.3f}" for value in (*each.seq_rep.values(), *each.distinct.values())]
            lines.append([*line, "" if each.mauve is None else f"{each.mauve:.3f}"])
        return [Part("", [head, *lines], [self.note] if self.note else [])]

    def _page(self) -> str:
        charts = []
        for name in ("retrieval", "model"):
            curves = {each.name: _smooth(getattr(each, name)) for each in self.sources}
            x = range(len(next(iter(curves.values()))))
            charts.append(lines(f"entropy of the {name}, nats", x, curves, over="tokens written"))
        return page(self, "Over the tokens written", charts)

    def plot(self) -> Any:
        """Both entropies along the continuations, a plotly figure (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        traces = []
        for each in self.sources:
            for name, dash in (("retrieval", "solid"), ("model", "dot")):
                values = _smooth(getattr(each, name))
                line = {"dash": dash}
                label = f"{name}, {each.name}"
                traces.append(graph.Scatter(y=values, name=label, mode="lines", line=line))
        x, y = {"title": "tokens written"}, {"title": "entropy (nats)"}
        return figure(traces, xaxis=x, yaxis=y)


def knn_continuations(
    memory: KNNMemory,
    texts: Sequence[str],
    *,
    prompt: int = 64,
    max_new_tokens: int = 128,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> KNNContinuations:
    """Continue the beginnings of held-out texts with the store and without, and compare.

    texts: those of `prompt` + `max_new_tokens` tokens or more are used, the others left out.
    prompt: tokens of the beginning. Drawn with top-p 0.8 at temperature 1 (our reading; the model's
    own temperature does not count) and without stop tokens, so that all are of one length; seed:
    of the draws. progress: called with (what, texts done, in all). Raises PertokenError where no
    text is long enough.
    """
    store = memory.datastore
    ids = [encode(store.model, store.tokenizer, text) for text in texts]
    for number, each in enumerate(ids, 1):
        if store.spans(each):
            raise PertokenError(
                f"text {number} is in {store.path}: its continuation would be looked up; take "
                "texts that are held out"
            )
    ids = [each[: prompt + max_new_tokens] for each in ids if len(each) >= prompt + max_new_tokens]
    if not ids or prompt < 1 or max_new_tokens < 2:
        raise PertokenError(
            f"none of {len(texts)} texts has {prompt} + {max_new_tokens} tokens: a shorter prompt "
            "or continuation, or longer texts (a continuation has two tokens or more)"
        )
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SOURCES}
    for start in range(0, len(ids), AT_ONCE):
        if progress is not None:
            progress("continuations", start, len(ids))
        some = ids[start : start + AT_ONCE]
        for name, own in continuations(memory, some, prompt, seed + start).items():
            found[name] += [entropies(memory, whole, prompt) for whole in own]
    return summary(found, seed)


def continuations(
    memory: KNNMemory, gold: Sequence[Sequence[int]], prompt: int, seed: int
) -> dict[str, list[list[int]]]:
    """Texts of one length by source: themselves, and continued with the store and without."""
    model = memory.datastore.model
    ids = torch.tensor([each[:prompt] for each in gold], device=model.device)
    new = len(gold[0]) - prompt
    found = {"gold": [list(each) for each in gold]}
    for name in SOURCES[1:]:
        with drawing(model, seed):
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                temperature=1.0,
                top_p=TOP_P,
                top_k=0,
                logits_processor=[memory] if name == "with the store" else [],
            )
        found[name] = written.tolist()
    return found


def entropies(memory: KNNMemory, ids: Sequence[int], prompt: int) -> dict[str, Any]:
    """A continuation as plain values: its ids, both entropies at each token, its feature."""
    reads = read_ids(memory.datastore, ids, memory.k, prompt - 1)
    return {
        "ids": list(ids[prompt:]),
        "retrieval": reads.retrieval_entropy(memory.temperature).tolist(),
        "model": reads.entropy.tolist(),
        "feature": reads.last.tolist(),
    }


def summary(found: Mapping[str, Sequence[Mapping[str, Any]]], seed: int = 0) -> KNNContinuations:
    """The result of continuations by source, each as `entropies` gives it."""
    note = ""
    features = {name: [each["feature"] for each in own] for name, own in found.items()}
    scores: dict[str, float | None] = dict.fromkeys(found)
    try:
        for name in SOURCES[1:]:
            scores[name] = mauve_score(features["gold"], features[name], seed)
    except PertokenError as error:
        note = f"no MAUVE: {error}"
    sources = [_source(name, own, scores[name], seed) for name, own in found.items()]
    return KNNContinuations(tuple(sources), note)


def _source(
    name: str, own: Sequence[Mapping[str, Any]], mauve: float | None, seed: int
) -> KNNSource:
    ids = [each["ids"] for each in own]
    given: dict[str, Any] = {}
    for kind in ("retrieval", "model"):
        curves = [each[kind] for each in own]
        slopes = [slope(curve) for curve in curves]
        given[kind] = np.mean(curves, axis=0).tolist()
        given[f"{kind}_slope"] = float(np.mean(slopes))
        given[f"{kind}_interval"] = bootstrap_mean(slopes, seed)
    return KNNSource(
        name,
        len(own),
        seq_rep={
            n: float(np.mean([repeated_ngram_share(each, n) for each in ids])) for n in N_GRAMS
        },
        distinct={n: distinct(ids, n) for n in N_GRAMS},
        mauve=mauve,
        **given,
    )


def slope(curve: Sequence[float]) -> float:
    """Growth of a curve per 100 steps, by least squares.

    >>> round(slope([1.0, 1.5, 2.0]), 6)
    50.0
    """
    return 100 * float(np.polyfit(np.arange(len(curve)), np.asarray(curve), 1)[0])


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """distinct-n: different n-grams over all n-grams of the texts together.

    >>> distinct([[1, 2, 1], [1, 2]], 2)
    0.6666666666666666
    """
    grams = [tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def mauve_score(
    gold: Sequence[Sequence[float]], written: Sequence[Sequence[float]], seed: int = 0
) -> float:
    """MAUVE of two sets of features, 0 … 1; extra `mauve`.

    Raises PertokenError for fewer than 20 texts: clusters of so few say nothing.
    """
    if len(gold) < _FEWEST_FOR_MAUVE:
        raise PertokenError(f"it takes {_FEWEST_FOR_MAUVE} texts or more, got {len(gold)}")
    compute = need("mauve", "mauve").compute_mauve
    features = {"p_features": np.asarray(gold), "q_features": np.asarray(written)}
    return float(compute(**features, seed=seed, verbose=False).mauve)


def _smooth(values: Sequence[float], width: int = 9) -> list[float]:
    """A running mean, for the eye."""
    width = min(width, len(values))
    return np.convolve(values, np.ones(width) / width, "valid").tolist()
