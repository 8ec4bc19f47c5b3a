"""What `pertoken generate` decodes with besides its method: a cache, a style, a memory.

Each has a check, which says what can be known to be wrong before a model is loaded, and a function
that makes it for the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pertoken.errors import PertokenError

__all__ = [
    "Held",
    "Memory",
    "Styled",
    "cache_of",
    "check_cache",
    "check_memory",
    "check_style",
    "memory_of",
    "style_of",
]

Held = tuple[str, int] | None  # name and budget of a cache
Styled = tuple[Path, float] | None  # file and strength of a style
Memory = tuple[Path, dict[str, Any]] | None  # folder of a KNN-LM store, settings of its memory


def check_memory(
    store: Path | None,
    k: int | None,
    weight: float | None,
    temperature: float | None,
    method: str | None,
    constraint: tuple[str, Any] | None,
) -> Memory:
    """The store that was asked for and its settings; refuses what does not go with it."""
    settings = {"k": k, "weight": weight, "temperature": temperature}
    if store is None:
        for name, value in settings.items():
            if value is not None:
                raise PertokenError(f"--knn-{name} goes with --knn STORE")
        return None
    if constraint:
        raise PertokenError(
            f"--knn mixes two distributions and {constraint[0]} is sampled from one; leave one out"
        )
    if method not in (None, "hf"):
        raise PertokenError(
            f"--knn decodes with hf: what {method} drafts would be read again token by token; "
            "leave --method out"
        )
    from pertoken.decode._knn_build import read_header

    read_header(store)  # no model is loaded for a folder that is no store
    return store, {name: value for name, value in settings.items() if value is not None}


@contextmanager
def memory_of(memory: Memory, model: Any, tokenizer: Any) -> Iterator[list[Any]]:
    """The logits processors of --knn: one, or none; taken off the model after."""
    if memory is None:
        yield []
        return
    from pertoken.decode import KNNDatastore, KNNMemory

    store = KNNDatastore(model, tokenizer, memory[0])
    with KNNMemory(store, **{"k": min(64, len(store)), **memory[1]}) as looked_up:
        yield [looked_up]


def check_cache(name: str | None, budget: int | None, particles: int | None) -> Held:
    """The name and budget of the cache that was asked for."""
    if name is None:
        if budget is not None:
            raise PertokenError("--cache-budget goes with --cache: name one, such as kv-direct")
        return None
    if particles is not None:
        raise PertokenError("--cache holds one text and --particles draws many; leave one out")
    from pertoken.cache.named import check_name

    check_name(name)
    return name, budget or 256


@contextmanager
def cache_of(held: Held, model: Any) -> Iterator[dict[str, Any]]:
    """The argument of `generate` with the cache that was asked for, taken off the model after."""
    if held is None:
        yield {}
        return
    from pertoken.cache.named import make_cache

    kept = make_cache(held[0], model, held[1])
    try:
        yield {"past_key_values": kept}
    finally:
        getattr(kept, "close", lambda: None)()


def check_style(file: Path | None, strength: float | None) -> Styled:
    """The file and strength of --style; what can be known to be wrong without a model is said."""
    if file is None:
        if strength is not None:
            raise PertokenError("--strength goes with --style: name a file of `style train`")
        return None
    from pertoken.decode.ngram_style import check_strength

    check_strength(0.1 if strength is None else strength)
    if not file.is_file():
        raise PertokenError(f"there is no style file {file}")
    return file, 0.1 if strength is None else strength


def style_of(styled: Styled, tokenizer: Any) -> list[Any]:
    """The logits processors of --style: one, or none."""
    if styled is None:
        return []
    from pertoken.decode.ngram_style import NGramStyle

    return [NGramStyle.load(styled[0], tokenizer)(strength=styled[1])]
