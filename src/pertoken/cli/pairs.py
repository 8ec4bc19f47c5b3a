"""`pertoken pairs`: sample a model's answers, and choose those that critical-token DPO needs."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from pertoken.train import ContrastData, Lesson

_Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA", help='A .jsonl file of {"question", "answer"} lines; the answers are known.'
    ),
]
_Out = Annotated[
    Path,
    typer.Option(metavar="DIR", help="Folder for the files; one that is there is gone on with."),
]
_SAMPLES = "samples.jsonl"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("pairs")(pairs)


def pairs(
    data: _Data,
    out: _Out,
    samples: Annotated[int, typer.Option(help="Answers to each question.")] = 64,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 0.5,
    top_p: Annotated[float, typer.Option(help="Of the sampling.")] = 0.95,
    batch: Annotated[int, typer.Option(help="Answers written at once.")] = 64,
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    seed: shared.Seed = 0,
    limit: shared.Limit = None,
    max_new_tokens: shared.MaxNewTokens = 1024,
    no_chat: shared.NoChat = False,
) -> None:
    """Sample answers, and choose right and wrong ones to train on.

    Writes positive.jsonl and negative.jsonl, which the two copies learn with `pertoken train sft`,
    and pairs.jsonl for `pertoken train cdpo`. Samples are kept: run it again to go on; they are
    judged each time, by the answers that DATA gives then.
    """
    from pertoken._files import write_whole
    from pertoken.cli.progress import progress_bar
    from pertoken.train import contrast_data, read_lessons
    from pertoken.train.sampled import judged

    lessons = read_lessons(data, limit)
    settings = {
        "model": model,
        "samples": samples,
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
        "chat": not no_chat,
        "dtype": dtype,
        "seed": seed,
    }
    for one in lessons:
        if one.messages:
            raise PertokenError(f'{one.place}: pairs are made of {{"question", "answer"}} lines')
    if out.exists() and not out.is_dir():
        raise PertokenError(f"can't write {out}: it is a file, and the files need a folder")
    kept = out / _SAMPLES
    done = _kept(kept, settings)
    left = [one for one in lessons if one.prompt not in done]
    if left:
        loaded = shared.load(model, dtype)
        out.mkdir(parents=True, exist_ok=True)
        with progress_bar() as tell:
            for place, one in enumerate(left):
                tell("questions", place, len(left))
                done[one.prompt] = _sampled(*loaded, one, batch, settings)
                _keep(kept, settings, one, done[one.prompt])
    answers = [[judged(text, one) for text in done[one.prompt]] for one in lessons]
    found = contrast_data([one.prompt for one in lessons], answers, seed)
    for name, rows in _files(found).items():
        write_whole(out / name, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    typer.echo(
        f"{len(found.pairs)} pairs, {len(found.positive)} right and {len(found.negative)} wrong "
        f"answers to learn, of {samples * len(lessons)} sampled ({found.unread} could not be "
        f"read); they are in {out}"
    )


def _sampled(
    model: Any, tokenizer: Any, lesson: Lesson, batch: int, settings: dict[str, Any]
) -> list[str]:
    """Answers to a question; the draw is the question's own, whatever was asked before it."""
    from pertoken.train import sample_answers

    (found,) = sample_answers(
        model,
        tokenizer,
        [lesson],
        n=settings["samples"],
        temperature=settings["temperature"],
        top_p=settings["top_p"],
        max_new_tokens=settings["max_new_tokens"],
        batch=batch,
        chat=settings["chat"],
        seed=zlib.crc32(lesson.prompt.encode()) + settings["seed"],
    )
    return [one.text for one in found]


def _files(found: ContrastData) -> dict[str, list[dict[str, str]]]:
    """The rows of each file that training reads."""
    sides = {"positive.jsonl": found.positive, "negative.jsonl": found.negative}
    files = {
        name: [{"prompt": one.prompt, "completion": one.answer} for one in lessons]
        for name, lessons in sides.items()
    }
    files["pairs.jsonl"] = [
        {"prompt": one.prompt, "chosen": one.chosen, "rejected": one.rejected}
        for one in found.pairs
    ]
    return files


def _kept(path: Path, settings: dict[str, Any]) -> dict[str, list[str]]:
    """Texts of an earlier run by question; a line cut off by a kill is dropped."""
    found: dict[str, list[str]] = {}
    if not path.exists():
        return found
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(whole.decode("utf-8", "replace").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            given = row["settings"]
            found[row["question"]] = [str(one["text"]) for one in row["answers"]]
        except (ValueError, KeyError, TypeError):
            raise PertokenError(
                f"{path}, line {number}: no sampled answers; take another folder"
            ) from None
        if given != settings:
            raise PertokenError(
                f"{path} holds answers of other settings ({given}): take another folder"
            )
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return found


def _keep(path: Path, settings: dict[str, Any], lesson: Lesson, texts: Sequence[str]) -> None:
    row = {
        "question": lesson.prompt,
        "settings": settings,
        "answers": [{"text": text} for text in texts],
    }
    with path.open("ab") as file:
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace"))
