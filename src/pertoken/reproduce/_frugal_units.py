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

Unit = dict[str, Any]


def classified(classifier: Classifier, item: Item, bodies: dict[str, list[str]]) -> Unit:
    """Losses of a mail's label; without the mail both labels are as likely."""
    label = item.choices.index(item.answer)
    found: Unit = {"empty": math.log(2)}
    for name, texts in {"full": [item.body], **bodies}.items():
        losses = [classifier.loss(text, label) for text in texts]
        found[name] = [{"loss": loss, "solved": float(loss < math.log(2))} for loss in losses]
    return found


def measured(
    model: Any, tokenizer: Any, item: Item, bodies: dict[str, list[str]], tokens: int
) -> Unit:
    """Losses of the answer behind every form of the prompt, and whether the task is solved."""
    forms = {"full": [item.body], **bodies}
    prompts = {body: item.prompt(body) for texts in forms.values() for body in texts}
    answer, said = item.answer, dict.fromkeys(prompts, "")
    if not answer:  # what the model itself says to the whole prompt
        told = _write(model, tokenizer, list(prompts.values()), tokens)
        said = dict(zip(prompts, told, strict=True))
        answer = said[item.body]
    found: Unit = {"empty": _loss(model, tokenizer, item.prompt(""), answer, item.choices)[0]}
    seen: Unit = {}
    for body, prompt in prompts.items():
        loss, first = _loss(model, tokenizer, prompt, answer, item.choices)
        solved: float | None = float(first) if item.choices else None
        if not item.answer:
            solved = rouge_1(said[body], answer)
        seen[body] = {"loss": loss, "solved": solved}
    return found | {name: [seen[body] for body in texts] for name, texts in forms.items()}


def _loss(
    model: Any, tokenizer: Any, prompt: str, answer: str, choices: Sequence[str]
) -> tuple[float, bool]:
    """Negative log-likelihood of the answer behind the prompt, nats; among choices if there are
    any, and then whether it is the likeliest of them."""
    import torch

    before = tokenizer(prompt)["input_ids"]
    after = [tokenizer(each, add_special_tokens=False)["input_ids"] for each in choices or [answer]]
    single = all(len(each) == 1 for each in after)
    sums = []
    with torch.no_grad():
        # One token each: one forward tells them all.
        for each in after[:1] if single else after:
            ids = torch.tensor([before + each], device=model.device)
            out = model(input_ids=ids, use_cache=False, logits_to_keep=len(each) + 1)
            logits = out.logits[0, :-1].float()
            chances = logits.log_softmax(-1)
            if single:
                sums = [chances[0, own[0]] for own in after]
            else:
                sums.append(chances.gather(-1, ids[0, len(before) :, None]).sum())
    found = torch.stack(sums)
    if not choices:
        return -float(found[0]), True
    place = list(choices).index(answer)
    return -float(found.log_softmax(0)[place]), int(found.argmax()) == place


def _write(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int) -> list[str]:
    """What the model writes behind each prompt, greedily, up to the end of the line."""
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    found = [""] * len(ids)
    for places, new in written(model, ids, max_new_tokens=tokens, batch=TOGETHER):
        for place, own in zip(places, new, strict=True):
            text = str(tokenizer.decode(own, skip_special_tokens=True))
            line = text.lstrip().split("\n")[0].strip()
            found[place] = f" {line or 'nothing'}"
    return found
