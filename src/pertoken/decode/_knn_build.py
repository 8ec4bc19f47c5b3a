"""Writing the folder of a KNN-LM store, so that it is there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from pertoken._files import write_whole
from pertoken._tokenizer_hash import tokenizer_hash
from pertoken.cache.fingerprint import model_fingerprint, model_name
from pertoken.decode._knn_search import check_inverted, write_inverted
from pertoken.decode._knn_states import read, windows
from pertoken.errors import PertokenError
from pertoken.prompts import check_ids, check_utf8, positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Build", "digest", "encode", "header_of", "made_with", "read_header"]

FORMAT = 1
CONTEXT = 1024  # tokens the model reads at a time; the authors' keys have read 1,536 or more
_FIELDS = (
    *("model", "fingerprint", "tokenizer", "texts", "context", "index", "dtype", "hidden"),
    *("entries", "documents"),
)
HEADER, SO_FAR = "store.json", "so_far.json"
_DTYPES = ("float16", "float32", "float64")

Progress = Callable[[str, int, int], None]


def digest(ids: Sequence[int]) -> str:
    """A short name for a sequence of ids."""
    return hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()[:32]


def encode(model: PreTrainedModel, tokenizer: Any, text: Any, what: str = "a text") -> list[int]:
    """Ids of a text, as the store and whatever is compared with it must cut it."""
    if not isinstance(text, str):
        raise PertokenError(f"{what} of the corpus is {type(text).__name__}, not text")
    check_utf8(text, f"{what} of the corpus")
    ids = list(tokenizer(text)["input_ids"])
    check_ids(model, ids)
    return ids


def _entries(ids: Sequence[Sequence[int]]) -> int:
    """How many entries texts make: one for every token but the first."""
    return sum(max(0, len(own) - 1) for own in ids)


def made_with(model: PreTrainedModel, tokenizer: Any) -> dict[str, str]:
    """What a store is only good for: fingerprints of the model and of the tokenizer."""
    return {"fingerprint": model_fingerprint(model), "tokenizer": tokenizer_hash(tokenizer)}


def header_of(
    model: PreTrainedModel,
    tokenizer: Any,
    ids: Sequence[Sequence[int]],
    context: int | None,
    index: str,
    dtype: str | None,
) -> dict[str, Any]:
    """What tells one store from another, before anything is read."""
    config = model.config.get_text_config(decoder=True)
    if not any(len(text) > 1 for text in ids):
        raise PertokenError(f"the corpus is empty: none of {len(ids)} texts has two tokens")
    room = positions(model) or CONTEXT
    context = min(CONTEXT, room) if context is None else context
    if not 2 <= context <= room:
        raise PertokenError(
            f"context must be from 2 to the model's {room} positions, got {context}"
        )
    own = str(model.dtype).removeprefix("torch.")
    dtype = dtype or (own if own in _DTYPES else "float32")
    if dtype not in _DTYPES:
        raise PertokenError(f"dtype of keys must be {', '.join(_DTYPES)}, got {dtype!r}")
    if index == "ivfpq":
        check_inverted(_entries(ids))
    return {
        "format": FORMAT,
        "model": model_name(model),
        **made_with(model, tokenizer),
        "texts": digest([token for text in ids for token in (*text, -1)]),
        "context": context,
        "index": index,
        "dtype": dtype,
        "hidden": config.hidden_size,
    }


def read_header(path: Path) -> dict[str, Any]:
    """The header of a finished store; PertokenError where there is none."""
    try:
        header: dict[str, Any] = json.loads((path / HEADER).read_text(encoding="utf-8"))
        found = header["format"]
    except (FileNotFoundError, NotADirectoryError):
        part = path.with_name(f"{path.name}.part")
        half = f": its build did not end, run it again ({part})" if part.is_dir() else ""
        raise PertokenError(f"{path} is no KNN-LM store{half}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PertokenError(f"{path} is damaged: {HEADER} can't be read ({error})") from None
    if found != FORMAT:
        raise PertokenError(f"{path} has format {found}, this reads {FORMAT}")
    if lacking := ", ".join(name for name in _FIELDS if name not in header):
        raise PertokenError(
            f"{path} is damaged: {HEADER} has no {lacking}; delete it and build it again"
        )
    return header


class Build:
    """A store on the way, in a folder beside its place, held by one process."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        from filelock import FileLock

        self.path, self.header = path, header
        self.part = path.with_name(f"{path.name}.part")
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        key = header["hidden"] * np.dtype(header["dtype"]).itemsize
        self._widths = {"keys.bin": key, "values.bin": 4}  # bytes of an entry

    def __enter__(self) -> Self:
        from filelock import Timeout

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise PertokenError(f"{self.path} is being built by another process") from None
        except OSError as error:
            raise PertokenError(f"can't write {self.path}: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # while it is held, so that nobody else's goes
            os.unlink(self._lock.lock_file)
        self._lock.release()

    def run(self, model: PreTrainedModel, ids: Sequence[Sequence[int]], tell: Progress) -> None:
        """Write what is not written yet, and move the folder to its place."""
        if self.path.exists():  # another process was faster
            return
        parts = [
            (text, *window)
            for text, own in enumerate(ids)
            for window in windows(len(own), self.header["context"])
        ]
        done, entries = self._so_far()
        self._refuse_full(_entries(ids) - entries)
        for name, width in self._widths.items():
            with (self.part / name).open("ab") as file:
                file.truncate(entries * width)  # what came behind the last note
        for number in range(done, len(parts)):
            tell("keys of the corpus", number, len(parts))
            text, begin, first, stop = parts[number]
            self._append(model, ids[text], begin, first, stop)
            entries += stop - first
            note = {"header": self.header, "windows": number + 1, "entries": entries}
            write_whole(self.part / SO_FAR, json.dumps(note))
        self._finish(ids, entries, tell, len(parts))

    def _so_far(self) -> tuple[int, int]:
        """Windows and entries that an earlier build of the same store has finished.

        None where a file is shorter than it must be: truncating it would fill it up with zeros.
        The index is made of what was read, and may be another.
        """
        try:
            found = json.loads((self.part / SO_FAR).read_text(encoding="utf-8"))
            entries: int = found["entries"]
            whole = all(
                (self.part / name).stat().st_size >= entries * width
                for name, width in self._widths.items()
            )
            if whole and found["header"] | {"index": self.header["index"]} == self.header:
                return found["windows"], entries
        except (OSError, ValueError, KeyError, TypeError):
            pass
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir()
        return 0, 0

    def _refuse_full(self, entries: int) -> None:
        needed, free = entries * sum(self._widths.values()), shutil.disk_usage(self.part).free
        if needed > free:
            raise PertokenError(
                f"{self.path} takes {needed:,} bytes more and {free:,} are free on the disk: "
                'dtype="float16" halves it'
            )

    def _append(
        self, model: PreTrainedModel, ids: Sequence[int], begin: int, first: int, stop: int
    ) -> None:
        keys, _ = read(model, torch.tensor([ids[begin:stop]], device=model.device))
        taken = keys[0, first - begin :].to(getattr(torch, self.header["dtype"])).cpu()
        if not bool(taken.isfinite().all()):
            raise PertokenError(
                f"a key of {self.header['model']} is not finite in {self.header['dtype']}: load "
                "the model in float32, or take another dtype"
            )
        values = np.asarray(ids[first + 1 : stop + 1], dtype=np.int32)
        for name, rows in (("keys.bin", taken.numpy()), ("values.bin", values)):
            with (self.part / name).open("ab") as file:
                file.write(rows.tobytes())
                file.flush()
                os.fsync(file.fileno())

    def _finish(
        self, ids: Sequence[Sequence[int]], entries: int, tell: Progress, total: int
    ) -> None:
        documents, first = [], 0
        for own in ids:
            stop = first + max(0, len(own) - 1)
            if stop > first:
                documents.append([digest(own), first, stop])
            first = stop
        (self.part / "index.faiss").unlink(missing_ok=True)  # half of one, of another call
        if self.header["index"] == "ivfpq":
            tell("the index", total, total)
            keys = np.memmap(self.part / "keys.bin", self.header["dtype"], "r")
            write_inverted(self.part / "index.faiss", keys.reshape(entries, -1))
        header = self.header | {"entries": entries, "documents": documents}
        write_whole(self.part / HEADER, json.dumps(header))
        os.replace(self.part, self.path)
        (self.path / SO_FAR).unlink()
