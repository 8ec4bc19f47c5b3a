"""Counts, premiums, power law, F test, regression: against what is known by hand or by scipy."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from pertoken import PertokenError
from pertoken.testing import ByteTokenizer
from pertoken.tokenize import (
    corpus_token_counts,
    optimal_vocabulary,
    regression,
    spread_test,
    token_premiums,
    train_tokenizer,
)

TEXTS = {
    "eng": ["All human beings are born free.", "They are equal.\n\nIn dignity and rights."],
    "deu": ["Alle Menschen sind frei geboren.", "Sie sind gleich.\nAn Würde und Rechten."],
}


def test_counts_are_those_of_the_lines_without_special_tokens() -> None:
    tokenizer = train_tokenizer(TEXTS["eng"], 300)
    expected = [
        sum(
            len(tokenizer(line, add_special_tokens=False)["input_ids"]) for line in text.split("\n")
        )
        for text in TEXTS["eng"]
    ]
    assert corpus_token_counts(tokenizer, TEXTS["eng"]) == expected
    assert corpus_token_counts(tokenizer.backend_tokenizer, TEXTS["eng"]) == expected
    lines = [line for text in TEXTS["eng"] for line in text.split("\n")]
    assert sum(corpus_token_counts(tokenizer, lines)) == sum(expected)
    assert corpus_token_counts(tokenizer, []) == []


def test_special_tokens_padding_and_truncation_do_not_count_and_stay() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer(TEXTS["eng"], 300)
    before = corpus_token_counts(tokenizer, TEXTS["eng"])
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    padding, truncation = backend.padding, backend.truncation
    assert corpus_token_counts(tokenizer, TEXTS["eng"]) == before
    assert (backend.padding, backend.truncation) == (padding, truncation)


def test_normal_forms_of_a_text_cost_the_same() -> None:
    assert corpus_token_counts(ByteTokenizer(), ["e\u0301"]) == [2]
    found = token_premiums({"eng": ["é"], "xxx": ["e\u0301"]}, ByteTokenizer())
    assert found.premium("xxx") == found.byte_premium("xxx") == 1


def test_a_tokenizer_of_bytes_charges_the_byte_premium() -> None:
    found = token_premiums(TEXTS, ByteTokenizer())
    for language in TEXTS:
        assert found.premium(language) == found.byte_premium(language)
        assert found.bytes_per_token(language) == 1
    assert found.premium("eng") == 1
    assert found.interval("eng") == (1, 1)


def test_premium_is_the_ratio_of_all_tokens_and_rows_come_dearest_first() -> None:
    tokenizer = train_tokenizer(TEXTS["eng"] * 3, 330)
    found = token_premiums(TEXTS, tokenizer)
    counts = {name: sum(corpus_token_counts(tokenizer, own)) for name, own in TEXTS.items()}
    assert found.premium("deu") == counts["deu"] / counts["eng"] > 1
    low, high = found.interval("deu")
    assert low <= found.premium("deu") <= high
    rows = found.rows()
    assert [row["language"] for row in rows] == ["deu", "eng"]
    assert found.table().splitlines()[1].split()[0] == "deu"
    frame = found.to_dataframe()
    assert list(frame["tokens"]) == [counts["deu"], counts["eng"]]
    assert len(found.plot().data[0].x) == 2


def test_premiums_refuse_texts_that_are_not_parallel() -> None:
    for texts, line in [
        ({"deu": ["a"]}, "no text of the reference 'eng'"),
        ({"eng": ["a"], "deu": ["a", "b"]}, "deu has 2 texts, eng 1"),
        ({"eng": ["a"], "deu": "a"}, "deu has one string, eng 1"),
        ({"eng": ["a"], "deu": [" "]}, "there is no text of deu"),
    ]:
        with pytest.raises(PertokenError, match=line):
            token_premiums(texts, ByteTokenizer())
    with pytest.raises(PertokenError, match=r"did you mean 'eng'\?"):
        token_premiums(TEXTS, ByteTokenizer()).premium("en")


def test_the_power_law_is_found_again_and_meets_its_target() -> None:
    exact = {size: 3e5 * size**-0.4 for size in (300, 500, 900, 1700)}
    law = optimal_vocabulary(exact, target=2e4)
    assert (law.a, law.b, law.r2) == pytest.approx((3e5, -0.4, 1))
    assert law(law.vocabulary) == pytest.approx(2e4)
    assert law.measured
    assert not optimal_vocabulary(exact, target=1e3).measured
    noisy = {
        size: count * (1 + 0.1 * (-1) ** size)
        for size, count in zip(range(300, 308), exact.values(), strict=False)
    }
    assert optimal_vocabulary(noisy, 2e4).r2 < 1
    learnt = {size: 9e3 * (size - 257) ** -0.3 for size in (288, 320, 448)}
    law = optimal_vocabulary(learnt, 2400, alphabet=257)
    assert (law.a, law.b, law.r2) == pytest.approx((9e3, -0.3, 1))
    assert law(law.vocabulary) == pytest.approx(2400)
    assert optimal_vocabulary(learnt, 2400).r2 < law.r2
    assert math.isnan(optimal_vocabulary({300: 10, 600: 10}, 5).vocabulary)


def test_a_power_law_takes_two_sizes_above_zero() -> None:
    with pytest.raises(PertokenError, match="two vocabularies or more, not 1"):
        optimal_vocabulary({300: 10}, 5)
    with pytest.raises(PertokenError, match="above the alphabet of 257, got 257"):
        optimal_vocabulary({257: 10, 300: 8}, 5, 257)
    for counts, target in [({300: 10, 400: 0}, 5), ({300: 10, 400: 9}, 0)]:
        with pytest.raises(PertokenError, match="above 0"):
            optimal_vocabulary(counts, target)


def test_the_f_test_is_calibrated_and_symmetric() -> None:
    draw = np.random.default_rng(0)
    ps = [spread_test(*draw.normal(size=(2, 20))).p for _ in range(400)]
    assert abs(np.mean(np.array(ps) < 0.1) - 0.1) < 0.05
    a, b = draw.normal(size=30), 3 * draw.normal(size=30)
    assert spread_test(a, b).p == pytest.approx(spread_test(b, a).p)
    assert spread_test(b, a).f == pytest.approx(b.var(ddof=1) / a.var(ddof=1))
    assert spread_test(b, a).p < 0.001
    with pytest.raises(PertokenError, match="two values or more"):
        spread_test([1], [1, 2])
    with pytest.raises(PertokenError, match="does not vary"):
        spread_test([1, 2], [1, 1])


def test_the_f_test_says_which_extra_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(PertokenError, match=r'pip install "pertoken\[premiums\]"'):
        spread_test([1, 2], [1, 3])


def test_regression_finds_the_coefficients_it_was_made_of() -> None:
    from scipy.stats import linregress

    draw = np.random.default_rng(1)
    x, z = draw.normal(size=(2, 80))
    script = ["LATIN"] * 40 + ["THAI"] * 25 + ["CJK"] * 15
    extra = np.array([0.0] * 40 + [5.0] * 25 + [-3.0] * 15)
    found = regression(2 * x + extra + 7, {"x": x, "z": z, "script": script})
    assert found.r2 == pytest.approx(1)
    assert found.coefficients["x"] == pytest.approx(2 * x.std(ddof=1))
    assert found.coefficients["script=THAI"] == pytest.approx(5)
    assert found.coefficients["script=CJK"] == pytest.approx(-3)
    assert abs(found.coefficients["z"]) < 1e-9
    noisy = 2 * x + draw.normal(size=80)
    single = regression(noisy, {"x": x})
    known = linregress((x - x.mean()) / x.std(ddof=1), noisy)
    assert single.coefficients["x"] == pytest.approx(known.slope)
    assert single.errors["x"] == pytest.approx(known.stderr)
    assert single.r2 == single.alone["x"] == pytest.approx(known.rvalue**2)
    assert single.adjusted_r2 < single.r2
    assert "R² " in single.table()
    assert len(found.to_dataframe()) == 4


def test_a_regression_that_cannot_be_is_refused() -> None:
    for values, factors, line in [
        ([1, 2, 3], {"x": [1, 2]}, "factor x has 2 rows, the values 3"),
        ([1, 2], {"x": [1, 2]}, "2 rows are too few for 1 columns"),
        ([1, 1, 1, 1], {"x": [1, 2, 3, 4]}, "do not vary"),
    ]:
        with pytest.raises(PertokenError, match=line):
            regression(values, factors)
    flat = regression([1, 2, 3, 5], {"x": [2, 2, 2, 2]})
    assert flat.coefficients["x"] == 0
    assert flat.r2 == 0


def test_the_room_is_entered_without_torch_or_scipy() -> None:
    code = (
        "import sys, pertoken.tokenize.sweeps, pertoken.tokenize.premiums\n"
        "print({'torch', 'scipy', 'transformers'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"
