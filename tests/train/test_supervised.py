"""`train_supervised`, the lessons it reads, and what a method would choose of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, tiny_model
from pertoken.train import (
    Lesson,
    choose_tokens,
    encode_lesson,
    prompt_attention,
    read_lessons,
    ss_scores,
)

LESSONS = [Lesson(f"{n}+1=", f"{n + 1}.") for n in range(6)]


def write(path: Path, *lines: Any) -> Path:
    path.write_text(
        "".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines)
    )
    return path


# --------------------------------------------------------------------------------------- lessons


def test_three_forms_of_a_lesson_are_read(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
    ]
    file = write(
        tmp_path / "a.jsonl",
        {"prompt": "1+1=", "completion": "2", "w": [1, 0.5]},
        {"question": "1+1?", "answer": "2", "w": [1, 1]},
        {"messages": messages, "w": [2, 2]},
    )
    found = read_lessons(file, weights="w")
    prompts = ["1+1=", "1+1?", "1+1?"]
    assert [(one.prompt, one.answer) for one in found] == [(prompt, "2") for prompt in prompts]
    assert found[0].weights == [1.0, 0.5]
    assert list(found[2].messages) == messages[:2]
    assert len(read_lessons(file, limit=2)) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (["{"], "line 1: not JSON"),
        (["[]"], 'line 1: an object such as {"prompt"'),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a"}],
            'line 2: no "completion" or "answer"',
        ),
        ([{"text": "a"}], 'line 1: no "prompt" or "question" in it, only \'text\''),
        ([{"prompt": "a", "completion": " "}], 'line 1: "completion" must hold some text'),
        ([{"prompt": 1, "completion": "b"}], 'line 1: "prompt" must hold some text'),
        ([{"messages": []}], 'line 1: "messages" must be a list'),
        ([{"messages": [{"role": "user", "content": "a"}]}], "the last message must be the assist"),
        ([{"messages": [{"role": "me", "content": "a"}]}], "line 1, message 1: "),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, lines: list[Any], message: str) -> None:
    file = write(tmp_path / "a.jsonl", *lines)
    with pytest.raises(PertokenError) as told:
        read_lessons(file)
    assert message in str(told.value)
    assert str(file) in str(told.value)


def test_weights_and_files_that_are_none(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(PertokenError, match='line 1: "w" must be a list of numbers'):
        read_lessons(file, weights="w")
    with pytest.raises(PertokenError, match="there is no data file"):
        read_lessons(tmp_path / "b.jsonl")
    with pytest.raises(PertokenError, match=r"read from \.jsonl files, not"):
        read_lessons(write(tmp_path / "a.txt", "a"))


def test_only_the_answer_and_its_end_are_learned() -> None:
    reader = ByteTokenizer()
    ids, labels = encode_lesson(Lesson("1+1=", "2"), reader)
    assert ids == [*reader("1+1=")["input_ids"], *reader("2")["input_ids"], reader.eos_token_id]
    assert labels == [-100] * 4 + ids[4:]
    assert encode_lesson(Lesson("1+1=", "23"), reader, max_length=5)[0] == ids[:5]
    with pytest.raises(PertokenError, match="the prompt alone has 4 tokens, and 4 stay"):
        encode_lesson(Lesson("1+1=", "2"), reader, max_length=4)
    turns = [{"role": "user", "content": "a"}]
    with pytest.raises(PertokenError, match="messages need a chat template"):
        encode_lesson(Lesson("a", "2", messages=turns), reader, chat=False)


# ---------------------------------------------------------------------------------------- choice


def test_scores_are_those_of_the_functions_and_padding_changes_nothing() -> None:
    model = tiny_model("llama", vocab_size=258)
    past = tiny_model("llama", vocab_size=258, seed=1)
    lessons = [Lesson("abcdef", "0123456789"), Lesson("xy", "abc"), Lesson("q", "01")]
    found = choose_tokens("sstoken", lessons, model, ByteTokenizer(), history=past, keep=0.5)
    for lesson, row in zip(lessons, found.chosen, strict=True):
        ids, labels = (torch.tensor([one]) for one in encode_lesson(lesson, ByteTokenizer()))
        learned = labels != -100
        gap = torch.stack([one(ids).logits.log_softmax(-1) for one in (model, past)])[:, :, :-1]
        gap = gap.gather(-1, ids[:, 1:, None].expand(2, 1, -1, 1))[..., 0]
        attention = prompt_attention(model, ids, ~learned)
        wanted = ss_scores(gap[0] - gap[1], attention, learned[:, 1:])[learned[:, 1:]]
        own = torch.tensor(row.values)[learned[0]]
        torch.testing.assert_close(own, wanted.float(), rtol=0, atol=1e-5)
        kept = torch.tensor(row.kept)[learned[0]]
        assert int(kept.sum()) == -(-len(kept) // 2)
        assert wanted[kept].min() >= wanted[~kept].max()
    alone = choose_tokens("sstoken", lessons[1:2], model, ByteTokenizer(), history=past, keep=0.5)
    assert alone.chosen[0].kept == found.chosen[1].kept


def test_scores_by_rank_and_without_the_sink() -> None:
    model, past = (tiny_model("llama", vocab_size=258, seed=seed) for seed in (0, 1))
    lesson = Lesson("abcdef", "0123456789")
    options: Any = {"normalize": "rank", "exclude_sink": True}
    (row,) = choose_tokens(
        "sstoken", [lesson], model, ByteTokenizer(), history=past, **options
    ).chosen
    ids, labels = (torch.tensor([one]) for one in encode_lesson(lesson, ByteTokenizer()))
    learned = labels[0] != -100
    rel, own = (
        torch.tensor(one, dtype=torch.float64)[learned] for one in (row.more["rel"], row.values)
    )
    attention = prompt_attention(model, ids, labels == -100, exclude_sink=True)[0][learned[1:]]
    ranks = rel.argsort().argsort() / (len(rel) - 1)
    torch.testing.assert_close(own, ((ranks + attention) / 2).to(own), rtol=0, atol=1e-5)


def test_a_choice_shows_itself(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=258)
    for method in ("mft", "sstoken"):
        found = choose_tokens(method, LESSONS, model, ByteTokenizer())
        assert len(found.signals) == len(found.lessons()) == 6
        assert found.signals[0].text == "0+1=1.<eos>" or found.signals[0].text.startswith("0+1=1.")
        assert [one["token"] for one in found.rows()][:2] == ["1", "."]
        assert {row["kept"] for row in found.rows()} == {True, False}
        page = found.to_html()
        struck = sum(not row["kept"] for row in found.rows() if row["token"])
        assert page.count(' out"') + page.count('"out"') - 1 == struck
        assert "answer tokens are" in found.table()
        json.loads(found.to_json())
    assert choose_tokens("mft", LESSONS, model, ByteTokenizer(), rate=0.0).lessons()[0]["kept"] == 3


def test_a_choice_says_which_part_of_the_answers_is_kept() -> None:
    """Attention of a model that looks at all alike falls with the place: the first half is kept."""
    model = tiny_model("llama", vocab_size=258, scale=0.0)
    lessons = [Lesson("ab", "0123456789abcdef012"), Lesson("a", "0123456789abcdef012")]
    found = choose_tokens("sstoken", lessons, model, ByteTokenizer(), keep=0.5)
    assert found.kept_by_tenth == [1.0] * 5 + [0.0] * 5
    assert found.to_dict()["kept_by_tenth"] == found.kept_by_tenth
    assert (
        "of the tenths of the answers are kept: 100%, 100%, 100%, 100%, 100%, 0%" in found.table()
    )
    short = choose_tokens("mft", [Lesson("ab", "0")], model, ByteTokenizer(), rate=0.0)
    assert short.to_dict()["kept_by_tenth"] == [1.0, *[None] * 4, 1.0, *[None] * 4]
    json.loads(short.to_json())


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("sstokens", {}, r"no tokens can be shown of 'sstokens' \(did you mean 'sstoken'"),
        ("mft", {"history": tiny_model("llama")}, "it has no history"),
        ("sstoken", {"history": tiny_model("llama")}, "history must be an earlier state"),
        ("sstoken", {"gamma": 2.0}, "gamma is a share, 0 to 1"),
        ("sstoken", {"normalize": "ranks"}, r"unknown normalize 'ranks' \(did you mean 'rank'"),
    ],
)
def test_mistakes_of_a_choice(method: str, more: dict[str, Any], message: str) -> None:
    model = tiny_model("llama", vocab_size=258)
    with pytest.raises(PertokenError, match=message):
        choose_tokens(method, LESSONS, model, ByteTokenizer(), **more)
    with pytest.raises(PertokenError, match="there is no lesson to show"):
        choose_tokens("mft", [], model, ByteTokenizer())


# ------------------------------------------------------------------------------------------ runs

trl = pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("tensorboard", reason="TensorBoard is not installed")

from pertoken.train import SupervisedRun, train_supervised  # noqa: E402


class Stop(BaseException):
    """What Ctrl-C raises, told apart."""


def go(out: Path, tiny: str, method: str, **options: Any) -> SupervisedRun:
    given: dict[str, Any] = {
        "model": tiny,
        "steps": 4,
        "batch": 4,
        "learning_rate": 3e-3,
        **options,
    }
    return train_supervised(method, out, given.pop("lessons", LESSONS), **given)


def test_weights_in_half_precision_are_not_trained(tmp_path: Path, tiny_folder: str) -> None:
    """A step of 1e-6 is less than what tells two numbers of bfloat16 apart."""
    import pertoken

    loaded = pertoken.load(tiny_folder, dtype="bfloat16")
    with pytest.raises(PertokenError, match=r"in half precision, .* load the model with dtype="):
        go(tmp_path, tiny_folder, "sft", model=loaded)


@pytest.mark.parametrize("method", ["mft", "sstoken"])
def test_a_run_goes_on_with_the_identical_next_loss(
    tmp_path: Path, tiny_folder: str, method: str
) -> None:
    options: dict[str, Any] = {
        "mft": {"rate": 0.9},
        "sstoken": {"history": "ema", "normalize": "rank", "exclude_sink": True},
    }[method]
    options |= {"save_every": 2}
    whole = go(tmp_path / "whole", tiny_folder, method, **options)
    assert whole.steps[-1]["loss"] < whole.steps[0]["loss"]

    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        go(tmp_path / "cut", tiny_folder, method, **options, progress=interrupt)
    again = go(tmp_path / "cut", tiny_folder, method, **options, resume=True)
    assert again.steps == whole.steps
    assert json.loads((tmp_path / "cut" / "run.json").read_text())["settings"]["method"] == method
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = again.folder / "model"
    model, reader = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    written = model.generate(**reader("1+1=", return_tensors="pt"), max_new_tokens=3)
    assert written.shape[1] <= 7
    if method == "mft":
        assert model.generation_config.suppress_tokens == [reader.mask_token_id]
        assert [row["hidden"] for row in whole.steps] == pytest.approx([0, 0.3375, 0.675, 0.9])
    else:
        assert all(0 <= row["place"] <= 1 for row in whole.steps)


def test_a_run_does_not_go_on_with_other_lessons(tmp_path: Path, tiny_folder: str) -> None:
    rows = [{"prompt": one.prompt, "completion": one.answer, "w": [1, 1, 1]} for one in LESSONS]
    file, out = write(tmp_path / "a.jsonl", *rows), tmp_path / "out"
    given: dict[str, Any] = {"lessons": file, "weights": "w", "batch": 2}
    go(out, tiny_folder, "sft", **given, steps=1)
    rows[2]["w"] = [1, 1, 2]
    write(file, *rows)
    with pytest.raises(PertokenError, match=r"was run with data_sha256 [0-9a-f]{16}, not"):
        go(out, tiny_folder, "sft", **given, steps=2, resume=True)
    rows[2]["w"] = [1, 1, 1]
    write(file, *rows)
    assert len(go(out, tiny_folder, "sft", **given, steps=2, resume=True).steps) == 2


def test_weights_of_the_data_are_used(tmp_path: Path, tiny_folder: str) -> None:
    rows = [{"prompt": one.prompt, "completion": one.answer, "w": [0, 0, 0]} for one in LESSONS]
    file = write(tmp_path / "a.jsonl", *rows)
    run = go(tmp_path / "out", tiny_folder, "sft", lessons=file, weights="w", steps=1)
    assert [row["loss"] for row in run.steps] == [0.0]
    rows[3]["w"] = [1]
    write(file, *rows)
    with pytest.raises(PertokenError, match="line 4: 1 weights for 3 tokens of the answer"):
        go(tmp_path / "b", tiny_folder, "sft", lessons=file, weights="w")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("sstokn", {}, r"unknown method 'sstokn' \(did you mean 'sstoken'"),
        ("sft", {"rate": 0.1}, "sft has no rate: it belongs to mft"),
        ("mft", {"keep": 0.1}, "mft has no keep: it belongs to sstoken"),
        ("mft", {"rate": 1.1}, "rate is a share of the answer's tokens"),
        ("sstoken", {"keep": 0.0}, "keep must be above 0"),
        ("sstoken", {"normalize": "none"}, "unknown normalize 'none'"),
        ("sstoken", {"history": "adapter_off"}, "history must be one of base, precomputed, ema"),
        ("sft", {"steps": 0}, "steps must be 1 or more, got 0"),
        ("sft", {"learning_rate": 0.0}, "learning_rate must be above 0"),
        ("sft", {"lessons": []}, "there is no lesson to learn"),
        ("sft", {"max_length": 4}, "the prompt alone has 4 tokens, and 4 stay"),
        ("sft", {"resume": True}, "there is no whole checkpoint"),
        ("sft", {"model": "smollm"}, "unknown model 'smollm'"),
    ],
)
def test_mistakes_are_said_before_the_first_step(
    tmp_path: Path, tiny_folder: str, method: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PertokenError, match=message):
        go(tmp_path / "a", tiny_folder, method, **options)
    assert not list(tmp_path.glob("a/checkpoint-*"))
    assert not (tmp_path / "a" / "model").exists()
