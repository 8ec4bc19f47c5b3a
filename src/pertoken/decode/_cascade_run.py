"""What a cascade answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pertoken.result import Part, Result

__all__ = ["CascadeRun"]


@dataclass(frozen=True)
class CascadeRun(Result):
    """What a cascade answered.

    rate: the deferral rate asked for. texts: the answers; scores: of the small model's answers;
    deferred: whether the large model's answer is the one given.
    """

    rate: float
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    scores: tuple[float, ...]
    deferred: tuple[bool, ...]

    _title = "A cascade's answers"

    @property
    def deferral_rate(self) -> float:
        """The share that was deferred."""
        return sum(self.deferred) / len(self.deferred)

    def rows(self) -> list[dict[str, Any]]:
        """A record per prompt: who answered, with what score, and the answer."""
        columns = zip(self.prompts, self.texts, self.scores, self.deferred, strict=True)
        return [
            {
                "answered_by": "large" if deferred else "small",
                "score": score,
                "prompt": prompt,
                "answer": text,
            }
            for prompt, text, score, deferred in columns
        ]

    def to_dict(self) -> dict[str, Any]:
        """The rows, with the rate that was asked for and the one that came out."""
        return {"rate": self.rate, "deferral_rate": self.deferral_rate, "answers": self.rows()}

    def _parts(self) -> list[Part]:
        lines = [["by", "score", "answer"]]
        lines += [
            [row["answered_by"], f"{row['score']:.3f}", " ".join(row["answer"].split())[:60]]
            for row in self.rows()
        ]
        note = f"{sum(self.deferred)} of {len(self.deferred)} deferred; asked for {self.rate:.1%}"
        return [Part("", lines, [note])]
