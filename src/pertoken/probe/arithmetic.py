"""Can a model add, and does it depend on how the digits are grouped?

"Tokenization counts" (arXiv 2402.14903). Additions of 7 to 9 digits are asked after a few solved
ones of the same lengths, written in several formats: as they are, with a separator between groups
of three digits from the right (R2L) or from the left (L2R), or repeated in another format before
the answer. The paper finds that L2R groups cost GPT-3.5 most of its accuracy where the answer has
more digits than both addends, and that a repetition with R2L commas brings it back.

Greedy decoding in batches padded on the left. Scored as the authors do: separators do not count,
one number is wanted. Models without a chat template get a line for each example, and the first line
of what they write is read (our reading). Sampling of problems and the kinds of errors are in
`_addition` and `_addition_errors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pertoken.errors import PertokenError
from pertoken.probe._addition import (
    PAIRS,
    Format,
    Lengths,
    Problem,
    Reading,
    check_lengths,
    messages,
    plain_prompt,
    problem_set,
    read,
    shots_for,
)
from pertoken.probe._addition_errors import analyse
from pertoken.probe._addition_report import ArithmeticReport, Outcome
from pertoken.probe._stream import Progress
from pertoken.prompts import check_ids, positions
from pertoken.tokenize.numbers import Direction, grouping_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ArithmeticReport", "Outcome", "arithmetic"]

FORMATS = ("nosep", "comma_r2l", "comma_l2r", "nosep/comma_r2l/comma_r2l")
_SPARE = 4  # tokens a response may be longer than the right one


@dataclass(frozen=True)
class _Task:
    """One problem in one format, with its prompt as ids."""

    name: str
    form: Format
    problem: Problem
    prompt: list[int]
    tokens: int
    """Of the right response, and a few more."""


def check_counts(shots: int, each: int, batch: int, limit: int | None) -> None:
    """Raise PertokenError for a number that `arithmetic` can't take."""
    if shots < 0 or each < 1 or batch < 1 or (limit is not None and limit < 1):
        raise PertokenError("shots must be 0 or more; each, limit and batch 1 or more")


@torch.no_grad()
def arithmetic(
    model: PreTrainedModel,
    tokenizer: Any,
    formats: Sequence[str] = FORMATS,
    shots: int = 8,
    *,
    lengths: Sequence[Lengths] = PAIRS,
    each: int = 10,
    limit: int | None = None,
    chat: bool | None = None,
    batch: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> ArithmeticReport:
    """Ask a model additions in several formats; the same problems and examples in each.

    formats: names of number formats, see `Format`: "nosep", or one of comma, space, dec, hashtag,
        dollar, foo with _r2l or _l2r; "question/answer" or "question/repeat/answer" for other ones
        in each part.
    shots: solved examples in front of each problem; the paper has 1, 2, 4 and 8.
    lengths: digits of both addends, or of both and the answer, for each kind of problem; `PAIRS`
        and `TRIPLES` are the paper's. each: problems of each. limit: only the first so many, which
        go through the lengths in turn.
    chat: use the chat template; by default where the tokenizer has one.
    progress: called with (what, problems done, problems in all).
    Raises PertokenError for an unknown format, impossible lengths, fewer than 0 shots, and
    prompts that the model cannot read.

    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> model = tiny_model("llama", vocab_size=258)
    >>> arithmetic(model, ByteTokenizer(), ["nosep"], 1, lengths=[(2, 2)], each=2).summary()[0]["n"]
    2
    """
    check_counts(shots, each, batch, limit)
    if chat is None:
        chat = bool(getattr(tokenizer, "chat_template", None))
    elif chat and not getattr(tokenizer, "chat_template", None):
        raise PertokenError("the tokenizer has no chat template: leave chat=True off")
    if not formats or not lengths:
        raise PertokenError("give at least one format and one kind of lengths")
    check_lengths(lengths)
    forms = {name: Format.parse(name) for name in formats}
    problems = problem_set(lengths, each, seed)[:limit]
    free = len(lengths[0]) == 2
    shown = [
        shots_for(problem, shots, problem.lengths[:2] if free else problem.lengths, [seed, place])
        for place, problem in enumerate(problems)
    ]
    tasks = []
    for name, form in forms.items():
        for problem, examples in zip(problems, shown, strict=True):
            prompt = _prompt(tokenizer, problem, examples, form, chat)
            right = tokenizer.encode(form.respond(problem), add_special_tokens=False)
            tasks.append(_Task(name, form, problem, prompt, len(right) + _SPARE))
    _refuse_unread(model, tasks)
    responses = _respond(model, tokenizer, tasks, batch, progress)
    cut, group = grouping_of(tokenizer)
    outcomes = [
        _judge(task, response, chat, cut, group)
        for task, response in zip(tasks, responses, strict=True)
    ]
    settings = {
        "shots": shots,
        "lengths": [list(one) for one in lengths],
        "problems": len(problems),
        "chat": chat,
        "seed": seed,
        "tokenizer": cut,
        "first_prompt": tokenizer.decode(tasks[0].prompt),
    }
    return ArithmeticReport(outcomes, settings)


def _prompt(
    tokenizer: Any, problem: Problem, shots: Sequence[Problem], form: Format, chat: bool
) -> list[int]:
    if not chat:
        return list(tokenizer.encode(plain_prompt(problem, shots, form)))
    from jinja2 import TemplateError

    turns = messages(problem, shots, form)
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError:  # some templates know no system line
        text = tokenizer.apply_chat_template(turns[1:], tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(text, add_special_tokens=False))


def _refuse_unread(model: PreTrainedModel, tasks: Sequence[_Task]) -> None:
    """PertokenError for prompts of another model's ids, and for more than a model's positions."""
    check_ids(model, (token for task in tasks for token in task.prompt))
    longest, new = max(len(task.prompt) for task in tasks), max(task.tokens for task in tasks)
    room = positions(model)
    if room is not None and longest + new > room:
        raise PertokenError(
            f"a prompt of {longest} tokens and {new} new ones do not fit the model's {room} "
            "positions: ask with fewer shots"
        )


def _respond(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[_Task],
    batch: int,
    progress: Progress | None,
) -> list[str]:
    """What the model writes behind each prompt, greedily."""
    pad = next(
        (each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0
    )
    # Prompts of like length together, so that little is padded.
    order = sorted(range(len(tasks)), key=lambda place: len(tasks[place].prompt))
    responses = [""] * len(tasks)
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        width = len(tasks[places[-1]].prompt)
        gaps = [width - len(tasks[place].prompt) for place in places]
        rows = [gap * [pad] + tasks[place].prompt for gap, place in zip(gaps, places, strict=True)]
        ids = torch.tensor(rows, device=model.device)
        mask = torch.tensor([gap * [0] + (width - gap) * [1] for gap in gaps], device=model.device)
        written = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(tasks[place].tokens for place in places),
            do_sample=False,
            pad_token_id=pad,
        )
        for place, row in zip(places, written[:, width:], strict=True):
            # Its own limit, so that the rest of the batch changes nothing.
            new = row[: tasks[place].tokens].tolist()
            responses[place] = str(tokenizer.decode(new, skip_special_tokens=True))
        if progress is not None:
            progress("additions", start + len(places), len(order))
    return responses


def _judge(task: _Task, response: str, chat: bool, cut: str, group: int) -> Outcome:
    text = response if chat else response.split("\n")[0]
    reading: Reading = read(text, task.problem, task.form)
    direction, size = _direction(task.form.answer, cut, group)
    right = reading.answer == task.problem.answer
    errors = None
    if reading.answer is not None and not right:
        errors = analyse(task.problem, reading.answer, direction, size)
    return Outcome(task.name, task.problem, text, reading, right, errors)


def _direction(style: str, cut: str, group: int) -> tuple[Direction | None, int]:
    """How an answer in this format is cut into tokens: by its separators, else by the tokenizer."""
    if cut == "single":
        return "single", 1
    if style.endswith("r2l"):
        return "r2l", 3
    if style.endswith("l2r"):
        return "l2r", 3
    if cut == "r2l":
        return "r2l", group
    return ("l2r", group) if cut == "l2r" else (None, group)
