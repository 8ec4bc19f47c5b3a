"""What stands in front of a text."""

from __future__ import annotations

from typing import Any

__all__ = ["first_token", "start_token"]


def start_token(tokenizer: Any) -> int | None:
    """The token that begins a text, or that ends one; None for neither.

    >>> from pertoken.testing import ByteTokenizer
    >>> start_token(ByteTokenizer()) == ByteTokenizer().eos_token_id
    True
    """
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((token for token in ends if token is not None), None)


def first_token(tokenizer: Any) -> int | None:
    """The special token that a tokenizer itself puts before every text.

    >>> from pertoken.testing import ByteTokenizer
    >>> first_token(ByteTokenizer())
    """
    ids = tokenizer("a")["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.all_special_ids else None
