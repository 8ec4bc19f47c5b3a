"""`pertoken pairs`: sample a model's answers, and choose those that critical-token DPO needs."""

from __future__ import annotations

import hashlib
import json
import zlib
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
_Samples = Annotated[int, typer.Option(callback=shared.positive, help="Answers to each question.")]
_Batch = Annotated[int, typer.Option(callback=shared.positive, help="Answers written at once.")]
_SAMPLES = "samples.jsonl"
_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model")  # weights, settings, tokenizer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("pairs")(pairs)


def pairs(
    data: _Data,
    out: _Out,
    samples: _Samples = 64,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 0.5,
    top_p: Annotated[float, typer.Option(help="Of the sampling.")] = 0.95,
    batch: _Batch = 64,
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    seed: shared.Seed = 0,
    limit: shared.Limit = None,
    max_new_tokens: shared.MaxNewTokens = 1024,
    no_chat: shared.NoChat = False,
) -> None:
    """Sample answers, and choose right and wrong ones to train on.

    Writes positive.jsonl and negative.jsonl, which the two copies learn with `pertoken train sft`,
    and pairs.jsonl for `pertoken train cdpo`. Samples are kept: run it again to go on, with the
    same model; they are judged each time, by the answers that DATA gives then.
    """
    from pertoken._files import write_whole
    from pertoken.cli.progress import progress_bar
    from pertoken.train import contrast_data, read_lessons
    from pertoken.train._kept import keep_row, kept_rows
    from pertoken.train.critical_tokens import check_sampling
    from pertoken.train.sampled import judged

    check_sampling(samples, batch, temperature, top_p)
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
        **_state(model),
    }
    _refuse(lessons, out)
    kept = out / _SAMPLES
    done = {
        row["question"]: [str(one["text"]) for one in row["answers"]]
        for row in kept_rows(kept, settings)
    }
    left = [one for one in lessons if one.prompt not in done]
    if left:
        loaded = shared.load(model, dtype)
        out.mkdir(parents=True, exist_ok=True)
        with progress_bar() as tell:
            for place, one in enumerate(left):
                tell("questions", place, len(left))
                done[one.prompt] = _sampled(*loaded, one, batch, settings)
                texts = [{"text": text} for text in done[one.prompt]]
                keep_row(kept, settings, {"question": one.prompt, "answers": texts})
    answers = [[judged(text, one) for text in done[one.prompt]] for one in lessons]
    found = contrast_data([one.prompt for one in lessons], answers, seed)
    for name, rows in _files(found).items():
        write_whole(out / name, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
    typer.echo(
        f"{len(found.pairs)} pairs, {len(found.positive)} right and {len(found.negative)} wrong "
        f"answers to learn, of {samples * len(lessons)} sampled ({found.unread} could not be "
        f"read); they are in {out}"
    )


def _refuse(lessons: list[Lesson], out: Path) -> None:
    """PertokenError for lines that hold no question, and a folder that is a file."""
    for one in lessons:
        if one.messages:
            raise PertokenError(f'{one.place}: pairs are made of {{"question", "answer"}} lines')
    if out.exists() and not out.is_dir():
        raise PertokenError(f"can't write {out}: it is a file, and the files need a folder")


def _state(model: str) -> dict[str, str]:
    """What tells a model of this machine from one that was trained in its place; of others nothing.

    Size and time of its files: to go on behind the last question no model is loaded.
    """
    place = Path(model).expanduser()
    if not place.exists():
        return {}
    files = [place] if place.is_file() else [path for one in _FILES for path in place.glob(one)]
    about = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return {"files": hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]}


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
