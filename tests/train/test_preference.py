"""`train_preference`, the pairs it reads, sampled answers, and the colours of a wrong answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, MockModel, tiny_model
from pertoken.train import (
    Lesson,
    Pair,
    choose_tokens,
    contrastive_scores,
    encode_lesson,
    read_pairs,
    sample_answers,
)

PAIRS = [Pair(f"{n}+1=", f"{n + 1}.", f"{n + 3}!") for n in range(6)]


def write(path: Path, *lines: Any) -> Path:
    path.write_text(
        "".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines)
    )
    return path


def test_pairs_are_read(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2
    file = write(tmp_path / "a.jsonl", *rows, {"question": "d", "chosen": "e", "rejected": "f"})
    assert read_pairs(file)[2] == Pair("d", "e", "f", f"{file}, line 3")
    assert len(read_pairs(file, 2)) == 2


def test_a_separator_inside_of_json_ends_no_line(tmp_path: Path) -> None:
    line = '{"prompt": "a\u2028b", "chosen": "c", "rejected": "d"}'
    assert read_pairs(write(tmp_path / "a.jsonl", line))[0].prompt == "a\u2028b"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", 'line 1: an object such as {"prompt": "…", "chosen"'),
        ({"prompt": "a", "chosen": "b"}, "line 1: no \"rejected\" in it, only 'prompt', 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, '"rejected" must hold some text'),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same text"),
    ],
)
def test_a_broken_pair_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(PertokenError) as told:
        read_pairs(write(tmp_path / "a.jsonl", line))
    assert message in str(told.value)


def test_answers_are_sampled_and_judged() -> None:
    # "=" goes on with 4 or 5 or a letter; then the text ends.
    reader, table = ByteTokenizer(), torch.zeros(258, 258)
    table[:, 1] = 1
    row = table[reader.encode("=")[0]]
    row.zero_()
    for sign, share in (("4", 0.5), ("5", 0.25), ("x", 0.25)):
        row[reader.encode(sign)[0]] = share
    model = MockModel(table)
    model.generation_config.eos_token_id = 1
    lessons = [Lesson("2+2=", "2 and 2 is 4"), Lesson("2+3=", "so\n#### 5")]
    given: dict[str, Any] = {"n": 200, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 3}
    found = sample_answers(model, reader, lessons, **given)
    for some, right in zip(found, ("4", "5"), strict=True):
        assert {(one.text, one.answer, one.right) for one in some} == {
            ("4", "4", right == "4"),
            ("5", "5", right == "5"),
            ("x", "", False),
        }
    shares = [sum(one.right for one in some) / 200 for some in found]
    assert shares == pytest.approx([0.5, 0.25], abs=4 * 0.036)
    assert sample_answers(model, reader, lessons, **given) == found
    with pytest.raises(PertokenError, match="n must be 1 or more"):
        sample_answers(model, reader, lessons, n=0)


def test_the_tokens_of_a_wrong_answer_have_their_weights() -> None:
    positive, negative = (tiny_model("llama", vocab_size=258, seed=seed) for seed in (0, 1))
    lessons = [Lesson("abc", "wrong"), Lesson("x", "bad")]
    found = choose_tokens("cdpo", lessons, positive, ByteTokenizer(), negative=negative)
    for lesson, row in zip(lessons, found.chosen, strict=True):
        ids, labels = (torch.tensor([one]) for one in encode_lesson(lesson, ByteTokenizer()))
        logits = positive(ids).logits, negative(ids).logits
        wanted = 1 - contrastive_scores(*logits, ids, labels != -100)[labels[:, 1:] != -100]
        own = torch.tensor(row.values)[labels[0] != -100]
        torch.testing.assert_close(own, wanted.float(), rtol=0, atol=1e-5)
        assert all(row.kept)
    assert "struck out" not in found.to_html().split("</style>")[1]
    assert found.notes()[0].startswith("lesson 0: ")


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("cdpo", {}, "cdpo needs negative"),
        ("cdpo", {"negative": "wide"}, "must be copies of one model"),
        ("cdpo", {"negative": "own", "history": "own"}, "cdpo compares two copies"),
        ("sstoken", {"negative": "own"}, "sstoken has no negative model"),
    ],
)
def test_mistakes_of_the_models(method: str, more: dict[str, str], message: str) -> None:
    own = tiny_model("llama", vocab_size=258)
    models = {"own": own, "wide": tiny_model("llama", vocab_size=300)}
    given: Any = {name: models[value] for name, value in more.items()}
    with pytest.raises(PertokenError, match=message):
        choose_tokens(method, [Lesson("a", "b")], own, ByteTokenizer(), **given)


# ------------------------------------------------------------------------------------------ runs

trl = pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("tensorboard", reason="TensorBoard is not installed")

from pertoken.train import train_preference  # noqa: E402


class Stop(BaseException):
    """What Ctrl-C raises, told apart."""


def go(out: Path, tiny: str, method: str, **options: Any) -> Any:
    given: dict[str, Any] = {"model": tiny, "steps": 4, "batch": 4, "learning_rate": 1e-3}
    if method == "cdpo":
        given |= {"positive": tiny, "negative": tiny}
    given |= options
    return train_preference(method, out, given.pop("pairs", PAIRS), **given)


@pytest.mark.parametrize(
    ("method", "more"), [("dpo", {}), ("cdpo", {}), ("cdpo", {"reduction": "position"})]
)
def test_a_run_goes_on_with_the_identical_next_loss(
    tmp_path: Path, tiny_folder: str, method: str, more: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"save_every": 2, **more}
    whole = go(tmp_path / "whole", tiny_folder, method, **options)
    assert whole.steps[-1]["loss"] < whole.steps[0]["loss"]
    assert whole.steps[-1]["margin"] > 0
    assert ("weight" in whole.steps[0]) == (method == "cdpo")

    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        go(tmp_path / "cut", tiny_folder, method, **options, progress=interrupt)
    again = go(tmp_path / "cut", tiny_folder, method, **options, resume=True)
    assert again.steps == whole.steps
    assert again.notes()[1].startswith("6 pairs; ")
    assert (again.folder / "model" / "config.json").exists()


def test_the_copies_are_gone_while_it_trains(
    tmp_path: Path, tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc
    import weakref

    from pertoken.train import preference

    load, train, loaded, alive = preference.load, preference.train, [], []

    def noted(*args: Any, **more: Any) -> Any:
        found = load(*args, **more)
        loaded.append(weakref.ref(found[0]))
        return found

    def training(*args: Any) -> None:
        gc.collect()
        alive.extend(each() is not None for each in loaded)
        train(*args)

    monkeypatch.setattr(preference, "load", noted)
    monkeypatch.setattr(preference, "train", training)
    go(tmp_path / "a", tiny_folder, "cdpo", steps=1)
    assert alive == [True, False, False]  # the student, and its two copies


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("cdp", {}, r"unknown method 'cdp' \(did you mean 'cdpo'"),
        ("dpo", {"positive": "smollm2"}, "dpo has no positive model"),
        ("cdpo", {"negative": None}, "cdpo needs the negative model"),
        ("cdpo", {"reduction": "sum"}, "reduction must be"),
        ("dpo", {"reduction": "position"}, "dpo has no contrast and no reduction"),
        ("cdpo", {"contrast": -1.0}, "contrast must be 0 or more"),
        ("dpo", {"beta": 0.0}, "beta must be above 0"),
        ("dpo", {"pairs": []}, "there is no pair"),
        ("dpo", {"steps": 0}, "steps must be 1 or more"),
        ("dpo", {"max_length": 4}, "a pair: the prompt alone has 4 tokens, and 4 stay"),
    ],
)
def test_mistakes_are_said_before_the_first_step(
    tmp_path: Path, tiny_folder: str, method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PertokenError, match=message):
        go(tmp_path / "a", tiny_folder, method, **options)
    assert not list(tmp_path.glob("a/checkpoint-*"))


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_copy_of_other_tokens_is_refused(
    tmp_path: Path, tiny_folder: str, other_folder: str, side: str
) -> None:
    with pytest.raises(PertokenError, match=f"the {side} model has another tokenizer: it must be"):
        go(tmp_path / "a", tiny_folder, "cdpo", **{side: other_folder})
    assert not list(tmp_path.glob("a/checkpoint-*"))


def test_a_pair_without_room_for_an_answer_is_named(tmp_path: Path, tiny_folder: str) -> None:
    rows = [{"prompt": "1" * n, "chosen": "2", "rejected": "3"} for n in (4, 9, 4)]
    file = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(PertokenError) as told:
        go(tmp_path / "out", tiny_folder, "dpo", pairs=file, max_length=9)
    assert str(told.value) == (
        f"{file}, line 2: the prompt alone has 9 tokens, and 9 stay: no token of the answer is "
        "left to learn; raise max_length, or leave it out"
    )
    assert not (tmp_path / "out").exists()
    run = go(tmp_path / "out", tiny_folder, "dpo", pairs=file, max_length=10, batch=3, steps=1)
    assert run.settings["pairs"] == 3


def test_a_run_does_not_go_on_with_other_pairs(tmp_path: Path, tiny_folder: str) -> None:
    go(tmp_path / "a", tiny_folder, "dpo", steps=1, batch=2)
    others = [*PAIRS[:-1], Pair("5+1=", "6!", "7!", "elsewhere")]
    with pytest.raises(PertokenError, match=r"was run with data_sha256 [0-9a-f]{16}, not"):
        go(tmp_path / "a", tiny_folder, "dpo", steps=2, batch=2, pairs=others, resume=True)
    moved = [Pair(one.prompt, one.chosen, one.rejected, "elsewhere") for one in PAIRS]
    again = go(tmp_path / "a", tiny_folder, "dpo", steps=2, batch=2, pairs=moved, resume=True)
    assert len(again.steps) == 2
