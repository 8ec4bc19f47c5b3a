"""FrugalPrompt's reproduction: its mails, what a model makes of an item, and its ratios."""

import math

import pytest
import torch

from pertoken.reproduce import _frugal_units as unit_room
from pertoken.reproduce._frugal_tasks import Item, classification
from pertoken.reproduce.frugalprompt import TASKS, _gap, _ratio, _table
from pertoken.testing import ByteTokenizer, tiny_model

CODES = (
    "<b>",
    "=3D",
    "| quoted",
    "Ann wrote:",
    "-- \nAnn",
    "x" * 41,
    "caf\u00e9",
    "Content-Type: text/plain",
    "URL: http://example.org",
)


@pytest.mark.parametrize("code", CODES)
def test_a_mail_that_shows_where_it_comes_from_is_left_out(code: str) -> None:
    words = [f"word{number}" for number in range(50)]
    plain = {"label": "spam", "text": " ".join(words)}
    marked = {"label": "spam", "text": "\n".join(["Hello", code, *reversed(words)])}
    assert [mail.number for mail in classification([plain, marked, marked, plain], 4, "dev")] == [0]
    assert not classification([plain, marked], 4)


def test_mails_come_from_all_groups() -> None:
    mails = [{"label": "ham", "text": f"word{number} " * 50} for number in range(80)]
    taken = [mail.number for mail in classification(mails, 8, "dev")]
    assert taken == [0, 20, 40, 60]


@pytest.mark.parametrize(
    ("written", "line"),
    [("\n\n Cats sleep.\nDogs", "\n\n Cats sleep."), ("Cats", "Cats"), (" \n\n", ""), ("", "")],
)
def test_a_reply_is_its_first_line_as_it_was_written(written: str, line: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(unit_room._line(tokenizer, ids)) == line


def test_no_reply_to_the_whole_prompt_is_no_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    item = Item("summaries", 1, "Sum: ", "a b c", "\nSummary:", "")
    bodies = {"globenc": ["a b"]}
    monkeypatch.setattr(unit_room, "_write", lambda model, tokenizer, ids, tokens: [[], [5]])
    assert unit_room.measured(model, tokenizer, item, bodies, 2) is None
    monkeypatch.setattr(unit_room, "_write", lambda model, tokenizer, ids, tokens: [[5, 6], [5]])
    unit = unit_room.measured(model, tokenizer, item, bodies, 2)
    assert unit is not None
    ids = torch.tensor([tokenizer("Sum: a b\nSummary:")["input_ids"] + [5, 6]])
    with torch.no_grad():
        chances = model(input_ids=ids).logits[0].log_softmax(-1)
    wanted = -float(chances[-3, 5] + chances[-2, 6])
    assert unit["globenc"][0]["loss"] == pytest.approx(wanted, abs=1e-5)
    assert [form["tokens"] for form in (unit["full"][0], unit["globenc"][0])] == [5, 3]


def test_a_mail_takes_no_more_than_a_mail_can_give() -> None:
    class Sure:
        def loss(self, text: str, label: int) -> float:
            return 50.0 if text == "short" else 0.0

        def ids(self, text: str) -> list[int]:
            return [1]

    item = Item("classification", 1, "", "whole", "", "spam", ("ham", "spam"))
    unit = unit_room.classified(Sure(), item, {"globenc": ["short"]})  # type: ignore[arg-type]
    assert unit["empty"] - unit["globenc"][0]["loss"] == pytest.approx(-math.log(2))
    assert unit["empty"] - unit["full"][0]["loss"] == pytest.approx(math.log(2))


def test_there_is_no_share_of_nothing() -> None:
    top, bottom = torch.ones(3, 2).numpy(), torch.tensor([[2, 2], [1, -1], [-1, -1.0]]).numpy()
    assert [str(float(value)) for value in _ratio(top, bottom)] == ["0.5", "nan", "nan"]
    left = {task: ([1.0], [0.0 if task == "summaries" else 2.0]) for task in TASKS}
    row = _gap(left, "", 0)
    assert math.isnan(row.here)
    assert row.interval is None
    row = _gap(left | {"summaries": ([], [])}, "", 0)
    assert math.isnan(row.here)
    rows = _table({task: [] for task in TASKS}, "", 0)
    figures = [row.here for row in rows if row.unit == "share"]
    assert figures
    assert all(math.isnan(value) for value in figures)
