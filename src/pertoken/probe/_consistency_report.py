"""What became of marked words, as a table, a frame, JSON, a plot and a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from pertoken._bootstrap import Interval, bootstrap_mean
from pertoken._extras import need
from pertoken._html import report
from pertoken.probe._artifacts import ARTIFACTS, OTHER
from pertoken.result import Part, Result, figure, plain

__all__ = ["OUTCOMES", "ConsistencyReport", "Reply", "Trial"]

OUTCOMES = ("unchanged", "replaced", "different")
"""What may become of a target that is found in a reply; different is a phantom edit."""
_SHOWN = 5  # replies without a target's place that the page shows


@dataclass(frozen=True)
class Trial:
    """One target: what stands in its place, and the tokens on both sides.

    masked: with the intervention. outcome: one of `OUTCOMES`, or "unparsed". artifact: the kind of
    a phantom edit. bracketed: the reply has it in brackets.
    """

    text: int
    target: str
    masked: bool
    outcome: str
    artifact: str | None = None
    written: str | None = None
    bracketed: bool = False
    ids_before: Sequence[int] = ()
    pieces_before: Sequence[str] = ()
    ids_after: Sequence[int] = ()
    pieces_after: Sequence[str] = ()


@dataclass(frozen=True)
class Reply:
    """One reply: its ids as they were written, words besides the targets that it changed, and the
    share of its tokens that the tokenizer would not have written."""

    text: int
    masked: bool
    ids: Sequence[int]
    reply: str
    changed: int
    noncanonical: float


class ConsistencyReport(Result):
    """What `token_consistency` found: `trials` (one a target), `replies` and `settings`."""

    _title = "Replaced words and their tokens"

    def __init__(
        self, trials: Sequence[Trial], replies: Sequence[Reply], settings: dict[str, Any]
    ) -> None:
        self.trials, self.replies, self.settings = list(trials), list(replies), settings

    @property
    def arms(self) -> list[bool]:
        """Whether without the mask, and with it."""
        return sorted({trial.masked for trial in self.trials})

    def of(self, masked: bool = False, *, parsed: bool = True) -> list[Trial]:
        """The trials of an arm; parsed: only those whose target is found in the reply."""
        return [
            trial
            for trial in self.trials
            if trial.masked == masked and not (parsed and trial.outcome == "unparsed")
        ]

    def parse_rate(self, masked: bool = False) -> float:
        """Share of targets whose place is found in the reply."""
        return len(self.of(masked)) / len(self.of(masked, parsed=False))

    def share(self, outcome: str, masked: bool = False) -> float:
        """Share of an outcome among the parsed trials; NaN where there is none."""
        found = self.of(masked)
        return _mean([trial.outcome == outcome for trial in found])

    def interval(self, outcome: str, masked: bool = False) -> Interval | None:
        """95 % interval of `share`, over trials."""
        found = self.of(masked)
        if not found:
            return None
        return bootstrap_mean([float(trial.outcome == outcome) for trial in found])

    def artifacts(self, masked: bool = False) -> dict[str, int]:
        """How many phantom edits are of each kind."""
        counts = Counter(trial.artifact for trial in self.of(masked) if trial.artifact)
        return {name: counts[name] for name in (*ARTIFACTS, OTHER)}

    def lengths(self, masked: bool = False) -> dict[str, float]:
        """Shares of the phantom edits by their numbers of tokens; NaN without one."""
        pairs = [
            (len(trial.ids_before), len(trial.ids_after))
            for trial in self.of(masked)
            if trial.outcome == "different"
        ]
        return {
            "one to one": _mean([pair == (1, 1) for pair in pairs]),
            "as many": _mean([before == after for before, after in pairs]),
            "more": _mean([before < after for before, after in pairs]),
            "fewer": _mean([before > after for before, after in pairs]),
        }

    def noncanonical(self, masked: bool = False) -> dict[str, float]:
        """Share of tokens, and of replies with any, that are not the tokenizer's own."""
        own = [reply for reply in self.replies if reply.masked == masked]
        tokens = sum(len(reply.ids) for reply in own)
        written = sum(reply.noncanonical * len(reply.ids) for reply in own)
        return {
            "tokens": written / tokens if tokens else float("nan"),
            "replies": _mean([reply.noncanonical > 0 for reply in own]),
        }

    def rows(self) -> list[dict[str, Any]]:
        """A record per trial."""
        return [plain(asdict(trial)) for trial in self.trials]

    def to_dict(self) -> dict[str, Any]:
        """Settings, the summary of each arm, every trial and every reply."""
        arms = [
            {
                "masked": masked,
                "trials": len(self.of(masked, parsed=False)),
                "parse_rate": self.parse_rate(masked),
                **{
                    outcome: {"share": self.share(outcome, masked), "interval": interval}
                    for outcome in OUTCOMES
                    for interval in [self.interval(outcome, masked)]
                },
                "artifacts": self.artifacts(masked),
                "lengths": self.lengths(masked),
                "noncanonical": self.noncanonical(masked),
            }
            for masked in self.arms
        ]
        found: dict[str, Any] = plain(
            {
                "settings": self.settings,
                "arms": arms,
                "trials": self.rows(),
                "replies": [asdict(reply) for reply in self.replies],
            }
        )
        return found

    def plot(self) -> Any:
        """Outcomes of each arm as shares of the parsed trials (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        bars = [
            graph.Bar(
                name=outcome,
                x=[_arm(masked) for masked in self.arms],
                y=[self.share(outcome, masked) for masked in self.arms],
            )
            for outcome in OUTCOMES
        ]
        axis = {"title": "share of parsed trials", "range": [0, 1]}
        return figure(bars, barmode="stack", yaxis=axis)

    def _parts(self) -> list[Part]:
        outcomes = [["", "trials", "parsed", *OUTCOMES, "95 % of different"]]
        kinds = [["kind", *map(_arm, self.arms), "example"]]
        lengths = [["", "one to one", "as many", "more", "fewer"]]
        canonical = [["", "of tokens", "of replies"]]
        for masked in self.arms:
            found = self.interval("different", masked)
            shares = [_percent(self.share(outcome, masked)) for outcome in OUTCOMES]
            count = str(len(self.of(masked, parsed=False)))
            ends = f"{found[0]:.1%}-{found[1]:.1%}" if found else "-"
            rate = _percent(self.parse_rate(masked))
            outcomes.append([_arm(masked), count, rate, *shares, ends])
            lengths.append([_arm(masked), *map(_percent, self.lengths(masked).values())])
            canonical.append([_arm(masked), *map(_percent, self.noncanonical(masked).values())])
        for name in (*ARTIFACTS, OTHER):
            counts = [str(self.artifacts(masked)[name]) for masked in self.arms]
            kinds.append([name, *counts, ARTIFACTS.get(name, "other ids, the same pieces")])
        return [
            Part("What became of the marked words", outcomes, ["shares of the parsed trials"]),
            Part("Phantom edits by kind", kinds),
            Part("Phantom edits by tokens before and after", lengths),
            Part("Written tokens that are not the tokenizer's own", canonical),
        ]

    def _page(self) -> str:
        """The tables, the first prompt, and replies that could not be read."""
        lost = {(trial.text, trial.masked) for trial in self.trials if trial.outcome == "unparsed"}
        shown = [reply for reply in self.replies if (reply.text, reply.masked) in lost][:_SHOWN]
        tables = "\n".join(part.html() for part in self._parts())
        prompt = escape(str(self.settings.get("first_prompt", "")))
        replies = "\n".join(f"<pre>{escape(reply.reply)}</pre>" for reply in shown)
        unread = f"<h2>Replies without a target's place</h2>\n{replies}" if shown else ""
        main = f"{tables}\n<h2>The first prompt</h2>\n<pre>{prompt}</pre>\n{unread}"
        return report("pertoken probe consistency", self._title, main)


def _arm(masked: bool) -> str:
    return "masked" if masked else "as it is"


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _percent(share: float) -> str:
    return "-" if share != share else f"{share:.1%}"
