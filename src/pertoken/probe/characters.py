"""How well does a model see the letters of a word, and does it depend on the tokens?

CharBench (arXiv 2508.02591): four tasks, two of counting and two of finding places, over words of 4
to 10 letters. The paper finds that right answers go with the length of the word and the number that
is asked for, little with the number of tokens, and that places are found less often in long tokens.
Questions and scoring are in `_questions`, the analyses in `_charbench_report`.

Differences from the authors' code: the word is tokenised as it stands in the question, behind its
quote, and letters are assigned to tokens by characters, not by the strings of tokens, whose marks
of a blank would shift them (ours); no system message is given; of a model without a chat template
the first line is read (our reading); replies are greedy and short.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pertoken._chat import asker
from pertoken._files import check_target, drop_cut_line, whole_lines
from pertoken.errors import PertokenError, nearest
from pertoken.probe._charbench_report import Answered, CharBench
from pertoken.probe._questions import EXAMPLES, FORMS, TASKS, Question, questions, read, words_in
from pertoken.probe._stream import Progress
from pertoken.tokenize.ways import spans

__all__ = ["CharBench", "ask_questions", "charbench", "default_words"]

_ROUNDS = 8  # batches of a local model between two savings
_BEFORE, _BEHIND = "in the string '", "'?"


def charbench(
    model: Any,
    tokenizer: Any = None,
    words: Iterable[str] | None = None,
    *,
    each: int = 10,
    tasks: Sequence[str] = tuple(TASKS),
    forms: Sequence[str] = ("plain",),
    shots: int = 0,
    limit: int | None = None,
    chat: bool | None = None,
    max_new_tokens: int = 8,
    batch: int = 16,
    seed: int = 0,
    path: str | Path | None = None,
    progress: Progress | None = None,
) -> CharBench:
    """Ask a model to count and to find letters in words, and relate its errors to the tokens.

    model: a model of transformers with its `tokenizer`, an `Endpoint`, or a function of messages
        that gives the text of the reply.
    tokenizer: of an endpoint or a function it may be left out; nothing is said of tokens then.
    words: words of 4 to 10 letters, others are left out; by default those of Shakespeare's plays.
    each: questions of each task and each of the 7 lengths. limit: only the first so many of a task.
    forms: "plain" as published, and "spelled", which also gives the word letter by letter (ours).
    shots: solved questions in front of each, 0 to 6 (ours; published are none).
    chat: ask a local model through its chat template; by default where it has one. False lets it go
        on with the question, behind which "Answer:" stands then.
    batch: questions at once, or requests to an endpoint at a time.
    path: a file of JSON lines that keeps every reply; those that are there are not asked again.
    Raises PertokenError for too few words, an unknown task or form, a file of another model, and
    where an endpoint fails: with `path` a second run goes on where it stopped.

    >>> words = ["four", "seven", "eleven", "letters", "language", "character", "strawberry"]
    >>> found = charbench(lambda messages: "1", None, words, each=1,
    ...                   tasks=["count_character_frequency"])
    >>> len(found.answered)
    7
    """
    check_settings(tasks, forms, shots, max_new_tokens=max_new_tokens, batch=batch, limit=limit)
    asker(model, tokenizer, max_new_tokens, batch)  # refuses what can't be asked, before the words
    shown = {word for word, _ in EXAMPLES[:shots]}
    known = [word for word in (default_words() if words is None else words) if word not in shown]
    asked = questions(known, each, tasks=tasks, seed=seed)
    if limit is not None:
        asked = [q for task in tasks for q in [q for q in asked if q.task == task][:limit]]
    pairs = [(question, form) for form in forms for question in asked]
    answered = ask_questions(
        model,
        tokenizer,
        pairs,
        shots=shots,
        chat=chat,
        max_new_tokens=max_new_tokens,
        batch=batch,
        path=path,
        progress=progress,
    )
    settings = {
        "each": each,
        "limit": limit,
        "forms": list(forms),
        "shots": shots,
        "chat": chat,
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "first_prompt": asked[0].prompt(forms[0], shots),
    }
    return CharBench(answered, settings)


def check_settings(
    tasks: Sequence[str], forms: Sequence[str], shots: int, **counts: int | None
) -> None:
    """Raise PertokenError for what `charbench` can't take; counts: by name, 1 or more, or None."""
    for form in forms:
        if form not in FORMS:
            raise PertokenError(
                f"unknown form {form!r}{nearest(form, FORMS)}: there are {', '.join(FORMS)}"
            )
    if not forms or not tasks:
        raise PertokenError("give at least one task and one form")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise PertokenError(f"{name} must be 1 or more, got {value}")
    if not 0 <= shots <= len(EXAMPLES):
        raise PertokenError(f"shots must be 0 to {len(EXAMPLES)}, got {shots}")


def ask_questions(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[Question, str]],
    *,
    shots: int = 0,
    chat: bool | None = None,
    max_new_tokens: int,
    batch: int,
    path: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Answered]:
    """The answers to questions in their forms; arguments and errors as of `charbench`."""
    ask = asker(model, tokenizer, max_new_tokens, batch, chat=chat is not False)
    kept = _Kept(path, _name(model), max_new_tokens, chat is not False)
    local = hasattr(model, "generate")
    together = batch * (_ROUNDS if local else 1)
    prompts = [question.prompt(form, shots) for question, form in pairs]
    if chat is False and not shots:
        prompts = [f"{prompt}\nAnswer:" for prompt in prompts]
    # Questions of one task begin alike, and a local model reads that once.
    groups: dict[tuple[str, str], list[str]] = {}
    for (question, form), prompt in zip(pairs, prompts, strict=True):
        if prompt not in kept.replies:
            groups.setdefault((form, question.task), []).append(prompt)
    parts = [
        own[start : start + together]
        for own in groups.values()
        for start in range(0, len(own), together)
    ]
    for part in parts:
        if progress is not None:
            progress("questions", len(kept.replies), len(prompts))
        try:
            said = ask(part)
        except PertokenError as error:
            raise PertokenError(f"{error}; {kept.hint()}") from None
        kept.add(part, [one.text for one in said])
    first_line = local and (chat is False or not getattr(tokenizer, "chat_template", None))
    pieces = _pieces(tokenizer, {question.word for question, _ in pairs})
    return [
        Answered(question, form, reply, read(_first(reply) if first_line else reply), own)
        for (question, form), prompt in zip(pairs, prompts, strict=True)
        for reply, own in [(kept.replies[prompt], pieces.get(question.word))]
    ]


def default_words() -> list[str]:
    """The words of Shakespeare's plays (public domain, fetched once)."""
    from pertoken.data import data

    return words_in(speech for play in data("shakespeare") for speech in play["speeches"])


def _first(reply: str) -> str:
    return reply.strip().partition("\n")[0]


def _pieces(tokenizer: Any, words: Iterable[str]) -> dict[str, list[int]]:
    """The letters that each token of a word holds, the word in quotes as in a question."""
    if tokenizer is None:
        return {}
    found = {}
    for word in words:
        ids = tokenizer.encode(f"{_BEFORE}{word}{_BEHIND}", add_special_tokens=False)
        start, end = len(_BEFORE), len(_BEFORE) + len(word)
        places = spans(ids, tokenizer)
        shift = places[-1][1] - end - len(_BEHIND)  # of a blank that is put before every text
        letters = [min(last - shift, end) - max(first - shift, start) for first, last in places]
        found[word] = [count for count in letters if count > 0]
    return found


def _name(model: Any) -> str:
    """What a model is called in a file of replies."""
    if hasattr(model, "replies"):
        return f"{model.url}#{model.model}"
    config = getattr(model, "config", None)
    known = getattr(config, "_name_or_path", "") or type(model).__name__
    return str(known if config is not None else getattr(model, "__name__", known))


def _said(about: dict[str, Any]) -> str:
    chat = "chat not noted" if about["chat"] is None else f"chat={about['chat']}"
    return f"{about['model']} and {about['max_new_tokens']} new tokens, {chat}"


class _Kept:
    """Replies by their prompts, in a file too where there is one."""

    def __init__(
        self, path: str | Path | None, model: str, max_new_tokens: int, chat: bool
    ) -> None:
        self._path = None if path is None else Path(path)
        self._about = {"model": model, "max_new_tokens": max_new_tokens, "chat": chat}
        self.replies: dict[str, str] = {}
        if self._path is not None:
            check_target(self._path)
            self._read(self._path)

    def _read(self, path: Path) -> None:
        for number, line in enumerate(whole_lines(path), 1):
            try:
                row = json.loads(line)
                about = {"model": row["model"], "max_new_tokens": row["max_new_tokens"]}
                about["chat"] = row.get("chat")  # files of before did not say
                self.replies[str(row["prompt"])] = str(row["reply"])
            except (ValueError, KeyError, TypeError):
                raise PertokenError(
                    f"{path}, line {number}: no reply of CharBench; give another file"
                ) from None
            if about != self._about:
                raise PertokenError(
                    f"{path} was written with {_said(about)}, this run has {_said(self._about)}; "
                    "give another file"
                )
        drop_cut_line(path, '{"model": ')

    def add(self, prompts: Sequence[str], replies: Sequence[str]) -> None:
        """Keep replies."""
        found = dict(zip(prompts, replies, strict=True))
        self.replies |= found
        if self._path is not None:
            rows = [{**self._about, "prompt": p, "reply": reply} for p, reply in found.items()]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            with self._path.open("ab") as file:
                file.write(lines.encode("utf-8", "replace"))

    def hint(self) -> str:
        """How to go on after an error."""
        if self._path is None:
            return f"{len(self.replies)} replies are lost: give path=, and a second run goes on"
        return f"{len(self.replies)} replies are in {self._path}: run it again to go on"
