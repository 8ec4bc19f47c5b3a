"""Predictive data selection (PreSelect, arXiv 2503.00808): the data that predicts teaches.

Given models of known ability and a sample of documents:

1. Each model's loss on each document, in bits per character: `bits_per_character`.
2. A document's predictive strength is the share of pairs of models in which the abler one has the
   lower loss (section 2): `predictive_strength`.
3. Documents that order all models rightly are wanted; as many of the least strength are not:
   `label_extremes`.
4. A light classifier learns to tell them apart: `pertoken.train.NgramScorer`.
5. It scores the whole pool, of which the best share of characters is kept: `select`; for files of
   any size `pertoken.train.select_file`.

`preselect` is steps 1 to 4. Within a document the number of characters does not change the order
of the models, the number of tokens would: so losses are summed, never averaged over tokens.

The authors' code reads all documents as one stream, so that a document has the end of another
before it. Here each is read alone: its loss does not depend on its neighbours (our reading).

What the method cannot see: checkpoints of one run differ in nothing but steps and order nearly
every document rightly; models must differ in what they have read, or in size. Short documents have
noisy losses: `Preselection` shows the lengths of what was labelled. No model may have trained on
the documents that it is scored on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pertoken._extras import need
from pertoken._files import drop_cut_line, whole_lines
from pertoken.errors import PertokenError
from pertoken.result import Part, Result, figure
from pertoken.train.ngram_scorer import NgramScorer
from pertoken.train.strength import (
    Floats,
    Progress,
    bits_per_character,
    label_extremes,
    predictive_strength,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Preselection", "preselect"]


@dataclass
class Preselection(Result):
    """What `preselect` found.

    models: names, ability: of each; losses: bits per character, [models, documents]; strength and
    labels: [documents]; characters: of each document; scorer: what learned from the labels.
    """

    models: list[str]
    ability: list[float]
    losses: Floats
    strength: Floats
    labels: npt.NDArray[np.int8]
    characters: npt.NDArray[np.int64]
    scorer: NgramScorer

    _title = "Predictive data selection"

    def rows(self) -> list[dict[str, Any]]:
        """One record per strength that occurs: how many documents have it, how long they are."""
        return [
            {
                "strength": float(value),
                "documents": int((self.strength == value).sum()),
                "wanted": int((self.labels[self.strength == value] == 1).sum()),
                "unwanted": int((self.labels[self.strength == value] == 0).sum()),
                "mean_characters": float(self.characters[self.strength == value].mean()),
            }
            for value in np.unique(self.strength)[::-1]
        ]

    def to_dict(self) -> dict[str, Any]:
        """Models, strengths, losses and what decides."""
        most, least = self.scorer.top_features()
        return {
            "models": [
                {"model": name, "ability": ability, "mean_bits_per_character": float(own.mean())}
                for name, ability, own in zip(self.models, self.ability, self.losses, strict=True)
            ],
            "strengths": self.rows(),
            "features": {"for": most, "against": least},
            "documents": [
                {
                    "strength": float(strength),
                    "label": int(label),
                    "characters": int(size),
                    "bits_per_character": [float(loss) for loss in own],
                }
                for strength, label, size, own in zip(
                    self.strength, self.labels, self.characters, self.losses.T, strict=True
                )
            ],
        }

    def _parts(self) -> list[Part]:
        found = self.to_dict()
        models = [["model", "ability", "mean bits per character"]]
        models += [
            [one["model"], f"{one['ability']:g}", f"{one['mean_bits_per_character']:.3f}"]
            for one in found["models"]
        ]
        lines = [["strength", "documents", "wanted", "unwanted", "mean characters"]]
        lines += [
            [
                f"{row['strength']:.3f}",
                f"{row['documents']:,}",
                f"{row['wanted']:,}",
                f"{row['unwanted']:,}",
                f"{row['mean_characters']:,.0f}",
            ]
            for row in self.rows()
        ]
        features = [["speaks for", "weight", "speaks against", "weight"]]
        most, least = self.scorer.top_features(12)
        for place in range(max(len(most), len(least))):
            line = []
            for side in (most, least):
                one = side[place] if place < len(side) else ("", 0.0)
                line += [one[0], f"{one[1]:.3g}" if one[0] else ""]
            features.append(line)
        return [
            Part("Models", models),
            Part("Documents by strength", lines, [_lengths(self)]),
            Part("What decides", features),
        ]

    def plot(self) -> Any:
        """Documents at each strength (extra `plot`)."""
        rows = self.rows()
        bars = need("plotly.graph_objects", "plot").Bar(
            x=[row["strength"] for row in rows], y=[row["documents"] for row in rows]
        )
        return figure(bars, xaxis_title="predictive strength", yaxis_title="documents")


def _lengths(found: Preselection) -> str:
    """The length of what was labelled: where they differ, the scorer may have learned length."""
    mean = {kind: found.characters[found.labels == kind].mean() for kind in (1, 0)}
    return f"mean characters: {mean[1]:,.0f} of wanted, {mean[0]:,.0f} of unwanted documents"


def preselect(
    models: Sequence[str | tuple[PreTrainedModel, Any]],
    ability: Sequence[float],
    texts: Sequence[str],
    *,
    margin: float = 0.0,
    epochs: int = 3,
    learning_rate: float = 0.1,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Preselection:
    """A scorer of documents, learned from how well models' losses on `texts` order their abilities.

    models: names for `pertoken.load`, or (model, tokenizer); they are in memory one after the
    other. ability: of each model, higher is abler. folder: where losses are kept, so that an
    interrupted run goes on and another sample reads only what is new.
    Raises PertokenError for one model, for abilities without a difference, an empty document, and
    where all documents order the models in the same way.
    """
    if len(models) != len(ability):
        raise PertokenError(f"{len(models)} models and {len(ability)} abilities: one of each")
    if len(models) < 2:
        raise PertokenError("one model has no order: give two or more, of different ability")
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise PertokenError(f"document {number} is empty: leave it out")
    predictive_strength(np.zeros((len(models), 1)), ability, margin=margin)  # before any model
    names, losses = [], []
    for one in models:
        name, own = _losses(one, texts, folder, progress)
        names.append(name)
        losses.append(own)
    table = np.array(losses)
    strength = predictive_strength(table, ability, margin=margin)
    labels = label_extremes(strength)
    chosen = [int(n) for n in np.flatnonzero(labels >= 0)]
    scorer = NgramScorer.fit(
        [texts[n] for n in chosen],
        labels[chosen].tolist(),
        epochs=epochs,
        learning_rate=learning_rate,
        seed=seed,
        progress=progress,
    )
    sizes = np.array([len(text) for text in texts])
    return Preselection(
        names, [float(each) for each in ability], table, strength, labels, sizes, scorer
    )


def _losses(
    given: str | tuple[PreTrainedModel, Any],
    texts: Sequence[str],
    folder: str | Path | None,
    progress: Progress | None,
) -> tuple[str, list[float]]:
    """A model's name and its bits per character; kept per document where there is a folder."""
    import pertoken
    from pertoken._tokenizer_hash import tokenizer_hash
    from pertoken.cache import model_fingerprint

    model, tokenizer = pertoken.load(given, kind="decoder") if isinstance(given, str) else given
    name = given if isinstance(given, str) else type(model).__name__

    def tell(_: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"reading with {name}", done, total)

    if folder is None:
        return name, bits_per_character(model, tokenizer, texts, progress=tell)
    made_with = f"{model_fingerprint(model)[:16]}-{tokenizer_hash(tokenizer)[:8]}"
    kept = _Kept(Path(folder) / f"{made_with}.jsonl")
    found = []
    for number, text in enumerate(texts):
        tell("", number, len(texts))
        loss = kept.get(text)
        if loss is None:
            [loss] = bits_per_character(model, tokenizer, [text])
            kept.add(text, loss)
        found.append(loss)
    return name, found


class _Kept:
    """Losses of one model in a file, a line each; one that was cut off by a kill is dropped."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        rows = [json.loads(line) for line in whole_lines(path)]
        drop_cut_line(path, '{"document": ')
        self.known: dict[str, float] = {row["document"]: row["bits_per_character"] for row in rows}

    def get(self, text: str) -> float | None:
        return self.known.get(_digest(text))

    def add(self, text: str, loss: float) -> None:
        self.known[_digest(text)] = loss
        line = json.dumps({"document": _digest(text), "bits_per_character": loss})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
