"""Training on pairs of a better and a worse answer: what `pertoken train dpo|cdpo` runs.

    from pertoken.train import train_preference
    run = train_preference("cdpo", "out", "pairs.jsonl", model="smollm2", positive=…, negative=…)

TRL's `DPOTrainer` does the work: ``dpo`` is TRL's own, ``cdpo`` is `CDPOTrainer`, where a rejected
token counts by how critical it is. The reference is the model as it was given. The authors train
LoRA adapters at 4e-5; here all weights learn, at a constant and smaller rate.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from pertoken._extras import need
from pertoken.errors import PertokenError, nearest
from pertoken.train._folder import claim, write_run
from pertoken.train._keeping import (
    arguments,
    check_settings,
    check_tokenizer,
    load,
    save_model,
    train,
    versions,
)
from pertoken.train.cdpo import CDPOMixin, Reduction
from pertoken.train.lessons import Lesson, Pair, data_hash, encode_lesson, read_pairs
from pertoken.train.supervised import SupervisedRun

__all__ = ["PREFERENCE", "train_preference"]

Row = dict[str, Any]
Model = str | tuple[Any, Any]
PREFERENCE = ("dpo", "cdpo")
"""The methods of `train_preference`."""
_SEVERAL = "train_preference runs in one process: for several use CDPOTrainer or TRL's DPOTrainer"
_MICRO = 2  # pairs of a forward and backward pass at most, for memory
_LOGGED = {
    "rewards/margins": "margin",
    "rewards/accuracies": "preferred",
    "cdpo/weight": "weight",
}


def train_preference(
    method: str,
    out: str | Path,
    pairs: str | Path | Sequence[Pair],
    *,
    model: Model = "smollm2",
    positive: Model | None = None,
    negative: Model | None = None,
    contrast: float = 1.0,
    reduction: Reduction = "sequence",
    beta: float = 0.1,
    steps: int = 100,
    batch: int = 8,
    learning_rate: float = 1e-6,
    max_length: int = 1024,
    chat: bool = True,
    limit: int | None = None,
    save_every: int | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: Callable[[Row], None] | None = None,
) -> SupervisedRun:
    """Train a model to prefer the chosen answers; the trained one lies in ``out/model``.

    method: dpo or cdpo. pairs: a file for `read_pairs`, or pairs; the first `limit` of them.
    positive, negative: of cdpo, the copies fine-tuned on right and on wrong answers
    (`contrast_data` says on which); contrast, reduction: see `CDPOTrainer`. beta: DPO's. The rest
    is as in `train_supervised`, of `batch` pairs an update.

    PertokenError before the first step for settings that do not fit the method, models of other
    tokens, a pair that is broken or whose prompt leaves no room for an answer (file and line), a
    folder of another run or of other pairs, a missing extra ``rl``. The last checkpoint is whole
    whatever stops the run.
    """
    _check(method, positive, negative, beta, contrast, reduction)
    numbers = {"steps": (steps, 1), "batch": (batch, 1), "max_length": (max_length, 2)}
    check_settings(learning_rate, {**numbers, "save_every": (save_every, 1)}, _SEVERAL)
    given = _given(pairs, limit)
    copied = {"positive": positive, "negative": negative}
    own = {**{side: _name(one) for side, one in copied.items()}, "contrast": contrast}
    settings = {
        "method": method,
        "model": _name(model),
        "pairs": len(given),
        "data_sha256": data_hash(given),
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "beta": beta,
        **({**own, "reduction": reduction} if method == "cdpo" else {}),
        "max_length": max_length,
        "chat": chat,
        "save_every": save_every or max(1, math.ceil(steps / 10)),
        "seed": seed,
    }
    run = SupervisedRun(settings, versions(), Path(out))
    student, tokenizer = load(model)
    _check_room(given, tokenizer, settings)
    checkpoint = claim(run.folder, settings, resume=resume)
    if checkpoint is None:
        write_run(run.folder, run.to_dict())
    copies = {side: _copy(side, one, tokenizer) for side, one in copied.items() if one is not None}
    trainer = _trainer(run, student, tokenizer, given, copies)
    copies.clear()  # they have been read: their memory is free for the training
    train(trainer, run, row_of, checkpoint, progress)
    save_model(trainer, tokenizer, run.folder)
    write_run(run.folder, run.to_dict())
    return run


def _copy(side: str, model: Model, tokenizer: Any) -> Any:
    """The positive or negative model; PertokenError where its tokens are not the student's."""
    found, own = load(model, trained=False)
    check_tokenizer(side, own, tokenizer, "a copy of model")
    return found


def _given(pairs: str | Path | Sequence[Pair], limit: int | None) -> list[Pair]:
    """The pairs, once it is sure that they can be learned from."""
    need("trl", "rl")
    need("tensorboard", "rl")
    found = read_pairs(pairs, limit) if isinstance(pairs, str | Path) else list(pairs)[:limit]
    if not found:
        raise PertokenError("there is no pair to learn from")
    return found


def _check_room(pairs: Sequence[Pair], tokenizer: Any, settings: Row) -> None:
    """Raise PertokenError for a pair that `max_length` leaves no answer: TRL would drop it."""
    for one in pairs:
        lesson = Lesson(one.prompt, one.chosen, one.place)
        encode_lesson(lesson, tokenizer, chat=settings["chat"], max_length=settings["max_length"])


def row_of(logs: Row, settings: Row, step: int) -> Row:
    """A step's row from what TRL has logged.

    margin: chosen less rejected reward, in β nats; preferred: share of pairs with a margin above 0;
    weight: of cdpo, the mean weight of a rejected token.
    """
    row = {"step": step, "loss": logs["loss"], "grad_norm": logs.get("grad_norm")}
    return row | {name: logs[key] for key, name in _LOGGED.items() if key in logs}


def _name(model: Model | None) -> str | None:
    return model if isinstance(model, str | None) else type(model[0]).__name__


def _check(
    method: str,
    positive: Model | None,
    negative: Model | None,
    beta: float,
    contrast: float,
    reduction: str,
) -> None:
    if method not in PREFERENCE:
        raise PertokenError(
            f"unknown method {method!r}{nearest(method, PREFERENCE)}; there is: "
            f"{', '.join(PREFERENCE)}"
        )
    for name, value in (("beta", beta), ("contrast", contrast)):
        if not (math.isfinite(value) and value >= 0) or (name == "beta" and value == 0):
            raise PertokenError(f"{name} must be {'above 0' if name == 'beta' else '0 or more'}")
    if reduction not in get_args(Reduction):
        raise PertokenError(f'reduction must be "sequence" or "position", got {reduction!r}')
    if method == "dpo" and (contrast, reduction) != (1.0, "sequence"):
        raise PertokenError("dpo has no contrast and no reduction: they belong to cdpo")
    for name, copied in (("positive", positive), ("negative", negative)):
        if method == "dpo" and copied is not None:
            raise PertokenError(f"dpo has no {name} model: it belongs to cdpo")
        if method == "cdpo" and copied is None:
            raise PertokenError(
                f"cdpo needs the {name} model: `pertoken pairs` samples what it learns, `pertoken "
                "train sft` makes it"
            )


def _trainer(
    run: SupervisedRun, model: Any, tokenizer: Any, pairs: Sequence[Pair], copies: Row
) -> Any:
    """TRL's trainer, with the mixin of cdpo, quiet."""
    settings = run.settings
    args = need("trl", "rl").DPOConfig(
        **arguments(run, _MICRO),
        beta=settings["beta"],
        max_length=settings["max_length"],
    )
    more = dict(copies)
    if settings["method"] == "cdpo":
        more |= {"contrast": settings["contrast"], "reduction": settings["reduction"]}
    mixins = (CDPOMixin,) if settings["method"] == "cdpo" else ()
    made: Any = type("Trainer", (*mixins, need("trl", "rl").DPOTrainer), {})
    trainer = made(
        model=model,
        # TRL would load the reference by the name in the model's configuration.
        ref_model=copy.deepcopy(model).requires_grad_(False),
        args=args,
        train_dataset=need("datasets", "rl").Dataset.from_list(
            [_row(one, tokenizer, settings["chat"]) for one in pairs]
        ),
        processing_class=tokenizer,
        **more,
    )
    trainer.remove_callback(need("transformers.trainer_callback", "rl").PrinterCallback)
    return trainer


def _row(pair: Pair, tokenizer: Any, chat: bool) -> Row:
    """A pair as TRL reads it: messages where there is a chat template, else bare text."""
    texts = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    if not chat or not getattr(tokenizer, "chat_template", None):
        return dict(texts)
    return {
        name: [{"role": "user" if name == "prompt" else "assistant", "content": text}]
        for name, text in texts.items()
    }
