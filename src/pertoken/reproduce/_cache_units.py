"""The units of KV-Direct's reproduction: one configuration each, plain JSON, none of them timed."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pertoken.errors import PertokenError
from pertoken.reproduce._cache_conversation import (
    TURNS,
    converse,
    history,
    parting,
    questions,
)
from pertoken.reproduce._context import Context

FIRST = "smollm2"  # or the model that the caller asks for
SECOND = "gemma3-270m"  # sliding windows of 512 in 15 of its 18 layers
# New tokens of an answer: about 620 and 540 tokens at the end, more than a window of the second. No
# more, since in "step" modes each of them is a prefill of nearly all tokens before it.
NEW_TOKENS = {FIRST: 8, SECOND: 10}
CHECKPOINTS: tuple[Any, ...] = ("tokens", "residual", "per_layer")
REMATERIALIZE: tuple[Any, ...] = ("step", "turn")
PERCENT = (5, 25, 50, 100)
EVICTING = ("window", "streaming-llm", "h2o", "snapkv", "tova")
BFLOAT16_PERCENT = 25
BFLOAT16_TURNS = 5  # in full: processors without bfloat16 kernels read prompts at a crawl
WINDOWS = (128, 64, 32)
TEXTS, TEXT_TOKENS = 4, 400  # for the perplexity with a window

Unit = dict[str, Any]
Units = dict[tuple[Any, ...], tuple[object, Callable[[], Unit]]]


@dataclass
class Models:
    """The models by name and dtype; only the last one is kept, since memory is small.

    left_out: name -> why a model is not there.
    """

    context: Context
    names: list[str] = field(init=False)
    left_out: dict[str, str] = field(default_factory=dict, init=False)
    _last: tuple[str, Any] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.names = [FIRST, SECOND]
        if not self.context.smoke:
            from pertoken.loading import model_folder

            try:
                model_folder(SECOND)
            except PertokenError as error:
                self.left_out[SECOND] = str(error)
                self.names.remove(SECOND)

    def get(self, name: str, dtype: str = "float32") -> tuple[Any, Any]:
        """(model, tokenizer)."""
        key = f"{name}, {dtype}"
        if self._last is None or self._last[0] != key:
            self._last = None
            self._last = (key, self._load(name, dtype))
        found: tuple[Any, Any] = self._last[1]
        return found

    def _load(self, name: str, dtype: str) -> tuple[Any, Any]:
        if self.context.smoke:
            import torch

            from pertoken.testing import ByteTokenizer, tiny_model

            kind = "gemma3" if name == SECOND else "llama"
            model = tiny_model(kind, vocab_size=258, dtype=getattr(torch, dtype))
            return model, ByteTokenizer()
        from pertoken.loading import load

        wanted = self.context.model if name == FIRST else name
        return load(wanted, device=self.context.device, dtype=dtype)

    def turns(self, name: str, dtype: str = "float32") -> list[list[int]]:
        """Ids of the questions."""
        tokenizer = self.get(name, dtype)[1]
        if self.context.smoke:
            return questions(tokenizer, 2, letters=12)
        return questions(tokenizer, TURNS if dtype == "float32" else BFLOAT16_TURNS)

    def new_tokens(self, name: str) -> int:
        """New tokens of an answer at most."""
        return 3 if self.context.smoke else NEW_TOKENS[name]


def reference(models: Models, name: str, dtype: str = "float32") -> Unit:
    """The conversation with the full cache."""
    from pertoken.cache import make_cache

    model, _ = models.get(name, dtype)
    cache = make_cache("full", model, 1)
    return converse(model, cache, models.turns(name, dtype), models.new_tokens(name)).to_dict()


def tokens_of(percent: int, found: Mapping[str, Any]) -> int:
    """A budget in tokens: percent of the reference's length at its end.

    >>> tokens_of(5, {"tokens": [30, 703]})
    35
    """
    return max(1, round(percent / 100 * int(found["tokens"][-1])))


def exact_units(models: Models, full: Mapping[str, Unit], percents: Sequence[int]) -> Units:
    """KV-Direct in every mode at every budget, in float32, and some of it in bfloat16.

    full: the references by name and, "name, bfloat16", in bfloat16.
    """
    units: Units = {}
    for name in models.names:
        for checkpoint in CHECKPOINTS:
            for again in REMATERIALIZE:
                for percent in percents:
                    key = (name, "float32", checkpoint, again, percent)
                    budget = tokens_of(percent, full[name])
                    units[key] = (["kv-direct", *key], partial(_exact, models, *key[:4], budget))
    for name in models.names:
        for checkpoint in CHECKPOINTS:
            key = (name, "bfloat16", checkpoint, "turn", BFLOAT16_PERCENT)
            budget = tokens_of(BFLOAT16_PERCENT, full[f"{name}, bfloat16"])
            units[key] = (["kv-direct", *key], partial(_exact, models, *key[:4], budget))
    return units


def _exact(models: Models, name: str, dtype: str, checkpoint: Any, again: Any, budget: int) -> Unit:
    from pertoken.cache.kv_direct import KVDirectCache

    model, _ = models.get(name, dtype)
    with warnings.catch_warnings():
        # "per_layer" says that it is larger than keys and values: so do the report's rows.
        warnings.simplefilter("ignore", UserWarning)
        cache = KVDirectCache(model, budget, checkpoint=checkpoint, rematerialize=again)
    with cache:
        found = converse(model, cache, models.turns(name, dtype), models.new_tokens(name))
    return {**found.to_dict(), "budget": budget}


def divergence(models: Models, name: str, dtype: str, right: Unit, own: Unit) -> Unit:
    """Where a conversation leaves the reference, and whether rounding explains it."""
    from pertoken.conversation import stop_ids
    from pertoken.testing.divergence import compare_ids

    turn = parting(right["answers"], own["answers"])
    assert turn is not None  # only those that leave it are asked about
    model, _ = models.get(name, dtype)
    verdict = compare_ids(
        model,
        history(model, models.turns(name, dtype), right["answers"], turn),
        right["answers"][turn],
        own["answers"][turn],
        max_new_tokens=models.new_tokens(name),
        stops=stop_ids(model),
    )
    return {"turn": turn + 1, "outcome": verdict.outcome, "text": str(verdict.divergence)}


def evicting_units(models: Models, full: Mapping[str, Unit], percents: Sequence[int]) -> Units:
    """The five eviction methods at the same budgets."""
    return {
        (name, method, percent): (
            ["evicting", name, method, percent],
            partial(_evicting, models, name, method, tokens_of(percent, full[name])),
        )
        for name in models.names
        for method in EVICTING
        for percent in percents
    }


def _evicting(models: Models, name: str, method: str, budget: int) -> Unit:
    from pertoken.cache import SnapKVCache, Turn, cache_fidelity, make_cache

    model, _ = models.get(name)
    text = [Turn(turn) for turn in models.turns(name)]
    make = partial(make_cache, method, model, budget)
    if method == "snapkv":
        # Its window of 32 is kept whatever happens: under a small budget half is left to choose.
        make = partial(SnapKVCache, model, budget, window=max(1, min(32, budget // 2)))
    found = cache_fidelity(model, make, [text], max_new_tokens=models.new_tokens(name))
    return {
        "budget": budget,
        "match": found.token_match,
        "kl": found.mean_kl,
        "top1": found.top1_agreement,
        "peak_bytes": found.peak_bytes,
        "full_peak_bytes": found.full_peak_bytes,
    }


def window_units(models: Models, rows: Sequence[Mapping[str, Any]]) -> Units:
    """Perplexity of text read token by token with only a window, and with the full cache.

    rows: of GSM8K; its problems and answers, one behind the other, are the text.
    """
    return {
        (number,): (["window", number], partial(_window, models, rows, number))
        for number in range(1 if models.context.smoke else TEXTS)
    }


def _window(models: Models, rows: Sequence[Mapping[str, Any]], number: int) -> Unit:
    from pertoken.cache import WindowCache, compare_caches

    model, tokenizer = models.get(models.names[0])
    length = 24 if models.context.smoke else TEXT_TOKENS
    # The odd rows, as everywhere in the reports; each text begins at a place of its own.
    odd = list(rows)[1::2] if len(rows) > 1 else list(rows)
    own = odd[number * len(odd) // TEXTS :]
    text = "\n\n".join(f"{row['question']}\n{row['answer']}" for row in own[:20])
    ids = list(tokenizer(text)["input_ids"])[:length]
    found = compare_caches(
        model,
        {str(window): partial(WindowCache, model, window) for window in WINDOWS},
        [ids],
        continuation="text",
        prompt_share=0.0,
        max_new_tokens=length,
    )
    every = {name: one.texts[0] for name, one in found.items()}
    full = next(iter(every.values())).full_nll
    return {"tokens": len(full), "full": sum(full)} | {
        name: sum(one.nll) for name, one in every.items()
    }


def tiny_units(smoke: bool) -> Units:
    """Tiny models of all architectures in float64, in every mode."""
    from pertoken.testing import ARCHITECTURES, EXTRA_ARCHITECTURES

    names = [*ARCHITECTURES, *EXTRA_ARCHITECTURES][: 1 if smoke else None]
    budgets = [12] if smoke else [4, 12, 27, 60]
    return {(name,): (["tiny", name, budgets], partial(_tiny, name, budgets)) for name in names}


def _tiny(architecture: str, budgets: Sequence[int]) -> Unit:
    """How many configurations there are, and how many write another token."""
    import torch

    from pertoken.cache import make_cache
    from pertoken.cache.kv_direct import KVDirectCache
    from pertoken.testing import tiny_model

    model = tiny_model(architecture)
    draw = torch.Generator().manual_seed(0)
    turns = [torch.randint(1, 64, (n,), generator=draw).tolist() for n in (19, 5, 7)]
    right = converse(model, make_cache("full", model, 1), turns, 6)
    found = []
    for checkpoint, again, budget in itertools.product(CHECKPOINTS, REMATERIALIZE, budgets):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            cache = KVDirectCache(model, budget, checkpoint=checkpoint, rematerialize=again)
        with cache:
            found.append(converse(model, cache, turns, 6).answers)
    wrong = sum(answers != right.answers for answers in found)
    return {"configurations": len(found), "wrong": wrong}


def evidence_units(models: Models) -> Units:
    """What the paper shows of the residual stream, per model."""
    units: Units = {}
    smoke = models.context.smoke
    for name in models.names:
        lengths = [3] if smoke else [16, 64, 256]
        for dtype in ("float32", "bfloat16"):
            units["reconstruction", name, dtype] = (
                ["reconstruction", name, dtype, lengths],
                partial(_reconstruction, models, name, dtype, lengths),
            )
        # Longer than two windows of its sliding layers would take long, longer than one does not.
        beyond = [20] if smoke else [560]
        units["reconstruction", name, "beyond a window"] = (
            ["reconstruction", name, "float32", beyond],
            partial(_reconstruction, models, name, "float32", beyond),
        )
        units["patching", name] = (["patching", name], partial(_patching, models, name))
        units["rank", name] = (["rank", name], partial(_rank, models, name))
    return units


def _reconstruction(models: Models, name: str, dtype: str, lengths: list[int]) -> Unit:
    from pertoken.probe import reconstruction_error

    model, tokenizer = models.get(name, dtype)
    # Only the ids matter here, so the questions stand one behind the other without answers.
    asked = questions(tokenizer, TURNS, letters=12 if models.context.smoke else None)
    ids = [token for turn in asked for token in turn]
    ids = (ids * (1 + max(lengths) // len(ids)))[: max(lengths)]
    found = reconstruction_error(model, ids, lengths=lengths)
    layers = [error for error in found.errors if error.tokens == max(lengths)]
    return {
        "greatest": found.to_dict()["greatest"],
        "layers": len(layers),
        "sliding": sum(error.window is not None for error in layers),
        "exact": sum(error.exact for error in found.errors),
        "compared": len(found.errors),
    }


def _patching(models: Models, name: str) -> Unit:
    from pertoken.probe import residual_patching

    model, tokenizer = models.get(name, "float64")
    return {
        str(positions): residual_patching(model, tokenizer, positions=positions).to_dict()
        for positions in ("all", "last", 0.5)
    }


def _rank(models: Models, name: str) -> Unit:
    from pertoken.probe import query_key_rank

    found = query_key_rank(models.get(name)[0])
    every = [rank for layer in found.ranks for rank in layer]
    return {
        "head_dim": found.head_dim,
        "mean": found.mean,
        "printed": found.mean_as_printed,
        "least": min(every),
        "greatest": max(every),
    }


def cache_free(models: Models, name: str) -> Unit:
    """30 tokens without a cache; its seconds are a look, so it runs alone."""
    from pertoken.probe import cache_free_decoding
    from pertoken.probe.patching import DONOR

    model, tokenizer = models.get(name)
    count = 3 if models.context.smoke else 30
    found = cache_free_decoding(model, list(tokenizer(DONOR)["input_ids"]), count)
    return {
        "equal": found.equal,
        "of": count,
        "slower": found.slower,
        "note": str(found.verdict.divergence),
    }
