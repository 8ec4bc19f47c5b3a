"""Special tokens of two tokenizers by their roles, and what else of a tokenizer a model leans on:
the ids in its configurations, the chat template, the token before every text."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from pertoken._start_token import first_token
from pertoken.errors import PertokenError
from pertoken.tokenize._token_bytes import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ID_SETTINGS", "adopt", "check_generation", "same_specials", "update_ids"]

ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
TURNS = (  # what chat models begin and end a turn with
    ("<|im_start|>", "<start_of_turn>", "<|start_header_id|>", "<|start|>", "<|turn>"),
    ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<turn|>"),
)
_ONE = ("forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id")
_MANY = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
ID_SETTINGS = ("bos_token_id", "eos_token_id", "pad_token_id", *_ONE, *_MANY)
"""Settings of a generation config that name tokens."""


def same_specials(old_tokenizer: Any, new_tokenizer: Any) -> dict[int, int]:
    """New id -> old id of special tokens: the same string, else the same role, else the same mark
    of a turn. Padding that is the end of a text has no role of its own."""
    old, new = (special_tokens(each) for each in (old_tokenizer, new_tokenizer))
    found = {token: old[text] for text, token in new.items() if text in old}
    own_pad = old_tokenizer.pad_token_id != old_tokenizer.eos_token_id
    for role in ROLES if own_pad else [role for role in ROLES if role != "pad"]:
        one, other = (getattr(each, f"{role}_token_id") for each in (new_tokenizer, old_tokenizer))
        if one is not None and other is not None:
            found.setdefault(one, other)
    for marks in TURNS:
        known = next((old[mark] for mark in marks if mark in old), None)
        for mark in marks:
            if known is not None and mark in new:
                found.setdefault(new[mark], known)
    return found


def adopt(old_tokenizer: Any, new_tokenizer: Any) -> tuple[Any, list[str]]:
    """A copy of the new tokenizer that serves the model as the old one did, and what was done.

    The chat template comes along, with the names of special tokens put in the new tokenizer's
    words; a special token that it names and the new one has no like of is added, and so is a token
    that ends a text, without which nothing stops. The copy puts a token before every text if the
    old one did.
    """
    tokenizer, notes = copy.deepcopy(new_tokenizer), []
    if tokenizer.eos_token is None and old_tokenizer.eos_token is not None:
        tokenizer.add_special_tokens({"eos_token": old_tokenizer.eos_token})
        notes.append(f"{old_tokenizer.eos_token} was added, to end a text")
    starts = first_token(old_tokenizer) is not None
    template = old_tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template or ""]
    begins = starts or any("bos_token" in text for text in texts)
    if begins and tokenizer.bos_token is None and old_tokenizer.bos_token is not None:
        tokenizer.add_special_tokens({"bos_token": old_tokenizer.bos_token})
        notes.append(f"{old_tokenizer.bos_token} was added, to begin a text")
    if template is not None:
        words = _new_words(old_tokenizer, tokenizer, " ".join(texts), notes)
        tokenizer.chat_template = (
            {name: _replaced(text, words) for name, text in template.items()}
            if isinstance(template, dict)
            else _replaced(template, words)
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = old_tokenizer.padding_side
    tokenizer.model_max_length = old_tokenizer.model_max_length
    if starts and first_token(tokenizer) is None:
        _begin_with(tokenizer, tokenizer.bos_token)
        notes.append(f"{tokenizer.bos_token} is put before every text, as the model is used to it")
    return tokenizer, notes


def _new_words(old_tokenizer: Any, tokenizer: Any, text: str, notes: list[str]) -> dict[str, str]:
    """The special tokens that a template names -> what the new tokenizer calls them.

    Two of them never become one: what has no like of its own is added.
    """
    old, new = special_tokens(old_tokenizer), special_tokens(tokenizer)
    named = [token for token in old if token in text]
    named = [
        token for token in named if not any(token in other and token != other for other in named)
    ]
    spelled = {token: content for content, token in new.items()}
    like: dict[int, list[str]] = {}
    for token, known in same_specials(old_tokenizer, tokenizer).items():
        like.setdefault(known, []).append(spelled[token])
    words: dict[str, str] = {}
    for content in named:
        if content in new:
            continue
        marks = next((marks for marks in TURNS if content in marks), ())
        choice = [mark for mark in marks if mark in new] + like.get(old[content], [])
        choice = [mark for mark in choice if mark not in named and mark not in words.values()]
        if choice:
            words[content] = choice[0]
            notes.append(f"the chat template says {choice[0]} for {content}")
        else:
            tokenizer.add_tokens([content], special_tokens=True)
            notes.append(f"{content} was added: the chat template names it")
    return words


def _replaced(template: str, words: dict[str, str]) -> str:
    for old, new in words.items():
        template = template.replace(old, new)
    return template


def _begin_with(tokenizer: Any, token: str) -> None:
    from tokenizers.processors import Sequence, TemplateProcessing

    backend = tokenizer.backend_tokenizer
    begin = TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token} $B",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token))],
    )
    own = backend.post_processor
    backend.post_processor = begin if own is None else Sequence([own, begin])


def check_generation(model: PreTrainedModel) -> None:
    """Refuse a generation config that transformers would not write once its ids have changed."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise PertokenError(
            "the model's generation config can't be saved with new ids; mend its "
            f"generation_config.json: {reason}"
        ) from None


def update_ids(model: PreTrainedModel, tokenizer: Any, source: dict[int, int]) -> None:
    """Write the tokenizer's special ids into the model's configurations.

    source: new id -> old id of every token that was copied. What ended a text before ends it still,
    in its new id. Raises PertokenError where a setting names an old id without a like.
    """
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    generation = model.generation_config
    before = [generation.eos_token_id, model.config.get_text_config().eos_token_id]
    old_ends = {token for each in before for token in _listed(each)}
    ends = [token for token in special_tokens(tokenizer).values() if source.get(token) in old_ends]
    ends = sorted({*ends, *_listed(ids["eos"])})
    again: dict[int, int] = {}
    for token, known in source.items():
        again.setdefault(known, token)
    for name in (*_ONE, *_MANY):
        value = getattr(generation, name, None)
        if value is not None:
            setattr(generation, name, _renamed(value, again, name))
    configs = {id(each): each for each in (model.config, model.config.get_text_config())}
    for config in configs.values():
        config.bos_token_id, config.pad_token_id = ids["bos"], ids["pad"]
        config.eos_token_id = ids["eos"]
    generation.bos_token_id, generation.pad_token_id = ids["bos"], ids["pad"]
    if ends:
        generation.eos_token_id = ends[0] if len(ends) == 1 else ends


def _listed(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [int(value)]


def _renamed(value: Any, again: dict[int, int], name: str) -> Any:
    if isinstance(value, (list, tuple)):
        return [_renamed(each, again, name) for each in value]
    if value not in again:
        raise PertokenError(
            f"the generation config's {name} names the old token {value}, which the new tokenizer "
            f"has not: set model.generation_config.{name} = None first"
        )
    return again[value]
