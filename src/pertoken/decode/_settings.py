"""What of `generate`'s settings and caches the loops here serve, and what they refuse.

Everything is refused before the first forward, by an error that names the loop (a drafter, AWRS)
and what does not go with it. `generate` shows a callable neither its `assistant_model` nor its
`streamer`, so those two cannot be refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pertoken.decode.forward import refuse_unfit, rotation_switch
from pertoken.decode.rows import refuse_unfit_cache, static_slots
from pertoken.errors import PertokenError
from pertoken.prompts import positions

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.cache_utils import Cache

    from pertoken.decode.cntp import CautiousDecoding
    from pertoken.decode.drafter import Drafter

_OTHER_WAYS = {  # settings by which transformers decodes in another way, which a callable replaces
    "assistant_early_exit": "drafting from its own early layers",
    "constraints": "constrained beam search",
    "dola_layers": "DoLa",
    "force_words_ids": "constrained beam search",
    "penalty_alpha": "contrastive search",
    "use_mtp": "multi-token prediction",
}
_NOT_KEPT = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_TEXT = {"attention_mask", "position_ids", "cache_position", "past_key_values", "input_ids"}
# They hold something per row of the batch, and cannot be shown the rows one by one.
_BY_STEP = {
    "SynthIDTextWatermarkLogitsProcessor": "watermarking_config with SynthID",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale",
}


def stops(criteria: Any, method: Drafter | CautiousDecoding) -> tuple[frozenset[int], Any]:
    """Stop ids, and the criteria that must be asked token by token (the length limit is known)."""
    from transformers.generation import (
        EosTokenCriteria,
        MaxLengthCriteria,
        StoppingCriteriaList,
        StopStringCriteria,
    )

    stop_ids: set[int] = set()
    others = StoppingCriteriaList()
    for one in criteria or []:
        if type(one) is EosTokenCriteria:
            stop_ids.update(one.eos_token_id.flatten().tolist())
        elif type(one) is not MaxLengthCriteria:
            others.append(one)
    if method.stop_strings:
        others.append(StopStringCriteria(method.tokenizer, method.stop_strings))
    return frozenset(stop_ids), others


def refuse_settings(
    config: GenerationConfig, input_ids: torch.Tensor, method: object, streamer: Any
) -> None:
    """Raise PertokenError for generation settings that a method's loop would silently ignore."""
    name = type(method).__name__
    if (config.num_beams or 1) > 1:
        raise PertokenError(
            f"{name} follows one text per row; beam search (num_beams > 1) does not go with it"
        )
    if config.prompt_lookup_num_tokens:
        raise PertokenError(
            f"{name} does not go with prompt_lookup_num_tokens, transformers' own drafter; drop "
            "it, or use custom_generate=PromptLookup()"
        )
    for setting, way in _OTHER_WAYS.items():
        if getattr(config, setting, None):
            raise PertokenError(
                f"{name} does not go with {setting}, by which transformers decodes in another way "
                f"({way}); drop one of them"
            )
    for setting in _NOT_KEPT:
        if getattr(config, setting, None):
            raise PertokenError(f"{setting} is not kept by {name}; decode without it")
    if config.use_cache is False:
        raise PertokenError(f"{name} needs the cache; drop use_cache=False")
    if input_ids.shape[1] == 0:
        raise PertokenError("the prompt is empty; give at least one token")
    if streamer is not None and input_ids.shape[0] > 1:
        raise PertokenError("a streamer shows one text; decode a batch without it")
    if config.max_length <= input_ids.shape[1]:
        raise PertokenError(
            f"max_length {config.max_length} leaves no room behind a prompt of "
            f"{input_ids.shape[1]} tokens; raise max_new_tokens"
        )


def refuse_inputs(
    method: object, model: PreTrainedModel, config: GenerationConfig, given: dict[str, Any]
) -> None:
    """Raise PertokenError for model inputs that the loops here do not hand on, such as images."""
    name = type(method).__name__
    if given.get("inputs_embeds") is not None:
        raise PertokenError(f"{name} needs token ids; pass input_ids instead of inputs_embeds")
    for key, value in given.items():
        if key in _TEXT or not isinstance(value, torch.Tensor):
            continue
        if not key.endswith("token_type_ids") or bool(value.any()):  # zeros: all is text
            raise PertokenError(
                f"{name} decodes text alone, and {key} was given; use transformers' own generate"
            )
    switch = rotation_switch(model)
    if switch is not None and config.max_length > switch:
        raise PertokenError(
            f"{type(model).__name__} rotates texts of more than {switch} tokens by other factors, "
            f"which {name} cannot follow; keep prompt and new tokens within {switch}, or use "
            "transformers' own generate"
        )


def refuse_processors(processors: Any, drafter: Drafter, rows: int) -> None:
    """Raise PertokenError for processors that a drafter cannot show the rows of a batch one by one.

    They hold a state for the whole batch; in a single row they are asked token by token, as ever.
    """
    for one in processors or [] if rows > 1 else []:
        if what := _BY_STEP.get(type(one).__name__):
            name = type(drafter).__name__
            raise PertokenError(
                f"{name} decodes the rows of a batch at different speeds, and {what} cannot follow "
                "that; decode one row at a time"
            )


def refuse_states(processors: Any, method: object) -> None:
    """Raise PertokenError for processors that hold a state of one text, where several are drawn."""
    for one in processors or []:
        if what := _BY_STEP.get(type(one).__name__):
            raise PertokenError(
                f"{type(method).__name__} draws several continuations of a text, and {what} can "
                "follow only one; drop one of them"
            )


def refuse_filled_cache(cache: Cache, input_ids: torch.Tensor, method: object) -> None:
    """Raise PertokenError for a cache of other rows, or with nothing left to read behind it."""
    name = type(method).__name__
    seen, (rows, length) = int(cache.get_seq_length()), input_ids.shape
    if seen >= length:
        raise PertokenError(
            f"{name} has nothing to read: the cache holds {seen} tokens but the input only "
            f"{length}; pass the whole text with the cache of all its tokens but the last"
        )
    keys = getattr(cache.layers[0], "keys", None) if seen else None
    if keys is not None and keys.shape[0] != rows:
        raise PertokenError(
            f"{name} was given {rows} rows and a {type(cache).__name__} of {keys.shape[0]}: use "
            "one cache per batch (batch_repeat_interleave copies rows)"
        )


def cache_and_mask(
    drafter: Drafter, model: PreTrainedModel, input_ids: torch.Tensor, given: dict[str, Any]
) -> tuple[Cache, torch.Tensor]:
    """The cache and the 2-D mask of the whole prompt; refuses what does not go together."""
    from transformers import DynamicCache

    refuse_unfit(model)
    text_config = model.config.get_text_config(decoder=True)
    cache = given.get("past_key_values")
    if cache is None:
        cache = DynamicCache(config=text_config)
    refuse_unfit_cache(cache, drafter)
    refuse_filled_cache(cache, input_ids, drafter)
    if static_slots(cache) and len(input_ids) > 1:
        raise PertokenError(
            "a static cache cannot hold rows that accept different numbers of tokens; use the "
            "default cache for a batch"
        )
    mask = prompt_mask(model, input_ids, given)
    refuse_empty_rows(mask)
    return cache, mask


def prompt_mask(
    model: PreTrainedModel, input_ids: torch.Tensor, given: dict[str, Any]
) -> torch.Tensor:
    """The 2-D mask of the whole prompt; refuses one that is too long or padded on the right."""
    length, longest = input_ids.shape[1], positions(model)
    if longest is not None and length > longest:
        raise PertokenError(
            f"the prompt has {length} tokens but {type(model).__name__} reads at most {longest}; "
            "shorten the prompt"
        )
    mask = given.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.dtype)
    if bool((mask.any(1) & (mask[:, -1] == 0)).any()):
        raise PertokenError(
            "the batch is padded on the right; decoding continues at the right end, so set "
            'tokenizer.padding_side = "left"'
        )
    return mask


def refuse_empty_rows(mask: torch.Tensor) -> None:
    """Raise PertokenError for a row without a token, such as one of the padding id without mask."""
    if not bool(mask.any(1).all()):
        raise PertokenError(
            "a row of the prompt is padding alone: give it a token, or pass attention_mask"
        )
