"""What the laws of `check_method` run on: a method, made anew whenever a law needs one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache

from pertoken.catalog import PLUGS
from pertoken.errors import PertokenError
from pertoken.testing._arguments import CannotCall, fill, parameters, takes_no
from pertoken.testing.models import tiny_model
from pertoken.testing.setups import random_prompts
from pertoken.testing.text_laws import TEXTS, tiny_tokenizer

__all__ = ["Case", "Refused", "case_model", "meets_a_model", "plug_of"]

_VOCAB = 32  # small, so that random text repeats itself and copies are drafted
_TYPES: tuple[tuple[type, str], ...] = (
    (LogitsProcessor, "logits"),
    (Cache, "cache"),  # before contexts: a cache may be one
    (PreTrainedModel, "net"),
    (PreTrainedTokenizerBase, "tokenizer"),
    (AbstractContextManager, "hooks"),
)
# Names of arguments that tell a plug, the first that fits.
_NAMES: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"log_probs"}), "loss"),
    (frozenset({"model", "input_ids"}), "generate"),
    (frozenset({"input_ids", "scores"}), "logits"),
    (frozenset({"prompt"}), "text"),
    (frozenset({"text"}), "text"),
    (frozenset({"texts"}), "probe"),
    (frozenset({"data"}), "probe"),
    (frozenset({"new_tokenizer"}), "tokenizer"),
    (frozenset({"model", "tokenizer"}), "probe"),
    (frozenset({"tokenizer"}), "tokenizer"),
)


class Refused(PertokenError):
    """The method said, before any forward, that it cannot do this."""


def plug_of(method: Any) -> str:
    """How an object meets a model, told by its type or by the arguments it is called with.

    Raises PertokenError where neither says it.

    >>> from transformers import TopKLogitsWarper
    >>> plug_of(TopKLogitsWarper), plug_of(lambda model, input_ids, **kwargs: input_ids)
    ('logits', 'generate')
    """
    kind = method if inspect.isclass(method) else type(method)
    for base, plug in _TYPES:
        if issubclass(kind, base):
            return plug
    whole = getattr(method, "__wrapped__", None)  # made by contextlib.contextmanager
    if whole is not None and inspect.isgeneratorfunction(whole):
        return "hooks"
    if inspect.isclass(method):
        called = any("__call__" in vars(base) for base in kind.__mro__)
        names = set(parameters(kind.__call__ if called else kind.__init__))
    else:
        names = set(parameters(method))
        if not names and inspect.isfunction(method):  # it makes one
            return plug_of(method())
    for wanted, plug in _NAMES:
        if wanted <= names:
            return plug
    raise PertokenError(
        f"cannot tell how {method!r} meets a model; say plug=, one of {', '.join(PLUGS)}"
    )


def meets_a_model(plug: str, method: Any) -> bool:
    """Whether a method works on a model: not so losses, and tokenizers and probes without one."""
    if plug in ("tokenizer", "probe", "text"):
        return "model" in parameters(method)
    return plug not in ("loss", "net")


@dataclass(frozen=True)
class Case:
    """One method on one model.

    method: a class, a function that makes one, or the thing itself. architecture: the name of the
    tiny model, None for a model of the user's.
    """

    method: Any
    plug: str
    model: PreTrainedModel | None
    tokenizer: Any
    architecture: str | None
    seed: int

    @cached_property
    def prompts(self) -> list[torch.Tensor]:
        """Two rows of ids [time]; the second repeats itself."""
        assert self.model is not None
        vocab = self.model.config.get_text_config().vocab_size
        rows = random_prompts(vocab, (7, 15), self.seed)
        return [row.to(self.model.device) for row in rows]

    @cached_property
    def small(self) -> PreTrainedModel:
        """A model of 8 tokens, whose texts can be counted."""
        if self.architecture is not None:
            return tiny_model(self.architecture, vocab_size=8)
        assert self.model is not None
        if self.model.config.get_text_config().vocab_size > 10:
            raise Refused(
                "this model has too many tokens to count its texts; give the name of an "
                "architecture instead"
            )
        return self.model

    def make(self) -> Any:
        """A new one where the method is a class or makes them, else the method itself."""
        call = self.method
        if not inspect.isclass(call) and not takes_no(call):
            return call
        return _made(call)

    def decoder(self) -> Callable[..., Any]:
        """What `custom_generate` is given: the method, its refusals marked as such."""
        method = self.make()

        def run(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            forwards = 0

            def count(*_: Any) -> None:
                nonlocal forwards
                forwards += 1

            handle = model.get_decoder().register_forward_pre_hook(count)
            try:
                return method(model, *args, **kwargs)
            except PertokenError as error:
                if forwards:
                    raise
                raise Refused(str(error)) from error
            finally:
                handle.remove()

        run.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
        return run

    def cache(self, budget: int) -> Callable[[PreTrainedModel], Cache]:
        """A function that makes a cache for a model, with this budget where it takes one."""
        if isinstance(self.method, Cache):
            raise CannotCall(
                "a cache holds one text: give its class, or a function of the model that makes one"
            )
        given = {"budget": budget} if self.takes("budget") else {}

        def new(model: PreTrainedModel) -> Cache:
            return _made(self.method, model, **given)

        return new

    def takes(self, name: str) -> bool:
        """Whether the method has an argument of this name."""
        return name in parameters(self.method)

    def call(self, **given: Any) -> Any:
        """Call a function over text, a probe or a maker of tokenizers by the names it has.

        Known are model, tokenizer, old_tokenizer, new_tokenizer, prompt, text, texts, data, seed
        and keep; all else must be bound before.
        """
        pool = {
            "model": self.model,
            "tokenizer": self.tokenizer,
            "old_tokenizer": self.tokenizer,
            "new_tokenizer": tiny_tokenizer(330),
            "prompt": TEXTS[0],
            "text": TEXTS[0],
            "texts": list(TEXTS),
            "data": list(TEXTS),
            "seed": self.seed,
            "keep": 0.5,
            **given,
        }
        return self.method(**fill(self.method, pool))


def _made(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What a class or function makes; its refusal marked as one."""
    try:
        return make(*args, **options)
    except PertokenError as error:
        raise Refused(str(error)) from error


def case_model(model: Any, tokenizer: Any, plug: str) -> tuple[PreTrainedModel, str | None]:
    """The model of a case and its architecture: a name or None makes a tiny one."""
    if model is not None and not isinstance(model, str):
        return model, None
    name = model or "llama"
    vocab = len(tokenizer) if plug in ("text", "tokenizer", "probe") else _VOCAB
    return tiny_model(name, vocab_size=vocab), name
