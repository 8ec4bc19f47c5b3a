"""Any tokenizer as a Hugging Face fast tokenizer: by public name, file, folder or Hub id.

Known files: tokenizer.json, SentencePiece models (BPE and Unigram), .tiktoken ranks, Mistral's
tekken JSON and Anthropic's JSON of 2023. What a file is, its content says, not its name: Llama 3's
tokenizer.model is a file of ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pertoken.errors import PertokenError, nearest
from pertoken.tokenize.public import PUBLIC, tokenizer_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

__all__ = ["as_fast", "open_tokenizer"]

_FILES = ("tokenizer.json", "tekken.json", "*.model", "*.model.v*", "*.tiktoken")


def open_tokenizer(
    source: str | Path, *, pattern: str | None = None, accept_licence: bool = False
) -> PreTrainedTokenizerFast:
    """Return the tokenizer that `source` names.

    `source` is a name in `PUBLIC`, a file (tokenizer.json, a SentencePiece .model, .tiktoken,
    tekken or claude.json), a folder that holds one, or a Hub id (org/name). `pattern` is the regex
    that cuts the text before the ranks of a .tiktoken file apply; files named after a known
    encoding (r50k, p50k, cl100k, o200k, qwen) need none. `accept_licence=True` consents to the
    terms of a public tokenizer that asks for it.

    A tokenizer without a fast version in transformers is converted. Raises `PertokenError` with
    one line for what is no tokenizer, cannot be converted, or cannot be got.

        open_tokenizer("cl100k").encode("hello world")        # [15339, 1917]
    """
    text = str(source)
    path = Path(text).expanduser()
    if not text.strip():
        raise PertokenError("the tokenizer's name is empty")
    if isinstance(source, str) and text in PUBLIC:
        entry = PUBLIC[text]
        folder = tokenizer_folder(entry, accept_licence=accept_licence)
        return _from_json(folder / "tokenizer.json") if entry.package else _from_folder(folder)
    if path.is_file():
        return _from_file(path, pattern)
    if path.is_dir():
        return _from_folder(path, pattern)
    looks_local = isinstance(source, Path) or text.startswith((".", "~", "/", "\\"))
    if looks_local or path.suffix in (".json", ".model", ".tiktoken"):
        raise PertokenError(f"no such tokenizer file or folder: {path}")
    if text.count("/") == 1:
        from pertoken.loading import load_tokenizer

        return as_fast(load_tokenizer(text), text)
    raise PertokenError(
        f"unknown tokenizer {text!r}{nearest(text, PUBLIC)}: give one of {', '.join(PUBLIC)}, a "
        "file, a folder, or a Hub id (org/name)"
    )


def as_fast(tokenizer: Any, name: str = "") -> PreTrainedTokenizerFast:
    """The tokenizer as a fast one of transformers: itself, wrapped, or converted.

    Takes a tokenizer of transformers, of tokenizers, a tiktoken `Encoding` or a
    `SentencePieceProcessor`. Raises `PertokenError` for a slow tokenizer that transformers cannot
    convert (it has no offsets) and for what is no tokenizer.

    >>> from tokenizers import Tokenizer, models
    >>> as_fast(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).vocab_size
    1
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    what = name or type(tokenizer).__name__
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    if isinstance(tokenizer, Tokenizer):
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return _converted(tokenizer, what)
    if hasattr(tokenizer, "_mergeable_ranks"):  # tiktoken's Encoding
        from pertoken.tokenize._formats import from_ranks

        ranks, specials = tokenizer._mergeable_ranks, tokenizer._special_tokens
        return as_fast(from_ranks(ranks, tokenizer._pat_str, specials), what)
    if hasattr(tokenizer, "serialized_model_proto"):  # SentencePieceProcessor
        from pertoken.tokenize._formats import from_sentencepiece

        return as_fast(from_sentencepiece(tokenizer.serialized_model_proto()), what)
    raise PertokenError(
        f"{what} is no tokenizer of transformers, tokenizers, tiktoken or "
        f"sentencepiece: it is a {type(tokenizer).__name__}"
    )


def _converted(tokenizer: Any, what: str) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import convert_slow_tokenizer

    names = {
        key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
    }
    try:
        backend = convert_slow_tokenizer(tokenizer)
    except Exception as error:  # each converter has its own
        raise PertokenError(
            f"{what} is a slow tokenizer ({type(tokenizer).__name__}), which has no offsets, and "
            "transformers cannot convert it: give one with a tokenizer.json"
        ) from error
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _from_folder(folder: Path, pattern: str | None = None) -> PreTrainedTokenizerFast:
    """Transformers' own way where the folder is laid out for it, else the one known file in it."""
    from pertoken.loading import load_tokenizer

    own = (folder / "config.json").is_file() or (folder / "tokenizer_config.json").is_file()
    files = [file for name in _FILES for file in sorted(folder.glob(name))]
    if own:
        try:
            return as_fast(load_tokenizer(folder), str(folder))
        except PertokenError:
            if not files:
                raise
    if not files:
        raise PertokenError(
            f"{folder} holds no tokenizer: no tokenizer.json, SentencePiece .model or .tiktoken"
        )
    return _from_file(files[0], pattern)


def _from_file(path: Path, pattern: str | None) -> PreTrainedTokenizerFast:
    from pertoken.tokenize import _formats

    try:
        content = path.read_bytes()
    except OSError as error:
        raise PertokenError(f"cannot read {path}: {error.strerror}") from error
    try:
        if content.lstrip()[:1] == b"{":
            return _from_json_content(path, content)
        if path.suffix == ".tiktoken" or _formats.is_ranks(content):
            return as_fast(_tiktoken(path, content, pattern))
        tokenizer = as_fast(_formats.from_sentencepiece(content))
    except PertokenError as error:
        raise PertokenError(f"{path}: {error}") from error
    return _name_specials(tokenizer)


def _tiktoken(path: Path, content: bytes, pattern: str | None) -> Tokenizer:
    from pertoken.tokenize._formats import PATTERNS, from_ranks, read_ranks

    known = [name for name in sorted(PATTERNS, key=len) if path.name.startswith(name)]
    specials: dict[str, int] = {}
    if known and pattern is None:
        pattern = PATTERNS[known[-1]]
    for entry in PUBLIC.values():  # the same file, so the same special tokens
        if entry.specials and entry.member.endswith(f"/{path.name}"):
            specials = dict(entry.specials)
    if pattern is None:
        raise PertokenError(
            f"which regex cuts the text is not in a .tiktoken file, and its name is none of "
            f"{', '.join(PATTERNS)}…: name it after its encoding, or pass pattern="
        )
    normalizer = None
    if known and known[-1].startswith("qwen"):
        from tokenizers import normalizers

        normalizer = normalizers.NFC()
    return from_ranks(read_ranks(content), pattern, specials, normalizer)


def _from_json_content(path: Path, content: bytes) -> PreTrainedTokenizerFast:
    from pertoken.tokenize._formats import from_claude, from_tekken

    try:
        parts = json.loads(content)
    except ValueError:
        raise PertokenError("not a tokenizer: it is no whole JSON") from None
    if "bpe_ranks" in parts and "pat_str" in parts:
        return as_fast(from_claude(parts))
    if "vocab" in parts and "default_num_special_tokens" in parts.get("config", {}):
        return _name_specials(as_fast(from_tekken(parts)))
    if "model" not in parts:
        raise PertokenError("not a tokenizer: JSON without a model, ranks or a tekken vocabulary")
    return _from_json(path)


def _from_json(path: Path) -> PreTrainedTokenizerFast:
    """A tokenizer.json; the names of its special tokens are in the file beside it, if at all."""
    from transformers import PreTrainedTokenizerFast

    beside = path.with_name("tokenizer_config.json")
    facts: dict[str, Any] = {}
    if beside.is_file():
        facts = json.loads(beside.read_text(encoding="utf-8"))
    names = {
        key: token["content"] if isinstance(token, dict) else token
        for key, token in facts.items()
        if key in ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token") and token
    }
    try:
        # From the file: an object given would be copied through its JSON.
        return PreTrainedTokenizerFast(
            tokenizer_file=str(path), clean_up_tokenization_spaces=False, **names
        )
    except Exception as error:  # tokenizers raises the bare class
        raise PertokenError(f"{path} holds no loadable tokenizer: {error}") from error


def _name_specials(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """SentencePiece's usual names for beginning, end and unknown, where the tokens are there."""
    known = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    for name, token in usual.items():
        if token in known and getattr(tokenizer, name) is None:
            setattr(tokenizer, name, token)
    return tokenizer
