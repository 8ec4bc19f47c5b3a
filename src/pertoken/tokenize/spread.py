"""Why languages differ, and what evens them out: power law, optimal vocabulary, F test, regression.

Counts fall with the vocabulary as CTC = a · V^b, so the vocabulary at which a language meets a
target count is V* = (target / a)^(1 / b). The paper fits the law by least squares on logarithms,
to vocabularies of 8,192 and more. Of a small vocabulary the 256 bytes are a large part, and they
shorten nothing; there the law holds for the tokens that were learnt, V - alphabet (our reading).
The paper compares the spread of the counts over languages, at one size for all and at each one's
own, by an F test of two variances. What the differences go with is told by a linear regression.

Paper: Arnett et al., arXiv 2510.21909.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pertoken._extras import need
from pertoken.errors import PertokenError
from pertoken.result import Part, Result, plain

__all__ = [
    "PowerLaw",
    "Regression",
    "SpreadTest",
    "optimal_vocabulary",
    "regression",
    "spread_test",
]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw(Result):
    """CTC = a · (V - alphabet)^b of one language, and the vocabulary that meets the target.

    r2: share of the variance of log CTC that the law explains.
    vocabulary: V* in tokens, not rounded; NaN where the counts do not fall (b >= 0). Outside
        low … high, the sizes that were measured, it is a guess.
    """

    a: float
    b: float
    r2: float
    target: float
    vocabulary: float
    low: float
    high: float
    alphabet: int = 0

    _title = "Counts over the vocabulary"

    def __call__(self, vocabulary: float) -> float:
        """The count that the law expects at a vocabulary."""
        return float(self.a * (vocabulary - self.alphabet) ** self.b)

    @property
    def measured(self) -> bool:
        """Whether V* lies within the sizes that were measured."""
        return self.low <= self.vocabulary <= self.high

    def to_dict(self) -> dict[str, Any]:
        """The fields, and `measured`."""
        found: dict[str, Any] = plain(asdict(self) | {"measured": self.measured})
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One record: `to_dict`."""
        return [self.to_dict()]


def optimal_vocabulary(
    counts: Mapping[int, float] | Mapping[float, float], target: float, alphabet: int = 0
) -> PowerLaw:
    """The vocabulary at which a language is expected to take `target` tokens.

    counts: corpus token count by vocabulary size, of one language and one kind of tokenizer; two
        sizes at least.
    alphabet: tokens that every size has, bytes and special tokens; 0 is the paper's law.

    Raises PertokenError for fewer sizes, for sizes that are not above the alphabet, and for counts
    that are not positive.

    >>> law = optimal_vocabulary({1024: 8000, 4096: 4000, 16384: 2000}, target=3000)
    >>> round(law.b, 3), round(law.r2, 3), round(law.vocabulary)
    (-0.5, 1.0, 7282)
    """
    if len(counts) < 2:
        raise PertokenError(
            f"a power law takes counts at two vocabularies or more, not {len(counts)}"
        )
    if target <= 0 or any(count <= 0 for count in counts.values()):
        raise PertokenError("a power law takes counts and a target above 0")
    if min(counts) <= alphabet:
        raise PertokenError(
            f"a power law takes sizes above the alphabet of {alphabet}, got {min(counts):g}"
        )
    x = np.log(np.array(list(counts), dtype=np.float64) - alphabet)
    y = np.log(np.array(list(counts.values()), dtype=np.float64))
    b, log_a = np.polyfit(x, y, 1)
    rest = y - (log_a + b * x)
    r2 = _r2(y, rest)
    falls = b < -1e-12
    best = math.exp(min((math.log(target) - log_a) / b, 700.0)) if falls else math.nan
    a, low, high = math.exp(log_a), min(counts), max(counts)
    return PowerLaw(a, float(b), r2, target, alphabet + best, low, high, alphabet)


@dataclass(frozen=True)
class SpreadTest(Result):
    """F test of two variances.

    f: the first variance over the second; degrees: of freedom, of each. p: two-sided chance of a
    ratio as far from 1, of two samples from normal distributions of equal variance.
    """

    f: float
    degrees: tuple[int, int]
    p: float

    _title = "F test of two spreads"

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        found: dict[str, Any] = plain(asdict(self))
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One record: `to_dict`."""
        return [self.to_dict()]


def spread_test(first: Sequence[float] | Floats, second: Sequence[float] | Floats) -> SpreadTest:
    """Whether two samples, such as the counts of all languages in two settings, spread alike.

    Needs scipy (extra `premiums`). Raises PertokenError where a sample has fewer than two values
    or the second does not vary.

    >>> test = spread_test([1, 2, 3, 4, 5], [2.5, 3, 3.5, 3, 2.5])
    >>> round(test.f, 1), test.degrees, round(test.p, 3)
    (14.3, (4, 4), 0.025)
    """
    if min(len(first), len(second)) < 2:
        raise PertokenError("an F test takes two values or more in each sample")
    below = float(np.var(second, ddof=1))
    if below == 0:
        raise PertokenError("the second sample does not vary: there is nothing to compare with")
    f = float(np.var(first, ddof=1)) / below
    degrees = (len(first) - 1, len(second) - 1)
    law = need("scipy.stats", "premiums").f(*degrees)
    return SpreadTest(f, degrees, float(min(1.0, 2 * min(law.cdf(f), law.sf(f)))))


@dataclass(frozen=True)
class Regression(Result):
    """An ordinary least-squares fit with an intercept.

    coefficients: by column; a factor that is text has a column for each of its values but the
        commonest, and one that is a number is in standard deviations (so coefficients compare).
    errors: their standard errors.
    r2, adjusted_r2: share of the variance that all factors explain together.
    alone: the same for each factor by itself.
    n: rows; intercept: of the fit.
    """

    coefficients: dict[str, float]
    errors: dict[str, float]
    intercept: float
    r2: float
    adjusted_r2: float
    alone: dict[str, float]
    n: int

    _title = "What the values go with"

    def to_dict(self) -> dict[str, Any]:
        """The rows, and the figures of all factors together."""
        whole = {name: getattr(self, name) for name in ("intercept", "r2", "adjusted_r2", "n")}
        return {"rows": self.rows(), **plain(whole)}

    def rows(self) -> list[dict[str, Any]]:
        """A record per column."""
        return [
            {
                "column": column,
                "coefficient": value,
                "standard_error": self.errors[column],
                "t": value / self.errors[column] if self.errors[column] else None,
                "r2_alone": self.alone[column.split("=")[0]],
            }
            for column, value in self.coefficients.items()
        ]

    def _parts(self) -> list[Part]:
        """A line per column, then the R² of all together."""
        lines = [["factor", "coefficient", "error", "t", "R² alone"]]
        for row in self.rows():
            t = "-" if row["t"] is None else f"{row['t']:.2f}"
            figures = [f"{row['coefficient']:.3g}", f"{row['standard_error']:.2g}", t]
            lines.append([row["column"], *figures, f"{row['r2_alone']:.3f}"])
        note = f"R² {self.r2:.3f} together, adjusted {self.adjusted_r2:.3f}, {self.n} rows"
        return [Part("", lines, [note])]


def regression(
    values: Sequence[float], factors: Mapping[str, Sequence[float] | Sequence[str]]
) -> Regression:
    """Regress values (counts, premiums) on factors, all together and each alone.

    values: `[rows]`, a language each; factors: for each name `[rows]` numbers or texts, such as
    scripts. Factors that do not vary have a coefficient of 0.

    Raises PertokenError where lengths differ, values do not vary, or there are no more rows than
    columns.

    >>> found = regression([1.0, 3.0, 2.0, 4.1], {"x": [0, 2, 1, 3]})
    >>> round(found.r2, 3), sorted(found.coefficients)
    (0.999, ['x'])
    """
    y = np.asarray(values, dtype=np.float64)
    for name, column in factors.items():
        if len(column) != len(y):
            raise PertokenError(f"factor {name} has {len(column)} rows, the values {len(y)}")
    blocks = {name: _columns(name, column) for name, column in factors.items()}
    names = [column for block in blocks.values() for column in block]
    if len(y) <= len(names) + 1:
        raise PertokenError(f"{len(y)} rows are too few for {len(names)} columns and an intercept")
    if not np.ptp(y):
        raise PertokenError("the values do not vary: there is nothing to explain")
    weights, errors, r2 = _least_squares(
        y, [blocks[name][c] for name in blocks for c in blocks[name]]
    )
    spare = len(y) - 1 - len(names)
    return Regression(
        coefficients=dict(zip(names, weights[1:].tolist(), strict=True)),
        errors=dict(zip(names, errors[1:].tolist(), strict=True)),
        intercept=float(weights[0]),
        r2=r2,
        adjusted_r2=1 - (1 - r2) * (len(y) - 1) / spare,
        alone={name: _least_squares(y, list(block.values()))[2] for name, block in blocks.items()},
        n=len(y),
    )


def _columns(name: str, column: Sequence[Any]) -> dict[str, Floats]:
    if any(isinstance(value, str) for value in column):
        words = [str(value) for value in column]
        kinds = sorted(set(words), key=lambda kind: (-words.count(kind), kind))
        return {
            f"{name}={kind}": np.array([word == kind for word in words], dtype=np.float64)
            for kind in kinds[1:]
        }
    numbers = np.asarray(column, dtype=np.float64)
    spread = numbers.std(ddof=1)
    return {name: (numbers - numbers.mean()) / (spread or 1.0)}


def _least_squares(y: Floats, columns: Sequence[Floats]) -> tuple[Floats, Floats, float]:
    """(weights, standard errors, R²), the intercept first."""
    design = np.column_stack([np.ones_like(y), *columns])
    # The pseudo-inverse gives a column that the others span its share instead of a failure.
    inverse = np.linalg.pinv(design)
    weights = inverse @ y
    rest = y - design @ weights
    spare = max(len(y) - design.shape[1], 1)
    variance = float(rest @ rest) / spare
    errors = np.sqrt(variance * (inverse**2).sum(1))
    return weights, errors, _r2(y, rest)


def _r2(y: Floats, rest: Floats) -> float:
    whole = float(((y - y.mean()) ** 2).sum())
    return 1.0 if whole == 0 else 1 - float((rest**2).sum()) / whole
