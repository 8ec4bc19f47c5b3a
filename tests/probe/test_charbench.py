"""CharBench: questions as published, scoring, every analysis by hand, resumed runs, bad input."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken import PertokenError
from pertoken.cli.main import main
from pertoken.endpoint import Endpoint, Reply
from pertoken.probe import average_correlations, charbench, error_overlap
from pertoken.probe._charbench_report import Answered, CharBench
from pertoken.probe._logistic import logistic
from pertoken.probe._questions import (
    LENGTHS,
    TASKS,
    Question,
    questions,
    read,
    words_in,
)
from pertoken.testing import ByteTokenizer, tiny_model, tiny_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def made_up(count: int, seed: int = 0) -> list[str]:
    """Words of few letters, so that many come twice."""
    draw = np.random.default_rng(seed)
    return ["".join(draw.choice(list("abcAB"), n)) for n in LENGTHS for _ in range(count)]


WORDS = made_up(400)


def oracle(messages: Any) -> str:
    """Answers from the question's text alone."""
    text = messages[0]["content"]
    word = re.search(r"string '(\w+)'", text)
    letter = re.search(r"character '(\w)'", text)
    assert word is not None
    if letter is None:
        return str(len(set(word[1])))
    if "How many times" in text:
        return f" {word[1].count(letter[1])}\n"
    return str((word[1].index if "first" in text else word[1].rindex)(letter[1]))


def copier(messages: Any) -> str:
    return str(messages[0]["content"])


# Questions.


def test_the_set_is_balanced_as_published() -> None:
    found = questions(WORDS, 20)
    assert Counter((q.task, len(q.word)) for q in found) == {
        (task, length): 20 for task in TASKS for length in LENGTHS
    }
    assert len({q.word for q in found}) == len(found)  # no word twice
    assert found == questions(reversed(WORDS), 20) != questions(WORDS, 20, seed=1)
    for task in TASKS:
        own = [q for q in found if q.task == task]
        assert Counter(len(q.word) for q in own[:14]) == dict.fromkeys(LENGTHS, 2)


def test_characters_are_drawn_uniformly_from_the_positions_of_their_words() -> None:
    """Of a word of different letters the answer is the position: each as likely."""
    draw = np.random.default_rng(1)
    words = {"".join(draw.choice(list(LETTERS), n, replace=False)) for n in LENGTHS * 450}
    found = questions(words, 400, tasks=["find_first_occurrence"])
    for length in LENGTHS:
        counts = Counter(q.answer for q in found if len(q.word) == length)
        expected = 400 / length
        chi = sum((counts[place] - expected) ** 2 / expected for place in range(length))
        assert chi < 35  # 9 degrees of freedom at most: chance below 1e-4


@settings(max_examples=60, deadline=None)
@given(word=st.text(LETTERS, min_size=4, max_size=10), task=st.sampled_from(sorted(TASKS)))
def test_answers_are_right_and_are_what_the_prompt_asks(word: str, task: str) -> None:
    filler = [word] + [LETTERS[:n] for n in LENGTHS if n != len(word)]
    (question,) = [q for q in questions(filler, 1, tasks=[task]) if q.word == word]
    letter, answer = question.character, question.answer
    if task == "count_unique_chars":
        assert answer == sum(word.index(each) == place for place, each in enumerate(word))
    else:
        assert letter is not None
        places = [place for place, each in enumerate(word) if each == letter]
        wanted = {"cou": len(places), "fir": places[0], "las": places[-1]}
        assert answer == wanted[task.split("_")[0][:3] if "count" in task else task[5:8]]
    assert read(oracle([{"content": question.prompt("spelled")}])) == answer
    assert question.prompt().startswith("Answer this question only with the final number")
    assert question.prompt("spelled").endswith(f"is spelled: {' '.join(word)}")


def test_words_are_those_of_four_to_ten_letters_with_their_case() -> None:
    assert words_in(["Of Tests, tests; naïve x86_64 caterpillars don't"]) == ["Tests", "tests"]


def test_what_is_asked_wrongly_is_refused_in_a_line() -> None:
    with pytest.raises(PertokenError, match="40 different words of 4 letters are wanted"):
        questions(["four"], 10)
    with pytest.raises(PertokenError, match=r"unknown task 'find_frist.*find_first"):
        questions(WORDS, 1, tasks=["find_frist_occurrence"])
    for options, complaint in (
        ({"forms": ["spelt"]}, "unknown form 'spelt'"),
        ({"forms": []}, "at least one task and one form"),
        ({"each": 0}, "each must be 1 or more"),
        ({"shots": -1}, "shots must be 0 to 6"),
        ({"limit": 0}, "limit must be 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
    ):
        with pytest.raises(PertokenError, match=complaint):
            charbench(oracle, None, WORDS, **options)  # type: ignore[arg-type]
    with pytest.raises(PertokenError, match="needs its tokenizer"):
        charbench(tiny_model("llama"), None, WORDS)


# Scoring.


def test_an_oracle_is_always_right_and_a_copier_never() -> None:
    best = charbench(oracle, tiny_tokenizer(), WORDS, each=5, forms=["plain", "spelled"])
    assert [row["accuracy"] for row in best.summary()] == [1.0] * 8
    assert best.unread == []
    worst = charbench(copier, None, WORDS, each=5)
    assert [row["accuracy"] for row in worst.summary()] == [0.0] * 4
    assert len(worst.unread) == len(worst.answered) == 140
    assert "no number, such as: 'Answer this question only" in worst.table()
    assert "Replies that are no number" in worst.to_html()
    limited = charbench(oracle, None, WORDS, each=5, limit=3)
    assert [row["n"] for row in limited.summary()] == [3] * 4


# Tokens.


class NoOffsets:
    """A slow tokenizer: `encode` and `decode` and nothing else."""

    chat_template = None

    def __init__(self) -> None:
        self._fast = tiny_tokenizer()

    def encode(self, text: str, **options: Any) -> list[int]:
        return list(self._fast.encode(text, **options))

    def decode(self, ids: Any, **_: Any) -> str:
        return str(self._fast.decode(ids))


def test_letters_of_tokens_are_those_of_the_offsets_and_need_none() -> None:
    fast = tiny_tokenizer()
    words = [
        "numbers",
        "Function",
        "mats",
        "their",
        "answer",
        "language",
        "characters",
        "beautiful",
    ]
    words += ["strangers", "hows"]
    found = charbench(oracle, fast, [*words, *WORDS], each=8)
    slow = charbench(oracle, NoOffsets(), [*words, *WORDS], each=8)
    assert found.rows() == slow.rows()
    for one in found.answered:
        text = f"in the string '{one.question.word}'?"
        encoded = fast(text, return_offsets_mapping=True)
        start, end = text.index("'") + 1, text.rindex("'")
        overlaps = [min(b, end) - max(a, start) for a, b in encoded["offset_mapping"]]
        assert one.letters == [count for count in overlaps if count > 0]
        assert sum(one.letters or ()) == len(one.question.word)
        if one.target_token_length is not None:
            holds = [c for c, n in enumerate(one.letters or ()) for _ in range(n)]
            assert one.letters is not None
            assert one.target_token_length == one.letters[holds[one.question.answer]]
    assert any(len(one.letters or ()) < len(one.question.word) for one in found.answered)


# Analyses.


def answered(task: str, word: str, gold: int, answer: int | None, letters: Any = None) -> Answered:
    character = None if task == "count_unique_chars" else word[0]
    return Answered(Question(task, word, character, gold), "plain", str(answer), answer, letters)


def test_correlations_are_numpys_and_their_intervals_hold_them() -> None:
    draw = np.random.default_rng(0)
    task, own = "find_first_occurrence", []
    for _ in range(200):
        word = "ab" * 5
        length = int(draw.integers(4, 11))
        place = int(draw.integers(0, length))
        letters = [2, length - 2]
        right = bool(draw.random() < 0.9 - 0.1 * (letters[0] if place < 2 else letters[1]))
        own.append(answered(task, word[:length], place, place if right else place + 1, letters))
    found = CharBench(own, {})
    rights = [float(one.right) for one in own]
    for row in found.correlations():
        x = [one.metric(row["metric"]) for one in own]
        if row["r"] is None:
            assert row["metric"] == "number_of_tokens"  # always two
            continue
        assert row["r"] == pytest.approx(np.corrcoef(x, rights)[0, 1], abs=1e-12)
        assert row["interval"][0] < row["r"] < row["interval"][1]
    assert found.correlations()[-1]["r"] < -0.2
    assert average_correlations({"a": found, "b": found})[0]["models"] == 2
    fitted = {row["predictor"]: row for row in found.regressions()}
    assert fitted["target_token_length"]["interval"][1] < 0
    assert "number_of_tokens" not in fitted


def test_every_other_analysis_by_hand() -> None:
    first, count = "find_first_occurrence", "count_character_frequency"
    own = [
        answered(first, "Aall", 0, 0, [1, 3]),
        answered(first, "all-", 1, 3, [4]),
        answered(first, "allo", 1, 1, [4]),
        answered(count, "otto", 2, 4),
        answered(count, "Otto", 1, 0),
        answered(count, "four", 1, 1),
        answered(count, "five", 1, None),
    ]
    found = CharBench(own, {})
    assert found.accuracy(first) == pytest.approx(2 / 3)
    assert found.by_token_length() == [
        {"form": "plain", "task": first, "word_length": 4, "target_token_length": n, "n": k,
         "accuracy": accuracy}
        for n, k, accuracy in ((1, 1, 1.0), (4, 2, 0.5))
    ]  # fmt: skip
    mixed = {
        row["task"]: (row["n_mixed"], row["mixed"], row["other"]) for row in found.mixed_case()
    }
    assert mixed == {first: (1, 1.0, 0.5), count: (1, 0.0, pytest.approx(1 / 3))}
    (bias,) = found.bias()
    assert (bias["task"], bias["n"], bias["mean"]) == (count, 2, 0.5)  # +2 and -1
    assert bias["std"] == pytest.approx(np.std([2, -1], ddof=1))
    assert found.by("gold")[0] == {
        "form": "plain", "task": first, "gold": 0.0, "n": 1, "accuracy": 1.0
    }  # fmt: skip
    other = CharBench(
        [answered(count, w, g, g) for w, g in (("otto", 2), ("Otto", 1))] + own[5:], {}
    )
    overlap = {row["task"]: row["overlap"] for row in error_overlap({"a": found, "b": other})}
    assert overlap == {first: 0.0, count: pytest.approx(1 / 3)}  # five of otto, Otto, five
    assert json.loads(found.to_json())["bias"][0]["mean"] == 0.5
    figure = found.plot("gold")
    assert [len(line.x) for line in figure.data] == [2, 2]


def test_logistic_regression_is_the_maximum_and_covers_the_truth() -> None:
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        x, z = draw.normal(size=(2, 300))
        right = draw.random(300) < 1 / (1 + np.exp(-(0.3 + 0.8 * x - 0.5 * z)))
        found = logistic(right.tolist(), {"x": x.tolist(), "z": z.tolist()})
        weight, low, high = found["x"]
        hits += low < 0.8 * x.std() < high
        assert low < weight < high
    assert hits >= 86  # 95 expected; a chance of 3e-4 for less
    y, columns = right.astype(float), np.stack([(c - c.mean()) / c.std() for c in (x, z)])
    shares = 1 / (
        1 + np.exp(-np.array([found["x"][0], found["z"][0]]) @ columns - _shift(y, columns, found))
    )
    assert np.abs(columns @ (y - shares)).max() < 1e-6  # the gradient is 0
    assert logistic([True] * 4, {"x": [1, 2, 3, 4]}) == {}
    assert logistic([False, False, True, True], {"x": [1, 2, 3, 4]}) == {}  # a perfect split
    assert logistic([True, False] * 4, {"x": [1, 1, 2, 2] * 2, "y": [2, 2, 4, 4] * 2}) == {}


def _shift(y: Any, columns: Any, found: Any) -> float:
    """The intercept at which the shares have the mean of y."""
    low, high = -20.0, 20.0
    score = np.array([found["x"][0], found["z"][0]]) @ columns
    for _ in range(200):
        middle = (low + high) / 2
        above = (1 / (1 + np.exp(-score - middle))).mean() > y.mean()
        low, high = (low, middle) if above else (middle, high)
    return middle


# Models.


def test_a_local_model_is_asked_and_its_first_line_read(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=258)
    run: dict[str, Any] = {"each": 1, "max_new_tokens": 3, "batch": 4}
    found = charbench(model, ByteTokenizer(), WORDS, path=tmp_path / "a.jsonl", **run)
    again = charbench(model, ByteTokenizer(), WORDS, **run)
    assert found.to_json() == again.to_json()
    assert all(len(one.reply.encode()) <= 9 for one in found.answered)
    assert found.answered[0].letters == [1] * 4
    # This tokenizer has no chat template: asked as a base model is, the prompt is another.
    plain = charbench(model, ByteTokenizer(), WORDS, chat=False, **run)
    assert [one.reply for one in plain.answered] != [one.reply for one in found.answered]
    assert len((tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()) == 28


def test_solved_questions_stand_in_front_and_are_not_asked(tmp_path: Path) -> None:
    words = ["banana", "Arizona", "window", *WORDS]
    asked: list[str] = []

    def last(messages: Any) -> str:
        asked.append(messages[0]["content"])
        return oracle([{"content": asked[-1].rpartition("Question: ")[2]}])

    found = charbench(last, None, words, each=100, tasks=["find_last_occurrence"], shots=3)
    assert found.accuracy("find_last_occurrence") == 1
    assert not {"banana", "Arizona", "window"} & {one.question.word for one in found.answered}
    assert re.findall(r"Answer: (\d+)", asked[0]) == ["5", "0", "3"]  # "A" is not "a"
    assert asked[0].endswith("Start counting from 0.\nAnswer:")
    with pytest.raises(PertokenError, match="shots must be 0 to 6, got 7"):
        charbench(oracle, None, WORDS, shots=7)


class Flaky(Endpoint):
    """Answers as the oracle, and fails once after `good` requests."""

    def __init__(self, good: int) -> None:
        super().__init__("http://localhost:1/v1", model="small")
        self.good, self.asked = good, 0

    def replies(self, conversations: Any, **_: Any) -> list[Reply]:
        self.asked += len(conversations)
        if self.asked > self.good:
            raise PertokenError("the endpoint http://localhost:1/v1 failed (503 busy), 4 times")
        return [Reply(oracle(messages)) for messages in conversations]


def test_a_run_goes_on_where_an_endpoint_failed(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    run: dict[str, Any] = {"each": 2, "batch": 8}
    with pytest.raises(PertokenError, match=r"503 busy.*14 replies are in .*run it again to go on"):
        charbench(Flaky(20), None, WORDS, path=path, **run)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"model": "http://localh')  # a kill in the middle of a line
    endpoint = Flaky(100)
    found = charbench(endpoint, None, WORDS, path=path, **run)
    assert endpoint.asked == 56 - 14
    assert [row["accuracy"] for row in found.summary()] == [1.0] * 4
    whole = charbench(Flaky(100), None, WORDS, **run)
    assert found.to_json() == whole.to_json()
    with pytest.raises(PertokenError, match=r"replies are lost: give path=, and a second run"):
        charbench(Flaky(20), None, WORDS, **run)
    with pytest.raises(PertokenError, match=r"was written with http://localhost:1/v1#small and 8"):
        charbench(oracle, None, WORDS, path=path, **run)
    path.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(PertokenError, match="line 1: no reply of CharBench"):
        charbench(oracle, None, WORDS, path=path, **run)
    foreign = json.dumps({"results": [1, 2]})  # without a line break at its end
    path.write_text(foreign, encoding="utf-8")
    with pytest.raises(PertokenError, match="give another file"):
        charbench(oracle, None, WORDS, path=path, **run)
    assert path.read_text(encoding="utf-8") == foreign


def test_replies_of_another_chat_mode_are_not_taken(tmp_path: Path) -> None:
    """With solved questions in front both ask the very same prompt."""
    path = tmp_path / "replies.jsonl"
    run: dict[str, Any] = {"each": 1, "shots": 1, "max_new_tokens": 1, "path": path}
    model = tiny_model("llama", vocab_size=258)
    charbench(model, ByteTokenizer(), WORDS, chat=True, **run)
    with pytest.raises(
        PertokenError, match=r"1 new tokens, chat=True, this run .* chat=False; give"
    ):
        charbench(model, ByteTokenizer(), WORDS, chat=False, **run)
    charbench(model, ByteTokenizer(), WORDS, **run)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 28
    del rows[0]["chat"]  # as files were
    path.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    with pytest.raises(PertokenError, match=r"chat not noted, this run .* chat=True; give"):
        charbench(model, ByteTokenizer(), WORDS, **run)


def test_a_file_that_could_not_be_written_is_refused_before_anything_is_asked(
    tmp_path: Path,
) -> None:
    endpoint = Flaky(100)
    with pytest.raises(PertokenError, match="there is no folder"):
        charbench(endpoint, None, WORDS, each=1, path=tmp_path / "missing" / "x.jsonl")
    assert endpoint.asked == 0


def test_the_command_takes_words_and_keeps_its_replies(
    tiny_folder: str, tmp_path: Path, capsys: Any
) -> None:
    file, out = tmp_path / "words.txt", tmp_path / "replies.jsonl"
    file.write_text(" ".join(WORDS), encoding="utf-8")
    command = ["probe", "characters", tiny_folder, "--words", str(file), "--each", "1"]
    command += ["--tasks", "count_unique_chars", "--forms", "plain,spelled", "--out", str(out)]
    assert main([*command, "--max-new-tokens", "2", "--json", "-"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [row["n"] for row in values["summary"]] == [7, 7]
    assert len(out.read_text(encoding="utf-8").splitlines()) == 14
    assert main([*command, "--tasks", "count_vowels"]) == 2
    assert "unknown task 'count_vowels'" in capsys.readouterr().err
    file.write_text("few words\n", encoding="utf-8")
    assert main(command) == 2
    assert "1 different words of 4 letters are wanted" in capsys.readouterr().err
