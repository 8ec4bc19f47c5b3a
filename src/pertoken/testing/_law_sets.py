"""Which laws a plug calls for: name -> what to run on a case.

A law returns None where it holds, or the reason why it has nothing to say; it raises `LawBroken`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pertoken.testing import cache_laws, logits_laws, loss_laws, text_laws
from pertoken.testing._arguments import parameters
from pertoken.testing._case import Case, Refused
from pertoken.testing.distribution import check_distribution
from pertoken.testing.laws import LawBroken, check_batch_invariant, check_lossless
from pertoken.testing.trace import check_leaves_no_trace

__all__ = ["LAWS", "Law"]

Law = Callable[[Case], str | None]

_TOKENS = 10  # new tokens of a run
_SMALL, _LARGE = 8, 128  # budgets of caches: less than a prompt, more than any text here
_DRAWS = 600
_SAMPLE_PROMPT = (1, 5, 2, 7, 1, 5, 2)


# generate


def _lossless(case: Case) -> None:
    check_lossless(case.decoder(), case.model, case.prompts, max_new_tokens=_TOKENS)


def _lossless_processed(case: Case) -> None:
    run: dict[str, Any] = {"repetition_penalty": 1.3, "eos_token_id": 3, "min_new_tokens": 4}
    check_lossless(case.decoder(), case.model, case.prompts[1:], max_new_tokens=_TOKENS, **run)


def _batch(case: Case) -> None:
    check_batch_invariant(case.decoder(), case.model, case.prompts, max_new_tokens=_TOKENS)


def _distribution(case: Case) -> None:
    size = {"draws": _DRAWS, "batch_size": _DRAWS, "top_k": 0}
    check_distribution(case.decoder(), case.small, _SAMPLE_PROMPT, seed=case.seed, **size)


def _no_trace_of_decoding(case: Case) -> None:
    """Greedy, and then nothing may be drawn; a method that only samples may draw."""
    ids = case.prompts[1][None]
    mask = torch.ones_like(ids)

    def decode(model: Any, sample: bool) -> None:
        run = {"max_new_tokens": 6, "do_sample": sample, **({"top_k": 0} if sample else {})}
        model.generate(ids, attention_mask=mask, custom_generate=case.decoder(), **run)

    try:
        check_leaves_no_trace(case.model, lambda m: decode(m, False), rng=True)
    except Refused:
        check_leaves_no_trace(case.model, lambda m: decode(m, True))


# logits


def _processor_scores(case: Case) -> None:
    logits_laws.check_processor_scores(case.make, vocab_size=_vocab(case), seed=case.seed)


def _processor_rows(case: Case) -> None:
    logits_laws.check_processor_rows(case.make, vocab_size=_vocab(case), seed=case.seed)


def _no_trace_of_processing(case: Case) -> None:
    ids = case.prompts[1][None]
    run = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    check_leaves_no_trace(
        case.model, lambda m: m.generate(ids, logits_processor=[case.make()], **run), rng=True
    )


# cache


def _full(case: Case) -> None:
    make = case.cache(_LARGE)
    cache_laws.check_cache_equals_full(make, case.model, case.prompts, max_new_tokens=_TOKENS)


def _exact(case: Case) -> str | None:
    if not case.takes("budget"):
        return "takes no budget"
    make = case.cache(_SMALL)
    cache_laws.check_cache_equals_full(make, case.model, case.prompts, max_new_tokens=_TOKENS)
    return None


def _cache_batch(case: Case) -> None:
    make = case.cache(_SMALL)
    cache_laws.check_cache_batch(make, case.model, case.prompts, max_new_tokens=8)


def _turns(case: Case) -> None:
    cache_laws.check_cache_turns(case.cache(_SMALL), case.model, seed=case.seed)


def _reorder(case: Case) -> str | None:
    refusal = cache_laws.check_cache_reorder(case.cache(_SMALL), case.model, seed=case.seed)
    return refusal and f"refused by name: {refusal}"


def _crop(case: Case) -> str | None:
    refusal = cache_laws.check_cache_crop(case.cache(_SMALL), case.model, seed=case.seed)
    return refusal and f"refused by name: {refusal}"


def _no_trace_of_caching(case: Case) -> None:
    ids = case.prompts[1][None]
    run = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    make = case.cache(_SMALL)
    check_leaves_no_trace(
        case.model, lambda m: m.generate(ids, past_key_values=make(m), **run), rng=True
    )


# hooks


def _no_trace_of_hooks(case: Case) -> None:
    check_leaves_no_trace(case.model, case.method, rng=True)


def _batch_inside(case: Case) -> None:
    with case.method(case.model):
        check_batch_invariant(None, case.model, case.prompts, max_new_tokens=_TOKENS)


# text, probe


def _deterministic(case: Case) -> None:
    text_laws.check_deterministic(case.call)


def _keeps_all(case: Case) -> str | None:
    if not case.takes("keep"):
        return "takes no keep"
    text = "prompt" if case.takes("prompt") else "text"
    text_laws.check_keeps_all(lambda given, keep: case.call(**{text: given, "keep": keep}))
    return None


def _no_trace_of_calling(case: Case) -> str | None:
    if case.model is None:
        return "takes no model"
    check_leaves_no_trace(case.model, lambda model: _and_none(case.call(model=model)), rng=True)
    return None


def _table(case: Case) -> None:
    found = case.call()
    if not callable(getattr(found, "table", None)) or not str(found.table()).strip():
        raise LawBroken(f"a result of a probe has a table(); {type(found).__name__} has none")


# tokenizer


def _tokenizer(case: Case) -> Any:
    if hasattr(case.method, "encode") and hasattr(case.method, "decode"):
        return case.method  # it is one
    found = case.call()
    return found[1] if isinstance(found, tuple) else found


def _round_trip(case: Case) -> None:
    text_laws.check_tokenizer_round_trip(_tokenizer(case))


def _tokenizer_batch(case: Case) -> None:
    text_laws.check_tokenizer_batch(_tokenizer(case))


def _tokenizer_saves(case: Case) -> None:
    text_laws.check_tokenizer_saves(_tokenizer(case))


def _tokenizer_given(case: Case) -> None:
    before = case.tokenizer.backend_tokenizer.to_str()
    _tokenizer(case)
    if case.tokenizer.backend_tokenizer.to_str() != before:
        raise LawBroken("the tokenizer that was given is changed")


def _tokenizer_fits(case: Case) -> str | None:
    """The model that comes with a tokenizer has a row for every token, and works."""
    if case.model is None:
        return "takes no model"
    model, tokenizer = case.call()
    logits = model(torch.arange(len(tokenizer))[None, -20:]).logits
    if logits.shape[-1] < len(tokenizer) or not bool(logits.isfinite().all()):
        raise LawBroken(
            f"a vocabulary of {len(tokenizer)} does not fit logits {list(logits.shape)}"
        )
    return None


# loss


def _micro_batches(case: Case) -> str | None:
    if "total" not in parameters(case.method):
        return "takes no total"
    loss_laws.check_loss_micro_batches(case.method, seed=case.seed)
    return None


# net


def _net_batch(case: Case) -> None:
    check_batch_invariant(None, _net(case), max_new_tokens=_TOKENS)


def _net_no_trace(case: Case) -> None:
    ids = torch.tensor([[1, 2, 3]])
    run = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    check_leaves_no_trace(_net(case), lambda m: m.generate(ids, **run))


def _net(case: Case) -> Any:
    return case.method if isinstance(case.method, torch.nn.Module) else case.method()


def _vocab(case: Case) -> int:
    assert case.model is not None
    return int(case.model.config.get_text_config().vocab_size)


def _and_none(_: Any) -> None:
    """A result is no context manager to be entered, whatever it is."""


LAWS: Mapping[str, Mapping[str, Law]] = {
    "generate": {
        "lossless": _lossless,
        "lossless with processors": _lossless_processed,
        "batch = single": _batch,
        "distribution": _distribution,
        "no trace": _no_trace_of_decoding,
    },
    "logits": {
        "scores": _processor_scores,
        "batch = single": _processor_rows,
        "no trace": _no_trace_of_processing,
    },
    "cache": {
        "equals a full cache": _full,
        "exact within its budget": _exact,
        "batch = single": _cache_batch,
        "turns": _turns,
        "reorder": _reorder,
        "crop": _crop,
        "no trace": _no_trace_of_caching,
    },
    "hooks": {"batch = single": _batch_inside, "no trace": _no_trace_of_hooks},
    "text": {
        "deterministic": _deterministic,
        "keep = 1": _keeps_all,
        "no trace": _no_trace_of_calling,
    },
    "tokenizer": {
        "round trip": _round_trip,
        "batch = single": _tokenizer_batch,
        "saves and loads": _tokenizer_saves,
        "given one unchanged": _tokenizer_given,
        "fits the model": _tokenizer_fits,
        "no trace": _no_trace_of_calling,
    },
    "loss": {
        "mask": lambda case: loss_laws.check_loss_mask(case.method, seed=case.seed),
        "order": lambda case: loss_laws.check_loss_order(case.method, seed=case.seed),
        "micro-batches": _micro_batches,
        "gradient": lambda case: loss_laws.check_loss_gradient(case.method, seed=case.seed),
    },
    "net": {
        "saves and loads": lambda case: text_laws.check_saves_and_loads(_net(case)),
        "batch = single": _net_batch,
        "no trace": _net_no_trace,
    },
    "probe": {
        "deterministic": _deterministic,
        "has a table": _table,
        "no trace": _no_trace_of_calling,
    },
}
"""Plug -> the laws of its methods, in the order they run."""
