"""Repeats are counted as repeats, against a plain definition."""

from hypothesis import given
from hypothesis import strategies as st

from pertoken.stats_text import repeated_4gram_share, repeated_ngram_share


@given(st.lists(st.integers(0, 2), max_size=20), st.integers(1, 4))
def test_share_counts_the_grams_seen_before(ids: list[int], n: int) -> None:
    seen: list[list[int]] = []
    repeats = 0
    for start in range(len(ids) - n + 1):
        gram = ids[start : start + n]
        repeats += gram in seen
        seen.append(gram)
    assert abs(repeated_ngram_share(ids, n) - (repeats / len(seen) if seen else 0)) < 1e-12


def test_short_and_looping_outputs() -> None:
    assert repeated_4gram_share([1, 2, 3]) == 0
    assert repeated_4gram_share(range(100)) == 0
    assert repeated_4gram_share([5] * 100) == 96 / 97
