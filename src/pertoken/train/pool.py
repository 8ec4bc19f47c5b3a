"""Keep the best documents of a file of any size: JSON lines, Parquet, or a folder of either.

The pool is read twice, a piece at a time. First every piece (some megabytes of lines, or a row
group) is scored, in several processes or on Ray, and its scores go into a folder beside the target:
8 bytes a document, the only thing that grows with the pool, and it lies on the disk. A run that is
stopped goes on behind the pieces that are there. Then the threshold at which the best documents
make up the share is found exactly by counting characters per score, and a second reading copies
what lies above it, as it stands, into a file that takes its place when it is whole.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from pertoken._extras import need
from pertoken._files import check_target, whole_file, write_whole
from pertoken._pool import LOST, in_processes, on_ray
from pertoken.errors import PertokenError
from pertoken.result import Result, plain
from pertoken.train._pieces import PIECE, Lines, Piece, pieces_of
from pertoken.train.ngram_scorer import NgramScorer

__all__ = ["Selected", "sample_documents", "select_file"]

SAMPLED = 16  # pieces that a sample is drawn from, more where they hold too little
_SCORED = np.dtype([("score", np.float32), ("characters", np.uint32)])
_HALF = 1 << 16

Scored = npt.NDArray[Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Selected(Result):
    """What `select_file` kept: documents, characters and mean length, of all and of the kept.

    threshold: the least score that was kept.
    """

    documents: int
    kept: int
    characters: int
    kept_characters: int
    threshold: float

    _title = "Selected documents"

    def rows(self) -> list[dict[str, Any]]:
        """Two records: the pool and what was kept."""
        sides = {
            "pool": (self.documents, self.characters),
            "kept": (self.kept, self.kept_characters),
        }
        return [
            {
                "what": name,
                "documents": documents,
                "characters": characters,
                "share": characters / self.characters,
                "mean_characters": characters / documents,
            }
            for name, (documents, characters) in sides.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Both records and the threshold."""
        return {"threshold": self.threshold, "parts": plain(self.rows())}


def select_file(
    source: str | Path,
    target: str | Path,
    scorer: NgramScorer,
    keep: float,
    *,
    field: str = "text",
    jobs: int = 1,
    ray: bool = False,
    progress: Progress | None = None,
) -> Selected:
    """Write the documents of `source` that are the best `keep` in (0, 1] of its characters.

    source: a .jsonl or .parquet file, or a folder with files of one of the two; `field` holds the
    text. target: a file of the same kind; documents stay in their order and as they are. Scores
    wait in TARGET.scores until it is written, so that another call goes on where one was stopped.
    jobs: processes; on Ray with `ray` (extra `ray`).
    Raises PertokenError, naming file and line, for a document without text in `field`; for an empty
    pool; and for scores of another pool or scorer that lie there.
    """
    source, target = Path(source), Path(target)
    pieces = checked(source, target, keep)
    folder = target.with_name(f"{target.name}.scores")
    _begin(folder, pieces, scorer, field)
    _score(folder, pieces, field, scorer.sha256, jobs, ray, progress)
    documents, total = _size(folder, len(pieces))
    if not total:
        raise PertokenError(f"there is nothing to select from in {source}: no document has text")
    threshold, left = _threshold(folder, len(pieces), keep * total)
    kept, characters = _write(folder, pieces, target, threshold, left, progress)
    shutil.rmtree(folder)
    return Selected(documents, kept, total, characters, threshold)


def checked(source: Path, target: Path, keep: float) -> Sequence[Piece]:
    """The pieces of a pool; PertokenError for a share, a pool or a target that does not fit."""
    if not 0 < keep <= 1:
        raise PertokenError(f"the share to keep must be above 0 and at most 1, got {keep}")
    pieces = pieces_of(source)
    check_target(target)
    if target.suffix.lower() != pieces[0].path.suffix.lower():
        raise PertokenError(
            f"{source} holds {pieces[0].path.suffix} and {target} is to be {target.suffix}: give a "
            "target of the same kind"
        )
    if target.resolve() in {piece.path.resolve() for piece in pieces}:
        raise PertokenError(f"{target} is what is read: give another target")
    return pieces


def sample_documents(
    source: str | Path, count: int, *, field: str = "text", seed: int = 0
) -> list[str]:
    """Up to `count` texts of a pool drawn at random, without blank ones.

    Of a pool of many pieces some are drawn first, then as many documents of each.
    Raises PertokenError as `select_file` does.
    """
    draw = np.random.default_rng(seed)
    pieces = pieces_of(Path(source))
    most = -(-count // min(len(pieces), SAMPLED))
    texts: list[str] = []
    for number in draw.permutation(len(pieces)):
        own = [text for text in pieces[number].texts(field) if text.strip()]
        wanted = min(len(own), most, count - len(texts))
        texts += [own[place] for place in sorted(draw.permutation(len(own))[:wanted])]
        if len(texts) == count:
            break
    if not texts:
        raise PertokenError(f"there is no text in {source}")
    return texts


# First reading: scores.


def _begin(folder: Path, pieces: Sequence[Piece], scorer: NgramScorer, field: str) -> None:
    """The folder of scores for this pool and scorer, new or from an earlier run."""
    files = {piece.path: piece.path.stat() for piece in pieces}
    about = {
        "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in files.items()],
        "piece": PIECE,
        "field": field,
        "scorer": scorer.sha256,
    }
    header = folder / "pool.json"
    if header.exists():
        if json.loads(header.read_text(encoding="utf-8")) != about:
            raise PertokenError(
                f"{folder} has the scores of another pool, field or scorer: remove it, or give "
                "another target"
            )
        return
    folder.mkdir(exist_ok=True)
    scorer.save(folder / "scorer.safetensors")
    write_whole(header, json.dumps(about))


def _score(
    folder: Path,
    pieces: Sequence[Piece],
    field: str,
    sha256: str,
    jobs: int,
    ray: bool,
    progress: Progress | None,
) -> None:
    left = [n for n in range(len(pieces)) if not _file(folder, n).exists()]
    if ray:  # a worker stands in a folder of its own
        folder = folder.absolute()
        pieces = [replace(piece, path=piece.path.absolute()) for piece in pieces]
    calls = [(folder, pieces[number], number, field, sha256) for number in left]
    if ray or jobs > 1:
        done = (on_ray if ray else in_processes)(_score_piece, calls, jobs)
    else:
        done = ((place, _score_piece(*call)) for place, call in enumerate(calls))
    ready, lost = len(pieces) - len(left), 0
    if progress is not None:
        progress("scoring", ready, len(pieces))
    for _, found in done:
        lost += found is LOST
        ready += found is not LOST
        if progress is not None:
            progress("scoring", ready, len(pieces))
    if lost:
        raise PertokenError(
            f"{lost} of {len(pieces)} pieces were lost with their processes; the others are in "
            f"{folder}: run it again to go on, with fewer jobs if memory ran out"
        )


def _score_piece(folder: Path, piece: Piece, number: int, field: str, sha256: str) -> int:
    """Documents of a piece, whose scores are in the folder now."""
    texts = piece.texts(field)
    found = np.empty(len(texts), dtype=_SCORED)
    found["score"] = _scorer(folder / "scorer.safetensors", sha256).score(texts)
    found["characters"] = [len(text) for text in texts]
    with whole_file(_file(folder, number)) as file:
        np.save(file, found)
    return len(texts)


@functools.lru_cache(maxsize=1)
def _scorer(path: Path, sha256: str) -> NgramScorer:
    """A process may live longer than a folder: the next pool's scorer can lie at the same path."""
    return NgramScorer.load(path)


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}.npy"


# Second reading: what lies above the threshold.


def _size(folder: Path, pieces: int) -> tuple[int, int]:
    """Documents and characters of the pool."""
    sizes = [(len(found), int(found.sum())) for _, found in _scored(folder, pieces)]
    return sum(count for count, _ in sizes), sum(own for _, own in sizes)


def _threshold(folder: Path, pieces: int, wanted: float) -> tuple[float, int]:
    """The least score at which `wanted` characters are reached, and how many are left for it.

    A score in (0, 1) is as great as its 32 bits read as a whole number: the upper half of them is
    counted first, then the lower half of those that share the upper half found.
    """
    upper, lower = np.zeros(_HALF), np.zeros(_HALF)
    for bits, characters in _scored(folder, pieces):
        upper += np.bincount(bits >> 16, characters, _HALF)
    high, above = _reached(upper, wanted)
    for bits, characters in _scored(folder, pieces):
        here = bits >> 16 == high
        lower += np.bincount(bits[here] & (_HALF - 1), characters[here], _HALF)
    low, more = _reached(lower, wanted - above)
    threshold = np.array([high << 16 | low], dtype=np.uint32).view(np.float32)
    return float(threshold[0]), int(np.ceil(wanted - above - more))


def _reached(counts: npt.NDArray[np.float64], wanted: float) -> tuple[int, float]:
    """The greatest place from which on the counts reach `wanted`, and what lies above it."""
    sums = counts[::-1].cumsum()
    place = int(np.searchsorted(sums, min(wanted, sums[-1])))
    return len(counts) - 1 - place, float(sums[place] - counts[::-1][place])


def _scored(folder: Path, pieces: int) -> Iterator[tuple[Scored, Scored]]:
    """(bits of the scores, characters) of each piece, [documents]."""
    for number in range(pieces):
        found = np.load(_file(folder, number))
        yield found["score"].view(np.uint32).astype(np.int64), found["characters"]


def _write(
    folder: Path,
    pieces: Sequence[Piece],
    target: Path,
    threshold: float,
    left: int,
    progress: Progress | None,
) -> tuple[int, int]:
    """Copy what is kept; documents and characters of it. left: characters at the threshold."""
    documents = characters = 0
    with whole_file(target) as file, _writer(pieces[0], file) as out:
        for number, piece in enumerate(pieces):
            found = np.load(_file(folder, number))
            sizes = found["characters"].astype(np.int64)
            level = found["score"] == threshold
            before = np.cumsum(sizes * level) - sizes * level
            kept = (found["score"] > threshold) | (level & (before < left))
            left -= int(sizes[level].sum())
            piece.copy(kept, out)
            documents += int(kept.sum())
            characters += int(sizes[kept].sum())
            if progress is not None:
                progress("writing", number + 1, len(pieces))
    return documents, characters


def _writer(piece: Piece, file: BinaryIO) -> Any:
    """What takes the pieces' copies: the file itself, or a writer of Parquet onto it."""
    if isinstance(piece, Lines):
        return contextlib.nullcontext(file)
    return need("pyarrow.parquet", "parquet").ParquetWriter(file, piece.open().schema_arrow)
