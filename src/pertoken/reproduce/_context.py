"""What a reproduction is handed: settings, model, data, kept units, progress."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pertoken.errors import PertokenError
from pertoken.reproduce._checkpoint import Checkpoint
from pertoken.reproduce._report import Reproduction, Row

if TYPE_CHECKING:
    from rich.console import Console

K = TypeVar("K")
T = TypeVar("T")
TINY = "tiny"  # the model of every smoke run: random, so no figure of it means anything


@dataclass
class Context:
    """Handed to `run(context)` of a reproduction.

    smoke: True asks for the smallest run that touches every row: `load` gives a tiny random
        model, and one or two prompts are enough.
    model, dtype, device, seed: as chosen by the reproduction, or by the caller over it.
    data_path: file or folder of the caller with the data, None to fetch it.
    out_dir: folder the report goes to, None where none is written; extra files may go there too.
    console: for messages, on stderr; the result alone goes to stdout.
    jobs: processes for units that are not timed, see `remember_all`.
    """

    slug: str
    version: int
    smoke: bool = False
    model: str = "smollm2"
    dtype: str | None = None
    seed: int = 0
    device: str = "cpu"
    data_path: Path | None = None
    out_dir: Path | None = None
    progress: bool = False
    console: Console | None = None
    checkpoint: Checkpoint | None = None
    jobs: int = 1
    job: dict[str, Any] = field(default_factory=dict)  # what a helper is told, see `_jobs`
    helper: int = 0  # of a process that helps another: which call of `remember_all` it came for
    calls: int = field(default=0, init=False, repr=False)
    loaded: tuple[Any, Any] | None = field(default=None, init=False, repr=False)

    def load(self) -> tuple[Any, Any]:
        """(model, tokenizer); loaded once. In a smoke run a tiny random model that reads bytes."""
        if self.loaded is None:
            self.loaded = self._load_tiny() if self.smoke else self._load()
        return self.loaded

    def data(self, name: str, *, smoke_rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of the named data set, from `data_path` where given; `smoke_rows` in a smoke run.

        A smoke run must work without a download, so a reproduction brings a row or two itself.
        """
        if self.smoke:
            return list(smoke_rows)
        from pertoken.data import data

        return data(name, path=self.data_path)

    def remember(self, key: object, compute: Callable[[], T]) -> T:
        """``compute()``, kept under `key` so that an interrupted run resumes behind it.

        The value must be plain JSON (numbers, strings, lists, dicts); key: any JSON value that
        names the unit among all units of this reproduction, such as ``["goose", prompt_id]``.
        """
        if self.checkpoint is None:
            return compute()
        value: T = self.checkpoint.remember(key, compute)
        return value

    def remember_all(
        self, units: Mapping[K, tuple[object, Callable[[], T]]], what: str
    ) -> dict[K, T]:
        """Many units like those of `remember`, in `jobs` processes: counts, never timings.

        units: (key, compute) by any name of your own. Call it before anything else that takes long:
        helpers run up to here and end. Each call has helpers of its own, so units may depend on
        those of an earlier call.
        """
        self.calls += 1
        checkpoint = self.checkpoint
        if checkpoint is None:
            return {name: compute() for name, (_, compute) in self._watched(units, what)}
        from pertoken.reproduce._jobs import HelperDone, check_parent, helpers, one_thread

        if self.calls < self.helper:  # long done
            return {name: checkpoint.wait(key, run) for name, (key, run) in units.items()}
        alone = self.jobs == 1 and not self.helper
        count = 0 if self.helper else self.jobs - 1
        job = {**self.job, "helper": self.calls}
        with contextlib.nullcontext() if alone else one_thread(), helpers(job, count) as said:
            for _, (key, compute) in self._watched(units, what):
                if self.helper:
                    check_parent()
                if checkpoint.claim(key):
                    checkpoint.remember(key, compute)
            if self.helper:
                raise HelperDone
            found = {name: checkpoint.wait(key, run) for name, (key, run) in units.items()}
        for complaint in said:
            self.say(f"{self.slug}: a helper process ended early: {complaint}")
        return found

    def _watched(
        self, units: Mapping[K, tuple[object, Callable[[], T]]], what: str
    ) -> Iterator[tuple[K, tuple[object, Callable[[], T]]]]:
        return self.track(list(units.items()), what)

    def track(self, items: Sequence[T] | Iterable[T], what: str) -> Iterator[T]:
        """Iterate with a progress bar on stderr, where one is wanted."""
        if not self.progress:
            yield from items
            return
        from rich.progress import track

        yield from track(items, description=what, console=self.console, transient=True)

    def say(self, message: str) -> None:
        """One line to stderr."""
        if self.console is not None:
            self.console.print(message, markup=False, highlight=False)

    def reproduction(self, rows: Iterable[Row], **settings: Any) -> Reproduction:
        """The result to return, with what the context knows filled in.

        settings: everything else that is needed to repeat the run.
        """
        return Reproduction(
            slug=self.slug,
            version=self.version,
            model=self.model,
            settings=settings,
            seed=self.seed,
            rows=list(rows),
        )

    def _load(self) -> tuple[Any, Any]:
        from pertoken.loading import load

        return load(self.model, device=self.device, dtype=self.dtype, kind="decoder")

    def _load_tiny(self) -> tuple[Any, Any]:
        import torch

        from pertoken.testing import ByteTokenizer, tiny_model

        dtype = getattr(torch, self.dtype or "float32", None)
        if not isinstance(dtype, torch.dtype):
            raise PertokenError(f"unknown dtype {self.dtype!r}: float32, float64 or bfloat16")
        tokenizer = ByteTokenizer()
        model = tiny_model("llama", vocab_size=len(tokenizer), seed=self.seed, dtype=dtype)
        return model.to(self.device), tokenizer
