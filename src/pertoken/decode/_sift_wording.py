"""What SIFT asks a model: all wordings in one place. They are ours, after the paper's Section 3."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HEADING", "WORDING", "Wording"]

HEADING = "**Conditions:**"
"""The line a sticker begins with."""

_FORM = """```
**Conditions:**
1. (one fact)
2. (one fact)

**Question:**
(one sentence)
```"""
_RULES = """A note has two parts. Conditions: every fact that is given, one on a numbered line, and
nothing that is not given. Question: what is asked for, in one sentence, without the facts."""
_FACTS = """```
**Conditions:**
1. Tom has 4 boxes.
2. Each box holds 6 pens.
3. He gives away 5 pens.

**Question:**
How many pens does Tom have left?
```"""


@dataclass(frozen=True)
class Wording:
    """The questions; fields in braces are filled in.

    sticker: {question}. forward: {question} and {sticker}. inverse: {prediction}. predict: {text},
    which is the question, the sticker, or `both` with {question} and {sticker}.
    """

    sticker: str
    forward: str
    inverse: str
    both: str
    predict: str


WORDING = Wording(
    sticker=f"""Write a note of this problem.

{_RULES}

Write it like this:
{_FORM}

Example. The problem:
Tom has 4 boxes with 6 pens each. He gives away 5 pens. How many has he left?
Its note:
{_FACTS}

The problem:
{{question}}

Write its note in that form and nothing else. Do not solve the problem.""",
    forward=f"""Here are a problem and a note of it. Write a better note.

{_RULES}

Compare the note with the problem and mend: conditions that are missing, wrong or there twice; a
question that is not clear; facts that do not fit each other; another form than this:
{_FORM}

The problem:
{{question}}

The note:
{{sticker}}

Write the better note in that form and nothing else. Do not solve the problem.""",
    inverse=f"""Here is the solution of a problem that you do not see. Write the note of the problem
that it solves.

{_RULES} The conditions hold no step of the solution and no result.

Write it like this:
{_FORM}

Example. The solution:
4 boxes of 6 pens are 24 pens. He gives away 5, so 24 - 5 = 19 are left. \\boxed{{{{19}}}}
The note:
{_FACTS}

The solution:
{{prediction}}

Write its note in that form and nothing else.""",
    both="""{question}

The same in short:
{sticker}""",
    predict="""{text}

Reason step by step, and put the final answer into \\boxed{{}}.""",
)
"""The usual wording, for problems in English whose answer can be boxed."""
