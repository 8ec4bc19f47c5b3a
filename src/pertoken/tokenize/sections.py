"""The sections of the audit that look at the tokenizer itself and count tokens of texts.

Each is a function (tokenizers by name, material) -> Section.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pertoken.byte_vocab import steps_of
from pertoken.errors import PertokenError
from pertoken.tokenize._material import Material, is_byte_level, token_counts
from pertoken.tokenize.numbers import grouping_of, number_cuts
from pertoken.tokenize.premiums import byte_counts
from pertoken.tokenize.public import PUBLIC
from pertoken.tokenize.section import Row, Section, Value, rows_of

__all__ = ["languages", "numbers", "overview", "text"]

Tokenizers = Mapping[str, Any]


def overview(tokenizers: Tokenizers, material: Material) -> Section:
    """What a tokenizer is, read from its description.

    - tokens: different ids that have a token, added ones among them
    - unused ids: ids below the largest that have none
    - padded rows: rows of the embedding behind the largest id, where the tokenizer lies in the
      folder of its model; None otherwise
    - bytes: "all" bytes as letters (byte-level), as a "fallback" for unknown characters, or "no":
      then some text becomes an unknown token
    - licence: of a public tokenizer, by its name
    """
    labels = (
        "algorithm", "bytes", "normaliser", "pre-tokenizer", "digits", "tokens", "added tokens",
        "special tokens", "unused ids", "padded rows", "licence",
    )  # fmt: skip
    columns = [
        _facts(name, tokenizer, material.parts(tokenizer)) for name, tokenizer in tokenizers.items()
    ]
    rows = rows_of("", "count", labels, columns)
    notes = [
        f"licence of {name}: {PUBLIC[name].licence}"
        for name in tokenizers
        if name in PUBLIC and PUBLIC[name].licence != _short(PUBLIC[name].licence)
    ]
    return Section("What they are", tuple(tokenizers), tuple(rows), "", tuple(notes))


def _short(licence: str) -> str:
    """
    >>> _short("MIT (the package)"), _short("unclear: two say different things")
    ('MIT', 'unclear')
    """
    return licence.partition(" (")[0].partition(":")[0].partition(",")[0]


def _facts(name: str, tokenizer: Any, parts: Mapping[str, Any]) -> list[Value]:
    backend = tokenizer.backend_tokenizer
    ids = set(backend.get_vocab(with_added_tokens=True).values())
    size = max(ids, default=-1) + 1
    fallback = "fallback" if parts["model"].get("byte_fallback") else "no"
    added = parts["added_tokens"]
    rows = _embedding_rows(tokenizer)
    return [
        parts["model"]["type"],
        "all" if is_byte_level(parts) else fallback,
        _steps(parts["normalizer"], "normalizers"),
        _steps(parts["pre_tokenizer"], "pretokenizers"),
        _digits(tokenizer),
        len(ids),
        len(added),
        sum(entry["special"] for entry in added),
        size - len(ids),
        None if rows is None else rows - size,
        _short(PUBLIC[name].licence) if name in PUBLIC else "see its source",
    ]


def _steps(part: dict[str, Any] | None, inner: str) -> str:
    return " + ".join(step["type"] for step in steps_of(part, inner)) or "none"


def _embedding_rows(tokenizer: Any) -> int | None:
    """The vocabulary size of the model whose folder the tokenizer was loaded from."""
    try:
        config = json.loads((Path(tokenizer.name_or_path) / "config.json").read_text("utf-8"))
        return int(config["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digits(tokenizer: Any) -> str:
    try:
        direction, group = grouping_of(tokenizer)
    except PertokenError:
        return "unknown"
    return f"{direction}, {group}" if direction in ("l2r", "r2l") else direction


def text(tokenizers: Tokenizers, material: Material) -> Section:
    """Bytes per token and tokens per word, by kind of text.

    Bytes are those of the text in UTF-8 as it is; a word is a run of characters without white
    space; tokens are counted without special tokens, each text by itself.
    """
    kinds = material.kinds
    if not kinds:
        raise PertokenError(f"there is no text to count on: {'; '.join(material.notes)}")
    sizes = [sum(len(text.encode()) for text in texts) for texts in kinds.values()]
    words = [sum(len(text.split()) for text in texts) for texts in kinds.values()]
    counts = []
    for number, (name, tokenizer) in enumerate(tokenizers.items()):
        material.tell(f"texts, {name}", number, len(tokenizers))
        counts.append([sum(token_counts(tokenizer, texts)) for texts in kinds.values()])
    per_token = [[a / b if b else None for a, b in zip(sizes, c, strict=True)] for c in counts]
    per_word = [[b / a if a else None for a, b in zip(words, c, strict=True)] for c in counts]
    rows = rows_of("bytes per token", "", list(kinds), per_token)
    rows += rows_of("tokens per word", "", list(kinds), per_word)
    return Section(
        "What text costs", tuple(tokenizers), tuple(rows), "bytes per token", tuple(material.notes)
    )


def languages(tokenizers: Tokenizers, material: Material) -> Section:
    """Token premium and bytes per token by language, over the Declaration of Human Rights.

    The premium is the number of tokens of a translation over that of the reference's, line by line
    in normal form C without special tokens (`premiums`). 1 is the reference's price. None where
    the tokenizer cannot write the text: more than 1 % of its tokens are unknown.
    """
    codes = material.chosen(tokenizers)
    texts = [material.articles(code) for code in codes]
    sizes = byte_counts(texts)
    premiums: list[list[Value]] = []
    density: list[list[Value]] = []
    for number, (name, tokenizer) in enumerate(tokenizers.items()):
        material.tell(f"languages, {name}", number, len(tokenizers))
        counts = material.language_counts(tokenizer, texts)
        unit = counts[0]
        premiums.append([count / unit if count and unit else None for count in counts])
        pairs = zip(sizes, counts, strict=True)
        density.append([size / count if count else None for size, count in pairs])
    names = [f"{material.parallel[code]['language']} ({code})" for code in codes]
    first = f"tokens over those of {names[0]}"
    rows = rows_of(first, "", names, premiums) + rows_of("bytes per token", "", names, density)
    notes = [
        "a translation holds some 10,000 letters of a legal text: small differences are chance"
    ]
    if any(value is None for column in premiums for value in column):
        notes.append("-: more than 1 % of the tokens are unknown, so the text cannot be written")
    if material.languages is None:
        notes.append("the last five are the dearest of all translations for these tokenizers")
    return Section("What languages cost", tuple(tokenizers), tuple(rows), first, tuple(notes))


FORMS = ("3.14159", "-1234", "1,234,567", "00123", "1e-05", "12:30", "2024-12-31")
"""Numbers as they stand in text, shown with their borders."""


def numbers(tokenizers: Tokenizers, material: Material) -> Section:
    """How numbers are cut: the direction of grouping, lengths 1 to 7, and other forms.

    A length is shown as the digits of each token of the most frequent cut over 20 drawn numbers,
    with its share where it is not the only one.
    """
    directions: list[Value] = []
    cuts: list[list[Value]] = []
    for number, (name, tokenizer) in enumerate(tokenizers.items()):
        material.tell(f"numbers, {name}", number, len(tokenizers))
        directions.append(_digits(tokenizer))
        cuts.append(_cuts(tokenizer))
    rows = [Row("grouping of digits", "direction", "", tuple(directions))]
    rows += rows_of(
        "digits of each token", "", ["1 digit", *(f"{n} digits" for n in range(2, 8))], cuts
    )
    forms: list[list[Value]] = [
        [_borders(tokenizer, form) for form in FORMS] for tokenizer in tokenizers.values()
    ]
    rows += rows_of("borders", "", list(FORMS), forms)
    return Section("How numbers are cut", tuple(tokenizers), tuple(rows))


def _cuts(tokenizer: Any) -> list[Value]:
    try:
        found = number_cuts(tokenizer, longest=7)
    except PertokenError:
        return [None] * 7
    shown: list[Value] = []
    for sizes in found.values():
        cut, share = max(sizes.items(), key=lambda item: item[1])
        shown.append("+".join(map(str, cut)) + ("" if share == 1 else f" ({100 * share:.0f} %)"))
    return shown


def _borders(tokenizer: Any, form: str) -> str:
    """The text with a bar where one token ends and the next begins."""
    offsets = tokenizer.backend_tokenizer.encode(form, add_special_tokens=False).offsets
    starts = {start for start, end in offsets if 0 < start < end}
    return "".join("|" * (place in starts) + sign for place, sign in enumerate(form))
