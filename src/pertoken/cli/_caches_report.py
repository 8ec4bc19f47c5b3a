"""What `compare-caches` found: its table, its records, and its page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pertoken._extras import need
from pertoken.cache.fidelity_report import HEAD, Fidelity, table_cells
from pertoken.result import Part, Result, figure
from pertoken.timing import FOREIGN_LIMIT

__all__ = ["CacheComparison", "Row"]


@dataclass(frozen=True)
class Row:
    """One line of the table: a cache with a budget (None: it keeps everything) and its result."""

    cache: str
    budget: int | None
    result: Fidelity

    @property
    def label(self) -> str:
        """The cache and its budget in one."""
        return self.cache if self.budget is None else f"{self.cache} {self.budget}"

    def by_turn(self) -> list[float]:
        """Mean KL of each turn of the conversation, nats."""
        (text,) = self.result.texts
        found, start = [], 0
        for answer in text.answers:
            part = text.kl[start : start + len(answer)]
            found.append(sum(part) / len(part))
            start += len(answer)
        return found


@dataclass(frozen=True)
class CacheComparison(Result):
    """Several caches on one conversation; the order is that of the table."""

    caches: list[Row]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Settings, and each cache with all its steps."""
        results = [
            {"cache": row.cache, "budget": row.budget, **row.result.to_dict()}
            for row in self.caches
        ]
        return {"settings": self.settings, "results": results}

    def rows(self) -> list[dict[str, Any]]:
        """A record per cache and budget, see `Fidelity.summary`."""
        return [
            {"cache": row.cache, "budget": row.budget, **row.result.summary()}
            for row in self.caches
        ]

    def plot(self) -> Any:
        """KL from the full cache turn by turn, a line per cache (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        curves = [graph.Scatter(y=row.by_turn(), name=row.label) for row in self.caches]
        return figure(curves, xaxis={"title": "turn"}, yaxis={"title": "KL, nats", "type": "log"})

    def cells(self) -> list[list[str]]:
        """Head and lines of the table, the full cache first."""
        name, *head = HEAD
        full, *body = table_cells({row.label: row.result for row in self.caches})
        lines = [[name, "budget", *head], [full[0], "", *full[1:]]]
        for row, (_, *values) in zip(self.caches, body, strict=True):
            lines.append([row.cache, "" if row.budget is None else str(row.budget), *values])
        return lines

    def notes(self) -> list[str]:
        """What has to be known to read the table."""
        settings = self.settings
        run = self.caches[0].result.settings
        judged = len(self.caches[0].result.kl)
        whose = (
            "of the file"
            if settings["answers"] == "file"
            else "that the full cache writes greedily"
        )
        lines = [
            f"{settings['turns']} turns, {judged} tokens of answers {whose}, at most "
            f"{run['new_tokens']} a turn, {settings['tokens']} tokens in all at most; "
            f"{settings['name']}, {run['dtype']}, {run['device']}, {run['threads']} threads",
            "KL: from the full cache's next-token law, nats, mean and largest of a step, fed the "
            "same tokens one by one; token match: writing freely",
            "held: between two forwards, at most; peak: within one too, where the cache tells it; "
            "a question is read in one forward unless --chunk is given",
        ]
        foreign = settings.get("foreign_share")
        if foreign is not None and foreign > FOREIGN_LIMIT:
            lines.append(
                f"other programs used {foreign:.0%} of the machine: take the speeds with care"
            )
        return lines

    def _parts(self) -> list[Part]:
        return [Part("", self.cells()), Part("", [], self.notes())]

    def _page(self) -> str:
        from pertoken.cli._caches_page import page

        return page(self)
