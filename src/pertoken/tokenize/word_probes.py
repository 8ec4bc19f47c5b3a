"""A small classifier over a tokenizer's pieces: what a cut is worth to who must learn from it.

Each text is the mean of the vectors of its pieces and the vector of its last piece (suffixes stand
there, and they tell its grammar), then one linear layer. The vectors are as wide as a number of
parameters allows, so that tokenizers of different vocabularies are compared at equal size, as the
paper compares its families (its own models are BERTs of one width per vocabulary).

Ours, in place of the fine-tuned models of Altinok, arXiv 2602.06942.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pertoken.errors import PertokenError
from pertoken.result import Result
from pertoken.tokenize._cuts import cuts

__all__ = ["WordProbe", "word_probe"]

_WIDEST = 256


@dataclass(frozen=True)
class WordProbe(Result):
    """What the classifier got right on texts it did not see.

    accuracy: share of the test texts. majority: of always saying the commonest label. f1: mean F1
    over the labels of the test texts. parameters: of the classifier. width: of its vectors.
    """

    accuracy: float
    majority: float
    f1: float
    parameters: int
    width: int
    texts: int

    _title = "A classifier over the pieces"

    def to_dict(self) -> dict[str, Any]:
        """The figures."""
        return self.rows()[0]

    def rows(self) -> list[dict[str, Any]]:
        """One record."""
        names = ("accuracy", "majority", "f1", "parameters", "width", "texts")
        return [{name: getattr(self, name) for name in names}]


def word_probe(
    tokenizer: Any,
    train: Sequence[tuple[str, str]],
    test: Sequence[tuple[str, str]],
    *,
    parameters: int = 100_000,
    epochs: int = 20,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> WordProbe:
    """Train the classifier on (text, label) pairs and test it on others.

    tokenizer: as for `morphology_report`. parameters: about as many as the classifier may have;
        its vectors are 1 to 256 wide.

    Raises PertokenError where there is nothing to train or to test on, and for a single label.

    >>> from pertoken.tokenize.train import train_tokenizer
    >>> pairs = [("evler", "many"), ("ev", "one"), ("kediler", "many"), ("kedi", "one")]
    >>> word_probe(train_tokenizer(["evler kediler"] * 2, 262), pairs, pairs).accuracy
    1.0
    """
    import torch

    labels = {label: number for number, label in enumerate(dict.fromkeys(y for _, y in train))}
    if len(labels) < 2 or not test:
        raise PertokenError(
            f"a probe needs texts of two labels to train on and texts to test it: got {len(train)} "
            f"of {len(labels)} labels, and {len(test)}"
        )
    seen: dict[int, int] = {}
    learnt = [_numbers(cut.ids, seen, grow=True) for cut in cuts(tokenizer, [x for x, _ in train])]
    asked = [_numbers(cut.ids, seen, grow=False) for cut in cuts(tokenizer, [x for x, _ in test])]
    pieces, classes = len(seen) + 1, len(labels)  # 0 is a piece that training did not show
    width = min(max((parameters - classes) // (pieces + 2 * classes), 1), _WIDEST)
    wanted = torch.tensor([labels[label] for _, label in train])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vectors = torch.nn.Parameter(0.1 * torch.randn(pieces, width))
        linear = torch.nn.Linear(2 * width, classes)

        def scores(rows: Sequence[Sequence[int]]) -> torch.Tensor:
            flat = torch.tensor([each for row in rows for each in row])
            starts = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
            mean = torch.nn.functional.embedding_bag(flat, vectors, starts[:-1], mode="mean")
            return linear(torch.cat([mean, vectors[flat[starts[1:] - 1]]], dim=-1))

        optimizer = torch.optim.Adam([vectors, *linear.parameters()], lr=learning_rate)
        for _ in range(epochs):
            for batch in torch.randperm(len(train)).split(256):
                loss = torch.nn.functional.cross_entropy(
                    scores([learnt[place] for place in batch.tolist()]), wanted[batch]
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            given = scores(asked).argmax(-1).tolist()
    names = list(labels)
    said = [names[each] for each in given]
    return WordProbe(
        accuracy=sum(a == y for a, (_, y) in zip(said, test, strict=True)) / len(test),
        majority=Counter(y for _, y in test)[Counter(y for _, y in train).most_common(1)[0][0]]
        / len(test),
        f1=_mean_f1(said, [label for _, label in test]),
        parameters=pieces * width + (2 * width + 1) * classes,
        width=width,
        texts=len(test),
    )


def _numbers(ids: Sequence[int], seen: dict[int, int], *, grow: bool) -> list[int]:
    """Numbers of the pieces from 1, in the order they were first seen; 0 for others."""
    if grow:
        return [seen.setdefault(each, len(seen) + 1) for each in ids] or [0]
    return [seen.get(each, 0) for each in ids] or [0]


def _mean_f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    """
    >>> _mean_f1(["a", "a", "b"], ["a", "b", "b"])
    0.6666666666666666
    """
    hits = Counter(a for a, b in zip(said, wanted, strict=True) if a == b)
    both = Counter(said) + Counter(wanted)
    labels = set(wanted)
    return sum(2 * hits[label] / both[label] for label in labels) / len(labels)
