"""How the methods of the catalogue are made for the battery, and what does not apply to them.

Only methods that need something, or a reason, are here; any other is taken from its card as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

from pertoken.catalog import baselines, methods
from pertoken.testing import cache_laws
from pertoken.testing._arguments import parameters
from pertoken.testing._case import meets_a_model
from pertoken.testing._law_sets import LAWS, Law
from pertoken.testing.trace import check_leaves_no_trace

__all__ = [
    "DRAWN_ON",
    "SETTINGS",
    "SETTING_LAWS",
    "SUBJECTS",
    "Subject",
    "expected_skips",
    "finished",
    "laws_on",
    "subject",
]


@dataclass(frozen=True)
class Subject:
    """A method as the laws take it.

    skip: law -> why it does not apply; it is not run. refuses: law -> what the method refuses by
    name in it, told in our words; it is run. laws: of its own, in place of or beside its plug's.
    """

    name: str
    plug: str
    method: Any
    skip: Mapping[str, str] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)
    laws: Mapping[str, Law] = field(default_factory=dict)

    @property
    def meets_model(self) -> bool:
        """Whether it works on a model at all."""
        return meets_a_model(self.plug, self.method)


class Anything:
    """The constraint that allows every text."""

    def accepts(self, ids: Sequence[int]) -> bool:
        return True

    def complete(self, ids: Sequence[int]) -> bool:
        return True


def finished() -> list[str]:
    """Slugs of our own methods and baselines that are written."""
    cards = (*methods(), *baselines())
    return [c.slug for c in cards if c.package == "pertoken" and c.status != "planned"]


def subject(slug: str) -> Subject:
    """A method of the catalogue as the battery takes it."""
    from pertoken.catalog import card

    own = card(slug)
    return SUBJECTS.get(slug) or Subject(slug, own.plug, own.load())


def _late(module: str, name: str, *args: Any, **options: Any) -> Callable[..., Any]:
    """A call of an object that is imported when it is made."""

    def make(*more: Any, **given: Any) -> Any:
        return getattr(import_module(module), name)(*more, *args, **options, **given)

    return make


def _cache(name: str) -> Any:
    """A cache of `pertoken.cache.CACHES` as a function of model and budget."""

    def make(model: Any, budget: int) -> Any:
        from pertoken.cache import make_cache

        return make_cache(name, model, budget)

    return make


def _awrs() -> Any:
    from pertoken.decode import AWRS

    return AWRS(Anything())


def _reagent(model: Any, tokenizer: Any, prompt: str, seed: int) -> Any:
    from pertoken.attribute import attribute

    few: dict[str, Any] = {"probes": 2, "max_steps": 20, "keep": 3}
    return attribute(model, tokenizer, prompt, "!", "reagent", seed=seed, **few)


def _bytes(model: Any, tokenizer: Any, prompt: str, seed: int) -> bytes:
    from pertoken.decode import ByteModel

    return ByteModel(model, tokenizer).sample(prompt[:9], 4, seed=seed)


def _compress(prompt: str, keep: float, model: Any, tokenizer: Any) -> Any:
    from pertoken.prune import compress

    rate: dict[str, Any] = {"salience": "self-information", "model": model, "tokenizer": tokenizer}
    return compress(prompt, keep, protect_defaults=False, **rate)


def _fiberpo(
    log_probs: Any,
    old_log_probs: Any,
    advantages: Any,
    mask: Any,
    total: Any = None,
    variant: Any = "paper",
) -> Any:
    from pertoken.train import fiberpo_loss

    given = (log_probs, old_log_probs, advantages, mask)
    return fiberpo_loss(*given, trajectory=(0.97, 1.03), total=total, variant=variant)


def _stored(level: str, model: Any, ids: Any, cache: Any) -> Any:
    from pertoken.cache import restore_cache, save_cache

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/talk.ptkv"
        save_cache(path, model, ids, cache=cache, level=level, chunk=ids.shape[1])
        return restore_cache(path, model).cache


def _restores(level: str, model: Any) -> None:
    cache_laws.check_cache_restores(partial(_stored, level), model)


def _number_direction(tokenizer: Any) -> Any:
    from pertoken.tokenize import NumberDirection

    return NumberDirection("r2l")(tokenizer)


def _premiums(tokenizer: Any) -> Any:
    from pertoken.tokenize import token_premiums

    texts = {"eng": ["free and equal", "in dignity"], "tur": ["hür ve eşit", "haysiyet"]}
    return token_premiums(texts, tokenizer)


_SAMPLES = "it samples: there is no greedy text"
_EVICTS = "it evicts: what is gone changes the output"
_STORES = "it stores what transformers' cache holds; while decoding it does nothing"
_EVICTING = {"exact within its budget": _EVICTS}
_TAKES_BACK = {"crop": "it refuses by name: what the taken-back tokens evicted is gone"}

SUBJECTS: dict[str, Subject] = {
    each.name: each
    for each in (
        Subject(
            "awrs",
            "generate",
            _awrs,
            {
                "lossless": _SAMPLES,
                "lossless with processors": _SAMPLES,
                "batch = single": "each row of a batch is a draw of its own",
            },
        ),
        Subject("balanced", "generate", _late("pertoken.decode", "Balanced", 3)),
        Subject("byte-probabilities", "text", _bytes),
        Subject("fiberpo", "loss", _fiberpo),
        Subject("frugalprompt", "text", _compress),
        Subject("h2o", "cache", _cache("h2o"), _EVICTING, _TAKES_BACK),
        Subject("kv-direct", "cache", _cache("kv-direct")),
        Subject("number-tokenization", "tokenizer", _number_direction),
        Subject(
            "plt-kv",
            "cache",
            _stored,
            dict.fromkeys(
                (
                    "equals a full cache",
                    "exact within its budget",
                    "batch = single",
                    "turns",
                    "reorder",
                    "crop",
                ),
                _STORES,
            ),
            laws={
                "restored as stored": lambda case: _restores("raw", case.model),
                "restored from tokens": lambda case: _restores("tokens", case.model),
                "no trace": lambda case: check_leaves_no_trace(
                    case.model, partial(_restores, "raw"), rng=True
                ),
            },
        ),
        Subject("reagent", "text", _reagent),
        Subject("snapkv", "cache", _cache("snapkv"), _EVICTING, _TAKES_BACK),
        Subject("streaming-llm", "cache", _cache("streaming-llm"), _EVICTING, _TAKES_BACK),
        Subject("token-premiums", "probe", _premiums),
        Subject("tova", "cache", _cache("tova"), _EVICTING, _TAKES_BACK),
        Subject("window", "cache", _cache("window"), _EVICTING, _TAKES_BACK),
    )
}
"""Slug -> how it is made."""

_DRAFTERS = {
    "goose": "Goose",
    "lookahead": "Lookahead",
    "prompt-lookup": "PromptLookup",
    "suffix": "SuffixTree",
    "token-recycling": "TokenRecycling",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "balanced": {"branching=5": _late("pertoken.decode", "Balanced", 5)},
    **{
        slug: {"budget=7": _late("pertoken.decode", name, budget=7)}
        for slug, name in _DRAFTERS.items()
    },
}
"""Slug -> name of a setting -> how it is made; run through `SETTING_LAWS`."""
SETTINGS["goose"]["shape=paper"] = _late("pertoken.decode", "Goose", shape="paper")

SETTING_LAWS = ("lossless",)
"""The law that every setting is run through; rows of batches under budgets: tests/decode."""

DRAWN_ON = "llama"
"""Where sampling is tested: it sees logits, never the architecture."""


def laws_on(one: Subject, architecture: str) -> tuple[str, ...]:
    """The laws of a method that are run on an architecture."""
    names = {**LAWS[one.plug], **one.laws}
    return tuple(n for n in names if n != "distribution" or architecture == DRAWN_ON)


def expected_skips(one: Subject, laws: Iterable[str]) -> dict[str, str]:
    """Which of these laws are to be skipped, and why; any other skip is a mistake."""
    known = dict(one.skip) | dict(one.refuses)
    if one.plug == "text" and "keep" not in parameters(one.method):
        known["keep = 1"] = "takes no keep"
    if not one.meets_model:
        known |= {"fits the model": "takes no model", "no trace": "takes no model"}
    return {law: known[law] for law in laws if law in known}
