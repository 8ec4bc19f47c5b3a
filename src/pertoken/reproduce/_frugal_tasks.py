"""The four tasks of FrugalPrompt's reproduction, chosen by rule, never by result.

Only `body` is compressed; what stands around it is the task, as in the paper. Items of the report
split are those with odd numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pertoken.reproduce._copies import unlike
from pertoken.reproduce._reagent_prompts import THINGS, Split, planted

TASKS = ("classification", "questions", "summaries", "mathematics")
_TAIL = " To say it again,"
_MAIL_WORDS = (40, 120)
_NOT_PLAIN = re.compile(
    r"[<>]|=[0-9A-F]{2}|=$|^\s*\||^--|--\]|\S{41}|[^\t\n\r -~]|nextpart|original message"
    r"|content-\w+:|\bw(?:rote|rites):|^\s*(?:url|date|from|to|cc|subject):",
    re.I | re.M,
)
_MOST_WORDS = 350  # of an article: a run must end on two cores

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Item:
    """head + body + tail is the prompt; answer follows it, "" where the model itself writes it.

    choices: the answers that compete, empty where there is no choice.
    """

    task: str
    number: int
    head: str
    body: str
    tail: str
    answer: str
    choices: tuple[str, ...] = ()

    def prompt(self, body: str) -> str:
        """The prompt with another body."""
        return self.head + body + self.tail


def classification(mails: Rows, count: int, split: Split = "report") -> list[Item]:
    """Is a mail spam? As many of each, drawn evenly over the groups; the first words of plain text.

    What the post or a list has left in a text (headers, codes, quotations, signatures) tells the
    two apart without a word being read: a mail whose first words hold any of it is left out. No
    mail is a copy of another one, nor of one of the other split: a campaign comes many times.
    """
    found: dict[Split, list[Item]] = {"dev": [], "report": []}
    for number, row in enumerate(mails):
        words = re.findall(r"\S+\s*", str(row["text"]))
        body = "".join(words[: _MAIL_WORDS[1]]).strip()
        if len(words) >= _MAIL_WORDS[0] and not _NOT_PLAIN.search(body):
            item = Item("classification", number, "", body, "", str(row["label"]), ("ham", "spam"))
            found["report" if number % 2 else "dev"].append(item)
    known = [item.body for item in found["dev"]] if split == "report" else []
    own = [found[split][place] for place in unlike([item.body for item in found[split]], known)]
    spam, ham = ([item for item in own if item.answer == label] for label in ("spam", "ham"))
    half = count // 2
    return _evenly(spam, count - half) + _evenly(ham, half)


def _evenly(items: list[Item], count: int) -> list[Item]:
    """Up to `count` of the items, at like distances: they stand group by group."""
    count = min(count, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def questions(count: int) -> list[Item]:
    """A fact among unrelated sentences, and a question that only the fact answers."""
    values = {f" {value}": names for _, _, names in THINGS for value in names}
    found = []
    for asked in planted("report", count):
        body, _, rest = asked.prompt.partition(_TAIL)
        answer = asked.target or ""
        choices = tuple(f" {name}" for name in values[answer])
        found.append(Item("questions", asked.number, "", body, _TAIL + rest, answer, choices))
    return found


def summaries(rows: Rows, count: int) -> list[Item]:
    """Articles of Spec-Bench's summaries of at most 350 words."""
    found = []
    for row in sorted(rows, key=lambda row: int(row["question_id"])):
        head, colon, body = str(row["turns"][0]).partition(": ")
        number = int(row["question_id"])
        short = len(body.split()) <= _MOST_WORDS
        if row["category"] == "summarization" and number % 2 and short and colon:
            tail = "\n\nSummary in one sentence:"
            found.append(Item("summaries", number, f"{head}: ", body, tail, ""))
    return found[:count]


def mathematics(rows: Rows, count: int) -> list[Item]:
    """GSM8K with the worked solution as the answer, without its calculator marks."""
    found = []
    for number, row in list(enumerate(rows))[1 : 2 * count : 2]:
        solution = re.sub(r"<<.*?>>", "", str(row["answer"])).replace("\n#### ", "\nThe answer is ")
        body = str(row["question"])
        item = Item("mathematics", number, "Question: ", body, "\nAnswer:", f" {solution}")
        found.append(item)
    return found


def rouge_1(candidate: str, reference: str) -> float:
    """F1 of the words two texts share, counted as often as they occur (ROUGE-1), 0 to 1.

    >>> round(rouge_1("the cat sat", "The cat ran off"), 4)
    0.5714
    """
    from collections import Counter

    given, wanted = (Counter(re.findall(r"\w+", text.lower())) for text in (candidate, reference))
    shared = (given & wanted).total()
    return 2 * shared / max(1, given.total() + wanted.total())
