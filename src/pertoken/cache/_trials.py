"""Archives put to the test: many round trips, and many damaged files. Used by tests and reports."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pertoken.cache.archive import Restored, prefill, restore_cache, save_cache
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["Trials", "damage_trials", "round_trips", "same_rows"]


@dataclass
class Trials:
    """Counts of what came of damaged files; `wrong` says what was done to each that fooled us."""

    named: int = 0
    harmless: int = 0
    wrong: list[str] = field(default_factory=list)


def round_trips(
    model: PreTrainedModel,
    count: int,
    *,
    level: str = "tokens",
    longest: int = 80,
    chunk: int = 32,
    seed: int = 0,
) -> int:
    """Save and restore random conversations of 1 to `longest` tokens; how many came back exactly.

    Exactly: the same ids, and (not at level "int8") bit for bit the keys and values of the saved
    cache, or at level "tokens" of one prefilled in the same chunks.
    """
    draw = random.Random(seed)
    vocab = model.config.get_text_config().vocab_size
    exact = 0
    with tempfile.TemporaryDirectory() as folder:
        for trial in range(count):
            path = Path(folder) / f"{trial}.ptkv"
            ids = [draw.randrange(vocab) for _ in range(draw.randint(1, longest))]
            cache = prefill(model, ids[:-1], chunk=chunk)
            save_cache(path, model, ids, cache=cache, level=level, chunk=chunk)
            restored = restore_cache(path, model)
            same = level == "int8" or same_rows(restored.cache, cache)
            exact += restored.input_ids[0].tolist() == ids and same
            path.unlink()
    return exact


def damage_trials(model: PreTrainedModel, path: Path, count: int, *, seed: int = 0) -> Trials:
    """Restore `count` damaged copies of a file that `save_cache` wrote without a `cache=`.

    Named: refused by a PertokenError, or restored with a word about the damage and nothing wrong
    in it. Harmless: restored as if whole, nothing wrong. Wrong: other ids, other keys and values
    than those in the file or than a prefill makes, or an error of another kind.
    """
    whole = path.read_bytes()
    wanted = restore_cache(path, model)
    draw = random.Random(seed)
    found = Trials()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        for damaged, what in _damaged(whole, count, draw):
            copy.write_bytes(damaged)
            try:
                restored = restore_cache(copy, model)
            except PertokenError:
                found.named += 1
                continue
            except Exception as error:
                found.wrong.append(f"{what}: {type(error).__name__}: {error}")
                continue
            if not _right(restored, wanted):
                found.wrong.append(f"{what}: other ids, keys or values")
            elif restored.damage:
                found.named += 1
            else:
                found.harmless += 1
    return found


def same_rows(cache: Cache, other: Cache, rows: int | None = None) -> bool:
    """Whether two caches hold the same keys and values bit for bit, or in their first `rows`."""
    if int(cache.get_seq_length()) != int(other.get_seq_length()):
        return False
    return int(cache.get_seq_length()) == 0 or all(
        torch.equal(a[..., :rows, :], b[..., :rows, :])
        for mine, theirs in zip(cache.layers, other.layers, strict=True)
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values))
    )


def _right(restored: Restored, wanted: Restored) -> bool:
    if not torch.equal(restored.input_ids, wanted.input_ids):
        return False
    # Computed behind rounded keys and values, others are not those of the undamaged file.
    partly = restored.verified != wanted.verified
    return same_rows(restored.cache, wanted.cache, restored.verified if partly else None)


def _damaged(whole: bytes, count: int, draw: random.Random) -> Iterator[tuple[bytes, str]]:
    """Three of four with one to three bytes changed, every fourth cut short."""
    for trial in range(count):
        if trial % 4 == 3:
            length = draw.randrange(len(whole))
            yield whole[:length], f"cut to {length} bytes"
            continue
        changed = bytearray(whole)
        places = [draw.randrange(len(whole)) for _ in range(draw.randint(1, 3))]
        for place in set(places):
            changed[place] ^= draw.randint(1, 255)
        yield bytes(changed), f"bytes {sorted(set(places))} changed"
