"""Answers that a model samples itself, read and judged by the answer that is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pertoken._answers import answer_of, equivalent
from pertoken._replies import drawing, written
from pertoken.train.contrast import Sampled
from pertoken.train.critical_tokens import check_sampling
from pertoken.train.lessons import Lesson, prompt_ids

__all__ = ["judged", "sample_answers"]

Progress = Callable[[str, int, int], None]


def sample_answers(
    model: Any,
    tokenizer: Any,
    lessons: Sequence[Lesson],
    *,
    n: int = 64,
    temperature: float = 0.5,
    top_p: float = 0.95,
    max_new_tokens: int = 1024,
    batch: int = 64,
    chat: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[list[Sampled]]:
    """`n` sampled answers to the question of each lesson, for `contrast_data`.

    What an answer says is what it boxes, or its last number; it is right where the lesson's answer
    says the same (behind "####" where it has that, as in GSM8K). The defaults are the paper's; its
    temperature goes with the model, 0.5 is that of Llama-3-8B on GSM8K. chat: in the model's chat
    template. seed: of the sampling; torch's global generator is left as it was.
    """
    check_sampling(n, batch, temperature, top_p)
    prompts = [prompt_ids(one, tokenizer, chat=chat) for one in lessons for _ in range(n)]
    texts = [""] * len(prompts)
    done = 0
    with drawing(model, seed):
        for places, new in written(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            batch=batch,
            do_sample=True,
            top_k=0,
            top_p=top_p,
            temperature=temperature,
        ):
            for place, ids in zip(places, new, strict=True):
                texts[place] = str(tokenizer.decode(ids, skip_special_tokens=True))
            done += len(places)
            if progress is not None:
                progress("answers", done, len(prompts))
    return [
        [judged(text, lesson) for text in texts[number * n : (number + 1) * n]]
        for number, lesson in enumerate(lessons)
    ]


def judged(text: str, lesson: Lesson) -> Sampled:
    """What a text answers, and whether that is right: see `sample_answers`.

    >>> judged("2 and 2 is 4", Lesson("2+2=", "so\\n#### 4"))
    Sampled(text='2 and 2 is 4', answer='4', right=True)
    """
    behind = lesson.answer.rpartition("####")[2].strip()
    known = behind if "####" in lesson.answer else answer_of(behind) or behind
    said = answer_of(text)
    return Sampled(text, said or "", equivalent(said, known))
