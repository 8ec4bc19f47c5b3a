"""What a speculative run did: forwards, drafted and accepted tokens by source, seconds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class RowTrace:
    """Where the new tokens of one batch row came from.

    sources: one per new token: the drafted node's source, ``"bonus"`` for the model's own token;
    step_lengths: tokens committed by each pass that moved the row, the prefill's first token first.
    """

    sources: list[str] = field(default_factory=list)
    step_lengths: list[int] = field(default_factory=list)


@dataclass
class DecodeStats:
    """Counts and seconds of one `generate` call, summed over the batch.

    forwards: passes after the prefill; new_tokens: all new tokens; first_tokens: those that came
    from the prefill; drafted, accepted: nodes by source; bonus: tokens chosen by the model itself
    in passes after the prefill; row_steps: passes counted per row still decoding; dropped: tokens
    accepted but cut at a stop id or at the length limit.
    """

    forwards: int = 0
    prefills: int = 0
    new_tokens: int = 0
    first_tokens: int = 0
    row_steps: int = 0
    bonus: int = 0
    dropped: int = 0
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    seconds_total: float = 0.0
    seconds_prefill: float = 0.0
    seconds_draft: float = 0.0
    seconds_verify: float = 0.0

    @property
    def accepted_per_forward(self) -> float:
        """Tokens committed per verification pass and row; plain decoding has 1.0."""
        tokens = self.new_tokens - self.first_tokens
        return tokens / self.row_steps if self.row_steps else float("nan")

    @property
    def draft_share(self) -> float:
        """Share of the decoding time outside the model: drafting, walking, keeping rows."""
        seconds = self.seconds_draft + self.seconds_verify
        return self.seconds_draft / seconds if seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of the whole call, prefill included."""
        return self.new_tokens / self.seconds_total if self.seconds_total else float("nan")
