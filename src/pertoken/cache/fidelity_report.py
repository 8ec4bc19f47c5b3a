"""What `cache_fidelity` found: figures per step, their summary, and the table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pertoken._extras import need
from pertoken.result import Part, Result, aligned, figure, plain

__all__ = ["Fidelity", "Speed", "TextFidelity", "fidelity_table"]

MIB = 2**20
HEAD = (
    "cache",
    "KL",
    "largest",
    "top-1",
    "perplexity ratio",
    "token match",
    "held MiB",
    "peak MiB",
    "of full",
    "tokens/s",
)


@dataclass
class Speed:
    """Seconds in forwards: of given tokens, and of answers one token at a time."""

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    steps: int = 0


@dataclass(frozen=True)
class TextFidelity:
    """One text. The lists `kl`, `agrees`, `nll`, `full_nll` have one entry per token of `answers`.

    answers: per turn, the tokens that were judged: the full cache's greedy ones, or given ones.
    free: per turn, what the candidate wrote by itself; None where the answer was given.
    nll, full_nll: minus log p of each token in nats, with the candidate and with the full cache.
    held_bytes: the most the cache held behind a forward; peak_bytes: within one, if it tells.
    """

    answers: list[list[int]]
    free: list[list[int] | None]
    kl: list[float]
    agrees: list[bool]
    nll: list[float]
    full_nll: list[float]
    held_bytes: int
    peak_bytes: int
    full_peak_bytes: int
    speed: Speed
    full_speed: Speed

    @property
    def matches(self) -> list[bool]:
        """Per token of the greedy answers, whether free running wrote the same at its place."""
        found: list[bool] = []
        for answer, own in zip(self.answers, self.free, strict=True):
            if own is not None:
                padded = [*own, *[-1] * (len(answer) - len(own))]
                found += [a == b for a, b in zip(answer, padded, strict=True)]
        return found

    @property
    def common_prefix(self) -> int:
        """Tokens that free running wrote before the first that the full cache does not write."""
        same = self.matches
        return same.index(False) if False in same else len(same)


@dataclass(frozen=True)
class Fidelity(Result):
    """One cache beside the full cache, over all texts. KL and log-probabilities are in nats."""

    texts: list[TextFidelity]
    settings: dict[str, Any]

    _title = "A cache beside the full cache"

    @property
    def kl(self) -> list[float]:
        """KL(full || candidate) in nats at each step, the texts one behind the other."""
        return [value for text in self.texts for value in text.kl]

    @property
    def mean_kl(self) -> float:
        """Mean of `kl` over all steps."""
        return _mean(self.kl)

    @property
    def max_kl(self) -> float:
        """The largest KL of a step."""
        return max(self.kl)

    @property
    def top1_agreement(self) -> float:
        """Share of the steps at which both have the same best token, 0 to 1."""
        return _mean(agree for text in self.texts for agree in text.agrees)

    @property
    def perplexity(self) -> float:
        """Perplexity of the judged tokens, fed one by one, with the candidate's cache."""
        return _exp(_mean(value for text in self.texts for value in text.nll))

    @property
    def full_perplexity(self) -> float:
        """Perplexity of the same tokens with the full cache."""
        return _exp(_mean(value for text in self.texts for value in text.full_nll))

    @property
    def perplexity_ratio(self) -> float:
        """`perplexity` over `full_perplexity`; 1 loses nothing."""
        return self.perplexity / self.full_perplexity

    @property
    def token_match(self) -> float | None:
        """Share of the full cache's greedy tokens that free running writes at the same place.

        None where no answer is greedy. One different token early on makes all later ones differ,
        so read it beside `top1_agreement` and `common_prefix`.
        """
        same = [match for text in self.texts for match in text.matches]
        return _mean(same) if same else None

    @property
    def common_prefix(self) -> float | None:
        """Tokens that free running writes before the first different one, mean over the texts."""
        lengths = [text.common_prefix for text in self.texts if text.matches]
        return _mean(lengths) if lengths else None

    @property
    def held_bytes(self) -> int:
        """The most bytes that the candidate's cache held behind a forward, over all texts."""
        return max(text.held_bytes for text in self.texts)

    @property
    def peak_bytes(self) -> int:
        """As `held_bytes`, and within a forward where the cache tells it (its own `peak_bytes`)."""
        return max(text.peak_bytes for text in self.texts)

    @property
    def full_peak_bytes(self) -> int:
        """The most bytes the full cache held."""
        return max(text.full_peak_bytes for text in self.texts)

    @property
    def seconds(self) -> float:
        """Seconds in the candidate's forwards under teacher forcing, prompts included."""
        return sum(t.speed.prefill_seconds + t.speed.decode_seconds for t in self.texts)

    @property
    def tokens_per_second(self) -> float:
        """Tokens fed one by one per second, with the candidate's cache; NaN without any."""
        return _speed(text.speed for text in self.texts)

    @property
    def full_tokens_per_second(self) -> float:
        """The same with the full cache."""
        return _speed(text.full_speed for text in self.texts)

    def _parts(self) -> list[Part]:
        """The figures beside those of the full cache."""
        return [Part("", [HEAD, *table_cells({"cache": self})])]

    def summary(self) -> dict[str, Any]:
        """The figures over all texts, as plain JSON values; None where one is not finite."""
        names = (
            "mean_kl", "max_kl", "top1_agreement", "perplexity", "full_perplexity",
            "perplexity_ratio", "token_match", "common_prefix", "held_bytes", "peak_bytes",
            "full_peak_bytes", "seconds", "tokens_per_second", "full_tokens_per_second",
        )  # fmt: skip
        return {"steps": len(self.kl), **{name: plain(getattr(self, name)) for name in names}}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values: settings, summary, and each text with its steps."""
        texts = [plain(asdict(text)) for text in self.texts]
        return {"settings": self.settings, "summary": self.summary(), "texts": texts}

    def rows(self) -> list[dict[str, Any]]:
        """A record per judged token.

        Keys: text, turn, step (within the text), token, kl, agrees, nll, full_nll, free_token
        (None where nothing was written there).
        """
        rows = []
        for number, text in enumerate(self.texts):
            step = 0
            for turn, (answer, own) in enumerate(zip(text.answers, text.free, strict=True)):
                for place, token in enumerate(answer):
                    rows.append(
                        {
                            "text": number,
                            "turn": turn,
                            "step": step,
                            "token": token,
                            "kl": plain(text.kl[step]),
                            "agrees": text.agrees[step],
                            "nll": plain(text.nll[step]),
                            "full_nll": plain(text.full_nll[step]),
                            "free_token": own[place] if own and place < len(own) else None,
                        }
                    )
                    step += 1
        return rows

    def plot(self) -> Any:
        """KL per step, one line per text: a plotly figure (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        curves = [
            graph.Scatter(y=text.kl, name=f"text {place}")
            for place, text in enumerate(self.texts, 1)
        ]
        axis = {"title": "KL(full || candidate), nats", "rangemode": "tozero"}
        return figure(curves, xaxis={"title": "step"}, yaxis=axis)


def fidelity_table(results: Mapping[str, Fidelity]) -> str:
    """Several results in one table, the full cache first: KL in nats, shares in per cent."""
    return aligned([list(HEAD), *table_cells(results)])


def table_cells(results: Mapping[str, Fidelity]) -> list[list[str]]:
    """The lines below `HEAD`: the full cache, then each result."""
    first = next(iter(results.values()))
    full = ["full (reference)", "", "", "", "", ""]
    full += [_size(first.full_peak_bytes)] * 2 + ["", _number(first.full_tokens_per_second, 1)]
    return [full, *(_cells(name, result) for name, result in results.items())]


def _cells(name: str, result: Fidelity) -> list[str]:
    return [
        name,
        _small(result.mean_kl),
        _small(result.max_kl),
        _percent(result.top1_agreement),
        _number(result.perplexity_ratio, 3),
        _percent(result.token_match),
        _size(result.held_bytes),
        _size(result.peak_bytes),
        _percent(result.peak_bytes / result.full_peak_bytes),
        _number(result.tokens_per_second, 1),
    ]


def _small(value: float) -> str:
    """A KL: 0 only where it is exactly 0.

    >>> _small(0.0), _small(3e-9), _small(0.25), _small(float("inf"))
    ('0', '3.0e-09', '0.2500', 'inf')
    """
    if value == 0 or math.isinf(value):
        return f"{value:.0f}"
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.1e}"


def _percent(share: float | None) -> str:
    """A share for the table; 100 only where it is exactly 1.

    >>> _percent(1.0), _percent(0.99999), _percent(None)
    ('100 %', '99.9 %', '-')
    """
    if share is None or not math.isfinite(share):
        return "-"
    if share == 1:
        return "100 %"
    return f"{min(100 * share, 99.9) if share < 1 else 100 * share:.1f} %"


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _size(count: int) -> str:
    return f"{count / MIB:.2f}"


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else math.nan


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _speed(speeds: Iterable[Speed]) -> float:
    listed: Sequence[Speed] = list(speeds)
    seconds = sum(speed.decode_seconds for speed in listed)
    return sum(speed.steps for speed in listed) / seconds if seconds else math.nan
