"""Text under a constraint, one token at a time: as a mask, and faster as speculation.

*Token masking* (locally constrained decoding) gives every token that the constraint refuses the
logit -inf and decodes as usual. `ConstraintMask` does that in transformers' own loop. `Constrained`
writes the same text with a drafter: every node of the token tree is chosen under the mask of its
own prefix, drafts that the constraint refuses are cut before the pass that verifies the others, and
tokens that the constraint forces are drafted without a guess. (Ours; the loop is that of
`speculative.py`.)

A constraint answers on the new tokens, without the prompt, by two methods and up to three more (see
`pertoken.decode.constraint`; those of `pertoken.decode.grammar` have them all):

* ``accepts(ids)``: may an allowed text begin like this; ``complete(ids)``: is it one, so that a
  stop id may follow.
* ``allowed(ids)``: bool tensor [vocab], every ordinary token that may follow. Without it tokens are
  asked one by one, the most probable first, until one is accepted.
* ``accepts_each(ids, tokens)``: list of bools, ``accepts`` for several next tokens at once.
* ``forced(ids)``: list of tokens of text that must follow, one behind the other; [] if none. They
  are drafts like others, so it does no harm where the text may be cut into other tokens too.

Masking draws from the wrong distribution over whole texts, because it never looks ahead; where that
matters take `AWRS` and `smc`, which weigh their texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor

from pertoken._shown import Shown
from pertoken.decode._rule import Rule
from pertoken.decode.constraint import ask
from pertoken.decode.drafter import Drafter
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pertoken.decode.constraint import Constraint
    from pertoken.decode.stats import DecodeStats, RowTrace


class Constrained(Shown):
    """Speculative decoding under a constraint: ``custom_generate=Constrained(Goose(), schema)``.

    Args:
        drafter: any drafter; with `Plain()` the forced tokens alone are drafted.
        constraint: an object with ``accepts(ids)`` and ``complete(ids)``, see the module. A stop
            id may follow where the text is complete, and only there.

    Greedy text is that of `ConstraintMask` in plain `generate`, token by token; sampled text has
    the same distribution. Other logits processors work as there: penalties before the mask,
    temperature, top-k and top-p behind it. Where the constraint has no ``allowed``, sampling with
    top-k or top-p is refused (top-k is 50 unless you pass ``top_k=0``).

    `stats` and `rows` are those of the drafter; forced tokens count there as source ``"forced"``.

    Raises PertokenError, in one line, for a constraint that is none, raises or gives a wrong type,
    and where nothing may follow.

    >>> from pertoken.decode import Plain
    >>> from pertoken.testing import MockModel
    >>> class Count:                                 # 1 2 3, then stop (0)
    ...     def accepts(self, ids): return ids == [1, 2, 3][: len(ids)]
    ...     def complete(self, ids): return len(ids) == 3
    ...     def forced(self, ids): return [1, 2, 3][len(ids) :]
    >>> model = MockModel([[0.4, 0.3, 0.2, 0.1]] * 4)
    >>> count = Constrained(Plain(), Count())
    >>> model.generate(torch.tensor([[3]]), do_sample=False, max_new_tokens=9, eos_token_id=0,
    ...                custom_generate=count).tolist()
    [[3, 1, 2, 3, 0]]
    >>> count.stats.forwards, count.stats.accepted["forced"]
    (1, 2)
    """

    def __init__(self, drafter: Drafter, constraint: Constraint) -> None:
        if not isinstance(drafter, Drafter):
            raise PertokenError(
                f"Constrained takes a drafter such as Goose() or Plain(), not "
                f"{type(drafter).__name__}"
            )
        Rule(constraint, ())  # refuses what is no constraint
        self.drafter = drafter
        self.constraint = constraint

    @property
    def stats(self) -> DecodeStats:
        """Counts of the last call."""
        return self.drafter.stats

    @property
    def rows(self) -> list[RowTrace]:
        """Where the tokens of each row came from."""
        return self.drafter.rows

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        *,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by `model.generate(..., custom_generate=self)`; returns what generate returns."""
        from pertoken.decode.speculative import speculate

        return speculate(
            self.drafter,
            model,
            input_ids,
            constraint=self.constraint,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            **model_kwargs,
        )


class ConstraintMask(Shown, LogitsProcessor):
    """Token masking in transformers' own loop: ``logits_processor=[ConstraintMask(c, stop_ids)]``.

    Args:
        constraint: see the module. Without ``allowed`` the whole vocabulary is asked in every
            step, which is slow; `Constrained` and `AWRS` ask few tokens.
        stop_ids: the stop ids of the call, such as ``model.generation_config.eos_token_id``. They
            may follow where the text is complete.
        prompt_length: tokens of the (padded) prompt. By default the width of the first call; a
            call with other prompts starts a new text.

    Rows that hold a stop id are left alone, and so are those whose text the constraint refuses
    already: drafts that will be rejected, texts that were given up. Raises PertokenError where
    nothing may follow an allowed text.

    >>> class Even:
    ...     def accepts(self, ids): return all(token % 2 == 0 for token in ids)
    ...     def complete(self, ids): return len(ids) > 0
    >>> mask = ConstraintMask(Even(), stop_ids=3)
    >>> mask(torch.tensor([[1]]), torch.zeros(1, 4)).tolist()
    [[0.0, -inf, 0.0, -inf]]
    >>> mask(torch.tensor([[1, 2]]), torch.zeros(1, 4)).tolist()
    [[0.0, -inf, 0.0, 0.0]]
    """

    def __init__(
        self,
        constraint: Constraint,
        stop_ids: int | Sequence[int] | None,
        *,
        prompt_length: int | None = None,
    ) -> None:
        self.constraint, self.stop_ids, self.prompt_length = constraint, stop_ids, prompt_length
        if stop_ids is None:
            stop_ids = ()
        self._rule = Rule(constraint, [stop_ids] if isinstance(stop_ids, int) else stop_ids)
        self._prompt = torch.empty(0, 0, dtype=torch.long)  # [batch, time] of the first call
        self._shown: set[int] = set()  # hashes of all texts since

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [batch, vocab] with -inf for all that may not follow; input_ids: [batch, time]."""
        new = input_ids[:, self._start(input_ids) :].tolist()
        rows = [self._masked(ids, row) for ids, row in zip(new, scores, strict=True)]
        return torch.stack(rows)

    def _start(self, input_ids: torch.Tensor) -> int:
        """Where the new tokens begin."""
        if self.prompt_length is not None:
            return self.prompt_length
        width, length = input_ids.shape[1], self._prompt.shape[1]
        texts = [tuple(row) for row in input_ids.tolist()]
        # A drafter shows the rows of the batch one by one, beam search in another order.
        if width <= length or not _among(input_ids[:, :length], self._prompt):
            self._prompt, self._shown = input_ids.clone(), set()
        elif self._shown.isdisjoint(hash(text[:-1]) for text in texts):
            raise PertokenError(
                f"a ConstraintMask was shown {width} tokens that begin with an earlier prompt and "
                "do not go on where it was; pass prompt_length=, or take a new one for every call"
            )
        self._shown.update(map(hash, texts))
        return self._prompt.shape[1]

    def _masked(self, ids: list[int], scores: torch.Tensor) -> torch.Tensor:
        """Scores [vocab] of one row, of which `ids` are the new tokens."""
        if self._rule.ended(ids):
            return scores
        try:
            return self._rule.masked(ids, scores)
        except PertokenError:
            if not ids or ask(self._rule.constraint.accepts, ids):
                raise
            return scores  # asked last: an allowed text is the usual case


def _among(ids: torch.Tensor, prompts: torch.Tensor) -> bool:
    """Whether every row of ids [rows, time] is one of the prompts [batch, time]."""
    return bool((ids[:, None] == prompts).all(-1).any(-1).all())
