"""What `verify` found: a row per prompt, a table, and one line that says it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pertoken.result import Part, Result, plain
from pertoken.testing.divergence import Divergence, Outcome, Verdict

_WORST_FIRST: tuple[Outcome, ...] = ("different", "numerical tie", "identical")
_PLURAL = {
    "different": "different",
    "numerical tie": "numerical tie(s)",
    "identical": "identical",
}
_HEADLINE = {
    "identical": "LOSSLESS",
    "numerical tie": "LOSSLESS up to rounding",
    "different": "NOT LOSSLESS",
}
_HEAD = ("prompt", "tokens", "verdict", "step", "expected", "got", "gap", "top-2 gap", "noise")


@dataclass(frozen=True)
class VerifyRow:
    """One prompt, or one sampled model, and what was found there."""

    name: str
    outcome: Outcome
    new_tokens: int
    """Tokens compared; sequences drawn, for a sampled model."""
    divergence: Divergence | None = None
    expected_text: str = ""
    actual_text: str = ""
    category: str = ""
    p_value: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        row = {name: getattr(self, name) for name in ("name", "category", "outcome", "new_tokens")}
        if self.p_value is not None:
            row["p_value"] = self.p_value
        if self.divergence:
            verdict = Verdict(self.outcome, self.new_tokens, self.divergence)
            row["divergence"] = verdict.to_dict()["divergence"]
            row["expected_text"], row["actual_text"] = self.expected_text, self.actual_text
        return row | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class VerifyReport(Result):
    """The checks of `verify`, their table and their one-line verdict."""

    a: str
    b: str
    checks: list[VerifyRow]
    settings: dict[str, Any] = field(default_factory=dict)
    drafted: int | None = None
    """Tokens that `a` drafted, where it keeps such statistics."""

    _title = "Is it lossless?"

    @property
    def outcome(self) -> Outcome:
        """The worst outcome of all rows."""
        outcomes = {row.outcome for row in self.checks}
        return next((o for o in ("different", "numerical tie") if o in outcomes), "identical")

    @property
    def lossless(self) -> bool:
        """Whether nothing is different: identical, or ties that rounding explains."""
        return self.outcome != "different"

    def line(self) -> str:
        """The verdict in one line."""
        counts = {o: sum(row.outcome == o for row in self.checks) for o in _WORST_FIRST}
        total = sum(row.new_tokens for row in self.checks)
        if self.settings.get("sample"):
            good = f"the model's distribution on {counts['identical']} of {len(self.checks)} models"
            text = f"{self.a}: {good}, {total} draws"
        else:
            found = ", ".join(f"{counts[o]} {_PLURAL[o]}" for o in _WORST_FIRST if counts[o])
            text = f"{self.a} against {self.b}: {found}; {_count(len(self.checks), 'prompt')}"
            text += f", {_count(total, 'token')}"
        if self.drafted == 0:
            text += " (nothing was drafted, so little was tested)"
        return f"{_HEADLINE[self.outcome]}: {text}"

    def rows(self) -> list[dict[str, Any]]:
        """A record per prompt or sampled model, the figures of its divergence among the rest."""
        found = []
        for check in self.checks:
            row = check.to_dict()
            parted = row.pop("divergence", None) or {}
            found.append(plain(row | parted))
        return found

    def _parts(self) -> list[Part]:
        """All checks, and the verdict."""
        sampled = bool(self.settings.get("sample"))
        head = ("model", "draws", "verdict", "p") if sampled else _HEAD
        body = [_sample_cells(row) if sampled else _prompt_cells(row) for row in self.checks]
        return [Part("", [head, *body]), Part("", [], [self.line()])]

    def to_dict(self) -> dict[str, Any]:
        """The verdict, the settings, and all checks as `rows`."""
        return {
            "a": self.a,
            "b": self.b,
            "outcome": self.outcome,
            "lossless": self.lossless,
            "drafted": self.drafted,
            "settings": self.settings,
            "rows": [check.to_dict() for check in self.checks],
        }


def _prompt_cells(row: VerifyRow) -> tuple[str, ...]:
    start = (" ".join(filter(None, (row.name, row.category))), str(row.new_tokens), row.outcome)
    parted = row.divergence
    if parted is None:
        return (*start, *[""] * 6)
    numbers = (parted.gap, parted.top2_gap, parted.noise)
    return (
        *start,
        str(parted.step),
        _token(parted.expected, row.expected_text),
        _token(parted.actual, row.actual_text),
        *("" if number is None else f"{number:.2g}" for number in numbers),
    )


def _sample_cells(row: VerifyRow) -> tuple[str, ...]:
    verdict = "fits" if row.outcome == "identical" else "different"
    value = row.note or ("" if row.p_value is None else f"{row.p_value:.3g}")
    return row.name, str(row.new_tokens), verdict, value


def _token(token: int | None, text: str) -> str:
    if token is None:
        return "(ended)"
    return f"{token} {text!r}" if text else str(token)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
