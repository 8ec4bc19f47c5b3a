"""What a text must satisfy: one question about beginnings, one about whole texts.

A constraint is any object with ``accepts(ids)``, may this beginning still become an allowed text,
and ``complete(ids)``, is it one; ids are the new tokens without the prompt. Here are the two usual
ways to have one: any Python predicate on text, and a regular expression. Those of
`pertoken.decode.grammar` come from a JSON schema or a grammar, and can tell a mask.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from pertoken._pieces import special_ids
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    import torch

__all__ = ["Constraint", "MaskConstraint", "RegexConstraint", "TextConstraint"]

_CUT = "\N{REPLACEMENT CHARACTER}"  # how a decoder shows bytes that are no whole character
# Some decoders show one sign for the bytes of an unfinished character, some one for each of three.
_UNFINISHED = re.compile(f"(?<!{_CUT}){_CUT}{{1,3}}\\Z")


class Constraint(Protocol):
    """Which token sequences are allowed."""

    def accepts(self, ids: Sequence[int]) -> bool:
        """Whether an allowed text may begin with these new tokens."""

    def complete(self, ids: Sequence[int]) -> bool:
        """Whether these new tokens are an allowed text as they are."""


class MaskConstraint(Constraint, Protocol):
    """A constraint that also answers for many tokens at once, or knows what must follow.

    Each of these is optional: who can do with less looks whether the constraint has it. Masks may
    be shorter than the model's logits; tokens beyond their end are not allowed.
    """

    vocabulary: torch.Tensor
    """Tokens that any text may hold at all, bool [vocab]; stop ids do not count."""

    def accepts_each(self, ids: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """``accepts([*ids, token])`` for each of these tokens."""

    def allowed(self, ids: Sequence[int]) -> torch.Tensor:
        """Tokens with ``accepts([*ids, token])``, bool [vocab]; stop ids are never set."""

    def forced(self, ids: Sequence[int]) -> list[int]:
        """Tokens of text that must follow, [] if none is sure; other cuts of it may be allowed."""


class TextConstraint:
    """A constraint by a predicate on the text written so far.

    accepts: whether an allowed text may begin like this.
    complete: whether a text is allowed as it is; by default every accepted one is.
    tokenizer: turns ids into text. Its special tokens never satisfy the constraint; a character of
        which only some bytes are there is left out of the text that `accepts` sees (our reading).
        More bytes than a character lacks are broken for good, and seen as U+FFFD.

    >>> from pertoken.testing import ByteTokenizer
    >>> short = TextConstraint(lambda text: len(text) <= 2, tokenizer=ByteTokenizer())
    >>> encode = ByteTokenizer().encode
    >>> short.accepts(encode("ça")), short.accepts(encode("ça va"))
    (True, False)
    >>> short.accepts(encode("ç")[:1]), short.complete(encode("ç")[:1])
    (True, False)
    """

    def __init__(
        self,
        accepts: Callable[[str], bool],
        complete: Callable[[str], bool] | None = None,
        *,
        tokenizer: Any,
    ) -> None:
        self._accepts = accepts
        self._complete = accepts if complete is None else complete
        self._tokenizer = tokenizer
        self._special = frozenset(special_ids(tokenizer))

    def accepts(self, ids: Sequence[int]) -> bool:
        """Whether an allowed text may begin with these new tokens."""
        if not self._special.isdisjoint(ids):
            return False
        return ask(self._accepts, _UNFINISHED.sub("", self._text(ids)))

    def complete(self, ids: Sequence[int]) -> bool:
        """Whether these new tokens are an allowed text as they are."""
        if not self._special.isdisjoint(ids):
            return False
        text = self._text(ids)
        return not text.endswith(_CUT) and ask(self._complete, text)

    @cached_property
    def vocabulary(self) -> torch.Tensor:
        """The tokenizer's tokens without its special ones; bool [vocab]."""
        import torch

        known = list(self._tokenizer.get_vocab().values())
        mask = torch.zeros(1 + max(known), dtype=torch.bool)
        mask[known] = True
        mask[list(self._special)] = False
        return mask

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids)))


class RegexConstraint(TextConstraint):
    r"""A constraint by a regular expression that the whole text must match, look-around included.

    Raises PertokenError for a pattern that is none, with the place.

    >>> from pertoken.testing import ByteTokenizer
    >>> date = RegexConstraint(r"\d{4}-\d\d", tokenizer=ByteTokenizer())
    >>> encode = ByteTokenizer().encode
    >>> date.accepts(encode("20")), date.accepts(encode("20x")), date.complete(encode("2024-1"))
    (True, False, False)
    """

    def __init__(self, pattern: str, *, tokenizer: Any) -> None:
        import regex

        try:
            compiled = regex.compile(pattern)
        except regex.error as error:
            raise PertokenError(f"not a regular expression: {pattern!r}: {error}") from None
        super().__init__(
            lambda text: compiled.fullmatch(text, partial=True) is not None,
            lambda text: compiled.fullmatch(text) is not None,
            tokenizer=tokenizer,
        )


def check(constraint: object) -> None:
    """Raise PertokenError for an object that is no constraint."""
    for name in ("accepts", "complete"):
        if not callable(getattr(constraint, name, None)):
            raise PertokenError(
                "a constraint is an object with accepts(ids) and complete(ids); "
                f"{type(constraint).__name__} has no {name}"
            )


def ask(predicate: Callable[[Any], Any], about: Any) -> bool:
    """The answer of a user's predicate; raises PertokenError where it fails or is no bool."""
    answer = call(predicate, about)
    # numpy's bools are no bool, but called so
    if isinstance(answer, bool) or type(answer).__name__ in ("bool", "bool_"):
        return bool(answer)
    raise PertokenError(
        f"the constraint must answer True or False, got {type(answer).__name__} on {_short(about)}"
    )


def call(function: Callable[..., Any], *about: Any) -> Any:
    """What a user's function returns; raises PertokenError where it raises."""
    try:
        return function(*about)
    except PertokenError:
        raise
    except Exception as error:
        raise PertokenError(
            f"the constraint raised {type(error).__name__} ({error}) on {_short(about[0])}"
        ) from error


def fit(mask: Any, size: int, name: str) -> torch.Tensor:
    """A copy of a constraint's mask at `size` tokens: those that it does not reach are not allowed.

    name: what it came from, for the PertokenError where it is no bool tensor [vocab].

    >>> import torch
    >>> fit(torch.tensor([True, False]), 4, "vocabulary").tolist()
    [True, False, False, False]
    """
    import torch

    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool or mask.dim() != 1:
        raise PertokenError(
            f"the constraint's {name} must be a bool tensor [vocab], got "
            f"{getattr(mask, 'dtype', type(mask).__name__)}"
        )
    fitted = mask.new_zeros(size)
    fitted[: len(mask)] = mask[:size]
    return fitted


def _short(about: Any) -> str:
    text = repr(about)
    return text if len(text) <= 60 else f"{text[:28]} … {text[-28:]}"
