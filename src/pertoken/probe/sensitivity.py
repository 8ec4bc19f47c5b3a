"""How much the next token depends on which tokens write the text before it.

A word at the end of a text is written in other encodings, everything before it as the tokenizer
does, and the distribution of the next token is compared with that behind the canonical encoding:
D(canonical || other), in nats. For a model that read text and not tokens it would be 0. (Ours, for
"Say Anything but This", arXiv 2601.14658, whose phantom edits are such encodings.)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from pertoken._bootstrap import bootstrap_mean
from pertoken._padded import right_padded
from pertoken.byte_vocab import ByteVocab
from pertoken.errors import PertokenError
from pertoken.probe._marked import mark
from pertoken.probe._stream import Progress, refuse_unfit, refuse_unread
from pertoken.result import Part, Result, figure, plain
from pertoken.tokenize.ways import Ways, spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Sensitivity", "encoding_sensitivity"]


@dataclass(frozen=True)
class Encoded:
    """A word in another encoding: its pieces, D(canonical || other) in nats, and whether the best
    next token is the same."""

    text: int
    word: str
    canonical: Sequence[str]
    pieces: Sequence[str]
    kl: float
    same_best: bool


class Sensitivity(Result):
    """What `encoding_sensitivity` found: `found`, one for each other encoding, and `settings`."""

    _title = "Encodings and the next token"

    def __init__(self, found: Sequence[Encoded], settings: dict[str, Any]) -> None:
        self.found, self.settings = list(found), settings

    @property
    def kl(self) -> float:
        """Mean divergence in nats."""
        return sum(each.kl for each in self.found) / len(self.found)

    @property
    def same_best(self) -> float:
        """Share of encodings behind which the best next token stays."""
        return sum(each.same_best for each in self.found) / len(self.found)

    def summary(self) -> list[dict[str, Any]]:
        """A record for each number of tokens more or fewer than the canonical encoding has."""
        by_more: dict[int, list[Encoded]] = {}
        for each in self.found:
            by_more.setdefault(len(each.pieces) - len(each.canonical), []).append(each)
        return [
            {
                "tokens_more": more,
                "n": len(own),
                "kl": sum(each.kl for each in own) / len(own),
                "interval": bootstrap_mean([each.kl for each in own]),
                "same_best": sum(each.same_best for each in own) / len(own),
            }
            for more, own in sorted(by_more.items())
        ]

    def rows(self) -> list[dict[str, Any]]:
        """A record per encoding."""
        return [plain(asdict(each)) for each in self.found]

    def to_dict(self) -> dict[str, Any]:
        """Settings, the means, the summary by length, and every encoding."""
        means = {"kl": self.kl, "same_best": self.same_best, "summary": self.summary()}
        found: dict[str, Any] = plain({"settings": self.settings, **means, "rows": self.rows()})
        return found

    def plot(self) -> Any:
        """Mean divergence by how many tokens more there are (extra `plot`)."""
        rows = self.summary()
        x, y = [row["tokens_more"] for row in rows], [row["kl"] for row in rows]
        layout: dict[str, Any] = {"xaxis": {"title": "tokens more"}, "yaxis": {"title": "nats"}}
        return figure([{"type": "scatter", "x": x, "y": y, "mode": "lines+markers"}], **layout)

    def _parts(self) -> list[Part]:
        lines = [["tokens more", "encodings", "nats", "95 %", "best token stays"]]
        for row in self.summary():
            low, high = row["interval"]
            first = [str(row["tokens_more"]), str(row["n"]), f"{row['kl']:.3f}"]
            lines.append([*first, f"{low:.3f}-{high:.3f}", f"{row['same_best']:.1%}"])
        note = f"all: {self.kl:.3f} nats; the best token stays behind {self.same_best:.1%}"
        return [Part("The next token behind other encodings of a word", lines, [note])]


@torch.no_grad()
def encoding_sensitivity(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    n: int = 8,
    share: float = 0.05,
    seed: int = 0,
    progress: Progress | None = None,
) -> Sensitivity:
    """D(canonical || other) of the next token, in nats, behind other encodings of single words.

    texts, share: as of `token_consistency`: words in [brackets], else drawn ones. The text is read
        up to the end of each.
    n: other encodings of a word, at most; they are drawn if there are more.
    Raises PertokenError for a tokenizer without a byte view, a text that the model cannot read or
    without a word to choose, and words that have one encoding only.

    >>> from pertoken.testing import tiny_model, tiny_tokenizer
    >>> tokenizer = tiny_tokenizer()
    >>> model = tiny_model("llama", vocab_size=len(tokenizer))
    >>> found = encoding_sensitivity(model, tokenizer, ["the [cat] sat"], n=3)
    >>> len(found.found), found.kl > 0
    (3, True)
    """
    refuse_unfit(model)
    if n < 1:
        raise PertokenError(f"n must be 1 or more, got {n}")
    vocab = ByteVocab(tokenizer)
    marked = [mark(text, share, seed, f"text {place}") for place, text in enumerate(texts, 1)]
    for each in marked:
        end = max(end for _, end in each.targets)
        refuse_unread(model, list(tokenizer.encode(each.text[:end])))
    found: list[Encoded] = []
    for place, each in enumerate(marked):
        if progress is not None:
            progress("encodings", place, len(marked))
        for number in range(len(each.targets)):
            own, others = _encodings(tokenizer, vocab, each.text, each.targets[number], n, seed)
            if not others:
                continue
            refuse_unread(model, max(others, key=len))
            scores = _next(model, [own, *others])
            pieces = [[tokenizer.decode([t]) for t in ids[_same(own, ids) :]] for ids in others]
            kl = (scores[0].exp() * (scores[0] - scores[1:])).sum(-1)
            best = scores.argmax(-1)
            for other in range(len(others)):
                canonical = [tokenizer.decode([t]) for t in own[_same(own, others[other]) :]]
                found.append(
                    Encoded(
                        place,
                        each.word(number),
                        canonical,
                        pieces[other],
                        float(kl[other]),
                        bool(best[0] == best[other + 1]),
                    )
                )
    if not found:
        raise PertokenError("no word of the texts has another encoding: mark longer [words]")
    return Sensitivity(found, {"texts": len(texts), "n": n, "share": share, "seed": seed})


def _same(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids two rows begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _encodings(
    tokenizer: Any, vocab: ByteVocab, text: str, target: tuple[int, int], n: int, seed: int
) -> tuple[list[int], list[list[int]]]:
    """The ids up to a word's end, and with the word in other encodings."""
    start, end = target
    ids = list(tokenizer.encode(text[:end]))
    places = spans(ids, tokenizer)
    # The text may stand behind a token that is put before every text.
    shift = places[-1][1] - end
    first = next(place for place, (_, last) in enumerate(places) if last > start + shift)
    word = b"".join(vocab.token_bytes[token] or b"" for token in ids[first:])
    others = [row for row in Ways(vocab, word).some(n + 1, seed) if row != ids[first:]][:n]
    return ids, [ids[:first] + row for row in others]


def _next(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Log-probabilities of the next token behind each row, [rows, vocab]."""
    ids, real = right_padded([torch.tensor(row, device=model.device) for row in rows])
    mask = torch.ones_like(ids) if real is None else real.long()
    last = mask.sum(-1) - 1
    given: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # A long text has too many scores to keep those of every position.
        given["logits_to_keep"], last = last.unique(return_inverse=True)
    logits = model(ids, attention_mask=mask, use_cache=False, **given).logits
    return logits[torch.arange(len(rows), device=ids.device), last].float().log_softmax(-1)
