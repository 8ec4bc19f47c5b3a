"""`pertoken tokens`: which tokens of your data a training method would learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.errors import PertokenError, nearest

_Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help='A .jsonl file: {"prompt", "completion"}, {"question", "answer"} or {"messages"} '
        'lines; of cdpo {"prompt", "chosen", "rejected"}, of which the rejected are shown.',
    ),
]
_Method = Annotated[str, typer.Option(metavar="cdpo|mft|sstoken", help="The method that chooses.")]
_History = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Of sstoken: an earlier state of the model, for the excess loss."
    ),
]
_Positive = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of cdpo: the copy that learned right answers.")
]
_Negative = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of cdpo: the copy that learned wrong answers.")
]
_Normalize = Annotated[
    str,
    typer.Option(metavar="minmax|rank", help="Of sstoken: how the excess loss comes to 0 to 1."),
]
_ExcludeSink = Annotated[
    bool, typer.Option("--exclude-sink", help="Of sstoken: the row's first token is no prompt.")
]

_OWN = {
    "cdpo": ("positive", "negative"),
    "mft": ("rate",),
    "sstoken": ("history", "keep", "gamma", "normalize", "exclude_sink"),
}  # options of one method alone


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("tokens")(tokens)


def tokens(
    context: typer.Context,
    data: _Data,
    method: _Method = "sstoken",
    history: _History = None,
    positive: _Positive = None,
    negative: _Negative = None,
    rate: Annotated[float, typer.Option(help="Of mft: the share of an answer hidden.")] = 0.4,
    keep: Annotated[float, typer.Option(help="Of sstoken: the share of an answer kept.")] = 0.6,
    gamma: Annotated[float, typer.Option(help="Of sstoken: weight of the excess loss.")] = 0.5,
    normalize: _Normalize = "minmax",
    exclude_sink: _ExcludeSink = False,
    max_length: Annotated[int, typer.Option(help="Tokens of a lesson that stay.")] = 1024,
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    seed: shared.Seed = 0,
    limit: shared.Limit = None,
    no_chat: shared.NoChat = False,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Show which tokens of your data a training method would learn from.

    With --html every text, each answer token in the colour of its score; nothing is trained. An
    option of another method is refused.
    """
    from pertoken.cli.progress import progress_bar
    from pertoken.train.choice import check_settings, choose_tokens
    from pertoken.train.lessons import Lesson, read_lessons, read_pairs

    output = shared.Output(as_json, html)
    _check(context)
    check_settings(rate, keep, gamma, normalize)
    if method == "cdpo":
        lessons = [Lesson(one.prompt, one.rejected, one.place) for one in read_pairs(data, limit)]
    else:
        lessons = read_lessons(data, limit)
    loaded, tokenizer = shared.load(positive or model, dtype)
    past = _second("history", history, dtype, tokenizer, "an earlier state of the model")
    other = _second("negative", negative, dtype, tokenizer, "a copy of the positive one")
    with progress_bar() as tell:
        found = choose_tokens(
            method,
            lessons,
            loaded,
            tokenizer,
            history=past,
            negative=other,
            rate=rate,
            gamma=gamma,
            keep=keep,
            normalize=normalize,  # type: ignore[arg-type]  # checked there
            exclude_sink=exclude_sink,
            max_length=max_length,
            chat=not no_chat,
            seed=seed,
            progress=tell,
        )
    if not output.write(found):
        typer.echo(found.table())


def _check(context: typer.Context) -> None:
    """Raise PertokenError for an unknown method, and for options it lacks or has no use for."""
    from pertoken.train.choice import CHOOSERS

    method = context.params["method"]
    if method not in CHOOSERS:
        raise PertokenError(
            f"no tokens can be shown of {method!r}{nearest(method, CHOOSERS)}; there is: "
            f"{', '.join(CHOOSERS)}"
        )
    given = {name for name in context.params if shared.given(context, name)}
    for owner, names in _OWN.items():
        for name in names:
            option = f"--{name.replace('_', '-')}"
            if owner != method and name in given:
                raise PertokenError(f"{option} belongs to {owner}, not to {method}")
            if owner == method == "cdpo" and name not in given:
                raise PertokenError(
                    f"cdpo needs {option}: a copy of the model, see `pertoken pairs`"
                )
    if method == "cdpo" and "model" in given:
        raise PertokenError("cdpo reads --positive and --negative: leave --model out")


def _second(side: str, name: str | None, dtype: str | None, tokenizer: Any, must: str) -> Any:
    """The history or negative model, None for none; PertokenError where its tokens are others."""
    from pertoken.train._keeping import check_tokenizer

    if name is None:
        return None
    found, own = shared.load(name, dtype)
    check_tokenizer(side, own, tokenizer, must)
    return found
