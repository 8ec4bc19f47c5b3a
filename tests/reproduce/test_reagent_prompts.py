"""The prompts of ReAGent's reproduction: halves unlike each other, a far word that decides."""

from __future__ import annotations

import pytest

from pertoken.reproduce import reagent
from pertoken.reproduce._reagent_prompts import BETWEEN, RELATIONS, Split, analogies, planted, prose
from pertoken.testing import ByteTokenizer, tiny_model

SPLITS: tuple[Split, Split] = ("dev", "report")


def test_an_aside_stands_between_the_two_words() -> None:
    found = [each for split in SPLITS for each in analogies(split)]
    assert len({each.number for each in found}) == len(found)
    assert len({(each.plain, each.target) for each in found}) == len(found)
    pairs = [pair.split() for _, words in RELATIONS.values() for pair in words.split(", ")]
    for each in found:
        aside = next(text for text in BETWEEN if text in each.prompt)
        head, _, end = each.prompt.partition(f" ({aside})")
        assert each.plain == head + end
        own = [first for first, second in pairs if f" {second}" == each.target]
        assert any(first in head.replace(".", "").split() for first in own)
        assert str(each.target).strip() not in each.prompt.split()


def test_halves_share_no_pair_and_no_aside() -> None:
    dev, report = (analogies(split) for split in SPLITS)
    assert not {each.plain for each in dev} & {each.plain for each in report}
    asides = [
        {text for text in BETWEEN for each in half if text in each.prompt} for half in (dev, report)
    ]
    assert not asides[0] & asides[1]
    facts = [{each.prompt for each in planted(split, 20)} for split in SPLITS]
    assert not facts[0] & facts[1]


def test_relations_take_turns() -> None:
    first = analogies("report")[: len(RELATIONS)]
    starts = [text[:10] for text, _ in RELATIONS.values()]
    assert [each.prompt[:10] for each in first] == starts


def test_prose_is_cut_from_long_questions_of_its_half() -> None:
    rows = [{"question": "word " * size} for size in (60, 60, 10, 60)]
    assert [each.number for each in prose(rows, "report", 9)] == [1, 3]
    assert all(24 <= len(each.prompt.split()) <= 40 for each in prose(rows, "report", 9))


def test_known_analogies_are_those_that_the_model_goes_on_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pertoken.attribute._question import ask
    from pertoken.reproduce import _reagent_prompts as prompts

    model, tokenizer = tiny_model("llama", vocab_size=258), ByteTokenizer()
    texts = [first + second for first in "abcdefghij" for second in "klmnopqrst"]
    said = {text: ask(model, tokenizer, text, 1).targets[0] for text in texts}
    one, other = [text for text in said if said[text].isascii()][:2]
    assert said[one] != said[other]
    asked = [
        prompts.Asked(1, one, said[one], plain=one),
        prompts.Asked(3, one, said[other], plain=one),
        prompts.Asked(5, one, said[one], plain=other),
        prompts.Asked(7, other, said[one], plain=one),
        prompts.Asked(9, one, said[one] + said[one], plain=one),  # two tokens
    ]
    monkeypatch.setattr(reagent, "analogies", lambda split: asked)
    assert reagent._known(lambda: (model, tokenizer)) == [1]
