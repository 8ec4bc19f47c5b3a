"""The bootstrap of reproductions, which methods share."""

from pertoken._bootstrap import (
    Interval,
    bootstrap,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_ratio_of_ratios,
)

__all__ = [
    "Interval",
    "bootstrap",
    "bootstrap_mean",
    "bootstrap_ratio",
    "bootstrap_ratio_of_ratios",
]
