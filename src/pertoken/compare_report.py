"""What `compare` found: results per prompt and method, the rows of its table, and the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pertoken._extras import need
from pertoken.prompts import Prompt
from pertoken.result import Part, Result, figure, plain
from pertoken.stats_text import LOOPING_SHARE, distinct_ngram_share, repeated_4gram_share
from pertoken.timing import FOREIGN_LIMIT, Spread, spread

if TYPE_CHECKING:
    from pertoken.testing.divergence import Verdict

__all__ = ["REFERENCE", "Comparison", "Decoded", "MethodRow"]

REFERENCE = "plain"
"""Our plain loop: its ids are the right ones and its speed is 1."""


@dataclass
class Decoded:
    """One prompt decoded by one method. Times in seconds; None where a method does not tell."""

    ids: list[int]
    seconds: float
    forwards: int
    """Forward passes behind the one that read the prompt."""
    committed: int
    """New tokens that these passes gave."""
    seconds_draft: float | None = None
    seconds_verify: float | None = None
    sources: list[str] | None = None
    """Where each new token came from; "bonus" is the model's own."""
    step_lengths: list[int] | None = None
    drafted: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    verdict: Verdict | None = None
    loss: float | None = None
    """Minus the text's log-probability under the model (nats), where it was measured."""
    right: bool | None = None
    """Whether the text gives the prompt's answer, where it has one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        own = {k: v for k, v in vars(self).items() if k != "verdict"}
        verdict = self.verdict.to_dict() if self.verdict else {"outcome": None, "divergence": None}
        return {
            **own,
            "outcome": verdict["outcome"],
            "divergence": verdict["divergence"],
        }


@dataclass(frozen=True)
class MethodRow:
    """One method over all prompts, or over some. Ratios are to the reference; NaN is unknown."""

    method: str
    prompts: int
    identical: int
    ties: int
    different: int
    tokens_per_second: float
    speed_up: float
    """Ratio of the sums: all tokens over all seconds, here and in plain decoding."""
    spread: Spread
    """The same ratio prompt by prompt: median and quartiles."""
    accepted_per_forward: float
    draft_share: float | None
    """Drafting and bookkeeping over all the time behind the prompt."""
    speed_up_not_looping: float
    """The ratio over outputs that hardly repeat themselves."""
    lossless: bool = True
    """Whether the method promises the reference's text; if not, nothing is called different."""
    perplexity: float = math.nan
    """Of the texts under the model itself, as are the next two known where some method is lossy."""
    distinct_2: float = math.nan
    """Distinct pairs of tokens over all pairs, in all texts together."""
    repeated_4: float = math.nan
    """Share of the 4-grams of a text that occurred in it before, mean over the texts."""
    right: float = math.nan
    """Share of right answers among the prompts that have one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, None for what is unknown."""
        found: dict[str, Any] = plain(asdict(self))
        return found


@dataclass
class Comparison(Result):
    """What `compare` found: for each prompt what each method did, and the figures over them."""

    methods: tuple[str, ...]
    prompts: list[Prompt]
    prompt_tokens: list[int]
    results: list[dict[str, Decoded]]
    """One per prompt: method -> what it did."""
    settings: dict[str, Any]
    pieces: Callable[[Sequence[int]], list[str]]
    """The text of each token of a list of ids."""
    lossy: frozenset[str] = frozenset()
    """Methods that do not promise the reference's text."""

    @cached_property
    def method_rows(self) -> list[MethodRow]:
        """The figures of each method, in the order asked for."""
        return [self.row(method) for method in self.methods]

    @property
    def lossless(self) -> bool:
        """Whether no method that promises the plain text wrote another, rounding aside."""
        return not any(row.different for row in self.method_rows)

    @property
    def categories(self) -> list[str]:
        """The categories of the prompts, in the order of their first prompt."""
        return list(dict.fromkeys(p.category for p in self.prompts if p.category))

    @property
    def looping(self) -> list[bool]:
        """Per prompt, whether its plain text repeats itself so much that copying is flattered."""
        return [
            repeated_4gram_share(by_method[REFERENCE].ids) >= LOOPING_SHARE
            for by_method in self.results
        ]

    def row(self, method: str, category: str | None = None) -> MethodRow:
        """What one method did over all prompts, or over those of one category."""
        chosen = [index for index, p in enumerate(self.prompts) if category in (None, p.category)]
        own = [self.results[index][method] for index in chosen]
        outcomes = [d.verdict.outcome if d.verdict else "" for d in own]
        seconds = sum(d.seconds for d in own)
        promised = method not in self.lossy
        steady = [index for index in chosen if not self.looping[index]]
        return MethodRow(
            method=method,
            prompts=len(chosen),
            identical=outcomes.count("identical"),
            ties=outcomes.count("numerical tie"),
            different=outcomes.count("different"),
            tokens_per_second=_ratio(sum(len(d.ids) for d in own), seconds),
            speed_up=self._speed_up(method, chosen),
            spread=spread([self._speed_up(method, [index]) for index in chosen]),
            accepted_per_forward=_ratio(
                sum(d.committed for d in own), sum(d.forwards for d in own)
            ),
            draft_share=_draft_share(own),
            speed_up_not_looping=self._speed_up(method, steady),
            lossless=promised,
            **(_quality(own) if self.lossy else {}),
        )

    def rows(self) -> list[dict[str, Any]]:
        """A record per method: its figures, the quartiles of `spread` as speed_up_low … _high."""
        rows = [row.to_dict() for row in self.method_rows]
        return [
            {
                **{key: value for key, value in row.items() if key != "spread"},
                **{f"speed_up_{key}": value for key, value in row["spread"].items()},
            }
            for row in rows
        ]

    def plot(self) -> Any:
        """How many times faster than plain decoding, a bar per method (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        rows = self.method_rows
        bars = graph.Bar(x=[row.method for row in rows], y=[row.speed_up for row in rows])
        return figure(bars, yaxis={"title": "x plain", "rangemode": "tozero"})

    def _parts(self) -> list[Part]:
        """The table, by category below it where there are any, and notes."""
        some_loop = any(self.looping) and not all(self.looping)
        head = ["method", "identical", *self.quality_head, "tokens/s", "x plain", "(middle half)"]
        head += ["not looping"] if some_loop else []
        body = [self._cells(row, some_loop) for row in self.method_rows]
        parts = [Part("", [[*head, "tokens/forward", "drafting"], *body])]
        if len(self.categories) > 1:
            parts.append(Part("", self.category_cells()))
        return [*parts, Part("", [], self.notes())]

    @property
    def quality_head(self) -> list[str]:
        """Heads of the columns of quality; none where all methods are lossless."""
        if not self.lossy:
            return []
        answered = any(prompt.answer for prompt in self.prompts)
        return ["perplexity", "distinct-2", "repeated", *(["right"] if answered else [])]

    def quality_cells(self, row: MethodRow) -> list[str]:
        """The cells under `quality_head`."""
        found = [number(row.perplexity), number(row.distinct_2), percent(row.repeated_4)]
        return [*found, percent(row.right)][: len(self.quality_head)]

    def category_cells(self) -> list[list[str]]:
        """Head and lines of the table by category: x plain of every method but the reference."""
        others = [method for method in self.methods if method != REFERENCE]
        lines = [["x plain by category", "prompts", *others]]
        for category in self.categories:
            rows = [self.row(method, category) for method in others]
            count = sum(p.category == category for p in self.prompts)
            lines.append([category, str(count), *(number(row.speed_up) for row in rows)])
        return lines

    def notes(self) -> list[str]:
        """What has to be known to read the table."""
        run = self.settings
        chosen = run.get("budget")
        budget = "published budgets" if chosen is None else f"budget {chosen}"
        lines = [
            f"{len(self.prompts)} prompts, {sum(len(r[REFERENCE].ids) for r in self.results)} new "
            f"tokens each method, at most {run['max_new_tokens']} a prompt; {run['model']}, "
            f"{run['dtype']}, {run['device']}, greedy, {budget}"
        ]
        looping = sum(self.looping)
        if looping:
            lines.append(
                f"{looping} of the texts repeat themselves (30 % of their 4-grams or more), "
                "which flatters methods that copy"
            )
        if any(row.ties for row in self.method_rows):
            lines.append("tie: two tokens nearer to each other than this dtype's rounding")
        if self.lossy:
            names = ", ".join(name for name in self.methods if name in self.lossy)
            lines.append(
                f"not lossless: {names}, seed {run.get('seed', 0)}; judge the text by perplexity "
                "under the model, distinct pairs of tokens and repeated 4-grams"
            )
        if not self.lossless:
            names = ", ".join(row.method for row in self.method_rows if row.different)
            lines.append(f"DIFFERENT text from {names}: see `pertoken verify`")
        foreign = run.get("foreign_share_max")
        if foreign is not None and foreign > FOREIGN_LIMIT:
            lines.append(
                f"other programs used up to {foreign:.0%} of the machine: "
                "take the speeds with care, or run again when it is quiet"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain JSON values: settings, rows, and each prompt with its results."""
        return {
            "settings": self.settings,
            "lossless": self.lossless,
            "rows": [row.to_dict() for row in self.method_rows],
            "by_category": {
                category: [self.row(method, category).to_dict() for method in self.methods]
                for category in self.categories
            },
            "prompts": [
                {
                    **asdict(prompt),
                    "prompt_tokens": tokens,
                    "looping": looping,
                    "results": {
                        name: {"text": "".join(self.pieces(d.ids)), **d.to_dict()}
                        for name, d in by_method.items()
                    },
                }
                for prompt, tokens, looping, by_method in zip(
                    self.prompts, self.prompt_tokens, self.looping, self.results, strict=True
                )
            ],
        }

    def _page(self) -> str:
        """The table, and each text with its tokens by origin."""
        from pertoken.compare_html import page

        return page(self)

    def _speed_up(self, method: str, chosen: Sequence[int]) -> float:
        """Tokens per second over the reference's, both over the chosen prompts."""

        def speed(name: str) -> float:
            done = [self.results[index][name] for index in chosen]
            return _ratio(sum(len(d.ids) for d in done), sum(d.seconds for d in done))

        return _ratio(speed(method), speed(REFERENCE))

    def _cells(self, row: MethodRow, some_loop: bool) -> list[str]:
        middle = f"{number(row.spread.low)} - {number(row.spread.high)}"
        cells = [row.method, identical(row), *self.quality_cells(row)]
        cells += [number(row.tokens_per_second, 1)]
        cells += [number(row.speed_up), middle if row.prompts > 1 else ""]
        cells += [number(row.speed_up_not_looping)] if some_loop else []
        return [*cells, number(row.accepted_per_forward), percent(row.draft_share)]


def identical(row: MethodRow) -> str:
    """How many texts are the reference's: "7 of 7", "6 of 7, 1 tie", "5 of 7, 2 DIFFERENT".

    Of a method that does not promise it: "not lossless".
    """
    if not row.lossless:
        return "not lossless"
    text = f"{row.identical} of {row.prompts}"
    if row.ties:
        text += f", {row.ties} tie" + ("s" if row.ties > 1 else "")
    return text + (f", {row.different} DIFFERENT" if row.different else "")


def number(value: float, digits: int = 2) -> str:
    """A number for a table, "-" where it is unknown."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def percent(share: float | None) -> str:
    """A share of time for a table.

    >>> percent(0.034), percent(None)
    ('3.4 %', '-')
    """
    return f"{100 * share:.1f} %" if share is not None and math.isfinite(share) else "-"


def _quality(results: Sequence[Decoded]) -> dict[str, float]:
    """The figures of `MethodRow` that tell how good texts are."""
    losses = [(d.loss, len(d.ids)) for d in results if d.loss is not None]
    loss = _ratio(sum(one for one, _ in losses), sum(count for _, count in losses))
    right = [d.right for d in results if d.right is not None]
    return {
        "perplexity": math.exp(loss) if math.isfinite(loss) else math.nan,
        "distinct_2": distinct_ngram_share([d.ids for d in results], 2),
        "repeated_4": _ratio(sum(repeated_4gram_share(d.ids) for d in results), len(results)),
        "right": _ratio(sum(right), len(right)),
    }


def _draft_share(results: Sequence[Decoded]) -> float | None:
    known = [(d.seconds_draft, d.seconds_verify) for d in results]
    drafting = [draft for draft, _ in known if draft is not None]
    verifying = [verify for _, verify in known if verify is not None]
    if len(drafting) < len(results) or len(verifying) < len(results):
        return None
    return _ratio(sum(drafting), sum(drafting) + sum(verifying))


def _ratio(over: float, under: float) -> float:
    return over / under if under else float("nan")
