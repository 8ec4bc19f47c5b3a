"""Additions: drawn as published, asked alike in every format, scored and explained as defined."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from pertoken import PertokenError
from pertoken.probe._addition import (
    PAIRS,
    SYSTEM,
    TRIPLES,
    Format,
    Problem,
    draw,
    problem_set,
    read,
    shots_for,
    write,
)
from pertoken.probe._addition_errors import analyse, carries, longest_chain
from pertoken.probe.arithmetic import arithmetic
from pertoken.testing import ByteTokenizer, tiny_model

NUMBERS = st.integers(min_value=1, max_value=10**9)


# The sampler.


def test_every_draw_has_the_lengths_and_every_addition_of_them_can_be_drawn() -> None:
    rng = np.random.default_rng(0)
    for lengths in [(1, 1, 1), (1, 2, 2), (2, 1, 3), (1, 1, 2), (2, 2)]:
        pairs = draw(lengths, 40000, rng).tolist()
        found = {Problem(*pair) for pair in pairs}
        wanted = {
            Problem(a, b)
            for a in range(1, 100)
            for b in range(1, 100)
            if (len(str(a)), len(str(b)), len(str(a + b)))[: len(lengths)] == lengths
        }
        # The rarest of them, a pair of 90 x 90, is missed with a chance of 90^2 exp(-40000 / 90^2).
        assert found <= wanted
        assert len(wanted - found) <= 150
        assert lengths == (2, 2) or found == wanted


def test_the_shorter_addend_comes_first_and_then_the_answer() -> None:
    """Published: the shorter is uniform over 1..9, then the answer over the sums from 10 on."""
    draws = 45000
    counts = Counter(map(tuple, draw((1, 1, 2), draws, np.random.default_rng(1)).tolist()))
    for shorter in range(1, 10):
        for longer in range(10 - shorter, 10):
            chance = 1 / 9 / shorter
            spread = math.sqrt(draws * chance * (1 - chance))
            # 45 pairs beyond 5.5 standard deviations: a chance of less than 2e-6.
            assert abs(counts[longer, shorter] - draws * chance) < 5.5 * spread


def test_the_papers_sets() -> None:
    assert len(PAIRS) == 9
    assert len(TRIPLES) == 13
    problems = problem_set()
    assert len(problems) == 90
    assert [problem.lengths[:2] for problem in problems[:9]] == list(PAIRS)
    assert problem_set(seed=1) != problems == problem_set()
    assert sum(problem.longer for problem in problem_set(TRIPLES, each=100)) == 400


def test_examples_have_the_problems_lengths_and_are_not_the_problem() -> None:
    problem = Problem(1, 8)
    shots = shots_for(problem, 8, problem.lengths, [0, 0])
    assert len(shots) == 8
    assert {shot.lengths for shot in shots} == {(1, 1, 1)}
    assert problem not in shots
    free = shots_for(problem, 40, (1, 1), [0, 0])
    assert {shot.lengths for shot in free} == {(1, 1, 1), (1, 1, 2)}


@pytest.mark.parametrize("lengths", [(7,), (0, 1), (7, 7, 9), (7, 8, 7), (19, 1)])
def test_impossible_lengths_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(PertokenError, match="lengths"):
        draw(lengths, 1, np.random.default_rng(0))


# Formats and reading.


def test_formats_as_in_the_paper() -> None:
    problem = Problem(2307350, 14016227)
    assert Format.parse("nosep").ask(problem) == "2307350+14016227="
    assert Format.parse("comma_r2l").ask(problem) == "2,307,350+14,016,227="
    assert Format.parse("comma_l2r").ask(problem) == "230,735,0+140,162,27="
    assert Format.parse("comma_r2l").respond(problem) == "16,323,577"
    assert Format.parse("nosep/comma_r2l").respond(problem) == "16,323,577"
    repeated = Format.parse("nosep/comma_r2l/nosep")
    assert repeated.ask(problem) == "2307350+14016227="
    assert repeated.respond(problem) == "2,307,350+14,016,227=16323577"


@given(NUMBERS, NUMBERS, st.sampled_from(["comma", "space", "dec", "hashtag", "dollar", "foo"]))
def test_every_right_response_is_read_as_right(first: int, second: int, separator: str) -> None:
    problem = Problem(first, second)
    for side in ("r2l", "l2r"):
        style = f"{separator}_{side}"
        for name in ("nosep", style, f"nosep/{style}", f"{style}/nosep/{style}"):
            form = Format.parse(name)
            reading = read(form.respond(problem), problem, form)
            assert (reading.answer, reading.format_kept) == (problem.answer, True)
            assert reading.repeated is (True if form.repeat else None)


def test_what_is_read_from_odd_responses() -> None:
    problem, plain = Problem(1000, 234), Format.parse("nosep")
    assert read("The answer is 1,234.", problem, plain).answer == 1234
    assert not read("1,234", problem, plain).format_kept
    assert read("1000+234=1234", problem, plain).answer is None
    assert read("I cannot say", problem, plain).answer is None
    again = Format.parse("nosep/comma_r2l/nosep")
    assert read("1,000 + 234 = 1234", problem, again).repeated
    assert read("1234", problem, again).answer == 1234
    assert read("1234", problem, again).repeated is False
    wrong = read("1,000+243=1243", problem, again)
    assert (wrong.answer, wrong.repeated) == (1243, False)


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(PertokenError, match="did you mean 'comma_r2l'"):
        Format.parse("comma_r21")
    with pytest.raises(PertokenError, match="more than question/repeat/answer"):
        Format.parse("nosep/nosep/nosep/nosep")


# Kinds of errors.


@given(NUMBERS, NUMBERS)
def test_carries_by_the_definition(first: int, second: int) -> None:
    problem = Problem(first, second)
    places = max(len(str(first)), len(str(second)))
    wanted = [
        first % 10 ** (place + 1) + second % 10 ** (place + 1) >= 10 ** (place + 1)
        for place in range(places)
    ]
    assert carries(problem) == wanted
    runs = "".join("c" if each else " " for each in wanted).split()
    assert longest_chain(problem) == max(map(len, runs), default=0)
    assert problem.longer == wanted[-1]


@given(NUMBERS, NUMBERS, st.integers(0, 8), st.sampled_from([-1, 1]), st.integers(1, 4))
def test_an_answer_off_by_a_power_of_ten(
    first: int, second: int, power: int, sign: int, group: int
) -> None:
    problem = Problem(first, second)
    answer = problem.answer + sign * 10**power
    if answer < 1:
        return
    errors = analyse(problem, answer, "r2l", group)
    assert errors.power_of_ten == power
    assert errors.length == len(str(answer)) - len(str(problem.answer))
    if errors.length:
        assert errors.digits == errors.tokens == ()
        return
    wrong = [a != b for a, b in zip(str(answer), str(problem.answer), strict=True)]
    assert list(errors.digits) == wrong
    # From the right, so that groups of the rule R2L are simple slices.
    tokens = [any(wrong[::-1][i : i + group]) for i in range(0, len(wrong), group)][::-1]
    assert list(errors.tokens) == tokens
    took = [False, *carries(problem)][: len(wrong)]
    gave = [*carries(problem), False][: len(wrong)]
    assert errors.carry_in == sum(a and b for a, b in zip(wrong[::-1], took, strict=True))
    assert errors.carry_out == sum(a and b for a, b in zip(wrong[::-1], gave, strict=True))


def test_the_papers_other_kinds() -> None:
    assert analyse(Problem(1234, 56), 124 + 56).dropped_digit
    assert analyse(Problem(1234, 56), 1234 + 5600).left_aligned
    assert not analyse(Problem(1234, 5678), 1).left_aligned
    # 1|234|567 + 1|999|000: 2, 1233, 567 in a row.
    assert analyse(Problem(1234567, 1999000), 21233567, "r2l").chunkwise == ("left", "right")
    # 123|4 + 567: 690 and 4 from the left, 123 and 571 from the right.
    assert analyse(Problem(1234, 567), 6904, "l2r").chunkwise == ("left",)
    assert analyse(Problem(1234, 567), 123571, "l2r").chunkwise == ("right",)
    assert analyse(Problem(1234, 567), 6904).chunkwise == ()


# The run.


class Adder:
    """Stands in for a model: adds right, but for sums of the digits it is told to spoil."""

    device = torch.device("cpu")
    config = LlamaConfig()

    def __init__(self, tokenizer: Any, style: str = "nosep", spoil: int | None = None) -> None:
        self.tokenizer, self.style, self.spoil = tokenizer, style, spoil
        self.prompts: list[str] = []

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return torch.nn.Embedding(len(self.tokenizer), 1)

    def named_modules(self) -> list[Any]:
        return []

    def generate(
        self,
        ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_new_tokens: int,
        do_sample: bool,
        pad_token_id: int,
    ) -> torch.Tensor:
        assert not do_sample
        rows = []
        for row, mask in zip(ids, attention_mask, strict=True):
            prompt = self.tokenizer.decode(row[mask.bool()].tolist())
            self.prompts.append(prompt)
            question = prompt.split("\n")[-1].rstrip("=")
            parts = ["".join(filter(str.isdigit, part)) for part in question.split("+")]
            answer = sum(map(int, parts))
            if len(str(answer)) == self.spoil:
                answer += 1 if answer % 10 < 9 else -1
            text = write(answer, self.style) + "\nand so on"
            new = self.tokenizer.encode(text, add_special_tokens=False)[:max_new_tokens]
            rows.append(torch.tensor(new + [pad_token_id] * (max_new_tokens - len(new))))
        return torch.cat([ids, torch.stack(rows)], -1)


def test_a_model_that_adds_is_right_and_a_spoiled_digit_is_found() -> None:
    tokenizer = ByteTokenizer()
    model: Any = Adder(tokenizer, spoil=4)
    report = arithmetic(
        model, tokenizer, ["nosep", "comma_l2r"], 2, lengths=[(3, 3, 3), (3, 3, 4)], each=5, batch=3
    )
    assert report.formats == ["nosep", "comma_l2r"]
    for row in report.summary():
        assert (row["n"], row["accuracy"]) == (10, 0.5)
        assert (row["accuracy_as_long"], row["accuracy_longer"]) == (1.0, 0.0)
        assert (row["power_of_ten"], row["length"], row["unread"]) == (0.5, 0, 0)
    assert report.wrong_digits("nosep") == {4: [0, 0, 0, 1]}
    kept = [row["format_kept"] for row in report.summary()]
    assert kept == [1.0, 0.5]  # a sum of three digits looks alike in both
    frame = report.to_dataframe()
    assert len(frame) == 20
    assert frame[~frame.right].error_digits.tolist() == 10 * [[4]]
    assert frame[~frame.right].error_tokens.tolist() == 10 * [[4]]
    problems = [[o.problem for o in report.of(name)] for name in report.formats]
    assert problems[0] == problems[1]
    assert len(json.loads(json.dumps(report.to_dict()))["outcomes"]) == 20
    assert len(report.cells()) == len(report.error_cells()) == 1 + 2
    assert [list(bar.y) for bar in report.plot().data] == [[1, 1], [0, 0]]
    page = report.to_html()
    assert "comma_l2r" in page
    assert "http:" not in page.replace("http-equiv", "")


def test_prompts_hold_the_examples_solved_in_the_format() -> None:
    tokenizer = ByteTokenizer()
    model: Any = Adder(tokenizer)
    report = arithmetic(
        model, tokenizer, ["comma_r2l"], 3, lengths=[(4, 5), (5, 4)], each=3, limit=3
    )
    assert len(report.outcomes) == 3
    for prompt in model.prompts:
        *shots, question = prompt.split("\n")
        assert len(shots) == 3
        sizes = [len(part.replace(",", "")) for part in question.rstrip("=").split("+")]
        for shot in shots:
            addends, answer = shot.replace(",", "").split("=")
            assert [len(part) for part in addends.split("+")] == sizes
            assert sum(map(int, addends.split("+"))) == int(answer)
    assert report.settings["first_prompt"] in model.prompts


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    names = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = template
    return tokenizer


TEMPLATE = "{% for m in messages %}{{ m.role }}|{{ m.content }}\n{% endfor %}assistant|"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE


def test_chats_have_the_papers_turns() -> None:
    for template in (TEMPLATE, NO_SYSTEM):
        tokenizer = chat_tokenizer(template)
        model: Any = Adder(tokenizer)
        with pytest.raises(ValueError, match="invalid literal"):  # the stand-in reads no chats
            arithmetic(model, tokenizer, ["nosep"], 1, lengths=[(2, 2)], each=1)
        lines = model.prompts[0].split("\n")
        if template == TEMPLATE:
            assert lines.pop(0) == f"system|{SYSTEM}"
        roles, texts = zip(*(line.split("|") for line in lines), strict=True)
        assert roles == ("user", "assistant", "user", "assistant")
        assert texts[0].endswith("=")
        assert texts[1].isdigit()
    plain: Any = Adder(tokenizer)
    report = arithmetic(plain, tokenizer, ["nosep"], 1, lengths=[(2, 2)], each=2, chat=False)
    assert report.accuracy("nosep") == 1


def test_batches_change_nothing() -> None:
    model, tokenizer = tiny_model("llama", vocab_size=258), ByteTokenizer()
    options: Any = {"lengths": [(1, 2), (4, 4)], "each": 2}
    alone = arithmetic(model, tokenizer, ["nosep", "foo_l2r"], 1, batch=1, **options)
    together = arithmetic(model, tokenizer, ["nosep", "foo_l2r"], 1, batch=5, **options)
    assert [o.response for o in alone.outcomes] == [o.response for o in together.outcomes]


def test_mistakes_are_refused_before_the_model_is_asked() -> None:
    model: Any = None
    tokenizer = ByteTokenizer()
    with pytest.raises(PertokenError, match="shots must be 0"):
        arithmetic(model, tokenizer, shots=-1)
    with pytest.raises(PertokenError, match="no chat template"):
        arithmetic(model, tokenizer, chat=True)
    with pytest.raises(PertokenError, match="at least one format"):
        arithmetic(model, tokenizer, [])
    with pytest.raises(PertokenError, match="or none of them"):
        arithmetic(model, tokenizer, lengths=[(2, 2), (2, 2, 2)])


def test_prompts_that_the_model_cannot_read_are_refused() -> None:
    run: dict[str, Any] = {"lengths": [(2, 2)], "each": 1}
    model = tiny_model("gpt2", vocab_size=258, max_positions=64)
    with pytest.raises(PertokenError, match="the model's 64 positions: ask with fewer shots"):
        arithmetic(model, ByteTokenizer(), ["nosep"], 8, **run)
    with pytest.raises(PertokenError, match="but the model knows 40 ids"):
        arithmetic(tiny_model("gpt2", vocab_size=40), ByteTokenizer(), ["nosep"], 1, **run)
