"""`pertoken train`: reinforcement learning on a task, fine-tuning on answers, training on pairs.

A method is a command of its own. The four of reinforcement learning are one function, the three of
fine-tuning another, the two of preferences a third: they differ in the objective, or in which
tokens count.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.cli._group import Group
from pertoken.cli._training import LossRows, PolicyRows, how_to_go_on, live, quiet
from pertoken.errors import PertokenError, nearest

if TYPE_CHECKING:
    from pertoken.train import Run, SupervisedRun

_Token = Annotated[
    str | None,
    typer.Option(
        metavar="LOW,HIGH",
        help="Bounds on a token's ratio.",
        show_default="fiberpo 0.8,1.25; grpo 0.8,1.2; cispo 0,5",
    ),
]
_Trajectory = Annotated[
    str | None,
    typer.Option(
        metavar="LOW,HIGH",
        help="Bounds on a trajectory's ratio.",
        show_default="fiberpo and gspo 0.9,1.1",
    ),
]


_Out = Annotated[
    Path, typer.Option(metavar="DIR", help="New folder for checkpoints, log and trained model.")
]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")
]
_Steps = Annotated[int, typer.Option(help="Updates in all.")]
_LearningRate = Annotated[float, typer.Option(help="Of AdamW, constant.")]
_SaveEvery = Annotated[
    int | None,
    typer.Option(help="Steps between checkpoints.", show_default="a tenth of the run"),
]
_LESSONS = 'A .jsonl file: {"prompt", "completion"}, {"question", "answer"} or {"messages"} lines.'

_Weights = Annotated[
    str | None,
    typer.Option(metavar="FIELD", help="Of sft: the field with a weight per answer token."),
]
_Rate = Annotated[
    float | None,
    typer.Option(help="Of mft: the largest share of an answer hidden.", show_default="0.4"),
]
_Noise = Annotated[
    str | None,
    typer.Option(metavar="mask|random", help="Of mft: what stands there.", show_default="mask"),
]
_Keep = Annotated[
    float | None,
    typer.Option(help="Of sstoken: the share of an answer kept.", show_default="0.6"),
]
_Gamma = Annotated[
    float | None, typer.Option(help="Of sstoken: weight of the excess loss.", show_default="0.5")
]
_History = Annotated[
    str | None,
    typer.Option(
        metavar="base|precomputed|ema", help="Of sstoken: the earlier state.", show_default="base"
    ),
]
_Normalize = Annotated[
    str | None,
    typer.Option(
        metavar="minmax|rank",
        help="Of sstoken: how the excess loss comes to 0 to 1.",
        show_default="minmax",
    ),
]
_ExcludeSink = Annotated[
    bool,
    typer.Option("--exclude-sink", help="Of sstoken: the row's first token is no prompt."),
]

# What each command is for; the rest of its help is the docstring of its function.
_REINFORCED = {
    "fiberpo": "Reinforcement learning with FiberPO: a gate per trajectory and one per token.",
    "grpo": "Reinforcement learning with GRPO: a bound on each token's ratio.",
    "gspo": "Reinforcement learning with GSPO: a bound on each trajectory's ratio.",
    "cispo": "Reinforcement learning with CISPO: token weights cut, no gradient stopped.",
}
_SUPERVISED = {
    "sft": "Fine-tune on worked answers, each token counting alike or by a weight of the data.",
    "mft": "Fine-tune with masked thought: a share of the answer is hidden in the input.",
    "sstoken": "Fine-tune on the tokens that are learned or that look at the prompt.",
}
_PREFERRED = {
    "dpo": "Prefer better answers to worse ones, each token of them counting alike.",
    "cdpo": "Prefer better answers, blaming the critical tokens of the worse ones.",
}
_PAIRS = 'A .jsonl file of {"prompt", "chosen", "rejected"} lines, such as `pertoken pairs` makes.'


class Methods(Group):
    """The methods; an unknown one is named with the nearest."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name."""
        if cmd_name not in self.commands and not cmd_name.startswith("-"):
            raise PertokenError(
                f"unknown method {cmd_name!r}{nearest(cmd_name, self.commands)}; there is: "
                f"{', '.join(self.commands)}"
            )
        return self.commands.get(cmd_name)


group = typer.Typer(
    cls=Methods,
    help="Train a model: by reinforcement learning on a task, or on worked answers of yours.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(group, name="train")


def reinforce(
    context: typer.Context,
    out: _Out,
    task: Annotated[str, typer.Option(help="arithmetic, countdown or gsm8k.")] = "arithmetic",
    resume: _Resume = False,
    steps: _Steps = 80,
    group: Annotated[int, typer.Option(help="Completions for each prompt.")] = 8,
    batch: Annotated[int, typer.Option(help="Completions sampled at once.")] = 32,
    iterations: Annotated[
        int, typer.Option(help="Updates from one batch; all but the first are off-policy.")
    ] = 4,
    learning_rate: _LearningRate = 1e-5,
    beta: Annotated[float, typer.Option(help="Weight of the KL term to the start.")] = 0.0,
    token: _Token = None,
    trajectory: _Trajectory = None,
    save_every: _SaveEvery = None,
    model: shared.Model = "smollm2",
    seed: shared.Seed = 0,
    max_new_tokens: shared.OptionalMaxNewTokens = None,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """The four methods of reinforcement learning differ in the objective alone.

    Completions have at most 16 tokens for arithmetic, 32 for countdown and 160 for gsm8k, else
    --max-new-tokens. The page is that of the last batch: ratio, gate and level of each token.
    Needs the extra rl.
    """
    output = shared.Output(as_json, html)
    settings: dict[str, Any] = {
        "token": _bounds("--token", token),
        "trajectory": _bounds("--trajectory", trajectory),
        "learning_rate": learning_rate,
        "max_new_tokens": max_new_tokens,
        "save_every": save_every,
        "seed": seed,
        "resume": resume,
    }
    method = str(context.info_name)
    run = _run(method, out, model, task, steps, group, batch, iterations, beta, settings)
    if not output.write(run):
        print("\n".join(run.notes()))


def supervise(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(metavar="DATA", help=_LESSONS)],
    out: _Out,
    resume: _Resume = False,
    steps: _Steps = 100,
    batch: Annotated[int, typer.Option(help="Lessons of an update.")] = 16,
    learning_rate: _LearningRate = 1e-5,
    weights: _Weights = None,
    rate: _Rate = None,
    noise: _Noise = None,
    keep: _Keep = None,
    gamma: _Gamma = None,
    history: _History = None,
    normalize: _Normalize = None,
    exclude_sink: _ExcludeSink = False,
    max_length: Annotated[int, typer.Option(help="Tokens of a lesson that stay.")] = 1024,
    save_every: _SaveEvery = None,
    model: shared.Model = "smollm2",
    seed: shared.Seed = 0,
    limit: shared.Limit = None,
    no_chat: shared.NoChat = False,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Only answers are learned. An option of another method is refused. Needs the extra rl."""
    output = shared.Output(as_json, html)
    settings: dict[str, Any] = {
        "model": model,
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "max_length": max_length,
        "chat": not no_chat,
        "limit": limit,
        "save_every": save_every,
        "seed": seed,
        "resume": resume,
    }
    own = {
        "weights": weights,
        "rate": rate,
        "noise": noise,
        "keep": keep,
        "gamma": gamma,
        "history": history,
        "normalize": normalize,
        "exclude_sink": exclude_sink or None,
    }
    settings |= {name: value for name, value in own.items() if value is not None}
    run = _run_on_answers("train_supervised", str(context.info_name), out, data, settings)
    if not output.write(run):
        print("\n".join(run.notes()))


def prefer(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(metavar="DATA", help=_PAIRS)],
    out: _Out,
    resume: _Resume = False,
    positive: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of cdpo: the copy that learned right answers."),
    ] = None,
    negative: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of cdpo: the copy that learned wrong answers."),
    ] = None,
    contrast: Annotated[float, typer.Option(help="Of cdpo: weight of the negative copy.")] = 1.0,
    reduction: Annotated[
        str,
        typer.Option(
            metavar="sequence|position", help="Of cdpo: sum over answers, or as released."
        ),
    ] = "sequence",
    beta: Annotated[float, typer.Option(help="Of DPO: how near the reference it stays.")] = 0.1,
    steps: _Steps = 100,
    batch: Annotated[int, typer.Option(help="Pairs of an update.")] = 8,
    learning_rate: _LearningRate = 1e-6,
    max_length: Annotated[int, typer.Option(help="Tokens of prompt and answer that stay.")] = 1024,
    save_every: _SaveEvery = None,
    model: shared.Model = "smollm2",
    seed: shared.Seed = 0,
    limit: shared.Limit = None,
    no_chat: shared.NoChat = False,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """The reference is the model as it was. Needs the extra rl."""
    output = shared.Output(as_json, html)
    settings: dict[str, Any] = {
        "model": model,
        "positive": positive,
        "negative": negative,
        "contrast": contrast,
        "reduction": reduction,
        "beta": beta,
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "max_length": max_length,
        "chat": not no_chat,
        "limit": limit,
        "save_every": save_every,
        "seed": seed,
        "resume": resume,
    }
    run = _run_on_answers("train_preference", str(context.info_name), out, data, settings)
    if not output.write(run):
        print("\n".join(run.notes()))


for _names, _function in (
    (_REINFORCED, reinforce),
    (_SUPERVISED, supervise),
    (_PREFERRED, prefer),
):
    for _name, _about in _names.items():
        _rest = " ".join((_function.__doc__ or "").split())
        group.command(_name, help=f"{_about}\n\n{_rest}")(_function)


def _run(
    method: str,
    out: Path,
    model: str,
    task: str,
    steps: int,
    group: int,
    batch: int,
    iterations: int,
    beta: float,
    settings: dict[str, Any],
) -> Run:
    """The run, shown step by step; stopped by Ctrl-C it says how to go on."""
    from rich.console import Console

    from pertoken.train import train_policy

    try:
        rows = PolicyRows(method, task, steps, beta)
        with quiet(), live(Console(stderr=True), rows) as show:
            return train_policy(
                method,
                out,
                model=model,
                task=task,
                steps=steps,
                group=group,
                batch=batch,
                iterations=iterations,
                beta=beta,
                progress=show,
                **settings,
            )
    except KeyboardInterrupt:
        typer.echo(how_to_go_on(out), err=True)
        raise


def _run_on_answers(
    runner: str, method: str, out: Path, data: Path, settings: dict[str, Any]
) -> SupervisedRun:
    """The run of a function of `pertoken.train`, shown step by step as in `_run`."""
    from rich.console import Console

    import pertoken.train

    run: Any = getattr(pertoken.train, runner)
    try:
        rows = LossRows(f"{method} on {data.name}", settings["steps"])
        with quiet(), live(Console(stderr=True), rows) as show:
            found: SupervisedRun = run(method, out, data, progress=show, **settings)
            return found
    except KeyboardInterrupt:
        typer.echo(how_to_go_on(out), err=True)
        raise


def _bounds(option: str, text: str | None) -> tuple[float, float] | None:
    """LOW,HIGH as numbers.

    >>> _bounds("--token", "0.8,1.25")
    (0.8, 1.25)
    """
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise PertokenError(f"{option} takes LOW,HIGH such as 0.8,1.25, got {text!r}") from None
    return low, high
