"""Critical tokens by rollouts: a scripted model's fatal token is found, and counts are exact."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.testing import ARCHITECTURES, ByteTokenizer, MockModel, tiny_model
from pertoken.train import continued, critical_token, pass_at_k, replaced, rollout_scores

TOKENIZER = ByteTokenizer()
END = 1


def scripted(**after: str | dict[str, float]) -> MockModel:
    """A model that goes on from each letter as written; every other token ends the text."""
    table = torch.zeros(258, 258)
    table[:, END] = 1
    for letter, told in after.items():
        row = {told: 1.0} if isinstance(told, str) else told
        table[one(letter)] = 0
        for next_letter, share in row.items():
            table[one(letter), one(next_letter)] = share
    model = MockModel(table)
    model.generation_config.eos_token_id = END
    return model


def one(letter: str) -> int:
    return END if letter == "." else TOKENIZER.encode(letter)[0]


def ids(text: str) -> list[int]:
    return [one(letter) for letter in text]


# From "a" and "b" the text can still reach "R"; behind "x" it never does.
FATAL = scripted(q="a", a={"b": 0.5, "x": 0.5}, b={"R": 0.5, "x": 0.5}, x="y", y=".", R=".")
RIGHT = {"is_correct": lambda text: text.endswith("R"), "temperature": 1.0, "top_p": 1.0}


def test_the_fatal_token_is_found() -> None:
    found = rollout_scores(FATAL, TOKENIZER, ids("q"), ids("abxy."), n=64, **RIGHT)
    assert found.critical == 2
    assert found.right[2:] == [0, 0, 0]
    assert 4 <= found.right[0] <= 40
    assert 16 <= found.right[1] <= 48
    assert found.signal.tokens[found.critical] == "x"
    assert [row["critical"] for row in found.rows()] == [False, False, True, False, False]


def test_a_zero_that_recovers_is_not_it() -> None:
    # Behind "z" the sampled texts are wrong, but the answer itself came back to "b".
    model = scripted(q="z", z=".", b={"R": 0.5, "x": 0.5}, x="y", y=".", R=".")
    found = rollout_scores(model, TOKENIZER, ids("q"), ids("zbx."), n=64, **RIGHT)
    assert found.right[0] == 0
    assert found.right[1] > 3
    assert found.critical == 2


def test_the_rule_is_the_authors_loop() -> None:
    def loop(counts: list[int]) -> int | None:
        least, dropped, has = None, None, False
        for place, count in enumerate(counts):
            if count == 0 and not has:
                least, has = place, True
            if has and count > 3:
                dropped, least, has = least, None, False
        return least if has else dropped

    draw = torch.Generator().manual_seed(0)
    for _ in range(500):
        counts = (torch.randint(0, 9, (12,), generator=draw) - 3).clamp(min=0).tolist()
        assert critical_token([count / 64 for count in counts]) == loop(counts)


def test_every_fourth_token_is_looked_at_and_the_last() -> None:
    found = rollout_scores(FATAL, TOKENIZER, ids("q"), ids("abxyxy"), n=8, every=4, **RIGHT)
    assert [count is None for count in found.right] == [False, True, True, True, False, False]
    assert found.critical == 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cold_rollout_is_the_greedy_text(architecture: str) -> None:
    model = tiny_model(architecture, vocab_size=258)
    model.generation_config.eos_token_id = END
    prompt, answer, texts = ids("to be"), ids("or not"), []

    def judge(text: str) -> bool:
        texts.append(text)
        return False

    found = rollout_scores(
        model,
        TOKENIZER,
        prompt,
        answer,
        is_correct=judge,
        n=2,
        temperature=1e-9,
        max_new_tokens=6,
        batch=3,
    )
    assert found.right == [0] * 6
    expected = []
    for stop in range(1, 7):
        row = torch.tensor([[*prompt, *answer[:stop]]])
        out = model.generate(row, max_new_tokens=6, do_sample=False, pad_token_id=0)
        expected += [TOKENIZER.decode(out[0, len(prompt) :].tolist(), True)] * 2
    assert sorted(texts[1:]) == sorted(expected)


def test_sampling_repeats_and_leaves_the_global_generator() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    runs = [rollout_scores(FATAL, TOKENIZER, ids("q"), ids("abx."), n=32, **RIGHT) for _ in "ab"]
    assert runs[0].right == runs[1].right
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_search_goes_on_with_what_it_has_kept(tmp_path: Path) -> None:
    path, asked = tmp_path / "search.jsonl", []
    given: dict[str, Any] = {**RIGHT, "n": 32, "batch": 8, "path": path}

    def stop(what: str, done: int, total: int) -> None:
        asked.append(total)
        if len(asked) == 5:
            raise KeyboardInterrupt

    answer = ids("qbx.")  # three tokens are sampled behind: 96 continuations
    with pytest.raises(KeyboardInterrupt):
        rollout_scores(FATAL, TOKENIZER, ids("q"), answer, progress=stop, **given)
    assert len(path.read_text().splitlines()) == 40
    with path.open("a") as file:
        file.write('{"settings')  # a line that was cut off
    found = rollout_scores(FATAL, TOKENIZER, ids("q"), answer, progress=stop, **given)
    assert set(asked[:5]) == {96}
    assert set(asked[5:]) == {56}
    assert 4 <= (found.right[1] or 0) <= 28  # a half, and five standard errors
    assert found.right[2:] == [0, 0]
    again = rollout_scores(FATAL, TOKENIZER, ids("q"), answer, progress=stop, **given)
    assert again == found
    assert len(asked) == 12  # nothing was sampled
    plain = {name: value for name, value in given.items() if name != "path"}
    first = rollout_scores(FATAL, TOKENIZER, ids("q"), answer, **plain)
    new = tmp_path / "new.jsonl"
    assert first == rollout_scores(FATAL, TOKENIZER, ids("q"), answer, **{**given, "path": new})
    judged = {**given, "is_correct": lambda text: text.endswith("y")}
    by_another = rollout_scores(FATAL, TOKENIZER, ids("q"), answer, **judged)
    assert (by_another.right[1] or 0) + (found.right[1] or 0) == 32
    with pytest.raises(PertokenError, match="holds answers of other settings"):
        rollout_scores(FATAL, TOKENIZER, ids("q"), ids("bx."), **given)


def test_another_token_in_its_place() -> None:
    found = replaced(FATAL, TOKENIZER, ids("q"), ids("bxy."), 1, n=64, **RIGHT)
    assert found.tokens == [one("R")] * 64  # the only other token
    assert (found.right, found.same_text) == (64, 0)
    blank = scripted(q="a", a={"b": 0.5, " ": 0.5})
    assert replaced(blank, TOKENIZER, ids("q"), ids("ab"), 1, n=4, **RIGHT).same_text == 0
    twice = scripted(q={"\t": 0.5, " ": 0.5})
    assert replaced(twice, TOKENIZER, ids("q"), ids(" "), 0, n=4, **RIGHT).same_text == 4


def test_going_on_behind_the_beginning_of_an_answer() -> None:
    assert 16 <= continued(FATAL, TOKENIZER, ids("q"), ids("b"), n=64, **RIGHT) <= 48
    assert continued(FATAL, TOKENIZER, ids("q"), ids("abx"), n=8, **RIGHT) == 0
    # A beginning that would be right if it ended here is asked about all the same.
    on = scripted(q="R", R="y", y=".")
    assert continued(on, TOKENIZER, ids("q"), ids("R"), n=8, **RIGHT) == 0
    assert continued(on, TOKENIZER, ids("q"), ids("R."), n=8, **RIGHT) == 8  # it has ended


def test_pass_at_k_is_the_share_of_draws_with_a_right_one() -> None:
    for n in range(1, 7):
        for right in range(n + 1):
            marks = [True] * right + [False] * (n - right)
            for k in range(1, n + 1):
                draws = [any(draw) for draw in combinations(marks, k)]
                assert pass_at_k(n, right, k) == pytest.approx(sum(draws) / len(draws))


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    [
        ("R.", {}, "the answer is right"),
        ("", {}, "the answer has no token"),
        ("x", {"n": 0}, "n must be 1 or more"),
        ("x", {"every": 0}, "every must be 1 or more"),
        ("x", {"temperature": 0.0}, "temperature must be above 0"),
        ("x", {"top_p": 0.0}, "top_p is a share"),
        ("x", {"path": "no/such/folder"}, "there is no folder no/such"),
    ],
)
def test_mistakes(answer: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PertokenError, match=message):
        rollout_scores(FATAL, TOKENIZER, ids("q"), ids(answer), **{**RIGHT, **options})


def test_mistakes_of_the_small_ones() -> None:
    with pytest.raises(PertokenError, match="one of the answer's 1 tokens"):
        replaced(FATAL, TOKENIZER, ids("q"), ids("x"), 1, **RIGHT)
    with pytest.raises(PertokenError, match="the answer has no token"):
        continued(FATAL, TOKENIZER, ids("q"), [], **RIGHT)
    with pytest.raises(PertokenError, match="threshold is a share"):
        critical_token([0.0], threshold=0.0)
    with pytest.raises(PertokenError, match="1 <= k <= n"):
        pass_at_k(3, 1, 4)
