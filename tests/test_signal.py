"""TokenSignal: values stay with their characters, whatever is done to them."""

from __future__ import annotations

import io
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pertoken.errors import PertokenError
from pertoken.signal import TokenSignal
from pertoken.testing import ByteTokenizer


def signal(tokens, values, **kwargs):
    ends = np.cumsum([len(token) for token in tokens]).astype(int).tolist()
    offsets = list(zip([0, *ends[:-1]], ends, strict=True)) if tokens else []
    return TokenSignal("".join(tokens), values, offsets, kwargs.pop("name", "score"), **kwargs)


class _Text(HTMLParser):
    """The text of the first paragraph."""

    def __init__(self):
        super().__init__()
        self.inside = False
        self.text = None

    def handle_starttag(self, tag, attrs):
        if tag == "p" and self.text is None:
            self.inside, self.text = True, ""

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "p"

    def handle_data(self, data):
        if self.inside:
            self.text += data


TOKENS = st.lists(st.text(max_size=4), max_size=12)


@given(TOKENS, st.randoms())
def test_text_and_values_survive_everything(tokens, random):
    values = [random.choice([0.0, 1.5, -2.0, math.nan]) for _ in tokens]
    made = signal(tokens, values)
    assert made.tokens == tokens
    back = TokenSignal.from_json(made.to_json())
    assert back.tokens == tokens
    assert np.array_equal(back.values, made.values, equal_nan=True)
    clean = made.text.encode("utf-8", "replace").decode()
    reader = _Text()
    reader.feed(made.to_html())
    # A parser makes one newline of both kinds of line end and drops the first of a paragraph.
    assert reader.text.split() == clean.split()


@given(TOKENS)
def test_words_keep_the_text_and_the_sum(tokens):
    made = signal(tokens, np.arange(1.0, len(tokens) + 1))
    words = made.words()
    assert "".join(words.tokens) == made.text
    assert math.isclose(words.values.sum(), made.values.sum())
    assert len(words) <= max(len(tokens), 0)


def test_words_join_what_shares_one():
    made = signal(["un", "like", "ly", " it", " is", "n't", "  ", "so"], np.arange(8.0))
    assert made.words().tokens == ["unlikely", " it", " isn't  ", "so"]
    assert made.words().values.tolist() == [3.0, 3.0, 15.0, 7.0]
    assert made.words("mean").values.tolist() == [1.0, 3.0, 5.0, 7.0]
    assert made.words("max").values.tolist() == [2.0, 3.0, 6.0, 7.0]
    assert signal(["a", "b"], [1.0, -3.0]).words("max").values.tolist() == [-3.0]
    with pytest.raises(PertokenError, match="'median'"):
        made.words("median")


def test_words_of_unmeasured_tokens():
    made = signal(["a", "b", " c"], [math.nan, 2.0, math.nan])
    assert made.words().values[0] == 2.0
    assert math.isnan(made.words().values[1])


def test_from_ids_with_characters_cut_in_two():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("aça")
    made = TokenSignal.from_ids(tokenizer, ids, [1.0, 2.0, 3.0, 4.0], "score")
    assert made.text == "aça"
    assert made.tokens == ["a", "", "ç", "a"]
    assert made.words().values.tolist() == [10.0]


@pytest.mark.parametrize("tokens", [["yes", " ", "", "京"], ["yes", "", " 京", ""]])
def test_a_token_inside_a_character_counts_for_the_word_of_the_character(tokens):
    made = signal(tokens, [0.0, 1.0, 2.0, 3.0])
    inside = [1.0, 5.0] if tokens[1] else [0.0, 6.0]
    assert made.words().values.tolist() == inside
    assert "".join(made.words().tokens) == "yes 京"


def test_targets():
    made = signal(["a", "b"], [[1.0, 3.0], [math.nan, -5.0]], targets=("x", "y"))
    assert made.total().values.tolist() == [2.0, -5.0]
    assert made.target("y").values.tolist() == [3.0, -5.0]
    assert made.target(0).values[0] == 1.0
    assert [top.token for top in made.top()] == ["b", "a"]
    assert made.words().values.tolist() == [[1.0, -2.0]]
    assert made.to_html().count("<details>") == 2
    with pytest.raises(PertokenError, match="'z' is no target"):
        made.target("z")
    with pytest.raises(PertokenError, match="no target 2"):
        made.target(2)


def test_top_leaves_out_what_was_not_measured():
    made = signal(["a", "b", "c"], [math.nan, 0.5, -2.0])
    assert [(top.token, top.index) for top in made.top(5)] == [("c", 2), ("b", 1)]


def test_frame():
    pytest.importorskip("pandas")
    frame = signal(["a", " b"], [0.5, math.nan]).to_dataframe()
    assert list(frame.columns) == ["token", "start", "end", "value"]
    assert frame.start.tolist() == [0, 1]
    both = signal(["a"], [[1.0, 2.0]], targets=("x", "x")).to_dataframe()
    assert list(both.columns) == ["token", "start", "end", "x", "x"]


def test_plot():
    pytest.importorskip("plotly")
    assert signal(["a", "b"], [0.5, math.nan]).plot().data[0].type == "bar"
    assert signal(["a"], [[1.0, 2.0]], targets=("x", "y")).plot().data[0].type == "heatmap"


def test_terminal():
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="truecolor", width=60).print(
        signal(["hot", " cold", " none"], [1.0, -1.0, 0.0], name="warmth")
    )
    text = out.getvalue()
    assert "48;2;230;120;0mhot" in text
    assert "48;2;0;100;200m cold" in text
    assert "warmth: -1 to 1" in text
    plain = io.StringIO()
    Console(file=plain, width=60).print(signal([], []))
    assert "nothing measured" in plain.getvalue()


def test_a_page_is_safe_from_its_text():
    made = signal(["<script>alert(1)</script>", "\ud800"], [1.0, 2.0], name='a"b<c>')
    for page in (made.to_html(), made._repr_html_().encode("utf-8", "replace").decode()):
        assert "<script>" not in page
        assert "&lt;script&gt;" in page


def test_written_whole(tmp_path):
    made = signal(["a"], [1.0])
    made.to_html(tmp_path / "page.html")
    made.to_json(tmp_path / "signal.json")
    assert json.loads((tmp_path / "signal.json").read_text())["text"] == "a"
    with pytest.raises(PertokenError, match="no folder"):
        made.to_html(tmp_path / "none" / "page.html")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ab", [1.0], [(0, 1), (1, 2)], "s"), "do not fit 2 tokens"),
        (("ab", [[1.0]], [(0, 1)], "s"), "do not fit 1 tokens"),
        (("ab", [[1.0]], [(0, 1)], "s", ("x", "y")), "and 2 targets"),
        (("ab", [math.inf], [(0, 1)], "s"), "infinite"),
        (("ab", [1.0, 2.0], [(1, 2), (0, 1)], "s"), "must follow each other"),
        (("ab", [1.0], [(0, 3)], "s"), "must follow each other"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, words):
    with pytest.raises(PertokenError, match=words):
        TokenSignal(*arguments)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "text": 3}'])
def test_json_of_something_else_is_refused(text):
    with pytest.raises(PertokenError, match=r"no token signal|format 99"):
        TokenSignal.from_json(text)


def test_a_signal_does_not_change():
    values = np.array([1.0, 2.0])
    made = signal(["a", "b"], values)
    values[0] = 7.0
    assert made.values[0] == 1.0
    with pytest.raises(ValueError, match="read-only"):
        made.values[0] = 3.0
