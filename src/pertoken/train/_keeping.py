"""What every run of `pertoken train` does around its trainer: a row per step, whole checkpoints.

A run is a record with settings, folder and steps; `row_of` makes a row of what was logged.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import pertoken
from pertoken._extras import need
from pertoken._tokenizer_hash import tokenizer_hash
from pertoken.errors import PertokenError
from pertoken.train._folder import mark_whole, write_run

__all__ = [
    "arguments",
    "check_settings",
    "check_tokenizer",
    "load",
    "save_model",
    "train",
    "versions",
]

Row = dict[str, Any]
RowOf = Callable[[dict[str, Any], dict[str, Any], int], Row]


def check_settings(
    learning_rate: float, least: Mapping[str, tuple[int | None, int]], for_several: str
) -> None:
    """Raise PertokenError for a run in several processes, and for a number that is too small.

    least: name -> (its value, the least it may be). for_several: what several processes take.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PertokenError(for_several)
    for name, (value, lowest) in least.items():
        if value is not None and value < lowest:
            raise PertokenError(f"{name} must be {lowest} or more, got {value}")
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise PertokenError(f"learning_rate must be above 0, got {learning_rate:g}")


def arguments(run: Any, most: int) -> dict[str, Any]:
    """What the configuration of every trainer has; at most `most` rows in a pass, for memory."""
    settings, batch = run.settings, run.settings["batch"]
    micro = max(size for size in range(1, most + 1) if batch % size == 0)
    return {
        "output_dir": str(run.folder),
        "max_steps": settings["steps"],
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "seed": settings["seed"],
        "bf16": False,  # float32: small steps vanish in bfloat16 weights
        "gradient_checkpointing": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": settings["save_every"],
        "report_to": [],
        "disable_tqdm": True,
    }


def load(model: str | tuple[Any, Any], *, trained: bool = True) -> tuple[Any, Any]:
    """A model in float32 and its tokenizer, which must have a stop token.

    PertokenError for a model to be trained whose weights are in half precision: they do not move.
    """
    loaded, tokenizer = pertoken.load(model, dtype="float32") if isinstance(model, str) else model
    learned = {each.dtype for each in loaded.parameters() if each.requires_grad}
    if trained and learned & {torch.float16, torch.bfloat16}:
        raise PertokenError(
            "the weights to train are in half precision, where small steps vanish: load the model "
            'with dtype="float32"'
        )
    if tokenizer.eos_token_id is None:
        raise PertokenError("the tokenizer has no stop token (eos_token), so no text of it ends")
    return loaded, tokenizer


def check_tokenizer(side: str, own: Any, tokenizer: Any, must: str) -> None:
    """Raise PertokenError where the `side` model's own tokenizer is another one.

    must: what that model must be.
    """
    if tokenizer_hash(own) != tokenizer_hash(tokenizer):
        raise PertokenError(f"the {side} model has another tokenizer: it must be {must}")


def train(
    trainer: Any,
    run: Any,
    row_of: RowOf,
    checkpoint: Path | None,
    progress: Callable[[Row], None] | None,
) -> None:
    """All steps, from the checkpoint on, with a row and a line for TensorBoard each."""
    writer = need("torch.utils.tensorboard", "rl").SummaryWriter(
        str(run.folder / "tensorboard"),
        purge_step=None if checkpoint is None else int(checkpoint.name.rpartition("-")[2]) + 1,
    )
    trainer.add_callback(_callback(run, row_of, writer, progress))
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise PertokenError(
            "the model's probabilities are NaN or infinite, so nothing can be sampled: its weights "
            "are broken, or the learning rate is too high"
        ) from error
    finally:
        writer.close()


def _callback(run: Any, row_of: RowOf, writer: Any, progress: Callable[[Row], None] | None) -> Any:
    """Rows, TensorBoard, the check of the gradient, and the mark of a whole checkpoint."""
    base: Any = need("transformers", "rl").TrainerCallback

    class Keeper(base):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            past = (entry for entry in state.log_history if "loss" in entry)
            run.steps = [row_of(entry, run.settings, entry["step"]) for entry in past]

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in logs:  # the summary at the end
                return
            row = row_of(logs, run.settings, state.global_step)
            run.steps.append(row)
            for name, value in logs.items():
                if isinstance(value, int | float):
                    writer.add_scalar(name, value, state.global_step)
            if progress is not None:
                progress(row)

        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            grads = [each.grad for each in model.parameters() if each.grad is not None]
            if grads and not bool(torch.isfinite(torch.stack(torch._foreach_norm(grads))).all()):
                raise PertokenError(
                    f"the gradient of step {state.global_step + 1} is NaN or infinite: nothing was "
                    "changed by it; the last checkpoint is as it was"
                )

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            write_run(run.folder, run.to_dict())
            mark_whole(run.folder, state.global_step)

    return Keeper()


def save_model(trainer: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model beside its place and move it there, so that it is whole or not there."""
    partial, place = folder / ".model.part", folder / "model"
    trainer.save_model(str(partial))
    tokenizer.save_pretrained(str(partial))
    if place.exists():
        shutil.rmtree(place)
    partial.replace(place)


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "trl")
    found = {"pertoken": pertoken.__version__, "python": platform.python_version()}
    return found | {name: version(name) for name in names}
