"""Reinforcement learning on a task with checkable answers: what `pertoken train` runs.

    from pertoken.train import train_policy
    run = train_policy("fiberpo", "out", model="smollm2", task="arithmetic", steps=40)

TRL's trainer does the work. The methods differ in nothing but the objective: ``grpo`` is TRL's,
``gspo`` the same with ``importance_sampling_level="sequence"``, ``cispo`` with
``loss_type="cispo"``, ``fiberpo`` is `FiberPOTrainer`. Every batch of sampled texts is used for
`iterations` steps; in the first of them the policy is the one that sampled, and all four
objectives have one gradient.

Settings are constant over a run (no warm-up, no decay), so a run may be made longer afterwards.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pertoken._extras import need
from pertoken.errors import PertokenError
from pertoken.result import Part, Result, cells, figure
from pertoken.train._folder import claim, write_run
from pertoken.train._guard import Batch, GuardMixin, grpo_trainer
from pertoken.train._keeping import arguments, check_settings, load, save_model, train, versions
from pertoken.train._page import gates_page
from pertoken.train.fiberpo import Bounds
from pertoken.train.gates import LEVELS, check_bounds
from pertoken.train.tasks import Example, Task, rewards_of
from pertoken.train.tasks import task as named_task

__all__ = ["Run", "train_policy"]

Row = dict[str, Any]

PROBLEMS = 2048  # drawn from the task; the order must not depend on how long the run will be
_MICRO = 8  # completions of a forward and backward pass at most, for memory
# Ratios: PPO's and CISPO's usual bounds, FiberPO's token gate as its authors draw it. There is no
# usual trajectory bound for small models; this one was not tuned.
_TOKEN: dict[str, Bounds] = {"fiberpo": (0.8, 1.25), "grpo": (0.8, 1.2), "cispo": (0.0, 5.0)}
_TRAJECTORY: Bounds = (0.9, 1.1)
_LENGTHS = {"arithmetic": 16, "countdown": 32, "gsm8k": 160}


@dataclass
class Run(Result):
    """What a run has done.

    settings, versions: what it was run with; steps: a row for each, see `row_of`; folder: where
    it lies; batch: the tensors of the last step, before it was applied.
    """

    settings: dict[str, Any]
    versions: dict[str, str]
    folder: Path
    steps: list[Row] = field(default_factory=list)
    batch: Batch = field(default_factory=dict)
    tokenizer: Any = None

    def to_dict(self) -> dict[str, Any]:
        """Settings, versions, tokens sampled, rows: a JSON form."""
        return {
            "settings": self.settings,
            "versions": self.versions,
            "tokens_sampled": sum(row["tokens"] for row in self.steps),
            "kl": "to the start" if self.settings["beta"] else "sampling policy to policy",
            "rows": self.steps,
        }

    def rows(self) -> list[Row]:
        """A record per step; the shares of closed gates as closed_<level>_low and _high."""
        found = []
        for step in self.steps:
            row = {key: value for key, value in step.items() if key != "closed"}
            for level, (low, high) in step["closed"].items():
                row |= {f"closed_{level}_low": low, f"closed_{level}_high": high}
            found.append(row)
        return found

    def plot(self) -> Any:
        """Reward over the steps, a plotly figure (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        known = [row for row in self.steps if row["reward"] is not None]
        steps, rewards = [row["step"] for row in known], [row["reward"] for row in known]
        curve = graph.Scatter(x=steps, y=rewards)
        return figure(curve, xaxis={"title": "step"}, yaxis={"title": "mean reward"})

    def _parts(self) -> list[Part]:
        """The steps, and how the reward has changed."""
        return [Part("", cells(self.rows())), Part("", [], self.notes())]

    def notes(self) -> list[str]:
        """The reward at both ends of the run, and where the model lies."""
        rewards = [row["reward"] for row in self.steps if row["reward"] is not None]
        part = max(1, len(rewards) // 4)
        first, last = (sum(some) / part for some in (rewards[:part], rewards[-part:]))
        tokens = self.to_dict()["tokens_sampled"]
        return [
            f"reward {first:.3f} in the first quarter of the batches, {last:.3f} in the last",
            f"{tokens} tokens sampled; the model is in {self.folder / 'model'}",
        ]

    def _page(self) -> str:
        """The last step's batch, see `pertoken.train.gates_page`."""
        batch, settings = self.batch, self.settings
        prompts = [
            self.tokenizer.decode(ids[mask != 0], skip_special_tokens=True)
            for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        ]
        return gates_page(
            self.tokenizer,
            batch["completion_ids"],
            batch["log_probs"],
            batch["old_log_probs"],
            batch["advantages"],
            batch["completion_mask"],
            method=settings["method"],
            token=settings["token"],
            trajectory=settings["trajectory"],
            rewards=batch["rewards"],
            prompts=prompts,
            title=f"{settings['method']} on {settings['task']}, step {self.steps[-1]['step']}",
        )


def train_policy(
    method: str,
    out: str | Path,
    *,
    model: str | tuple[Any, Any] = "smollm2",
    task: str | Task = "arithmetic",
    steps: int = 80,
    group: int = 8,
    batch: int = 32,
    iterations: int = 4,
    learning_rate: float = 1e-5,
    beta: float = 0.0,
    token: Bounds | None = None,
    trajectory: Bounds | None = None,
    max_new_tokens: int | None = None,
    save_every: int | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: Callable[[Row], None] | None = None,
) -> Run:
    """Train a model on a task; the trained one lies in ``out/model`` for plain transformers.

    method: fiberpo, grpo, gspo or cispo. out: a new folder, or one to go on in with `resume`; it
    takes the newest checkpoint (three times the weights) and, at the end, the model. model: a name
    for `pertoken.load`, or (model, tokenizer), in float32. task: a name in `pertoken.train.tasks`
    or a `Task` of your own.

    steps: updates in all. batch: completions sampled at once, `group` of them for each prompt;
    they serve for `iterations` updates. beta: weight of TRL's KL term to the starting policy.
    token, trajectory: (low, high) ratios for the gates the method has. max_new_tokens: 16 for
    arithmetic, 32 for countdown, else 160. save_every: steps between checkpoints, a tenth of the
    run by default. seed: of the problems, their order and the sampling; torch's global generator
    is seeded with it. progress: called with each row as it is made.

    PertokenError before the first step for settings that do not fit, an unknown name, a missing
    extra ``rl``, a folder of another run; and before the step for a reward that is no number,
    log-probabilities or gradients that are none. The last checkpoint is whole whatever stops the
    run.
    """
    job = task if isinstance(task, Task) else named_task(task)
    if method in LEVELS:
        token = token or _TOKEN.get(method)
        trajectory = trajectory or (_TRAJECTORY if "trajectory" in LEVELS[method] else None)
    check_bounds(method, token, trajectory)
    _check(steps, group, batch, iterations, learning_rate, beta, max_new_tokens, save_every)
    trainer_class = grpo_trainer()
    need("tensorboard", "rl")
    settings = {
        "method": method,
        "model": model if isinstance(model, str) else type(model[0]).__name__,
        "task": job.name,
        "steps": steps,
        "group": group,
        "batch": batch,
        "iterations": iterations,
        "learning_rate": learning_rate,
        "beta": beta,
        "token": list(token) if token else None,
        "trajectory": list(trajectory) if trajectory else None,
        "max_new_tokens": max_new_tokens or _LENGTHS.get(job.name, 160),
        "save_every": save_every or max(1, math.ceil(steps / 10)),
        "seed": seed,
    }
    run = Run(settings, versions(), Path(out))
    checkpoint = claim(run.folder, settings, resume=resume)
    problems = job.examples("train", PROBLEMS, seed)
    policy, tokenizer = load(model)
    run.tokenizer = tokenizer
    if checkpoint is None:
        write_run(run.folder, run.to_dict())
    trainer = _trainer(trainer_class, run, policy, job, problems)
    del policy
    train(trainer, run, row_of, checkpoint, progress)
    run.batch = _whole_batch(trainer.batch)
    save_model(trainer, tokenizer, run.folder)
    write_run(run.folder, run.to_dict())
    return run


def row_of(logs: dict[str, Any], settings: dict[str, Any], step: int) -> Row:
    """A step's row from what TRL has logged.

    reward: mean of the texts sampled in this step, None where it used those of the step before;
    tokens: sampled in this step; kl: nats per token, to the start where there is a KL term, else
    from the policy that sampled; closed: level -> (low, high), share of tokens or trajectories.
    """
    method = settings["method"]
    if method == "fiberpo":
        sides = {
            level: [logs[f"fiberpo/{level}/closed_{side}"] for side in ("low", "high")]
            for level in LEVELS[method]
        }
    elif method == "cispo":
        sides = {"token": [0.0, logs["cispo_clip_ratio"]]}
    else:
        both = [logs[f"clip_ratio/{side}_mean"] for side in ("low", "high")]
        sides = {LEVELS[method][0]: both}
    return {
        "step": step,
        "reward": logs.get("reward"),
        "tokens": round(logs.get("completions/mean_length", 0) * settings["batch"]),
        "kl": logs["kl"] if settings["beta"] else logs["approx_kl"],
        "closed": sides,
        "loss": logs["loss"],
        "grad_norm": logs.get("grad_norm"),
        "seconds": logs["step_time"],
    }


def _check(
    steps: int,
    group: int,
    batch: int,
    iterations: int,
    learning_rate: float,
    beta: float,
    max_new_tokens: int | None,
    save_every: int | None,
) -> None:
    check_settings(
        learning_rate,
        {
            "steps": (steps, 1),
            "group": (group, 2),
            "batch": (batch, 2),
            "iterations": (iterations, 1),
            "max_new_tokens": (max_new_tokens, 1),
            "save_every": (save_every, 1),
        },
        "train_policy runs in one process: for several use FiberPOTrainer or TRL's own trainer",
    )
    if batch % group:
        raise PertokenError(
            f"batch must hold whole groups: {batch} completions are no multiple of group {group}"
        )
    if not (math.isfinite(beta) and beta >= 0):
        raise PertokenError(f"beta must be 0 or more, got {beta:g}")


def _trainer(trainer_class: Any, run: Run, model: Any, task: Task, problems: list[Example]) -> Any:
    """TRL's trainer for a run, quiet and with the guard in front."""
    settings = run.settings
    token, trajectory = settings["token"], settings["trajectory"]
    bounds = token or trajectory
    clip: dict[str, Any] = {"loss_type": "grpo"}
    gates: dict[str, Any] = {}
    made: Any = type("GuardedGRPOTrainer", (GuardMixin, trainer_class), {})
    if settings["method"] == "fiberpo":
        from pertoken.train.trl import FiberPOTrainer

        made, gates = FiberPOTrainer, {"token": token, "trajectory": trajectory}
    elif settings["method"] == "cispo":
        clip = {"loss_type": "cispo", "epsilon_high": bounds[1]}
    else:
        clip |= {"epsilon": 1 - bounds[0], "epsilon_high": bounds[1] - 1}
        if settings["method"] == "gspo":
            clip["importance_sampling_level"] = "sequence"
    args = need("trl", "rl").GRPOConfig(
        **arguments(run, _MICRO),
        **clip,
        num_generations=settings["group"],
        num_iterations=settings["iterations"],
        max_completion_length=settings["max_new_tokens"],
        disable_dropout=True,  # else the ratio of an unchanged policy would not be 1
    )
    ask = _asker(run.tokenizer)
    rows = [{"prompt": ask(each.prompt), "problem": i} for i, each in enumerate(problems)]
    trainer = made(
        model=model,
        reward_funcs=rewards_of(task, problems),
        args=args,
        train_dataset=need("datasets", "rl").Dataset.from_list(rows),
        processing_class=run.tokenizer,
        **gates,
    )
    trainer.remove_callback(need("transformers.trainer_callback", "rl").PrinterCallback)
    if settings["beta"]:  # TRL would load the reference by the name in the model's configuration
        start = copy.deepcopy(model).requires_grad_(False)
        trainer.beta = settings["beta"]
        trainer.ref_model = trainer.accelerator.prepare_model(start, evaluation_mode=True)
    return trainer


def _asker(tokenizer: Any) -> Callable[[str], Any]:
    """A user's message where the model has a chat template, else the bare text."""
    if getattr(tokenizer, "chat_template", None):
        return lambda prompt: [{"role": "user", "content": prompt}]
    return lambda prompt: f"{prompt}\n"


def _whole_batch(parts: list[Batch]) -> Batch:
    """The micro-batches of a step as one; they were cut from one, so they are equally long."""
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
