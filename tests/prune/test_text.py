"""Words, sentences, and cutting words out of a text."""

from __future__ import annotations

from itertools import pairwise

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from pertoken.prune._lexrank import lexrank
from pertoken.prune._text import add_up, join, kept_spans, sentences, words

# Accents, joined emoji, flags, a line break of two characters, Chinese, Korean jamo, a blank with
# an accent on it: what a careless cut would tear.
PIECES = [
    *"ab .!,\n\t",
    "\r\n",
    "é",
    "e\u0301",
    " \u0301",
    "👩‍👩‍👧",
    "🇹🇷",
    "你",
    "ひ",
    "カ",
    "각",
    "\u200d",
]
HARD = st.lists(st.sampled_from(PIECES)).map("".join)
TEXT = HARD | st.text()


def cut(text: str, *kept: int) -> str:
    spans = words(text)
    return join(text, kept_spans(text, spans, [spans[place] for place in kept]))


@given(TEXT)
def test_words_hold_all_but_white_space_and_whole_characters(text: str) -> None:
    spans = words(text)
    clusters = {match.start() for match in regex.finditer(r"\X", text)} | {len(text)}
    last = 0
    for start, end in [*spans, (len(text), len(text))]:
        assert last <= start
        assert not text[last:start].strip()
        assert start in clusters
        assert end in clusters
        last = end


@given(TEXT)
def test_sentences_hold_every_word_once(text: str) -> None:
    spans = words(text)
    found = [place for part in sentences(text, spans) for place in part]
    assert found == list(range(len(spans)))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("One. Two! Three?", 3),
        ("He said “go.” Then left.", 2),
        ("It costs 3.5 dollars, e.g. in Rome. J. Smith paid.", 2),
        ("a line\nwrapped here\nNew line", 2),
        ("head\n\nbody", 2),
        ("今天很好。你呢？", 2),
        ("", 0),
    ],
)
def test_where_sentences_end(text: str, count: int) -> None:
    assert len(sentences(text, words(text))) == count


@given(TEXT)
def test_nothing_dropped_is_the_same_text(text: str) -> None:
    spans = words(text)
    if spans:
        assert cut(text, *range(len(spans))) == text


@given(TEXT, st.data())
def test_what_is_left_are_the_kept_words(text: str, data: st.DataObject) -> None:
    spans = words(text)
    if not spans:
        return
    kept = sorted(data.draw(st.sets(st.integers(0, len(spans) - 1), min_size=1)))
    found = kept_spans(text, spans, [spans[place] for place in kept])
    assert all(low < high for low, high in found)
    assert all(high < low for (_, high), (low, _) in pairwise(found))
    left = "".join(text[low:high] for low, high in found)
    wanted = "".join(text[slice(*spans[place])] for place in kept)
    assert "".join(left.split()) == "".join(wanted.split())
    # Words that white space kept apart are still apart.
    for first, then in pairwise(kept):
        # (A blank that carries an accent is no white space to a reader, but part of a word.)
        if any(spans[place][1] < spans[place + 1][0] for place in range(first, then)):
            between = [
                text[max(low, spans[first][1]) : min(high, spans[then][0])]
                for low, high in found
                if low < spans[then][0] and high > spans[first][1]
            ]
            assert "".join(between).isspace()


def test_lines_stay_lines() -> None:
    text = "# Head\n\nOne two\n  three four\nfive"
    assert cut(text, 0, 2, 5, 6) == "#\n\nOne\n  four\nfive"
    assert cut(text, 1, 6) == "Head\n\nfive"
    assert cut("def f(x):\n    return x\n", 0, 3) == "def\n    x\n"
    assert cut("  a b c  ", 1) == "  b  "


def test_words_without_blanks_are_not_glued() -> None:
    assert cut("to中be", 0, 2) == "to be"
    assert cut("你好吗", 0, 2) == "你吗"
    assert cut("a 中 b", 0, 2) == "a b"


def test_a_token_over_two_words_counts_for_both() -> None:
    sums = [0.0, 0.0, 0.0]
    add_up([(0, 1), (1, 2), (3, 4)], [(0, 2), (2, 3), (2, 4)], [4.0, 8.0, 1.0], sums)
    assert sums == [2.0, 2.0, 1.0]  # white space alone belongs to no word


def test_lexrank_against_the_matrix_written_out() -> None:
    import math

    import torch

    texts = ["a b c", "a b", "c d", "x", "", "a d d"]
    terms = sorted({term for text in texts for term in text.split()})
    idf = [math.log(len(texts) / sum(term in text.split() for text in texts)) for term in terms]
    table = torch.tensor(
        [[text.split().count(t) * w for t, w in zip(terms, idf, strict=True)] for text in texts],
        dtype=torch.float64,
    )
    unit = torch.nn.functional.normalize(table, dim=1)
    alike = unit @ unit.T
    alike[4, 4] = 1.0
    moves = 0.15 / len(texts) + 0.85 * alike / alike.sum(1, keepdim=True)
    values, vectors = torch.linalg.eig(moves.T)
    rank = vectors[:, values.real.argmax()].real
    wanted = rank / rank.mean()
    assert lexrank(texts) == pytest.approx(wanted.tolist(), abs=1e-8)


def test_lexrank_of_one_sentence_and_of_equal_ones() -> None:
    assert lexrank(["alone here"]) == pytest.approx([1.0])
    assert lexrank(["same words", "same words"]) == pytest.approx([1.0, 1.0])
