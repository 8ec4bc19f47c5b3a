"""The sections of the audit that ask what survives a tokenizer and what its tokens are worth.

Each is a function (tokenizers by name, material) -> Section.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pertoken.tokenize._material import Material, plain_backend
from pertoken.tokenize.section import Row, Section, Value, rows_of

__all__ = ["STRINGS", "controls", "fidelity", "redundancy"]

Tokenizers = Mapping[str, Any]

STRINGS: dict[str, tuple[str, ...]] = {
    "plain text": ("The cat sat on the mat.", "It's 5 o'clock; isn't it?", "a", "Hello, World!"),
    "capitals": ("NATO and UNESCO", "iPhone", "McDonald", "ALL CAPS"),
    "scripts": (
        "Всеобщая декларация", "人人生而自由", "すべての人間は", "모든 인간은", "सभी मनुष्यों को",
        "يولد جميع الناس", "כל בני האדם", "มนุษย์ทั้งหลาย", "Ἅπαντες οἱ ἄνθρωποι", "ყველა ადამიანი",
    ),
    "accents, composed": ("naïve café", "Übergröße", "İstanbul ığüşöç", "Tiếng Việt"),
    "accents, combining": ("e\u0301te\u0301", "u\u0308ber", "a\u0323\u0302", "Z\u0351\u036b\u0343"),
    "compatibility signs": ("\ufb01ne", "x²", "Ⅷ", "\uff21\uff22", "½ ℃"),
    "emoji": ("😀", "👩‍👩‍👧‍👦", "🇹🇷🇩🇪", "👍🏽", "❤️"),
    "runs of spaces": ("a  b", "a     b", "  lead", "trail  ", "\u00a0x\u3000y", " "),
    "line ends": ("a\nb", "a\n\n\nb", "a\r\nb", "\n", "a\tb", "\t\tx"),
    "code": ("def f(x):\n    return x**2\n", 'if (a[i] != "\\0") { }', "<a href='#'>&amp;</a>"),
    "control characters": ("a\x00b", "\x07", "\x1b[31mred", "a\u200bb", "\ufeffx", "\u202eabc"),
    "rare characters": ("𝔘𝔫𝔦", "\U00013080", "\ue000", "\U000e0041", "\U0010fffd", "▁", "Ġ"),
}  # fmt: skip
"""The strings of `fidelity`, by kind."""

# What a text of one token is put behind, so that its beginning is not joined with anything.
_BEFORE = ("", "\n", "a", "1", ".")


def fidelity(tokenizers: Tokenizers, material: Material) -> Section:
    """What comes back as it went in, and which tokens text never gives.

    - round trip: share of the strings with decode(encode(s)) == s, no special tokens added, no
      clean-up of spaces
    - tokens not found: of the tokens that are whole characters, the share that is not among
      encode(c + t) for the token's text t behind any of nothing, a line break, `a`, `1` and `.`,
      nor for t without its first blank. An upper bound of what is never used: some other text
      might give it. None for pieces that mark the inside of words (WordPiece).
    - parts of characters: tokens that are no whole characters, as a share of all; text gives them
      only within longer characters, so they are not looked for.
    """
    kinds = list(STRINGS)
    shares: list[list[Value]] = []
    vocabulary: list[list[Value]] = []
    for number, (name, tokenizer) in enumerate(tokenizers.items()):
        material.tell(f"fidelity, {name}", number, len(tokenizers))
        shares.append([_round_trips(tokenizer, STRINGS[kind]) for kind in kinds])
        vocabulary.append(_unfound(tokenizer, material))
    rows = rows_of("strings that decode to themselves", "share", kinds, shares)
    labels = ("tokens not found in text", "parts of characters")
    rows += rows_of("vocabulary", "share", labels, vocabulary)
    return Section(
        "What survives", tuple(tokenizers), tuple(rows), "strings that decode to themselves"
    )


def _round_trips(tokenizer: Any, strings: Sequence[str]) -> float:
    backend = plain_backend(tokenizer)
    encoded = backend.encode_batch_fast(list(strings), add_special_tokens=False)
    decoded = backend.decode_batch([each.ids for each in encoded], skip_special_tokens=False)
    return sum(a == b for a, b in zip(strings, decoded, strict=True)) / len(strings)


def _unfound(tokenizer: Any, material: Material) -> list[Value]:
    backend = plain_backend(tokenizer)
    parts, pieces = material.parts(tokenizer), material.pieces(tokenizer)
    added = {entry["id"] for entry in parts["added_tokens"]}
    whole = set(backend.get_vocab(with_added_tokens=False).values()) - added
    fragments = (len(whole) - len(pieces)) / len(whole) if whole else None
    if not pieces or parts["model"].get("continuing_subword_prefix"):
        return [None, fragments]
    left = list(pieces)
    for before in _BEFORE:
        left = _still_unfound(backend, left, [before + text for _, text in left])
    left = _still_unfound(backend, left, [text.removeprefix(" ") for _, text in left])
    return [len(left) / len(pieces), fragments]


def _still_unfound(
    backend: Any, tokens: Sequence[tuple[int, str]], texts: Sequence[str]
) -> list[tuple[int, str]]:
    encoded = backend.encode_batch_fast(list(texts), add_special_tokens=False)
    return [one for one, each in zip(tokens, encoded, strict=True) if one[0] not in each.ids]


FOREIGN = (
    "<|im_start|>", "<|endoftext|>", "<|eot_id|>", "<s>", "</s>", "[INST]", "<start_of_turn>",
    "<bos>", "[SEP]", "<think>",
)  # fmt: skip
"""Control tokens of well-known chat formats."""


def controls(tokenizers: Tokenizers, material: Material) -> Section:
    """Which control tokens a user can type: text that is read as a special token.

    own: share of the tokenizer's special tokens t that are among encode(t), the text encoded as
    transformers does by default. `split_special_tokens=True` turns that off for a call. The rows
    of well-known tokens say what each is read as: "control", an added token that is plain "added"
    text, or "text".
    """
    columns = [_typed(tokenizer) for tokenizer in tokenizers.values()]
    shares = tuple(column[0] for column in columns)
    rows = [Row("special tokens read from text", "own special tokens", "share", shares)]
    rows += rows_of("read as", "", list(FOREIGN), [column[1:] for column in columns])
    notes = ("text of users wants `split_special_tokens=True` where control tokens can be typed",)
    return Section("Which control tokens can be typed", tuple(tokenizers), tuple(rows), "", notes)


def _typed(tokenizer: Any) -> list[Value]:
    backend = plain_backend(tokenizer)
    entries = {entry.content: entry for entry in backend.get_added_tokens_decoder().values()}
    own = [content for content, entry in entries.items() if entry.special]
    encoded = backend.encode_batch_fast([*own, *FOREIGN], add_special_tokens=False)
    read = [backend.token_to_id(text) in each.ids for text, each in zip(own, encoded, strict=False)]
    found: list[Value] = [sum(read) / len(read) if read else None]
    for text, each in zip(FOREIGN, encoded[len(own) :], strict=True):
        entry = entries.get(text)
        if entry is None or backend.token_to_id(text) not in each.ids:
            found.append("text")
        else:
            found.append("control" if entry.special else "added")
    return found


def redundancy(tokenizers: Tokenizers, material: Material) -> Section:
    """How many tokens are another one but for a blank in front or for their case.

    1 - (different forms / tokens), over the tokens that are whole characters; the form leaves out
    one blank in front, or the case (`str.casefold`), or both.
    """
    columns: list[list[Value]] = []
    for tokenizer in tokenizers.values():
        texts = [text for _, text in material.pieces(tokenizer)]
        bare = [text.removeprefix(" ") or text for text in texts]
        columns.append(
            [
                _repeated(bare),
                _repeated([text.casefold() for text in texts]),
                _repeated([text.casefold() for text in bare]),
            ]
        )
    group = "tokens that repeat another but for"
    rows = rows_of(group, "share", ("a blank in front", "case", "either"), columns)
    return Section("What the vocabulary repeats", tuple(tokenizers), tuple(rows), group)


def _repeated(forms: Sequence[str]) -> float | None:
    """
    >>> _repeated(["a", "a", "b", "c"])
    0.25
    """
    return 1 - len(set(forms)) / len(forms) if forms else None
