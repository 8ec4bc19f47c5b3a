"""FrugalPrompt: keep the most salient share of a prompt's words, in their order.

Split the prompt into sentences; rate the tokens of each with a small encoder (GlobEnc or DecompX);
bring the scores of a sentence to 0 … 1; with GlobEnc, multiply by how central the sentence is
(LexRank); add the scores of a word's tokens up; keep the round(words · share) best words of the
whole prompt, in their order. Source: FrugalPrompt, arXiv 2510.16439, section 3. Its claim: 20 %
fewer tokens cost little in sentiment analysis, question answering and summarisation, and much in
mathematics.

Where we differ. Words are cut out of the original with their own white space, so that lines stay
lines (the paper joins words with blanks). What `protect` matches survives byte for byte and counts
for the share. LexRank takes sentences as documents. A word is a run without white space, or one
Chinese character (our reading); a sentence is what `_text.sentences` says (our reading). DecompX
is asked for the predicted class, or for the norm where the encoder has no head, not for class 0
(bench/decompx_targets.py: class 0 turns spam into ham).
A decoder can rate in the place of the encoder; the paper has encoders alone.

Scores of a sentence span 0 … 1 whatever its length, so that short sentences lose fewer words than
long ones: that is the paper's rule and stays. LLMLingua-2 is not here, as its weights are in no
package registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

from pertoken.conversation import templated
from pertoken.errors import PertokenError, nearest
from pertoken.prompts import check_utf8
from pertoken.prune import _protect
from pertoken.prune._plan import Plan, Reader, count, name_of, shorten
from pertoken.prune.compressed import CompressedChat, CompressedPrompt
from pertoken.signal import TokenSignal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pertoken._embedded import Kind
    from pertoken.prune._salience import Rate

__all__ = ["SALIENCE", "compress", "reader"]

Messages = Sequence[Mapping[str, str]]


SALIENCE: dict[str, tuple[Kind, str] | None] = {
    "decompx": ("encoder", "minilm"),
    "globenc": ("encoder", "minilm"),
    "random": None,
    "self-information": ("decoder", "smollm2"),
    "stop-words": None,
}
"""What can rate words, and the model taken by default with its kind; where that is an encoder, a
decoder will do too."""


@overload
def compress(
    prompt: str,
    keep: float = ...,
    *,
    salience: str | Rate | TokenSignal = ...,
    model: str | Path | PreTrainedModel | None = ...,
    tokenizer: Any = ...,
    target_tokenizer: Any = ...,
    protect: str | Sequence[str] = ...,
    protect_defaults: bool = ...,
    lowest: bool = ...,
    seed: int = ...,
) -> CompressedPrompt: ...


@overload
def compress(
    prompt: Messages,
    keep: float = ...,
    *,
    salience: str | Rate | TokenSignal = ...,
    model: str | Path | PreTrainedModel | None = ...,
    tokenizer: Any = ...,
    target_tokenizer: Any = ...,
    protect: str | Sequence[str] = ...,
    protect_defaults: bool = ...,
    lowest: bool = ...,
    seed: int = ...,
) -> CompressedChat: ...


def compress(
    prompt: str | Messages,
    keep: float = 0.8,
    *,
    salience: str | Rate | TokenSignal = "globenc",
    model: str | Path | PreTrainedModel | None = None,
    tokenizer: Any = None,
    target_tokenizer: Any = None,
    protect: str | Sequence[str] = (),
    protect_defaults: bool = True,
    lowest: bool = False,
    seed: int = 0,
) -> CompressedPrompt | CompressedChat:
    """Drop the words a prompt can do without; what is left keeps its order and its characters.

    prompt: a text, or the messages of a chat ({"role": …, "content": …}); each message is
        compressed by itself.
    keep: share of the words that stays, in (0, 1]: round(words · keep), halves to the even number,
        at least one. 1.0 gives the prompt back byte for byte.
    salience: what says which words matter. "globenc" and "decompx" by an encoder, or by a decoder
        (each sentence is read at its last token: our reading); "self-information" (−log p under a
        decoder, as Selective Context does); "stop-words" (English; drops these first and then words
        evenly spread); "random" (by `seed`). Or a function `(model, input_ids, attention_mask) ->
        scores [batch, time]` in the place of GlobEnc, rated like DecompX; or a `TokenSignal` of
        this very prompt.
    model, tokenizer: the model that rates, by name as in `pertoken.load`, or as an object with its
        tokenizer; None for minilm, or smollm2 for "self-information".
    target_tokenizer: counts the tokens before and after; None for the tokenizer of the salience.
    protect: regular expressions, and the names "code", "urls", "numbers". Words they touch stay,
        whatever that does to the share.
    protect_defaults: also protect how the answer shall look (`ANSWER_FORMAT`), and of a chat the
        last message of the user.
    lowest: keep the least salient words instead, as a control.

    Raises PertokenError for an empty prompt, a share outside (0, 1], an unknown salience, a model
    of the wrong kind, a name of one where none is needed, a pattern that does not compile, and
    scores that are NaN. A prompt longer than the model is rated in parts, which the notes say.

    >>> prompt = "The cat sat on the mat. Answer with one word."
    >>> small = compress(prompt, 0.7, salience="stop-words")
    >>> small.text
    'cat sat mat. Answer with one word.'
    >>> [word.text for word in small.dropped]
    ['The', 'on', 'the']
    """
    if not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise PertokenError(f"the share to keep must be above 0 and at most 1, got {keep}")
    if isinstance(salience, str):
        _known(salience)
    wanted, pattern_notes = _protect.patterns(protect, protect_defaults)
    messages = None if isinstance(prompt, str) else _checked(prompt)
    texts = [cast(str, prompt)] if messages is None else [m["content"] for m in messages]
    for text in texts:
        _check_text(text)
    if isinstance(salience, TokenSignal) and messages is not None:
        raise PertokenError("a signal rates one text: give the messages of the chat one by one")
    if isinstance(salience, TokenSignal) and salience.text != prompt:
        raise PertokenError("the signal is not of this prompt: its text must be the very same")
    rater = Reader(None, tokenizer) if keep == 1 else reader(salience, model, tokenizer)
    counter = rater.tokenizer if target_tokenizer is None else target_tokenizer
    plan = Plan(keep, salience, rater, counter, wanted, lowest, seed)
    spared = [""] * len(texts)
    if messages is not None and protect_defaults:
        last = max(place for place, each in enumerate(messages) if each["role"] == "user")
        spared[last] = "last message of the user"
    parts = [shorten(text, plan, spared=why) for text, why in zip(texts, spared, strict=True)]
    notes = list(pattern_notes)
    notes += [
        f"the pattern {pattern.name!r} matches nothing"
        for pattern in wanted[: len([protect] if isinstance(protect, str) else protect)]
        if not any(pattern.compiled.search(text) for text in texts)
    ]
    if salience == "stop-words" and keep < 1:
        notes.append("the stop words are English ones")
    if salience in ("globenc", "decompx") and _is_decoder(rater.model):
        notes.append(
            "the salience model is a decoder: scores are read at the last token of each sentence"
        )
    if target_tokenizer is None and counter is not None:
        notes.append(
            "tokens are counted by the salience model's tokenizer, not by that of the model that "
            "will read the prompt"
        )
    if messages is None:
        only = parts[0]
        return _with_notes(only, [*notes, *only.notes])
    short = [{**m, "content": part.text} for m, part in zip(messages, parts, strict=True)]
    for number, part in enumerate(parts, 1):
        notes += [f"message {number}: {note}" for note in part.notes]
    before, after = _chat_tokens(counter, messages), _chat_tokens(counter, short)
    return CompressedChat(short, tuple(parts), before, after, tuple(notes))


def reader(
    salience: str | Rate | TokenSignal,
    model: str | Path | PreTrainedModel | None = None,
    tokenizer: Any = None,
) -> Reader:
    """The model that `salience` needs, loaded where it is given by name."""
    if isinstance(salience, TokenSignal):
        need, name = None, salience.name
    elif isinstance(salience, str):
        need, name = _known(salience), salience
    else:
        need, name = ("encoder", "minilm"), name_of(salience)
    if need is None:
        if isinstance(model, str | Path):
            raise PertokenError(f"{name} rates without a model: leave {str(model)!r} out")
        return Reader(None, tokenizer)
    kind, default = need
    from pertoken.loading import is_encoder, load, refuse_kind

    writes = kind == "decoder"  # what an encoder rates, a decoder can rate too
    if model is None or isinstance(model, str | Path):
        loaded, own = load(default if model is None else model, kind=kind if writes else None)
        return Reader(loaded, own if tokenizer is None else tokenizer)
    if writes and is_encoder(model.config):
        refuse_kind("the model", "encoder", name_of(model))
    if tokenizer is None:
        raise PertokenError("a model given as an object needs its tokenizer: tokenizer=…")
    if model.training:
        raise PertokenError("the model is in training mode (dropout): call model.eval() first")
    return Reader(model, tokenizer)


def _is_decoder(model: PreTrainedModel | None) -> bool:
    if model is None:
        return False
    from pertoken.loading import is_encoder

    return not is_encoder(model.config)


def _known(salience: str) -> tuple[Kind, str] | None:
    if salience not in SALIENCE:
        raise PertokenError(
            f"unknown salience {salience!r}{nearest(salience, SALIENCE)}: there are "
            f"{', '.join(SALIENCE)}"
        )
    return SALIENCE[salience]


def _checked(prompt: Messages) -> list[dict[str, str]]:
    from pertoken.conversation import check_messages

    rows = [(f"message {number}", row) for number, row in enumerate(prompt, 1)]
    return check_messages(rows, "the chat")


def _check_text(text: str) -> None:
    if not text.strip():
        raise PertokenError("the prompt is empty")
    check_utf8(text, "the prompt")


def _chat_tokens(tokenizer: Any, messages: list[dict[str, str]]) -> int | None:
    if tokenizer is None:
        return None
    if not getattr(tokenizer, "chat_template", None):
        return sum(count(tokenizer, message["content"]) or 0 for message in messages)
    return len(templated(tokenizer, messages, return_dict=True)["input_ids"])


def _with_notes(result: CompressedPrompt, notes: Sequence[str]) -> CompressedPrompt:
    from dataclasses import replace

    return replace(result, notes=tuple(notes))
