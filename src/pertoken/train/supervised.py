"""Fine-tuning on worked answers: what `pertoken train sft|mft|sstoken` runs.

    from pertoken.train import train_supervised
    run = train_supervised("mft", "out", "data.jsonl", model="smollm2", rate=0.4, noise="random")

TRL's `SFTTrainer` does the work, on the answers alone. The methods differ in which tokens count and
what the model reads: ``sft`` is TRL's own (with `weights` each token counts its own), ``mft`` is
`MaskedThought`, ``sstoken`` is `SSTokenSFT`. The learning rate is constant, but a method's own
schedule (the share that is hidden, the warm-up of the selection) is of the whole run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pertoken._extras import need
from pertoken.errors import PertokenError, nearest
from pertoken.result import Part, Result, cells, figure
from pertoken.train._folder import claim, write_run
from pertoken.train._keeping import arguments, check_settings, load, save_model, train, versions
from pertoken.train.lessons import Lesson, data_hash, encode_lesson, read_lessons
from pertoken.train.masked_thought import MaskedThought, add_mask_token, check_noise
from pertoken.train.sstoken import check_choice
from pertoken.train.sstoken_trainer import History, SSTokenSFT
from pertoken.train.token_weights import WEIGHTS, TokenWeightedSFT

__all__ = ["SUPERVISED", "SupervisedRun", "train_supervised"]

Row = dict[str, Any]
SUPERVISED: dict[str, dict[str, Any]] = {
    "sft": {"weights": None},
    "mft": {"rate": 0.4, "noise": "mask"},
    "sstoken": {
        "keep": 0.6,
        "gamma": 0.5,
        "history": "base",
        "warmup": 0.2,
        "normalize": "minmax",
        "exclude_sink": False,
    },
}
"""The methods, with their own settings and what these are by default."""
HISTORIES = tuple(one for one in get_args(History) if one != "adapter_off")  # no adapter here
_MICRO = 4  # lessons of a forward and backward pass at most, for memory
_LOGGED = {"masked_thought/rate": "hidden", "sstoken/rel": "rel", "sstoken/place": "place"}


@dataclass
class SupervisedRun(Result):
    """What a run has done: settings, versions, a row per step (`row_of`), and where it lies."""

    settings: Row
    versions: dict[str, str]
    folder: Path
    steps: list[Row] = field(default_factory=list)

    def to_dict(self) -> Row:
        """Settings, versions, rows: a JSON form."""
        return {"settings": self.settings, "versions": self.versions, "rows": self.steps}

    def rows(self) -> list[Row]:
        """A record per step."""
        return self.steps

    def plot(self) -> Any:
        """Loss over the steps, a plotly figure (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        curve = graph.Scatter(
            x=[row["step"] for row in self.steps], y=[row["loss"] for row in self.steps]
        )
        return figure(curve, xaxis={"title": "step"}, yaxis={"title": "loss, nats per token"})

    def _parts(self) -> list[Part]:
        """The steps, and how the loss has changed."""
        return [Part("", cells(self.steps)), Part("", [], self.notes())]

    def notes(self) -> list[str]:
        """The loss at both ends of the run, and where the model lies."""
        losses = [row["loss"] for row in self.steps]
        part = max(1, len(losses) // 4)
        first, last = (sum(some) / part for some in (losses[:part], losses[-part:]))
        what = "lessons" if "lessons" in self.settings else "pairs"
        return [
            f"loss {first:.3f} in the first quarter of the steps, {last:.3f} in the last",
            f"{self.settings[what]} {what}; the model is in {self.folder / 'model'}",
        ]


def train_supervised(
    method: str,
    out: str | Path,
    lessons: str | Path | Sequence[Lesson],
    *,
    model: str | tuple[Any, Any] = "smollm2",
    steps: int = 100,
    batch: int = 16,
    learning_rate: float = 1e-5,
    max_length: int = 1024,
    chat: bool = True,
    limit: int | None = None,
    save_every: int | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: Callable[[Row], None] | None = None,
    **own: Any,
) -> SupervisedRun:
    """Fine-tune a model on worked answers; the trained one lies in ``out/model``.

    method: sft, mft or sstoken. out: a new folder, or one to go on in with `resume`. lessons: a
    file for `read_lessons`, or lessons; the first `limit` of them. model: a name for
    `pertoken.load`, or (model, tokenizer), in float32.

    steps: updates in all, of `batch` lessons each. own: settings of the method (`SUPERVISED`). Of
    sft: weights, the field of the file that holds a weight per answer token, the stop token among
    them. Of mft: rate and noise, see `MaskedThought`. Of sstoken: keep, gamma, history, warmup,
    normalize and exclude_sink, see `SSTokenSFT`. max_length: tokens of a lesson that stay. chat: in
    the model's chat template. save_every: steps between checkpoints, a tenth of the run by default.
    seed: of the order and of what is hidden. progress: called with each row as it is made.

    PertokenError before the first step for settings that do not fit the method, a lesson that can't
    be learned (file and line), a folder of another run or of other lessons, a missing extra ``rl``.
    The last checkpoint is whole whatever stops the run.
    """
    own = _own_settings(method, own)
    _check(steps, batch, learning_rate, max_length, save_every)
    need("trl", "rl")
    need("tensorboard", "rl")
    given = (
        read_lessons(lessons, limit, own.get("weights"))
        if isinstance(lessons, str | Path)
        else list(lessons)[:limit]
    )
    if not given:
        raise PertokenError("there is no lesson to learn")
    settings = {
        "method": method,
        "model": model if isinstance(model, str) else type(model[0]).__name__,
        "lessons": len(given),
        "data_sha256": data_hash(given),
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        **own,
        "max_length": max_length,
        "chat": chat,
        "save_every": save_every or max(1, math.ceil(steps / 10)),
        "seed": seed,
    }
    run = SupervisedRun(settings, versions(), Path(out))
    student, tokenizer = load(model)
    rows = _rows(given, tokenizer, settings)
    checkpoint = claim(run.folder, settings, resume=resume)
    if checkpoint is None:
        write_run(run.folder, run.to_dict())
    trainer = _trainer(run, student, tokenizer, rows)
    train(trainer, run, row_of, checkpoint, progress)
    save_model(trainer, tokenizer, run.folder)
    write_run(run.folder, run.to_dict())
    return run


def row_of(logs: Row, settings: Row, step: int) -> Row:
    """A step's row from what TRL has logged.

    loss: nats per token that counts; hidden: the share that mft hides; rel, place: of sstoken.
    """
    row = {"step": step, "loss": logs["loss"], "grad_norm": logs.get("grad_norm")}
    row |= {name: logs[key] for key, name in _LOGGED.items() if key in logs}
    return row


def _own_settings(method: str, given: Row) -> Row:
    """The settings of a method; PertokenError for those of another one, or out of range."""
    if method not in SUPERVISED:
        raise PertokenError(
            f"unknown method {method!r}{nearest(method, SUPERVISED)}; there is: "
            f"{', '.join(SUPERVISED)}"
        )
    known = SUPERVISED[method]
    for name in given:
        owner = next((one for one, own in SUPERVISED.items() if name in own), "none")
        if name not in known:
            raise PertokenError(f"{method} has no {name}: it belongs to {owner}")
    if given.get("history", "base") not in HISTORIES:
        raise PertokenError(
            f"history must be one of {', '.join(HISTORIES)} here, got {given['history']!r}"
        )
    made = {**known, **given}
    if method == "mft":
        check_noise(made["rate"], made["noise"])
    if method == "sstoken":
        check_choice(**{name: made[name] for name in ("keep", "normalize", "gamma", "warmup")})
    return made


def _check(
    steps: int, batch: int, learning_rate: float, max_length: int, save_every: int | None
) -> None:
    check_settings(
        learning_rate,
        {
            "steps": (steps, 1),
            "batch": (batch, 1),
            "max_length": (max_length, 2),
            "save_every": (save_every, 1),
        },
        "train_supervised runs in one process: for several use the mixins over TRL's trainer",
    )


def _rows(lessons: Sequence[Lesson], tokenizer: Any, settings: Row) -> list[Row]:
    """Ids, labels and weights of every lesson."""
    rows = []
    for one in lessons:
        ids, labels = encode_lesson(
            one, tokenizer, chat=settings["chat"], max_length=settings["max_length"]
        )
        row: Row = {"input_ids": ids, "labels": labels}
        if settings.get("weights"):
            learned, numbers = sum(label >= 0 for label in labels), list(one.weights or [])
            if len(numbers) < learned or (
                len(numbers) > learned and len(ids) < settings["max_length"]
            ):
                raise PertokenError(
                    f"{one.place}: {len(numbers)} weights for {learned} tokens of the answer, its "
                    "end among them"
                )
            row[WEIGHTS] = [1.0] * (len(ids) - learned) + numbers[:learned]
        rows.append(row)
    return rows


def _trainer(run: SupervisedRun, model: Any, tokenizer: Any, rows: list[Row]) -> Any:
    """TRL's trainer with the mixin of the method, quiet."""
    settings = run.settings
    args = need("trl", "rl").SFTConfig(
        **arguments(run, _MICRO),
        max_length=None,
    )
    more: Row = {}
    mixins: tuple[type, ...] = ()
    if settings.get("weights"):
        mixins = (TokenWeightedSFT,)
    elif settings["method"] == "mft":
        mixins = (MaskedThought,)
        more = {"rate": settings["rate"], "noise": settings["noise"]}
        if settings["noise"] == "mask":
            more["mask_id"] = add_mask_token(model, tokenizer)
    elif settings["method"] == "sstoken":
        mixins = (SSTokenSFT,)
        more = {name: settings[name] for name in SUPERVISED["sstoken"]}
    made: Any = type("Trainer", (*mixins, need("trl", "rl").SFTTrainer), {})
    trainer = made(
        model=model,
        args=args,
        train_dataset=need("datasets", "rl").Dataset.from_list(rows),
        processing_class=tokenizer,
        **more,
    )
    trainer.remove_callback(need("transformers.trainer_callback", "rl").PrinterCallback)
    return trainer
