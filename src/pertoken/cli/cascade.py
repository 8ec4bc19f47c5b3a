"""`pertoken cascade …`: fit a deferral rule to two models, draw its curve, answer with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.cli._group import Group
from pertoken.errors import PertokenError, nearest

_MEMBER = "A model, or an OpenAI-compatible endpoint: http://localhost:8000/v1#NAME."
_Small = Annotated[str, typer.Argument(metavar="SMALL", help=f"Answers first. {_MEMBER}")]
_Large = Annotated[str, typer.Argument(metavar="LARGE", help="Is asked where SMALL is not sure.")]
_Data = Annotated[
    Path, typer.Argument(metavar="DATA", help='A .jsonl file of {"prompt", "answer"} lines.')
]
_Net = Annotated[str, typer.Option(help="Of a learned rule: logistic or mlp.")]
_Layer = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="LARGE's block that post-hoc-embed-1+2 reads.", show_default="a quarter"
    ),
]
_Quality = Annotated[
    str, typer.Option(help="exact: the answer is the right one; contains: it stands in it.")
]
_Stop = Annotated[
    list[str] | None,
    typer.Option(metavar="STRING", help="Ends an answer; repeatable. \\n is a line break."),
]
_Answers = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Where the models' answers go, a JSON line each; what is there is not asked again. "
        "The questions' file with .answered.jsonl behind its name if not given.",
    ),
]
_RuleFile = Annotated[Path, typer.Option("--rule", metavar="FILE", help="Of `cascade fit`.")]


def register(app: typer.Typer) -> None:
    """Add the group and its commands."""
    group = typer.Typer(
        cls=Group,
        help="Ask a small model first, and a large one where the small is not sure.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command("fit")(fit)
    group.command("curve")(curve)
    group.command("generate")(generate)
    app.add_typer(group, name="cascade")


def fit(
    small: _Small,
    large: _Large,
    data: _Data,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the fitted rule goes.")],
    rule: Annotated[
        str, typer.Option(metavar="NAME", help="chow-sum, chow-quantile-0.2, …: see the guide.")
    ] = "post-hoc-quantile",
    net: _Net = "logistic",
    layer: _Layer = None,
    quality: _Quality = "exact",
    stop: _Stop = None,
    answers: _Answers = None,
    dtype: shared.Dtype = None,
    timeout: shared.Timeout = None,
    seed: shared.Seed = 0,
    limit: shared.Limit = None,
    max_new_tokens: shared.MaxNewTokens = 64,
    no_chat: shared.NoChat = False,
    as_json: shared.Json = None,
) -> None:
    """Ask both models the questions of DATA, and fit a rule that says whose answer counts."""
    from pertoken.decode.cascade import Cascade

    kept = answers or _beside(data)
    output = shared.Output(as_json, None, out=out, answers=kept)
    prompts, references = _read(data, limit)
    judge = _quality(quality)
    first, second = _members(small, large, dtype, timeout)
    made = Cascade(
        first,
        second,
        rule,
        net=net,
        layer=layer,
        max_new_tokens=max_new_tokens,
        stop=[each.replace("\\n", "\n") for each in stop or []],
        chat=not no_chat,
        seed=seed,
    )
    made.check_fit(prompts)
    with _asking(kept) as tell:
        pairs = made.answer(prompts, references, quality=judge, path=kept, progress=tell)
    made.fit(pairs).save(out)
    right = {
        role: sum(values) / len(pairs)
        for role, values in (
            ("small", [pair.small_quality or 0.0 for pair in pairs]),
            ("large", [pair.large_quality or 0.0 for pair in pairs]),
        )
    }
    found = {"rule": rule, "alpha": made.alpha, "questions": len(pairs), "quality": right}
    if not output.write(found):
        chosen = "" if made.alpha is None else f" (quantile {made.alpha:g})"
        print(f"{rule}{chosen} fitted on {len(pairs)} questions, written to {out}")
        print(f"quality of small {right['small']:.4g}, of large {right['large']:.4g}")


def curve(
    small: _Small,
    large: _Large,
    data: _Data,
    rule: _RuleFile,
    quality: _Quality = "exact",
    answers: _Answers = None,
    dtype: shared.Dtype = None,
    timeout: shared.Timeout = None,
    limit: shared.Limit = None,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Draw a fitted rule's quality against the deferral rate, on questions it was not fitted on."""
    from pertoken.decode.cascade import Cascade

    kept = answers or _beside(data)
    output = shared.Output(as_json, html, answers=kept)
    prompts, references = _read(data, limit)
    judge = _quality(quality)
    made = Cascade.load(rule, *_members(small, large, dtype, timeout))
    made.check_curve(prompts)
    with _asking(kept) as tell:
        pairs = made.answer(prompts, references, quality=judge, path=kept, progress=tell)
    found = made.curve(pairs)
    if not output.write(found):
        print(found.table())


def generate(
    small: _Small,
    large: _Large,
    rule: _RuleFile,
    rate: Annotated[float, typer.Option(help="Share of the prompts that LARGE answers, 0 to 1.")],
    prompts: shared.Prompts = None,
    answers: _Answers = None,
    dtype: shared.Dtype = None,
    timeout: shared.Timeout = None,
    limit: shared.Limit = None,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Answer prompts, about --rate of them by the large model; run it again to go on."""
    from pertoken.decode.cascade import Cascade
    from pertoken.prompts import read_prompts

    kept = answers or (prompts and _beside(prompts))
    output = shared.Output(as_json, html, answers=kept)
    if not 0 <= rate <= 1:
        raise PertokenError(f"--rate is a share from 0 to 1, got {rate:g}")
    asked = [each.text for each in read_prompts(prompts, limit)]
    made = Cascade.load(rule, *_members(small, large, dtype, timeout))
    with _asking(kept) as tell:
        found = made.generate(asked, rate=rate, path=kept, progress=tell)
    if not output.write(found):
        print(found.table())


@contextmanager
def _asking(kept: Path | None) -> Iterator[Any]:
    """A progress bar; Ctrl-C says where the answers are."""
    from pertoken.cli.progress import progress_bar

    with progress_bar() as tell:
        try:
            yield tell
        except KeyboardInterrupt:
            if kept is not None and kept.is_file():
                typer.echo(f"answers so far are in {kept}; run it again to go on", err=True)
            raise


def _beside(questions: Path) -> Path:
    """Where the answers to a file of questions go."""
    return questions.with_name(f"{questions.name}.answered.jsonl")


def _members(small: str, large: str, dtype: str | None, timeout: float | None) -> tuple[Any, Any]:
    """What SMALL and LARGE name; every endpoint before any model is loaded."""
    found = {name: shared.endpoint(name, timeout) for name in (small, large)}
    for name, there in found.items():
        if there is None:
            found[name] = shared.load(name, dtype)
    return found[small], found[large]


def _quality(name: str) -> Any:
    from pertoken.decode._pairs import contains, exact_match

    known = {"exact": exact_match, "contains": contains}
    if name not in known:
        raise PertokenError(f"--quality is exact or contains, not {name!r}{nearest(name, known)}")
    return known[name]


def _read(path: Path, limit: int | None) -> tuple[list[str], list[str]]:
    """Prompts and answers of a file; PertokenError that names the line."""
    from pertoken.prompts import read_utf8

    prompts: list[str] = []
    references: list[str] = []
    for number, line in enumerate(read_utf8(path, "data file").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PertokenError(f"{path}, line {number}: not JSON ({error.msg})") from None
        texts: list[Any] = [row.get("prompt"), row.get("answer")] if isinstance(row, dict) else []
        if len([each for each in texts if isinstance(each, str) and each.strip()]) < 2:
            raise PertokenError(
                f'{path}, line {number}: {{"prompt": "…", "answer": "…"}} is wanted'
            )
        prompts.append(texts[0])
        references.append(texts[1])
    if not prompts:
        raise PertokenError(f"data file {path} is empty")
    return prompts[:limit], references[:limit]
