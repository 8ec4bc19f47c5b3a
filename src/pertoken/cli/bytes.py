"""`pertoken generate --bytes`: continue a prompt that may end anywhere, byte by byte."""

from __future__ import annotations

import codecs
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import typer

from pertoken.cli import options as shared
from pertoken.cli.options import load, sampling
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from typer import Context

    from pertoken.decode import ByteModel

DEFAULT_NEW_BYTES = 256

# What --bytes understands; every other option of the command belongs to decoding by tokens.
_SHARED = {
    "prompt",
    "model",
    "dtype",
    "sample",
    "temperature",
    "seed",
    "stop",
    "no_chat",
    "stats",
    "as_bytes",
    "max_new_bytes",
}


def check_options(context: Context) -> None:
    """Raise PertokenError where an option was given that --bytes does not understand."""
    if not context.params["as_bytes"]:
        raise PertokenError("--max-new-bytes needs --bytes; tokens are counted by --max-new-tokens")
    wrong = [n for n in context.params if n not in _SHARED and shared.given(context, n)]
    for name in sorted(wrong, key=lambda name: name == "max_new_tokens"):
        option = "--" + name.removeprefix("as_").replace("_", "-")
        if name == "max_new_tokens":
            raise PertokenError(f"--bytes counts bytes: give --max-new-bytes instead of {option}")
        raise PertokenError(f"--bytes and {option} do not go together; leave one of them out")


def read_prompt(prompt: str | None) -> bytes:
    """The prompt as the bytes it was given as: from the command line, or standard input.

    Raises PertokenError where it is empty, or not UTF-8 before its last character.
    """
    if prompt is None and sys.stdin.isatty():
        raise PertokenError('give a prompt: pertoken generate "Once upon a ti" --bytes')
    given = sys.stdin.buffer.read() if prompt in (None, "-") else os.fsencode(str(prompt))
    if not given:
        raise PertokenError("the prompt is empty")
    cut_character(given)
    return given


def cut_character(prompt: bytes) -> bytes:
    r"""The bytes of an unfinished character at the end of a prompt, empty where there is none.

    Raises PertokenError where the prompt is not UTF-8 before that.

    >>> cut_character("cl\u00e9".encode()[:-1])
    b'\xc3'
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(prompt)
    except UnicodeDecodeError as error:
        raise PertokenError(
            f"the prompt is not UTF-8: byte {error.start + 1} of it is "
            f"0x{prompt[error.start]:02x}; only its last character may be unfinished"
        ) from None
    return bytes(decoder.getstate()[0])


def characters(begun: bytes, stream: Iterable[bytes]) -> Iterator[str]:
    r"""Text of a stream of bytes, each character as soon as its bytes are whole.

    begun: the bytes of the first character that the prompt already holds. Bytes that are no
    character become U+FFFD; a character that is still unfinished at the end is left out.

    >>> list(characters(b"\xc3", [b"\xa9", b"t", b"\xc3"]))
    ['é', 't']
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(begun)
    for byte in stream:
        if text := decoder.decode(byte):
            yield text


def until(stream: Iterable[bytes], stops: Iterable[bytes]) -> Iterator[bytes]:
    """A stream of single bytes up to and with the first of the texts `stops`.

    >>> list(until([b"o", b"n", b"e", b".", b"t"], [b"e."]))
    [b'o', b'n', b'e', b'.']
    """
    endings = tuple(stops)
    longest = max(map(len, endings), default=0)
    last = b""
    for byte in stream:
        yield byte
        if longest:
            last = (last + byte)[-longest:]
            if last.endswith(endings):
                return


def generate_bytes(context: Context) -> None:
    """Continue the prompt and stream the text; `context` holds the options of `generate`.

    The prompt is raw text, without a chat template. Nothing but whole characters is printed: one
    that the prompt began comes with its first bytes, one that the limit cuts does not come.
    """
    given = context.params
    prompt = read_prompt(given["prompt"])
    # 0: the best byte every time.
    temperature = sampling(given["sample"], given["temperature"]).get("temperature", 0.0)

    from pertoken.decode import ByteModel

    model, tokenizer = load(given["model"], given["dtype"])
    byte_model = ByteModel(model, tokenizer)
    new = byte_model.stream(
        prompt,
        given["max_new_bytes"] or DEFAULT_NEW_BYTES,
        temperature=temperature,
        seed=given["seed"],
    )
    counted = _Counted(until(new, [stop.encode() for stop in given["stop"] or ()]))
    began = time.perf_counter()
    try:
        for text in characters(cut_character(prompt), counted):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        print(flush=True)  # so that the shell's prompt starts on a line of its own
        raise
    print(flush=True)
    seconds = time.perf_counter() - began
    if given["stats"]:
        for line in stats_lines(counted.count, seconds, byte_model):
            typer.echo(line, err=True)


def stats_lines(count: int, seconds: float, byte_model: ByteModel) -> list[str]:
    """How it went, the prompt's time included.

    >>> from types import SimpleNamespace
    >>> stats_lines(8, 2.0, SimpleNamespace(forwards=8, fed=9, invalid_mass=0.02))[1]
    '8 forward passes of 9 tokens; 2.0% of the last one on tokens that cannot stand there'
    """
    speed = count / seconds if seconds else 0.0
    lines = [f"{count} new bytes in {seconds:.2f} s, {speed:.1f} bytes/s"]
    if byte_model.invalid_mass is not None:
        lines.append(
            f"{byte_model.forwards} forward passes of {byte_model.fed} tokens; "
            f"{byte_model.invalid_mass:.1%} of the last one on tokens that cannot stand there"
        )
    return lines


class _Counted:
    """An iterator that knows how many items it gave."""

    def __init__(self, items: Iterable[bytes]) -> None:
        self.count = 0
        self._items = items

    def __iter__(self) -> Iterator[bytes]:
        for item in self._items:
            self.count += 1
            yield item
