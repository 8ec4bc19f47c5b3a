"""Does a model that replaces a word replace the text, or only the tokens?

"Say Anything but This" (arXiv 2601.14658). Words of a text are marked, and the model is asked to
replace each by another and to leave the rest. The ids that it writes are kept as they are, since
decoding and encoding again would destroy the evidence. In a target's place a reply has

* *unchanged*: the ids of the text;
* *replaced*: other text;
* *different*: other ids with the same text, white space around it aside. That is a phantom edit.

What can't be found in a reply is *unparsed*, and shares are of the others; so is the same word
behind another mark, such as a quote, which has other tokens for that (our reading). A reply that
keeps the brackets is compared with the tokens that the target has between brackets, others with
those that it has in the plain text (our reading: else every copied target in brackets were a
phantom edit). The wording of the question is ours, in `INSTRUCTION`; sampling is the paper's.
Phantom edits are told apart by `_artifacts`; the paper's intervention is `SurfaceMask`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor

from pertoken._replies import drawing, written
from pertoken.conversation import first_turn
from pertoken.errors import PertokenError
from pertoken.probe._artifacts import artifact
from pertoken.probe._consistency_report import ConsistencyReport, Reply, Trial
from pertoken.probe._marked import Marked, Slot, mark, slots
from pertoken.probe._stream import Progress, refuse_unfit
from pertoken.probe.surface_mask import SurfaceMask
from pertoken.prompts import positions
from pertoken.tokenize.ways import noncanonical_share, spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["INSTRUCTION", "ConsistencyReport", "token_consistency"]

INSTRUCTION = """Write each text again. Replace the words in brackets by other words that fit, and \
leave all others as they are.

Text: She put the keys on the [table] and left.
New text: She put the keys on the desk and left.

Text: Most of them were very [happy] with the [results] of the election.
New text: Most of them were very pleased with the outcome of the election.

Text: In 1950 the [company] moved its offices to Ohio.
New text: In 1950 the firm moved its offices to Ohio.

Text: {text}
New text:"""
"""What is asked; {text} has its targets in brackets."""

SAMPLING = {"top_p": 0.9, "top_k": 50, "temperature": 1.0}
"""The paper's."""


class _Nucleus(LogitsProcessor):
    """Top-k, then top-p among these, as transformers' own: that one sorts the whole vocabulary at
    every step, which takes most of the time of a small model."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        best, tokens = scores.topk(min(int(SAMPLING["top_k"]), scores.shape[-1]))
        chances = best.softmax(-1)
        before = chances.cumsum(-1) - chances
        kept = best.masked_fill(before >= SAMPLING["top_p"], -torch.inf)
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens, kept)


def token_consistency(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    share: float = 0.05,
    mask: bool = False,
    chat: bool | None = None,
    max_new_tokens: int | None = None,
    batch: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> ConsistencyReport:
    """Ask a model to replace marked words and see what it does to their tokens.

    texts: words in [brackets] are the targets; of a text without any, `share` of the words that
        are no stop words are drawn, at least one. The paper has articles of 100 to 600 words.
    mask: ask everything again with `SurfaceMask`, the paper's intervention.
    chat: ask through the chat template; by default where the tokenizer has one. Else the model goes
        on with the question, and what it writes behind a blank line is not looked at.
    max_new_tokens: of each reply; by default a quarter more than the text has.
    batch: texts at once. What is drawn depends on it, and on `seed`; torch's generator is left as
        it was.
    Raises PertokenError for a text that has no target, a tokenizer without a byte view, a text that
    does not fit the model's positions.

    >>> from pertoken.testing import tiny_model, tiny_tokenizer
    >>> tokenizer = tiny_tokenizer()
    >>> model = tiny_model("llama", vocab_size=len(tokenizer), max_positions=1024)
    >>> found = token_consistency(model, tokenizer, ["the cat [sat] on the mat"])
    >>> found.trials[0].target, found.trials[0].outcome  # a random model writes no text again
    ('sat', 'unparsed')
    """
    refuse_unfit(model)
    if not 0 < share <= 1:
        raise PertokenError(f"share must be above 0 and at most 1, got {share}")
    if batch < 1 or (max_new_tokens is not None and max_new_tokens < 1):
        raise PertokenError("batch and max_new_tokens must be 1 or more")
    if not texts:
        raise PertokenError("there is no text: give at least one")
    marked = [mark(text, share, seed, f"text {place}") for place, text in enumerate(texts, 1)]
    chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    if chat and not getattr(tokenizer, "chat_template", None):
        raise PertokenError("the tokenizer has no chat template: leave chat=True off")
    asked = [INSTRUCTION.format(text=each.marked) for each in marked]
    prompts = [
        first_turn(tokenizer, each) if chat else list(tokenizer(each)["input_ids"])
        for each in asked
    ]
    lengths = [len(tokenizer.encode(each.text, add_special_tokens=False)) for each in marked]
    most = [max_new_tokens or n + n // 4 + 8 for n in lengths]
    _refuse_long(model, prompts, most)
    surface = SurfaceMask(tokenizer, texts=[each.marked for each in marked], prompt_length=0)
    trials: list[Trial] = []
    replies: list[Reply] = []
    for masked in (False, True) if mask else (False,):
        found = _sampled(model, prompts, most, surface if masked else None, batch, seed, progress)
        for place, each in enumerate(marked):
            reply, own = _judge(tokenizer, place, each, found[place], masked, chat)
            replies.append(reply)
            trials += own
    settings = {
        "texts": len(texts),
        "share": share,
        "batch": batch,
        "seed": seed,
        **SAMPLING,
        "chat": chat,
        "first_prompt": tokenizer.decode(prompts[0]),
    }
    return ConsistencyReport(trials, replies, settings)


def _sampled(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    most: Sequence[int],
    surface: SurfaceMask | None,
    batch: int,
    seed: int,
    progress: Progress | None,
) -> dict[int, list[int]]:
    """The new ids of each prompt, drawn as in the paper."""
    found: dict[int, list[int]] = {}
    what = "texts" if surface is None else "texts with the mask"
    with drawing(model, seed):
        for places, new in written(
            model,
            prompts,
            max_new_tokens=most,
            batch=batch,
            processors=lambda rows, width: [
                *([] if surface is None else [surface.of_rows(rows, width)]),
                _Nucleus(),
            ],
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
        ):
            found |= dict(zip(places, new, strict=True))
            if progress is not None:
                progress(what, len(found), len(prompts))
    return found


def _refuse_long(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], most: Sequence[int]
) -> None:
    room = positions(model)
    for place, (prompt, new) in enumerate(zip(prompts, most, strict=True), 1):
        if room is not None and len(prompt) + new > room:
            raise PertokenError(
                f"text {place} takes {len(prompt)} tokens to ask for and {new} to write, which "
                f"does not fit the model's {room} positions: shorten it"
            )


def _judge(
    tokenizer: Any, place: int, marked: Marked, ids: list[int], masked: bool, chat: bool
) -> tuple[Reply, list[Trial]]:
    """A reply, and what it did to each target of its text."""
    text = tokenizer.decode(ids)
    whole = len(text) if chat or "\n\n" in marked.text else _end_of_paragraph(text)
    found, changed = slots(marked, text[:whole])
    sides = {
        False: _Tokens(tokenizer, marked.text),
        True: _Tokens(tokenizer, marked.marked),
        None: _Tokens(tokenizer, text, ids),
    }
    trials = []
    for number, slot in enumerate(found):
        target = marked.word(number)
        if slot is None:
            trials.append(Trial(place, target, masked, "unparsed"))
            continue
        start = marked.targets[number][0] + (2 * number + 1 if slot.bracketed else 0)
        before = sides[slot.bracketed].of(start, start + len(target))
        after = sides[None].of(slot.start, slot.end)
        given = marked.marked if slot.bracketed else marked.text
        if slot.text == target and _behind(given, start) != _behind(text, slot.start):
            trials.append(Trial(place, target, masked, "unparsed"))
            continue
        outcome, kind = _outcome(marked, number, slot, before, after)
        trials.append(
            Trial(place, target, masked, outcome, kind, slot.text, slot.bracketed, *before, *after)
        )
    reply = Reply(place, masked, ids, text, changed, noncanonical_share(ids, tokenizer))
    return reply, trials


def _end_of_paragraph(text: str) -> int:
    """Where a blank line follows the first one with any text."""
    start = len(text) - len(text.lstrip())
    end = text.find("\n\n", start)
    return len(text) if end < 0 else end


def _behind(text: str, start: int) -> str:
    """What stands right before a place, white space left out.

    >>> _behind("a (b", 3), _behind("a b", 2)
    ('(', '')
    """
    return text[max(0, start - 1) : start].strip()


_Found = tuple[list[int], list[str]]


def _outcome(
    marked: Marked, number: int, slot: Slot, before: _Found, after: _Found
) -> tuple[str, str | None]:
    """What became of a target, and the kind of a phantom edit."""
    if slot.text != marked.word(number):
        return "replaced", None
    if before[0] == after[0]:
        return "unchanged", None
    start = marked.starts_sentence(number)
    return "different", artifact(before[1], after[1], sentence_start=start)


class _Tokens:
    """The ids of a text, and those that write a word of it; encoded when it is first asked."""

    def __init__(self, tokenizer: Any, text: str, ids: list[int] | None = None) -> None:
        self._tokenizer, self._text, self._ids = tokenizer, text, ids
        self._spans: list[tuple[int, int]] | None = None

    def of(self, start: int, end: int) -> _Found:
        """Ids and pieces that write the characters, with white space in tokens before them."""
        if self._ids is None:
            self._ids = list(self._tokenizer.encode(self._text, add_special_tokens=False))
        if self._spans is None:
            self._spans = spans(self._ids, self._tokenizer)
        inside = [
            place
            for place, (first, last) in enumerate(self._spans)
            if first < end and (last > start or first == last >= start)
        ]
        first = inside[0]
        while first and self._piece(first - 1).isspace():
            first -= 1
        chosen = range(first, inside[-1] + 1)
        return [self._ids[place] for place in chosen], [self._piece(place) for place in chosen]

    def _piece(self, place: int) -> str:
        assert self._spans is not None
        start, end = self._spans[place]
        return self._text[start:end]
