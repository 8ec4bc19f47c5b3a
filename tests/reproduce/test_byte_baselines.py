"""The naive and the healed guess are what one gets by going through the vocabulary by hand."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from pertoken.reproduce._byte_baselines import END, TokenGuesses
from pertoken.reproduce._byte_texts import Text, cuts, line_cut, prose, rest_of_line
from pertoken.testing import ByteTokenizer, MockModel, tiny_model

WORDS = [b"", b"a", b"b", b"ab", b"aba", b"ba", b"", b"a"]  # 0 ends the text, 6 is a control token


class LongestMatch:
    """Encodes from the left, the longest token first."""

    def __call__(self, text: str, **_: bool) -> dict[str, list[int]]:
        data, ids = text.encode(), []
        while data:
            best = max((w for w in WORDS if w and data.startswith(w)), key=len)
            ids.append(WORDS.index(best))
            data = data[len(best) :]
        return {"input_ids": ids}


@pytest.fixture
def guesses() -> TokenGuesses:
    table = torch.rand(len(WORDS), len(WORDS), generator=torch.Generator().manual_seed(0))
    model = MockModel(table / table.sum(-1, keepdim=True))
    model.generation_config.eos_token_id = 0
    return TokenGuesses(model, LongestMatch(), WORDS)


def rows(guesses: TokenGuesses) -> Any:
    ids = torch.arange(len(WORDS))[:, None]
    return guesses.model(ids).logits[:, 0].double().softmax(-1).tolist()


def by_hand(chances: list[float], begin: bytes = b"") -> dict[int, float]:
    """Share of each outcome behind `begin`; what ends exactly there is under -1."""
    found: dict[int, float] = defaultdict(float)
    for token, (word, chance) in enumerate(zip(WORDS, chances, strict=True)):
        if token == 0 and not begin:
            found[END] += chance
        elif word and word.startswith(begin):
            found[word[len(begin)] if len(word) > len(begin) else -1] += chance
    return found


@pytest.mark.parametrize("text", ["bab", "abab", "baab", "bba", "baaba", "baa"])
def test_by_going_through_the_vocabulary(guesses: TokenGuesses, text: str) -> None:
    before, last = LongestMatch()(text)["input_ids"][-2:]
    chances = rows(guesses)
    naive = by_hand(chances[last])
    share = sum(naive.values())  # what tokens without bytes would have got is spread
    naive = {outcome: chance / share for outcome, chance in naive.items()}
    healed = by_hand(chances[before], WORDS[last])
    exact = healed.pop(-1)
    for outcome, chance in naive.items():
        healed[outcome] += exact * chance
    share = sum(healed.values())
    healed = {outcome: chance / share for outcome, chance in healed.items()}
    found = guesses.next_byte(text)
    for name, expected in (("naive", naive), ("token healing", healed)):
        wanted = torch.zeros(257, dtype=torch.float64)
        for outcome, chance in expected.items():
            wanted[outcome] = chance
        torch.testing.assert_close(found[name], wanted, atol=1e-6, rtol=0)


def test_healing_changes_nothing_where_every_token_is_a_byte() -> None:
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    words = [b"", b"", *(bytes([byte]) for byte in range(256))]
    guesses = TokenGuesses(model, tokenizer, words)
    found = guesses.next_byte("some text")
    torch.testing.assert_close(found["naive"], found["token healing"])
    ids = torch.tensor([tokenizer.encode("some text")])
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    truth = b"".join(words[token] for token in greedy)
    for heal in (False, True):
        assert guesses.writes("some text", truth, heal=heal)
        assert guesses.writes("some text", truth[:3], heal=heal)
        assert not guesses.writes("some text", truth[:3] + b"?" + truth[4:], heal=heal)


def test_only_healing_writes_what_the_last_token_was_cut_from() -> None:
    # "b" is always followed by "aba", "a" by "b": cut as "ba|ba" the prompt reads "ba", not "b".
    table = torch.full((len(WORDS), len(WORDS)), 1e-3)
    for token, following in ((2, 4), (4, 2), (5, 1), (1, 2)):
        table[token, following] = 1.0
    model = MockModel(table / table.sum(-1, keepdim=True))
    guesses = TokenGuesses(model, LongestMatch(), WORDS)
    assert LongestMatch()("bbab")["input_ids"] == [2, 5, 2]  # the text behind is "aba", as after 2
    assert guesses.writes("bbab", b"aba", heal=False)
    assert LongestMatch()("baba")["input_ids"] == [5, 5]
    assert not guesses.writes("bab", b"xx", heal=True)


TEXT = Text("code", 3, "def f():\n    return total  # total\n", 9)
PIECES = [b"def", b" f", b"():\n", b"    re", b"turn", b" tot", b"al  #", b" total\n"]


def test_a_line_is_cut_inside_a_token_and_a_word_and_outside_comments() -> None:
    ends = {len(b"".join(PIECES[:n])) for n in range(len(PIECES))}
    for seed in range(30):
        cut = line_cut(TEXT, PIECES, seed)
        assert cut is not None
        assert cut not in ends
        assert cut < TEXT.text.index("#")
        assert (TEXT.text[cut - 1] + TEXT.text[cut]).isalpha()
        assert rest_of_line(TEXT, cut) == TEXT.data[cut:]
    assert line_cut(TEXT, PIECES[1:], 0) is None
    assert rest_of_line(TEXT, 2) == b"f f():\n"


def test_cuts_are_random_repeatable_and_between_characters() -> None:
    text = Text("prose", 1, "é" * 30, 16)
    places = cuts(text, 5, seed=1)
    assert places == cuts(text, 5, seed=1)
    assert places != cuts(text, 5, seed=2)
    assert all(place >= 16 and place % 2 == 0 for place in places)


def test_dev_and_report_share_no_text() -> None:
    questions = [{"question": str(n)} for n in range(20)]
    dev = {text.number for text in prose(questions, "dev", 7)}
    report = {text.number for text in prose(questions, "report", 7)}
    assert len(dev) == len(report) == 7
    assert not dev & report
