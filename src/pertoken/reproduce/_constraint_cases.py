"""Prompts with constraints, written for this library: regular expression, schema, Python predicate.

Within each kind even places are for choosing settings and odd ones for figures. Prompts are plain
text without a chat template, so that a base model reads them as an instruct model does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

KINDS = ("regex", "schema", "predicate")


@dataclass(frozen=True)
class Case:
    """A prompt and what the text behind it must satisfy."""

    kind: str
    number: int
    prompt: str
    make: Callable[[Any], Any]
    """tokenizer -> constraint"""


def cases(kind: str, split: str) -> list[Case]:
    """Cases of one of `KINDS`; split: "dev" (even places) or "report" (odd places).

    >>> [case.number for case in cases("regex", "report")]
    [1, 3, 5, 7]
    """
    build, pairs = _kinds()[kind]
    first = {"dev": 0, "report": 1}[split]
    return [
        Case(kind, number, prompt, partial(build, rule))
        for number, (prompt, rule) in enumerate(pairs)
        if number % 2 == first
    ]


def patterns(split: str) -> list[tuple[str, str]]:
    """(prompt, regular expression) of the cases of that kind, for benches."""
    return _REGEX[{"dev": 0, "report": 1}[split] :: 2]


def _regex(pattern: str, tokenizer: Any) -> Any:
    from pertoken.decode.constraint import RegexConstraint

    return RegexConstraint(pattern, tokenizer=tokenizer)


def _schema(schema: dict[str, Any], tokenizer: Any) -> Any:
    from pertoken.decode.grammar import JSONSchemaConstraint

    # White space without end satisfies a schema and says nothing.
    return JSONSchemaConstraint(
        {**schema, "x-guidance": {"whitespace_flexible": False}}, tokenizer=tokenizer
    )


def _predicate(accepts: Callable[[str], bool], tokenizer: Any) -> Any:
    from pertoken.decode.constraint import TextConstraint

    return TextConstraint(
        accepts, lambda text: accepts(text) and text.endswith("."), tokenizer=tokenizer
    )


def without_e(text: str) -> bool:
    """No letter e."""
    return "e" not in text.lower()


def short_words(text: str) -> bool:
    """No word of more than five letters."""
    return all(len(word.strip(".,;:!?'\"")) <= 5 for word in text.split())


def growing_words(text: str) -> bool:
    """Every word at least as long as the one before it; the last one may still grow."""
    lengths = [len(word.strip(".,;:!?'\"")) for word in text.split()]
    done = lengths if text.endswith((" ", ".")) else lengths[:-1]
    return done == sorted(done)


def one_sentence(text: str) -> bool:
    """Letters and single spaces with at most one full stop, at the end."""
    body = text[:-1] if text.endswith(".") else text
    return "  " not in body and all(sign.isalpha() or sign == " " for sign in body)


_REGEX: list[tuple[str, str]] = [
    ("The first human walked on the Moon on this date (YYYY-MM-DD):", r" ?\d{4}-\d\d-\d\d"),
    ("A telephone number in Berlin:", r" ?\+49 30 \d{7,8}"),
    ("The address of the printer in the network:", r" ?\d{1,3}(?:\.\d{1,3}){3}"),
    ("Three words joined by dashes, easy to remember:", r" ?[a-z]{4,8}-[a-z]{4,8}-[a-z]{4,8}"),
    ("The colour of grass, for a style sheet: color =", r" ?#[0-9a-f]{6};"),
    ("In summer the sun rises at (24-hour clock):", r" ?(?:[01]\d|2[0-3]):[0-5]\d"),
    ("The number plate of a French car:", r" ?[A-Z]{2}-\d{3}-[A-Z]{2}"),
    ("A made-up name in which no letter comes twice in a row:", r" ?(?!\w*(\w)\1)[A-Z][a-z]{5,9}"),
]


_SHOT = """\
Text: The chair is red and costs 30 euros.
Fields: item, colour, euros
JSON:
{"item":"chair","colour":"red","euros":30}

Text: %s
Fields: %s
JSON:
"""


def _record(**fields: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


_NAME = {"type": "string", "minLength": 1, "maxLength": 24}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 9999}
_SCHEMA: list[tuple[str, Any]] = [
    ("Ada Lovelace was born in 1815.", _record(name=_NAME, born=_COUNT)),
    ("The pump costs 49 euros and weighs 3 kilograms.", _record(item=_NAME, euros=_COUNT)),
    ("The train to Lyon leaves from platform 7.", _record(to=_NAME, platform=_COUNT)),
    (
        "The soup needs onions, carrots and salt.",
        _record(dish=_NAME, needs={"type": "array", "items": _NAME, "minItems": 1, "maxItems": 4}),
    ),
    ("It is warm and dry in Oslo today.", _record(city=_NAME, rain={"type": "boolean"})),
    (
        "The order of two lamps is on its way.",
        _record(item=_NAME, number=_COUNT, state={"enum": ["open", "sent", "back"]}),
    ),
    ("The book has 320 pages and is in French.", _record(pages=_COUNT, language=_NAME)),
    (
        "Mia, 34, lives in Rome.",
        _record(person=_record(name=_NAME, age=_COUNT), city=_NAME),
    ),
]

_PREDICATE: list[tuple[str, Any]] = [
    ("A sentence about the sea without the letter e:", without_e),
    ("A sentence about a dog without the letter e:", without_e),
    ("A sentence about the moon in short words:", short_words),
    ("A sentence about bread in short words:", short_words),
    ("A sentence in which the words grow longer and longer:", growing_words),
    ("A sentence about trees in which the words grow longer:", growing_words),
    ("A sentence about rain:", one_sentence),
    ("A sentence about a small town:", one_sentence),
]


def _shot(text: str, schema: dict[str, Any]) -> str:
    """A text to be put as JSON, behind one that was, with the names of the fields."""
    return _SHOT % (text, ", ".join(schema["properties"]))


def _kinds() -> dict[str, tuple[Callable[[Any, Any], Any], list[tuple[str, Any]]]]:
    return {
        "regex": (_regex, _REGEX),
        "schema": (_schema, [(_shot(text, schema), schema) for text, schema in _SCHEMA]),
        "predicate": (_predicate, _PREDICATE),
    }
