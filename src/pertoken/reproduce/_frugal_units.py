"""What a model makes of an item of FrugalPrompt's reproduction in all its compressed forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pertoken._replies import written
from pertoken.reproduce._frugal_classifier import Classifier
from pertoken.reproduce._frugal_tasks import Item, rouge_1

__all__ = ["Unit", "classified", "measured"]

TOGETHER = 8  # texts written at once
MOST = 2 * math.log(2)  # of a mail's loss, nats: no mail takes more than a mail can give

Unit = dict[str, Any]
Ids = list[int]


def classified(classifier: Classifier, item: Item, bodies: dict[str, list[str]]) -> Unit:
    """Losses of a mail's label; without the mail both labels are as likely."""
    label = item.choices.index(item.answer)
    found: Unit = {"empty": math.log(2)}
    for name, texts in {"full": [item.body], **bodies}.items():
        found[name] = []
        for text in texts:
            loss = classifier.loss(text, label)
            form = {"loss": min(loss, MOST), "solved": float(loss < math.log(2))}
            found[name].append(form | {"tokens": len(classifier.ids(text))})
    return found


def measured(
    model: Any, tokenizer: Any, item: Item, bodies: dict[str, list[str]], tokens: int
) -> Unit | None:
    """Losses of the answer behind every form of the prompt, and whether the task is solved.

    None where the model itself is to write the answer and has written nothing.
    """
    forms = {"full": [item.body], **bodies}
    prompts = {body: item.prompt(body) for texts in forms.values() for body in texts}
    before = {body: tokenizer(prompt)["input_ids"] for body, prompt in prompts.items()}
    said: dict[str, Ids] = {}
    if item.answer:
        answers = [_ids(tokenizer, each) for each in item.choices or [item.answer]]
    else:  # what the model itself says to the whole prompt
        replies = _write(model, tokenizer, list(before.values()), tokens)
        said = dict(zip(before, replies, strict=True))
        answers = [said[item.body]]
        if not answers[0]:
            return None
    right = item.choices.index(item.answer) if item.choices else 0
    found: Unit = {
        "empty": _loss(model, tokenizer(item.prompt(""))["input_ids"], answers, right)[0]
    }
    seen: Unit = {}
    for body, ids in before.items():
        loss, first = _loss(model, ids, answers, right)
        solved: float | None = float(first) if item.choices else None
        if said:
            solved = rouge_1(tokenizer.decode(said[body]), tokenizer.decode(answers[0]))
        seen[body] = {"loss": loss, "solved": solved, "tokens": len(_ids(tokenizer, body))}
    return found | {name: [seen[body] for body in texts] for name, texts in forms.items()}


def _ids(tokenizer: Any, text: str) -> Ids:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _loss(model: Any, before: Ids, answers: Sequence[Ids], right: int) -> tuple[float, bool]:
    """Negative log-likelihood of the right answer behind the prompt, nats; among the answers where
    there are several, and then whether it is the likeliest of them."""
    import torch

    single = all(len(each) == 1 for each in answers)
    sums = []
    with torch.no_grad():
        # One token each: one forward tells them all.
        for each in answers[:1] if single else answers:
            ids = torch.tensor([before + each], device=model.device)
            out = model(input_ids=ids, use_cache=False, logits_to_keep=len(each) + 1)
            chances = out.logits[0, :-1].float().log_softmax(-1)
            if single:
                sums = [chances[0, own[0]] for own in answers]
            else:
                sums.append(chances.gather(-1, ids[0, len(before) :, None]).sum())
    found = torch.stack(sums)
    if len(answers) == 1:
        return -float(found[0]), True
    return -float(found.log_softmax(0)[right]), int(found.argmax()) == right


def _write(model: Any, tokenizer: Any, prompts: Sequence[Ids], tokens: int) -> list[Ids]:
    """What the model writes behind each prompt, greedily: up to its first line's end, as it is."""
    found: list[Ids] = [[]] * len(prompts)
    for places, new in written(model, prompts, max_new_tokens=tokens, batch=TOGETHER):
        for place, own in zip(places, new, strict=True):
            found[place] = _line(tokenizer, own)
    return found


def _line(tokenizer: Any, ids: Ids) -> Ids:
    """Ids up to the end of the first line with anything on it; none where there is no such line."""
    texts = [tokenizer.decode(ids[:stop]).lstrip() for stop in range(len(ids) + 1)]
    stop = next((place for place, text in enumerate(texts) if "\n" in text), len(ids) + 1) - 1
    return ids[:stop] if texts[stop] else []
