"""Self-consistency (arXiv 2203.11171): write several answers to a prompt, take the commonest.

It goes with any way of decoding that draws: transformers' own sampling, or a `custom_generate`
callable such as `CautiousDecoding`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pertoken._answers import number_in
from pertoken.errors import PertokenError
from pertoken.prompts import encode_prompt
from pertoken.result import Part, Result

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SelfConsistency", "majority", "self_consistency"]

_SHOWN = 60  # characters of a prompt in the table


def majority(answers: Sequence[str | None]) -> str | None:
    """The commonest answer, the first of those that are equally common; None does not vote.

    >>> majority(["7", None, "8", "8", "7"]), majority([None])
    ('7', None)
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


@dataclass(frozen=True)
class SelfConsistency(Result):
    """What was written to each prompt, and the answers that were found in it.

    texts, found: [prompts][draws]; `found` holds None where a text has no answer.
    """

    prompts: list[str]
    texts: list[list[str]]
    found: list[list[str | None]]

    _title = "Self-consistency"

    @property
    def answers(self) -> list[str | None]:
        """The answer of the majority to each prompt; None where no text has one."""
        return [majority(found) for found in self.found]

    @property
    def shares(self) -> list[float]:
        """Share of the texts of each prompt that give its answer."""
        return [
            found.count(answer) / len(found) if answer is not None else 0.0
            for found, answer in zip(self.found, self.answers, strict=True)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """A record per prompt: the answer, the share of texts that give it, and the votes."""
        lines = zip(self.prompts, self.answers, self.shares, self.found, strict=True)
        return [
            {
                "prompt": prompt,
                "answer": answer,
                "share": share,
                "votes": dict(Counter(one for one in found if one is not None)),
                "without_answer": found.count(None),
            }
            for prompt, answer, share, found in lines
        ]

    def to_dict(self) -> dict[str, Any]:
        """The `rows`, each with its texts."""
        rows = zip(self.rows(), self.texts, self.found, strict=True)
        return {"prompts": [{**row, "texts": texts, "found": found} for row, texts, found in rows]}

    def _parts(self) -> list[Part]:
        lines = [["prompt", "answer", "share", "others", "without answer"]]
        for row in self.rows():
            prompt = " ".join(row["prompt"].split())
            short = prompt if len(prompt) <= _SHOWN else prompt[: _SHOWN - 1] + "…"
            others = [
                f"{answer} x {count}"
                for answer, count in sorted(row["votes"].items(), key=lambda vote: -vote[1])
                if answer != row["answer"]
            ]
            answer = "-" if row["answer"] is None else row["answer"]
            lines.append(
                [
                    short,
                    answer,
                    f"{row['share']:.0%}",
                    ", ".join(others[:3]),
                    str(row["without_answer"]),
                ]
            )
        return [Part("", lines)]


def self_consistency(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str] | str,
    *,
    draws: int = 8,
    decoder: Any = None,
    answer: Callable[[str], str | None] = number_in,
    batch: int = 8,
    chat: bool = True,
    max_new_tokens: int = 256,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> SelfConsistency:
    """Write `draws` texts to each prompt and take the answer that most of them give.

    decoder: a `custom_generate` callable, None for transformers' own sampling.
    answer: finds the answer in a text, None where there is none; by default the last number,
        written in one way.
    batch: texts written at once. chat: use the tokenizer's chat template if it has one.
    options: further arguments of `generate`, such as ``temperature=0.7, top_p=0.9``.
    progress: called with (what, texts done, texts in all).

    The drawing starts from `seed`, and torch's generator is left as it was. Raises PertokenError
    for no prompt, numbers below 1, and a prompt that does not fit the model.

    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> model = tiny_model("llama", vocab_size=258)
    >>> found = self_consistency(model, ByteTokenizer(), "1 + 1 =", draws=3, max_new_tokens=5)
    >>> len(found.texts[0]), found.answers[0] == majority(found.found[0])
    (3, True)
    """
    import torch

    from pertoken.testing.setups import left_pad, pad_id

    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise PertokenError("there is no prompt to answer")
    for name, value in (("draws", draws), ("batch", batch), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise PertokenError(f"{name} must be 1 or more, got {value}")
    encoded = [encode_prompt(tokenizer, model, one, max_new_tokens, chat)[0] for one in prompts]
    rows = [ids for ids in encoded for _ in range(draws)]
    texts: list[str] = []
    run = {"do_sample": True, **options}
    if decoder is not None:
        run["custom_generate"] = decoder
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for place in range(0, len(rows), batch):
            if progress is not None:
                progress("writing", place, len(rows))
            ids, mask = left_pad(rows[place : place + batch], pad_id(model))
            out = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, **run)
            out = out if isinstance(out, torch.Tensor) else out.sequences
            texts += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    grouped = [texts[place : place + draws] for place in range(0, len(texts), draws)]
    return SelfConsistency(prompts, grouped, [[answer(text) for text in own] for own in grouped])
