"""Greedy answers with the raw log-probability of every token, from a model or an endpoint.

Raw means: of the model's own logits, before any temperature or penalty. The token that ends an
answer counts too, be it the end-of-text token or the one that completes a stop text; of an answer
cut at its length limit there is none. An endpoint reports the tokens that its server counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pertoken._blocks import Blocks
from pertoken.conversation import stop_ids
from pertoken.decode.forward import TextForward
from pertoken.endpoint import Endpoint
from pertoken.errors import PertokenError
from pertoken.prompts import encode_prompt

__all__ = ["Answer", "early_states", "endpoint_answers", "greedy_answers"]

Progress = Callable[[str, int, int], None]

_RECENT = 16  # tokens in which a stop text is looked for


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    logprobs: natural, one per token, () where none were asked for. state: the model's last layer,
    the mean over the places that wrote the tokens, [hidden]; () where it was not asked for.
    """

    text: str
    logprobs: tuple[float, ...] = ()
    state: tuple[float, ...] = ()


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    chat: bool = True,
    batch: int = 8,
    states: bool = False,
    progress: Progress | None = None,
) -> list[Answer]:
    """The answers of a model of transformers, in the prompts' order.

    stop: texts that end an answer; the first of them and what follows is cut off. chat: in the
    chat template, if there is one. batch: prompts at once, of like length. states: also `state`.

    Raises PertokenError, before the first answer, for prompts that are empty or do not fit.

    >>> from pertoken.testing import ByteTokenizer, MockModel
    >>> table = torch.full((258, 258), 0.5 / 257)
    >>> table[:, 1] = 0.5  # whatever was said, the text ends
    >>> model = MockModel(table / table.sum(-1, keepdim=True))
    >>> model.generation_config.eos_token_id = 1
    >>> [answer] = greedy_answers(model, ByteTokenizer(), ["Hello"], max_new_tokens=3)
    >>> answer.text, [round(each, 3) for each in answer.logprobs]
    ('', [-0.693])
    """
    rows = [encode_prompt(tokenizer, model, text, max_new_tokens, chat)[0] for text in prompts]
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    found: dict[int, Answer] = {}
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        writing = _Writing(model, tokenizer, max_new_tokens, stop, states)
        found |= zip(places, writing.answers([rows[place] for place in places]), strict=True)
        if progress is not None:
            progress("answers", len(found), len(order))
    return [found[place] for place in range(len(rows))]


class _Writing:
    """One batch of answers."""

    def __init__(
        self, model: Any, tokenizer: Any, most: int, stop: Sequence[str], states: bool
    ) -> None:
        self._model, self._tokenizer, self._most = model, tokenizer, most
        self._stop = tuple(stop)
        self._ends = stop_ids(model)
        self._states = states

    def answers(self, rows: Sequence[torch.Tensor]) -> list[Answer]:
        """The answers to prompts [time], in their order."""
        width = max(len(row) for row in rows)
        ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
        mask = torch.stack([(torch.arange(width) >= width - len(row)).long() for row in rows])
        mask = mask.to(ids.device)
        written: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        sums: list[Any] = [0.0] * len(rows)
        forward, going = TextForward(self._model), list(range(len(rows)))
        for _ in range(self._most):
            logits, states = self._step(forward, ids, mask)
            best, tokens = logits.max(-1)
            chances = (best - logits.logsumexp(-1)).tolist()
            for place, row in enumerate(going):
                written[row].append(int(tokens[place]))
                logprobs[row].append(min(chances[place], 0.0))
                if states is not None:
                    sums[row] = sums[row] + states[place]
            kept = [place for place, row in enumerate(going) if not self._ended(written[row])]
            if not kept:
                break
            if len(kept) < len(going):
                going = [going[place] for place in kept]
                forward.select(torch.tensor(kept, device=ids.device))
            ids = torch.cat((ids[kept], tokens[kept, None]), -1)
            mask = torch.cat((mask[kept], mask.new_ones(len(kept), 1)), -1)
        return [
            Answer(
                self._text(written[row]),
                tuple(logprobs[row]),
                tuple((sums[row] / len(written[row])).tolist()) if self._states else (),
            )
            for row in range(len(rows))
        ]

    def _step(
        self, forward: TextForward, ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits [batch, vocab] behind the texts, and what the head read, [batch, hidden]."""
        if not self._states:
            return forward(ids, mask), None
        seen: list[torch.Tensor] = []

        def note(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            seen.append(given[0][:, -1].double())

        with self._model.get_output_embeddings().register_forward_pre_hook(note):
            logits = forward(ids, mask)
        return logits, seen[0]

    def _ended(self, written: Sequence[int]) -> bool:
        if written[-1] in self._ends:
            return True
        if not self._stop:
            return False
        recent = self._tokenizer.decode(written[-_RECENT:], skip_special_tokens=True)
        return any(stop in recent for stop in self._stop)

    def _text(self, written: Sequence[int]) -> str:
        return _cut(str(self._tokenizer.decode(written, skip_special_tokens=True)), self._stop)


def _cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first stop text.

    >>> _cut("yes\\nno. no", [".", "\\n"])
    'yes'
    """
    for each in stop:
        text = text.partition(each)[0]
    return text


def endpoint_answers(
    endpoint: Endpoint,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    logprobs: bool = True,
    threads: int = 4,
    progress: Progress | None = None,
) -> list[Answer]:
    """The answers of an endpoint, each prompt a message of the user; errors as of `Endpoint`."""
    replies = endpoint.replies(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        max_new_tokens=max_new_tokens,
        logprobs=logprobs,
        stop=stop,
        threads=threads,
        progress=progress,
    )
    return [Answer(_cut(each.text, stop), each.logprobs or ()) for each in replies]


class _Reached(Exception):
    """Ends a forward at a block."""


@torch.no_grad()
def early_states(
    model: Any, tokenizer: Any, prompts: Sequence[str], layer: int, *, chat: bool = True
) -> list[tuple[float, ...]]:
    """The output of block `layer`, the mean over the prompt's tokens, [hidden] of each prompt.

    The blocks behind it do not run: this costs (layer + 1) / blocks of reading the prompt.

    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> len(early_states(tiny_model("gemma3", vocab_size=258), ByteTokenizer(), ["Hi"], 0)[0])
    32
    """

    def stop(_: Any, __: Any, output: Any) -> None:
        raise _Reached(output[0] if isinstance(output, tuple) else output)

    decoder, found = model.get_decoder(), []
    with Blocks(model).modules[layer].register_forward_hook(stop):
        for prompt in prompts:
            ids = encode_prompt(tokenizer, model, prompt, 0, chat)
            try:
                decoder(input_ids=ids, use_cache=False)
            except _Reached as reached:
                found.append(tuple(reached.args[0][0].double().mean(0).tolist()))
    if len(found) < len(prompts):
        raise PertokenError(f"{type(model).__name__} never ran its block {layer}")
    return found
