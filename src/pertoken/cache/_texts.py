"""The texts that caches are judged on, as turns: prompts, and answers given or to be written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pertoken.errors import PertokenError
from pertoken.prompts import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Text", "Turn", "check_fit", "refuse_unfit", "scripts"]


@dataclass(frozen=True)
class Turn:
    """Tokens that are given, and the answer behind them: None for the full cache's greedy one."""

    given: Sequence[int]
    answer: Sequence[int] | None = None


Text = str | Sequence[int] | torch.Tensor | Sequence[Turn]
"""A text, its ids (a list, [time] or [1, time]), or the turns of a conversation."""


def scripts(
    texts: Sequence[Text],
    *,
    tokenizer: Any = None,
    continuation: str = "greedy",
    max_new_tokens: int = 64,
    prompt_share: float = 0.5,
) -> list[list[Turn]]:
    """The turns of each text; PertokenError for texts that nothing can be judged on."""
    if continuation not in ("greedy", "text"):
        raise PertokenError(f'continuation is "greedy" or "text", not {continuation!r}')
    if max_new_tokens < 1:
        raise PertokenError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if not 0 <= prompt_share < 1:
        raise PertokenError(f"prompt_share is from 0 to below 1, got {prompt_share:g}")
    if isinstance(texts, str) or not len(texts):
        raise PertokenError("texts must be a list with at least one text")
    found = []
    for number, text in enumerate(texts, 1):
        if isinstance(text, Sequence) and text and isinstance(text[0], Turn):
            turns = [_checked(turn, number) for turn in text]
            found.append(turns)
            continue
        ids = _ids(text, tokenizer, number)
        if continuation == "greedy":
            if not ids:
                raise PertokenError(f"text {number} is empty")
            found.append([Turn(ids)])
            continue
        if len(ids) < 2:
            raise PertokenError(
                f"text {number} has {len(ids)} tokens; one to begin with and one to judge are "
                "needed"
            )
        cut = min(max(1, round(prompt_share * len(ids))), len(ids) - 1)
        found.append([Turn(ids[:cut], ids[cut : cut + max_new_tokens])])
    return found


def _ids(text: Any, tokenizer: Any, number: int) -> list[int]:
    if isinstance(text, str):
        if tokenizer is None:
            raise PertokenError(f"text {number} is a string: give the tokenizer too")
        return list(tokenizer(text)["input_ids"])
    if isinstance(text, torch.Tensor):
        if text.dim() == 2 and text.shape[0] == 1:
            text = text[0]
        if text.dim() != 1 or text.is_floating_point():
            raise PertokenError(
                f"text {number} must be ids [time] or [1, time], not {list(text.shape)} of "
                f"{text.dtype}"
            )
        return [int(token) for token in text]
    if not all(isinstance(token, int) for token in text):
        raise PertokenError(f"text {number} must be a string, ids, or a list of Turn")
    return list(text)


def _checked(turn: Any, number: int) -> Turn:
    if not isinstance(turn, Turn):
        raise PertokenError(f"text {number} mixes Turn with {type(turn).__name__}")
    if not len(turn.given) or (turn.answer is not None and not len(turn.answer)):
        raise PertokenError(f"text {number} has a turn with nothing given or an empty answer")
    return turn


def refuse_unfit(model: PreTrainedModel) -> None:
    """Raise PertokenError for a model that cannot be judged: it has no KV cache, or it trains."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise PertokenError(f"{name} is an encoder-decoder model; a decoder-only one is needed")
    if getattr(model, "_is_stateful", False):
        raise PertokenError(f"{name} keeps a recurrent state instead of keys and values")
    if model.training:
        raise PertokenError(f"{name} is in training mode (dropout): call model.eval() first")


def check_fit(
    model: PreTrainedModel, turns: Sequence[Turn], max_new_tokens: int, number: int
) -> None:
    """Raise PertokenError for ids that the model does not have, or more than its positions."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    room = positions(model)
    given = [token for turn in turns for token in (*turn.given, *(turn.answer or ()))]
    wrong = next((token for token in given if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise PertokenError(
            f"text {number} holds the id {wrong}; the model has {vocabulary} tokens"
        )
    length = len(given) + max_new_tokens * sum(turn.answer is None for turn in turns)
    if room is not None and length > room:
        raise PertokenError(
            f"text {number} with its new tokens is up to {length} tokens long; the model has "
            f"{room} positions: shorten it, or ask for fewer new tokens"
        )
