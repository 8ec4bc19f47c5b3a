"""What is asked of a model: which tokens of a prompt led to the tokens behind it.

A `Question` holds one text as ids, prompt and target together. The target token at place t is
explained by all tokens before it; methods give a value for each of these, and the values of the
prompt's own tokens are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pertoken._pieces import pieces, special_ids
from pertoken.conversation import templated
from pertoken.errors import PertokenError
from pertoken.loading import is_encoder
from pertoken.prompts import check_ids, check_utf8, positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Span = tuple[int, int]
Prompt = str | Sequence[dict[str, str]]
"""A text, or the messages of a chat ({"role": …, "content": …})."""


def _silent(done: int, total: int) -> None:
    pass


@dataclass(frozen=True, eq=False)
class Question:
    """Which tokens led to `ids[prompt:]`?

    ids: [time], prompt and target, on the model's device.
    prompt: number of the prompt's tokens.
    free: bool [time], tokens that a method may replace: no special tokens, no part of a chat
        template. The others are protected.
    text: the prompt as the user wrote it (of a chat: its messages, one under the other).
    spans: for each token of the prompt its characters in `text`; None for one that is not the
        user's (a special token, a part of the chat template).
    targets: the text of each target token.
    progress: called with (done, total) while a method works.
    """

    model: PreTrainedModel
    tokenizer: Any
    ids: torch.Tensor
    prompt: int
    free: torch.Tensor
    text: str
    spans: tuple[Span | None, ...]
    targets: tuple[str, ...]
    progress: Callable[[int, int], None] = field(default=_silent)

    @property
    def places(self) -> range:
        """The place of each target token; what is before it explains it."""
        return range(self.prompt, len(self.ids))

    @property
    def shown(self) -> list[int]:
        """The places of the prompt's own tokens."""
        return [place for place, span in enumerate(self.spans) if span is not None]


def ask(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: Prompt,
    target: str | int | None = None,
) -> Question:
    """The question for a prompt and a target.

    target: a text that follows the prompt; or a number of tokens, which the model writes itself
        (greedily); None for one.
    Raises PertokenError for an empty prompt or target, a tokenizer of another model, a model that
    predicts no next token, an encoder-decoder model, a chat without a chat template or that the
    template refuses, and a text longer than the model's positions.

    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> question = ask(tiny_model("llama", vocab_size=258), ByteTokenizer(), "two", " x")
    >>> question.ids.tolist(), question.prompt, question.targets
    ([118, 121, 113, 34, 122], 3, (' ', 'x'))
    """
    _refuse_kind(model)
    text, written = _written(tokenizer, prompt)
    ids, offsets, bare = _encode(tokenizer, text, special=isinstance(prompt, str))
    if not ids:
        raise PertokenError("the prompt is empty: the tokenizer makes no token of it")
    check_ids(model, ids)
    if model.training:
        raise PertokenError("the model is in training mode (dropout): call model.eval() first")
    if isinstance(target, str):
        after = _continuation(tokenizer, text, target, ids, special=isinstance(prompt, str))
    else:
        count = 1 if target is None else target
        if count < 1:
            raise PertokenError(f"the number of target tokens must be 1 or more, got {count}")
        _check_room(model, len(ids) + count)
        after = _greedy(model, ids, count)
    _check_room(model, len(ids) + len(after))
    check_ids(model, after)
    if written is None:
        own_text, spans = text, _given(offsets, bare)
    else:
        own_text, spans = _own(text, written, offsets, bare)
    special = special_ids(tokenizer)
    free = [span is not None and i not in special for i, span in zip(ids, spans, strict=True)]
    free += [token not in special for token in after]
    if not any(free[: len(ids)]):
        raise PertokenError("the prompt holds nothing but special tokens: there is nothing to rate")
    return Question(
        model,
        tokenizer,
        torch.tensor(ids + after, device=model.device),
        len(ids),
        torch.tensor(free, device=model.device),
        own_text,
        tuple(spans),
        tuple(_shown(tokenizer, ids, after)),
    )


def _refuse_kind(model: PreTrainedModel) -> None:
    """Refuse a model that predicts no next token."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise PertokenError(
            f"{name} is an encoder-decoder model; attribution here explains decoder-only models"
        )
    if is_encoder(model.config):
        raise PertokenError(
            f"{name} is an encoder, and attribution here explains next tokens: use "
            "pertoken.attribute.decompx.decompx or pertoken.attribute.globenc.globenc"
        )
    if not model.can_generate():
        raise PertokenError(f"{name} predicts no next token: load it with a language model's head")


def _written(tokenizer: Any, prompt: Prompt) -> tuple[str, list[tuple[str, Span]] | None]:
    """The text that is tokenized, and for a chat each message with its place in it."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PertokenError("the prompt is empty")
        check_utf8(prompt, "the prompt")
        return prompt, None
    messages = list(prompt)
    contents = [
        message.get("content")
        for message in messages
        if isinstance(message, dict) and isinstance(message.get("role"), str)
    ]
    if not messages or len(contents) < len(messages):
        raise PertokenError('a chat is a list of {"role": …, "content": …}, and not empty')
    texts = [content for content in contents if isinstance(content, str) and content.strip()]
    if len(texts) < len(messages):
        raise PertokenError("a message of the chat is empty, or is not text")
    for content in texts:
        check_utf8(content, "a message")
    if not getattr(tokenizer, "chat_template", None):
        raise PertokenError("the tokenizer has no chat template: give the prompt as a text")
    rendered = str(templated(tokenizer, messages, reply=True, tokenize=False))
    # The same words may stand in the template: marks in their place tell where the contents are.
    marks = [f"\ue000{number}\ue001" for number in range(len(messages))]
    marked = [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]
    frame = str(templated(tokenizer, marked, reply=True, tokenize=False))
    places = _places(rendered, texts, marks, frame)
    return rendered, list(zip(texts, places, strict=True))


def _places(text: str, contents: list[str], marks: list[str], marked: str) -> list[Span]:
    """Where contents stand in `text`; `marked`: the same text with marks in place of contents.

    >>> _places("[user: user]", ["user"], ["*"], "[user: *]")
    [(7, 11)]
    """
    between, rest = [], marked
    for mark in marks:
        before, _, rest = rest.partition(mark)
        between.append(before)
    end, found = len(between[0]), []
    for content, behind in zip(contents, [*between[1:], rest], strict=True):
        # Templates may strip messages.
        forms = (content, content.strip(), content.lstrip(), content.rstrip())
        form = next((form for form in forms if text.startswith(form + behind, end)), None)
        if form is None:
            break
        found.append((end, end + len(form)))
        end += len(form + behind)
    if len(found) < len(contents) or end < len(text) or not text.startswith(between[0]):
        raise PertokenError(
            "the chat template rewrites the messages, so that tokens cannot be tied to them: "
            "render it yourself and give the prompt as a text"
        )
    return found


def _encode(tokenizer: Any, text: str, special: bool) -> tuple[list[int], list[Span], list[bool]]:
    """Ids, the characters of each, and whether it stands for none of the text.

    A token that is the beginning of a character leaves that to the last token of it, and is part of
    the text all the same. special: with the tokens the tokenizer puts around a text.
    """
    if getattr(tokenizer, "is_fast", False):
        given = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        bare = [start == end for start, end in given["offset_mapping"]]
        return list(given["input_ids"]), _in_order(given["offset_mapping"], text), bare
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    ends, end = [], 0
    for piece in pieces(tokenizer, ids):
        end = min(end + len(piece), len(text))
        ends.append(end)
    added = special_ids(tokenizer)
    return ids, list(zip([0, *ends[:-1]], ends, strict=True)), [each in added for each in ids]


def _in_order(offsets: Sequence[Span], text: str) -> list[Span]:
    """Offsets that do not overlap and leave no blank out.

    Tokens that share a character leave it to the last of them; a blank that no token covers
    belongs to the token behind it.
    """
    spans = [(int(start), int(end)) for start, end in offsets]
    following = len(text)
    for index in range(len(spans) - 1, -1, -1):
        start, end = spans[index]
        if start == end == 0:  # a token the tokenizer added: it stands nowhere in the text
            continue
        end = min(end, following)
        following = min(start, end)
        spans[index] = (following, end)
    last = 0
    for index, (start, end) in enumerate(spans):
        if start < end or start > last:
            start = last if not text[last:start].strip() else start
            spans[index] = (start, end)
        else:
            spans[index] = (last, last)
        last = max(last, spans[index][1])
    return spans


def _given(offsets: list[Span], bare: list[bool]) -> list[Span | None]:
    """None for tokens that stand nowhere at the ends of the text: the tokenizer added them."""
    reach = max((end for _, end in offsets), default=0)
    found: list[Span | None] = []
    for (start, end), nowhere in zip(offsets, bare, strict=True):
        added = nowhere and start == end and start in (0, reach)
        found.append(None if added else (start, end))
    return found


def _own(
    text: str, written: list[tuple[str, Span]], offsets: list[Span], bare: list[bool]
) -> tuple[str, list[Span | None]]:
    """The messages, and where each token of the rendered text stands in them; None for others."""
    places: list[tuple[int, int, int]] = []  # begin and end in the rendered text, begin in ours
    begin = 0
    for content, (low, high) in written:
        places.append((low, high, begin + content.index(text[low:high])))
        begin += len(content) + 1
    spans: list[Span | None] = []
    last = 0
    for (start, end), nowhere in zip(offsets, bare, strict=True):
        span = None
        for low, high, ours in places:
            first, after = max(start, low), min(end, high)
            # A token that begins before a message and reaches into it is the user's for its part;
            # one that ends inside a character has no text of its own.
            inside = low <= start == end < high and not (nowhere and start == low)
            if first < after or inside:
                # Blanks between two messages belong to the token behind them.
                span = (last, ours + after - low)
                last = span[1]
                break
        spans.append(span)
    return "\n".join(content for content, _ in written), spans


def _continuation(
    tokenizer: Any, text: str, target: str, ids: list[int], special: bool
) -> list[int]:
    """Ids of the target as they follow the prompt."""
    if not target:
        raise PertokenError("the target is empty")
    check_utf8(target, "the target")
    joint = _encode(tokenizer, text + target, special)[0]
    if joint[: len(ids)] == ids and len(joint) > len(ids):
        return joint[len(ids) :]
    # The tokenizer would join the two texts; the prompt's tokens are the question, so they stay.
    alone = _encode(tokenizer, target, special=False)[0]
    if not alone:
        raise PertokenError("the target is empty: the tokenizer makes no token of it")
    return alone


@torch.no_grad()
def _greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    """The next `count` tokens the model writes, fewer where it ends the text."""
    prompt = torch.tensor([ids], device=model.device)
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False
    )
    return list(written[0, len(ids) :].tolist())


def _check_room(model: PreTrainedModel, count: int) -> None:
    room = positions(model)
    if room is not None and count > room:
        raise PertokenError(
            f"prompt and target are {count} tokens, more than the model's {room} positions; "
            "shorten the prompt"
        )


def _shown(tokenizer: Any, ids: list[int], after: list[int]) -> list[str]:
    return pieces(tokenizer, ids + after)[len(ids) :]
