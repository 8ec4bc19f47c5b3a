"""The questions of CharBench (arXiv 2508.02591): four tasks over words of one corpus, scored.

Words, templates, sampling and scoring are those of the authors' code (omriuz/CharBench, MIT). Their
words are the unique ones of 4 to 10 letters in the first 100,000 documents of MiniPile: 25,000 of
each length, 6,250 for each task, no word twice; of a word the character is drawn uniformly from its
positions. They are put in an order before anything is drawn, so that a seed means the same
everywhere (ours).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pertoken.errors import PertokenError, nearest

__all__ = [
    "EXAMPLES",
    "FORMS",
    "LENGTHS",
    "POSITION",
    "TASKS",
    "Question",
    "questions",
    "read",
    "words_in",
]

TASKS = {
    "count_character_frequency": "How many times does the character '{character}' appear in the "
    "string '{word}'?",
    "count_unique_chars": "How many unique characters appear in the string '{word}'?",
    "find_first_occurrence": "What is the index of the first occurrence of the character "
    "'{character}' in the string '{word}'?\nStart counting from 0.",
    "find_last_occurrence": "What is the index of the last occurrence of the character "
    "'{character}' in the string '{word}'?\nStart counting from 0.",
}
"""The authors' names and templates."""

POSITION = ("find_first_occurrence", "find_last_occurrence")
"""The tasks about places, not counts."""

LENGTHS = tuple(range(4, 11))
"""Letters of a word."""

PROMPT = (
    "Answer this question only with the final number, without any other text. Lower case and upper "
    "case letters are considered different characters.\n\nQuestion: {question}"
)
FORMS = {"plain": "", "spelled": "\nThe string '{word}' is spelled: {letters}"}
"""What is added to a question; the spelled-out form is ours."""

EXAMPLES = (
    ("banana", "a"),
    ("Arizona", "A"),
    ("window", "d"),
    ("Tennessee", "s"),
    ("river", "r"),
    ("possible", "l"),
)
"""Words and letters of the solved questions, which are not asked themselves then."""


@dataclass(frozen=True)
class Question:
    """A task, its word, the character that is asked for (None for unique ones), the answer."""

    task: str
    word: str
    character: str | None
    answer: int

    def prompt(self, form: str = "plain", shots: int = 0) -> str:
        """What a model is asked; shots: solved questions of the same task before it (ours).

        >>> print(Question("count_unique_chars", "Otto", None, 3).prompt("spelled", shots=1))
        Answer this question only with the final number, without any other text. Lower case and \
upper case letters are considered different characters.
        <BLANKLINE>
        Question: How many unique characters appear in the string 'banana'?
        The string 'banana' is spelled: b a n a n a
        Answer: 3
        <BLANKLINE>
        Question: How many unique characters appear in the string 'Otto'?
        The string 'Otto' is spelled: O t t o
        Answer:
        """
        if not shots:
            return PROMPT.format(question=self._asked(form))
        shown = [_answered(self.task, word, letter) for word, letter in EXAMPLES[:shots]]
        solved = [f"{each._asked(form)}\nAnswer: {each.answer}" for each in shown]
        return PROMPT.format(question="\n\nQuestion: ".join([*solved, self._asked(form)])) + (
            "\nAnswer:"
        )

    def _asked(self, form: str) -> str:
        asked = TASKS[self.task].format(word=self.word, character=self.character)
        return asked + FORMS[form].format(word=self.word, letters=" ".join(self.word))

    @property
    def mixed_case(self) -> bool:
        """Whether both cases matter: of the letter that is looked for, else of any letters."""
        if self.task in POSITION and self.character is not None:
            return self.character.upper() in self.word and self.character.lower() in self.word
        return self.word.upper() != self.word != self.word.lower()


def words_in(texts: Iterable[str]) -> list[str]:
    """The different words of 4 to 10 letters a to z of some texts, in alphabetical order.

    >>> words_in(["The cats, the Cats and 3 caterpillars; naïve"])
    ['Cats', 'cats']
    """
    found = {word for text in texts for word in re.findall(r"\b[a-zA-Z]+\b", text)}
    return sorted(word for word in found if len(word) in LENGTHS)


def questions(
    words: Iterable[str], each: int, *, tasks: Sequence[str] = tuple(TASKS), seed: int = 0
) -> list[Question]:
    """`each` questions of every task about words of every length, no word twice.

    Others than words of 4 to 10 letters a to z are left out. The published set has 6,250 each.
    The lengths take turns, so that the first n questions of a task are balanced too.
    Raises PertokenError for an unknown task, `each` below 1, and too few words of a length.

    >>> words = ["four", "lord", "seven", "house", "eleven", "letter", "another", "letters"]
    >>> words += ["language", "strength", "character", "wonderful", "strawberry", "everything"]
    >>> found = questions(words, 1, tasks=["find_first_occurrence"])
    >>> [len(question.word) for question in found]
    [4, 5, 6, 7, 8, 9, 10]
    """
    for task in tasks:
        if task not in TASKS:
            raise PertokenError(
                f"unknown task {task!r}{nearest(task, TASKS)}: there are {', '.join(TASKS)}"
            )
    if each < 1:
        raise PertokenError(f"each must be 1 or more, got {each}")
    draw = random.Random(seed)
    by_length: dict[int, list[str]] = {length: [] for length in LENGTHS}
    for word in sorted(set(words)):
        if len(word) in by_length and re.fullmatch("[a-zA-Z]+", word):
            by_length[len(word)].append(word)
    for length, own in by_length.items():
        if len(own) < each * len(tasks):
            raise PertokenError(
                f"{each * len(tasks)} different words of {length} letters are wanted, there are "
                f"{len(own)}: give more words, or a smaller each"
            )
        draw.shuffle(own)
    found = []
    for number, task in enumerate(tasks):
        for place in range(number * each, (number + 1) * each):
            for length in LENGTHS:
                found.append(_question(task, by_length[length][place], draw))
    return found


def _question(task: str, word: str, draw: random.Random) -> Question:
    return _answered(task, word, None if task == "count_unique_chars" else draw.choice(word))


def _answered(task: str, word: str, character: str | None) -> Question:
    """The question with its right answer."""
    if task == "count_unique_chars" or character is None:
        return Question(task, word, None, len(set(word)))
    answers = {
        "count_character_frequency": word.count,
        "find_first_occurrence": word.index,
        "find_last_occurrence": word.rindex,
    }
    return Question(task, word, character, answers[task](character))


def read(reply: str) -> int | None:
    """The number that a reply is, None where it is anything else: `int` of it, as the authors do.

    >>> read(" 3\\n"), read("3."), read("The answer is 3")
    (3, None, None)
    """
    try:
        return int(reply)
    except ValueError:
        return None
