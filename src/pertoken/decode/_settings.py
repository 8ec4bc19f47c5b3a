"""What of `generate`'s settings the speculative loop serves, and what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pertoken.errors import PertokenError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

    from pertoken.decode.drafter import Drafter


def stops(criteria: Any, drafter: Drafter) -> tuple[frozenset[int], Any]:
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
    if drafter.stop_strings:
        others.append(StopStringCriteria(drafter.tokenizer, drafter.stop_strings))
    return frozenset(stop_ids), others


def refuse_settings(config: GenerationConfig, drafter: Drafter, input_ids: torch.Tensor) -> None:
    """Raise PertokenError for generation settings that the loop would silently ignore."""
    if (config.num_beams or 1) > 1:
        raise PertokenError(
            "speculative decoding follows one text per row; beam search (num_beams > 1) does not "
            "go with it"
        )
    if config.prompt_lookup_num_tokens:
        raise PertokenError(
            "prompt_lookup_num_tokens is transformers' own drafter; drop it, or use "
            "custom_generate=PromptLookup()"
        )
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise PertokenError(f"{name} is not kept by speculative decoding; decode without it")
    if config.use_cache is False:
        raise PertokenError("speculative decoding needs the cache; drop use_cache=False")
    if input_ids.shape[1] == 0:
        raise PertokenError("the prompt is empty; give at least one token")
    if drafter.streamer is not None and input_ids.shape[0] > 1:
        raise PertokenError("a streamer shows one text; decode a batch without it")
    if config.max_length <= input_ids.shape[1]:
        raise PertokenError(
            f"max_length {config.max_length} leaves no room behind a prompt of "
            f"{input_ids.shape[1]} tokens; raise max_new_tokens"
        )
