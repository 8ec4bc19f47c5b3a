"""Numbers in groups of digits: from the right, from the left, or digit by digit.

"Tokenization counts" (arXiv 2402.14903) finds that models add much better when the digits of a
number are grouped from the right (R2L: 1|234|567), as thousands separators do, than from the left
(L2R: 123|456|7), as many tokenizers do. `NumberDirection` puts the grouping into a tokenizer you
train or fine-tune with; `format_number` puts it into the text, for a model as it is;
`direction_of` says which of them a tokenizer has.

The rule, for every run of the digits 0-9 in a text (our reading beyond whole numbers):

- a run right behind a digit and a point is a fraction, and grouped from the left by both rules;
- every other run is a whole part, grouped from the side of the rule, leading zeros included;
- a sign, a letter or a separator is no digit: each run of `1,234,567` is a number of its own, and
  the run behind a decimal comma is a whole part;
- digits of other scripts are no digits here, and left as they were; where they touch others (`12²`)
  a tokenizer that takes all scripts together may group them anew.

Only borders are added: text is cut between two digits and nowhere else. So a vocabulary without
the token `234` still cuts that group further, and a tokenizer that cuts every digit keeps doing so.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal, cast

from pertoken._shown import Shown
from pertoken.errors import PertokenError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "DIRECTIONS",
    "NumberDirection",
    "direction_of",
    "format_number",
    "grouping_of",
    "number_cuts",
]

Direction = Literal["r2l", "l2r", "single"]
DIRECTIONS: tuple[Direction, ...] = ("r2l", "l2r", "single")
"""From the right, from the left, digit by digit."""

# Texts that show where a tokenizer cuts, and numbers to put into them.
_FORMS = ("{0}", " {0}", "a {0}", "a{0}b", "x = -{0}.{0};", "({0},{0})", "{0}\n")
_NUMBERS = ("7", "12", "907", "1234", "00123", "987650", "1234567", "20240229", "123456789012")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class NumberDirection(Shown):
    """A digit grouping in front of a fast tokenizer's own pre-tokenizer.

    direction: "r2l" cuts the whole part from the right, "l2r" from the left, "single" cuts every
        digit off. group: digits of a group, 1 or more; without meaning for "single".
    Called with a fast tokenizer it returns a copy that has the grouping, as a part of its
    `tokenizer.json`: it survives `save_pretrained`, `AutoTokenizer` and `Tokenizer.from_file`. The
    copy is a plain `PreTrainedTokenizerFast`, since classes of one model (`GPT2Tokenizer` …) build
    their pre-tokenizer anew when they are loaded. A grouping that is already there is replaced.

    A model trained with another grouping must be trained further; this changes its input only.
    Raises PertokenError for a slow tokenizer, for one whose vocabulary has no token of several
    digits (nothing would change), and where the grouping cannot be put in without changing the
    text that is decoded. Source: section 3 of the paper has R2L by commas; as a pre-tokenizer it is
    in no file of theirs.

    >>> from tokenizers import Tokenizer, decoders, models
    >>> from transformers import PreTrainedTokenizerFast
    >>> names = ["?", "-", "."] + [f"{n:0{w}}" for w in (1, 2, 3) for n in range(10**w)]
    >>> vocab = {name: place for place, name in enumerate(names)}
    >>> backend = Tokenizer(models.WordPiece(vocab, unk_token="?", continuing_subword_prefix=""))
    >>> backend.decoder = decoders.Fuse()
    >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    >>> tokenizer.tokenize("-1234567.12345")
    ['-', '123', '456', '7', '.', '123', '45']
    >>> NumberDirection("r2l")(tokenizer).tokenize("-1234567.12345")
    ['-', '1', '234', '567', '.', '123', '45']
    """

    slug = "number-tokenization"

    def __init__(self, direction: Direction, *, group: int = 3) -> None:
        _check(direction, group)
        self.direction = direction
        self.group = group

    def __call__(self, tokenizer: Any) -> PreTrainedTokenizerFast:
        """The copy of `tokenizer` with this grouping."""
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise PertokenError(
                f"NumberDirection needs a fast tokenizer, not {type(tokenizer).__name__}: load one "
                "with a tokenizer.json through AutoTokenizer"
            )
        return _same_settings(tokenizer, self._put_into(backend))

    def _put_into(self, backend: Any) -> Any:
        """A copy of the backend with the grouping in front of its pre-tokenizer, else behind it.

        Behind where the own one would put a mark for a blank in front of every group (Metaspace).
        """
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import Sequence, Split

        copied = copy.deepcopy(backend)
        parts = _own_parts(backend)
        own = copied.pre_tokenizer = Sequence(parts)
        # Bare numbers alone: a vocabulary may lack other signs.
        written = [_written(copied, number) for number in _NUMBERS]
        split = Split(Regex(_pattern(self.direction, self.group)), "merged_with_previous")
        for grouped in (Sequence([split, *parts]), Sequence([*parts, split])):
            copied.pre_tokenizer = grouped
            same = written == [_written(copied, number) for number in _NUMBERS]
            if same and self._cuts(own, grouped):
                break
        else:
            raise PertokenError(
                f"{self!r} cannot be put into this tokenizer: its own pre-tokenizer or decoder "
                "would cut or write numbers in another way; use format_number to group the digits "
                "in the text"
            )
        if self.direction != "single" and self.group > 1 and not _has_groups(copied):
            raise PertokenError(
                "NumberDirection has no effect here: the tokenizer has no token of several digits; "
                "use format_number to group the digits in the text"
            )
        return copied

    def _cuts(self, own: Any, grouped: Any) -> bool:
        """Are the borders in numbers those of the rule, and the others as they were?"""
        for text in (form.format(number) for form in _FORMS for number in _NUMBERS):
            inside = {at for at in range(1, len(text)) if text[at - 1 : at + 1].isdigit()}
            before, after = _borders(own, text), _borders(grouped, text)
            if before - inside != after - inside:
                return False
            # A pre-tokenizer that cuts every digit off stays as it is.
            if after & inside not in (_rule(text, self.direction, self.group), inside):
                return False
        return True


def direction_of(tokenizer: Any) -> str:
    """How a tokenizer groups digits: "l2r", "r2l", "single" (digit by digit) or "irregular".

    Any tokenizer with `encode` and `convert_ids_to_tokens` will do, slow ones too. Numbers of 1 to
    12 digits are looked at, see `number_cuts`, and groups of 2 to 6 digits are known.

    >>> from pertoken.testing import ByteTokenizer
    >>> direction_of(ByteTokenizer())
    'single'
    """
    return grouping_of(tokenizer)[0]


def grouping_of(tokenizer: Any) -> tuple[str, int]:
    """The same with the digits of a group, 0 where they are irregular.

    >>> from pertoken.testing import ByteTokenizer
    >>> grouping_of(ByteTokenizer())
    ('single', 1)
    """
    cuts = number_cuts(tokenizer)
    rules: list[tuple[Direction, int]] = [("single", 1)]
    rules += [(direction, group) for group in range(2, 7) for direction in ("l2r", "r2l")]
    for direction, group in rules:
        if all(set(cuts[length]) == {_sizes(length, direction, group)} for length in cuts):
            return direction, group
    return "irregular", 0


def number_cuts(
    tokenizer: Any, longest: int = 12, samples: int = 20, seed: int = 0
) -> dict[int, dict[tuple[int, ...], float]]:
    """How numbers are cut: length -> digits of each token, from the left -> share of the numbers.

    longest: digits of the longest numbers. samples: numbers of each length, drawn with `seed`.
    Raises PertokenError where the tokens do not show the digits that went in.

    >>> from pertoken.testing import ByteTokenizer
    >>> number_cuts(ByteTokenizer(), longest=3)
    {1: {(1,): 1.0}, 2: {(1, 1): 1.0}, 3: {(1, 1, 1): 1.0}}
    """
    draw = random.Random(seed)
    cuts = {}
    for length in range(1, longest + 1):
        counts: Counter[tuple[int, ...]] = Counter()
        for _ in range(samples):
            number = str(draw.randrange(10 ** (length - 1), 10**length))
            counts[_token_sizes(tokenizer, number)] += 1
        cuts[length] = {sizes: count / samples for sizes, count in counts.most_common()}
    return cuts


def format_number(
    number: int | str, separator: str = ",", direction: Direction = "r2l", group: int = 3
) -> str:
    """The number as text with a separator between its groups, for a model as it is.

    number: a whole number, or text with digits, perhaps a sign in front and a fraction behind a
        point; the fraction stays as it is. Raises PertokenError for other text.
    Source: the paper's section 3, whose separators are "," " " "." "#" "$" and "foo".

    >>> format_number(1234567), format_number(1234567, " ", "l2r"), format_number("-0012.5678")
    ('1,234,567', '123 456 7', '-0,012.5678')
    """
    _check(direction, group)
    match = re.fullmatch(r"([+-]?)([0-9]+)(\.[0-9]+)?", str(number))
    if match is None:
        raise PertokenError(f"{number!r} is not a number such as 1234567 or -12.5")
    sign, whole, fraction = match.groups()
    return sign + separator.join(groups(whole, direction, group)) + (fraction or "")


def groups(digits: str, direction: Direction, group: int = 3) -> list[str]:
    """Digits in groups.

    >>> groups("1234567", "r2l"), groups("1234567", "l2r")
    (['1', '234', '567'], ['123', '456', '7'])
    """
    found, place = [], 0
    for size in _sizes(len(digits), direction, group):
        found.append(digits[place : place + size])
        place += size
    return found


def _sizes(length: int, direction: Direction, group: int) -> tuple[int, ...]:
    """Digits of each group of a number.

    >>> _sizes(7, "r2l", 3), _sizes(6, "l2r", 3)
    ((1, 3, 3), (3, 3))
    """
    if direction == "single":
        return (1,) * length
    full, rest = divmod(length, group)
    odd = (rest,) if rest else ()
    return odd + (group,) * full if direction == "r2l" else (group,) * full + odd


def _rule(text: str, direction: Direction, group: int) -> set[int]:
    """Places of a text in front of which the rule of this module cuts."""
    borders = set()
    for run in re.finditer("[0-9]+", text):
        fraction = re.search(r"[0-9]\.$", text[: run.start()]) is not None
        side: Direction = "l2r" if fraction and direction == "r2l" else direction
        place = run.start()
        for size in _sizes(len(run[0]), side, group)[:-1]:
            place += size
            borders.add(place)
    return borders


def _pattern(direction: Direction, group: int) -> str:
    """What matches a group that another one follows: text is cut behind every match.

    Only look-behinds of fixed length, which every regex engine of `tokenizers` has, and no
    look-ahead over the rest of the number but at its first group: time stays linear.
    """
    if direction == "single":
        return "[0-9](?=[0-9])"
    full = f"[0-9]{{{group}}}"
    if direction == "l2r":
        return f"{full}(?=[0-9])"
    first = rf"(?<![0-9])(?<![0-9]\.)[0-9]{{1,{group}}}(?=(?:{full})+(?![0-9]))"
    return rf"{first}|(?<=[0-9]\.){full}(?=[0-9])|(?<=[0-9]){full}(?=[0-9])"


def _own_parts(backend: Any) -> list[Any]:
    """The parts of the pre-tokenizer but for a grouping that `NumberDirection` put there."""
    from tokenizers.pre_tokenizers import Sequence

    whole = backend.pre_tokenizer
    if not isinstance(whole, Sequence):
        return [] if whole is None else [whole]
    count = len(json.loads(whole.__getstate__())["pretokenizers"])
    return [part for part in (whole[place] for place in range(count)) if not _is_ours(part)]


def _is_ours(part: Any) -> bool:
    """Was this put there by a NumberDirection, of any direction and group?"""
    state = json.loads(part.__getstate__())
    pattern = state.get("pattern", {}).get("Regex", "") if state["type"] == "Split" else ""
    sizes = {int(size) for size in re.findall(r"\{(?:1,)?([0-9]+)\}", pattern)} or {1}
    return any(pattern == _pattern(each, size) for each in DIRECTIONS for size in sizes)


def _borders(pre_tokenizer: Any, text: str) -> set[int]:
    """Places of a text in front of which a pre-tokenizer cuts."""
    return {start for _, (start, _) in pre_tokenizer.pre_tokenize_str(text)} - {0}


def _written(backend: Any, number: str) -> str:
    """What comes back of a number."""
    return str(backend.decode(backend.encode(number, add_special_tokens=False).ids))


def _has_groups(backend: Any) -> bool:
    """Does any number come out with a token of several digits?"""
    return any(
        _digits(token) > 1
        for number in _NUMBERS
        for token in backend.encode(number, add_special_tokens=False).tokens
    )


def _token_sizes(tokenizer: Any, number: str) -> tuple[int, ...]:
    """Digits of each token of a number, tokens without any left out."""
    ids = tokenizer.encode(number, add_special_tokens=False)
    names = [tokenizer.convert_ids_to_tokens(token) for token in ids]
    sizes = tuple(size for size in map(_digits, names) if size)
    if sum(sizes) != len(number):
        raise PertokenError(
            f"the tokens of {number} do not show its digits: {' '.join(map(str, names))}"
        )
    return sizes


def _digits(token: str | bytes) -> int:
    """Digits 0-9 in a token's name; a byte token counts as its byte.

    >>> _digits("\u0120123"), _digits("<0x31>"), _digits("<0x41>"), _digits(b"12")
    (3, 1, 0, 2)
    """
    text = token.decode("latin-1") if isinstance(token, bytes) else token
    byte = _BYTE.fullmatch(text)
    return len(re.findall("[0-9]", chr(int(byte[1], 16)) if byte else text))


def _same_settings(tokenizer: Any, backend: Any) -> PreTrainedTokenizerFast:
    """A plain fast tokenizer around the backend, with all other settings of `tokenizer`."""
    from transformers import PreTrainedTokenizerFast

    built = {"vocab", "merges", "tokenizer_object", "tokenizer_file", "backend", "vocab_file"}
    built |= {"auto_map", "tokenizer_class"}  # of the class it no longer is
    settings = {key: value for key, value in tokenizer.init_kwargs.items() if key not in built}
    settings |= {
        "model_max_length": tokenizer.model_max_length,
        "model_input_names": list(tokenizer.model_input_names),
        "padding_side": tokenizer.padding_side,
        "truncation_side": tokenizer.truncation_side,
        "extra_special_tokens": list(tokenizer.extra_special_tokens),
        **tokenizer.special_tokens_map,
    }
    copied = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    copied.chat_template = copy.deepcopy(tokenizer.chat_template)
    return cast("PreTrainedTokenizerFast", copied)


def _check(direction: str, group: int) -> None:
    if direction not in DIRECTIONS:
        raise PertokenError(
            f"unknown direction {direction!r}{nearest(direction, DIRECTIONS)}: "
            f"{', '.join(DIRECTIONS)}"
        )
    if group < 1:
        raise PertokenError(f"group must be 1 digit or more, got {group}")
