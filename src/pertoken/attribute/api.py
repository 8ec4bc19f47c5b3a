"""One call for every method: `attribute`, and what it will cost: `estimate_cost`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pertoken.attribute._forward import LONG, last_logits, most_tokens
from pertoken.attribute._question import Prompt, Question, ask
from pertoken.attribute._scores import Scores
from pertoken.attribute.methods import Method, find
from pertoken.attribute.quantity import Quantity, contrast
from pertoken.attribute.quantity import find as find_quantity
from pertoken.errors import PertokenError
from pertoken.signal import TokenSignal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Cost", "attribute", "estimate_cost"]


def attribute(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Prompt,
    target: str | int | None = None,
    method: str = "reagent",
    quantity: str | Quantity = "probability",
    *,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> TokenSignal:
    """How much each token of a prompt mattered for what follows it.

    prompt: a text, taken as it is, or the messages of a chat, put into the chat template.
    target: what follows: a text, of which every token is explained, each by the prompt and the
        target tokens before it; or how many tokens the model shall write itself; None for one.
    method: a name of `pertoken.attribute.METHODS`; options are the method's own.
    quantity: what is explained, "probability", "log-probability", "logit", "entropy", or
        `contrast(foil)`; a name you registered.
    progress: called with (what, done, total) now and then.
    Returns a `TokenSignal` over the user's own text: values [tokens] for one target token, [tokens,
    targets] for several; special tokens and the chat template are left out, and a token that was
    not rated is NaN. `notes` say what must be known about the result.
    Raises PertokenError for a prompt or target that is empty or too long, an unknown method,
    quantity or option, and a model that the method cannot serve.

    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> model = tiny_model("llama", vocab_size=258)
    >>> signal = attribute(model, ByteTokenizer(), "two words", "!", "occlusion")
    >>> len(signal.values), signal.name
    (9, "occlusion of probability of '!'")
    """
    chosen, wanted = find(method), find_quantity(quantity)
    chosen.filled(options)  # what is misspelt is said before any work
    question = ask(model, tokenizer, prompt, target)
    if progress is not None:
        told = progress  # a name that stays what it is, for the type checker
        question = replace(question, progress=lambda done, total: told(chosen.name, done, total))
    return signal(question, chosen(question, wanted, seed=seed, **options), chosen.name, wanted)


def signal(question: Question, scores: Scores, method: str, quantity: Quantity) -> TokenSignal:
    """Scores of a question as a signal over the prompt's own text."""
    shown = question.shown
    values = scores.values[:, shown].T.numpy()
    spans = [span for span in question.spans if span is not None]
    name = f"{method} of {quantity.name}"
    targets = question.targets
    if len(targets) == 1:
        values, name, targets = values[:, 0], f"{name} of {targets[0]!r}", ()
    return TokenSignal(
        question.text, np.ascontiguousarray(values), spans, name, targets, scores.notes
    )


@dataclass(frozen=True)
class Cost:
    """What an attribution will take, at least and at most.

    rows: texts that go through the model; seconds: measured on one of them; megabytes: rough,
        beside the model itself.
    """

    rows: tuple[int, int]
    seconds: tuple[float, float]
    megabytes: float

    def __str__(self) -> str:
        few, many = self.seconds
        span = f"{few:.3g} s" if few == many else f"{few:.3g} to {many:.3g} s"
        low, high = self.rows
        rows = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        return f"{rows} texts through the model, about {span}, {self.megabytes:,.0f} MB"


def estimate_cost(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Prompt,
    target: str | int | None = None,
    method: str = "reagent",
    **options: Any,
) -> Cost:
    """What `attribute` with these arguments will take; runs a few rows to time them.

    ReAGent stops by a rule that cannot be foreseen: its cost lies between one step and max_steps.
    A gradient is counted as three forwards, of a long text as four. Memory is what one bounded
    forward holds.
    """
    find(method).filled(options)  # what is misspelt is said before any work
    question = ask(model, tokenizer, prompt, target)
    return cost(question, method, options, seconds_of_row(question))


def seconds_of_row(question: Question) -> float:
    """Seconds of a forward over the question's text, in a batch as methods run them."""
    model, place = question.model, question.places[-1]
    batch = max(1, min(most_tokens(model) // place, 8))
    ids = question.ids[:place].expand(batch, -1)
    with torch.no_grad():
        last_logits(model, input_ids=ids[:1])  # warm up
        began = time.perf_counter()
        last_logits(model, input_ids=ids)
        return (time.perf_counter() - began) / batch


def cost(question: Question, method: str, options: dict[str, Any], each: float) -> Cost:
    """`estimate_cost` of a question whose forwards take `each` seconds."""
    chosen, place = find(method), question.places[-1]
    rows = chosen.rows(question, chosen.filled(options))
    if chosen.backward:
        each *= 4 if place > LONG else 3
    held = _megabytes(question.model, place, rows[1], chosen)
    return Cost(rows, (rows[0] * each, rows[1] * each), held)


def _megabytes(model: PreTrainedModel, place: int, rows: int, method: Method) -> float:
    """Activations of the largest forward: one block's at a time, with gradients all blocks', if
    the text is not so long that they are computed twice."""
    config = model.config.get_text_config(decoder=True)
    rows = min(rows, max(1, (LONG if method.backward else most_tokens(model)) // place))
    kept = method.backward and place <= LONG
    blocks = config.num_hidden_layers if kept else 1
    width = 12 * config.hidden_size  # attention, feed-forward and residual beside each other
    size = torch.finfo(model.dtype).bits // 8
    activations = rows * place * width * blocks * size
    logits = 3 * rows * config.vocab_size * 4
    kept_of_each = {"attention-rollout": 2, "globenc": 4}.get(method.name, 0)  # of all layers
    states = kept_of_each * place * config.hidden_size * config.num_hidden_layers * size
    return float(activations + logits + states) / 2**20


def foil_of(tokenizer: Any, text: str) -> Quantity:
    """The contrast with a foil given as a text, which must be one token."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise PertokenError(
            f"the foil {text!r} is {len(ids)} tokens; it must be one (mind the blank before it)"
        )
    return contrast(int(ids[0]))
