"""`pertoken probe consistency` and `characters`: what a model makes of words and their letters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.errors import PertokenError

__all__ = ["characters", "consistency"]

_Texts = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Texts, one a line, or .jsonl; words in [brackets] are replaced, else drawn ones. A "
        "built-in sample if not given.",
    ),
]
_Share = Annotated[
    float, typer.Option(metavar="X", help="Of the words that are no stop words, to be replaced.")
]
_Batch = Annotated[int, typer.Option(metavar="N", callback=shared.positive, help="Asked at once.")]
_Studied = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file, short name, or URL#NAME."),
]
_Words = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A text whose words of 4 to 10 letters are asked about.",
        show_default="Shakespeare's plays",
    ),
]
_Each = Annotated[
    int, typer.Option(metavar="N", help="Questions of each task and each length of word.")
]
_Tasks = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[,NAME...]",
        help="Of count_character_frequency, count_unique_chars, find_first_occurrence and "
        "find_last_occurrence.",
        show_default="all four",
    ),
]
_Forms = Annotated[
    str,
    typer.Option(
        metavar="NAME[,NAME...]", help="plain, or spelled: the word letter by letter as well."
    ),
]
_Shots = Annotated[int, typer.Option(metavar="N", help="Solved questions in front, 0 to 6.")]
_Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Where each reply goes, a JSON line; a run that broke off goes on behind them.",
    ),
]
_Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Whose tokens the answers are held against: of an endpoint's model."
    ),
]


def consistency(
    model: shared.ModelArgument = "smollm2",
    texts: _Texts = None,
    share: _Share = 0.05,
    batch: _Batch = 8,
    dtype: shared.Dtype = None,
    seed: shared.Seed = 0,
    limit: shared.Limit = None,
    max_new_tokens: shared.OptionalMaxNewTokens = None,
    no_chat: shared.NoChat = False,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Have words replaced and see whether the text changed or only its tokens (phantom edits).

    As it is and with all encodings of the words masked; then how far the next token depends on
    which tokens write a word.
    """
    output = shared.Output(as_json, html)
    from pertoken.cli.probe import Probes
    from pertoken.cli.progress import progress_bar
    from pertoken.probe import encoding_sensitivity, token_consistency
    from pertoken.prompts import read_prompts

    read = [each.text for each in read_prompts(texts, limit)]
    options: dict[str, Any] = {"share": share, "seed": seed}
    with progress_bar() as tell:
        tell(f"loading {model}", 0, 0)
        loaded, tokenizer = shared.load(model, dtype)
        found = token_consistency(
            loaded,
            tokenizer,
            read,
            mask=True,
            chat=False if no_chat else None,
            max_new_tokens=max_new_tokens,
            batch=batch,
            progress=tell,
            **options,
        )
        probes: dict[str, Any] = {"consistency": found}
        try:
            probes["sensitivity"] = encoding_sensitivity(
                loaded, tokenizer, read, progress=tell, **options
            )
        except PertokenError as error:  # a tokenizer of bytes has one encoding of each word
            typer.echo(str(error), err=True)
    result = Probes({"model": model}, probes, "Words and their tokens")
    if not output.write(result):
        print(result.table())


def characters(
    model: _Studied = "smollm2",
    words: _Words = None,
    each: _Each = 10,
    tasks: _Tasks = None,
    forms: _Forms = "plain",
    shots: _Shots = 0,
    out: _Out = None,
    tokenizer: _Tokenizer = None,
    batch: _Batch = 16,
    dtype: shared.Dtype = None,
    timeout: shared.Timeout = None,
    seed: shared.Seed = 0,
    limit: shared.Limit = None,
    max_new_tokens: shared.MaxNewTokens = 8,
    no_chat: shared.NoChat = False,
    as_json: shared.Json = None,
    html: shared.Html = None,
) -> None:
    """Ask a model to count and to find letters in words (CharBench).

    MODEL may also be an OpenAI-compatible endpoint: http://localhost:8000/v1#NAME.
    """
    output = shared.Output(as_json, html, out=out)
    from pertoken.cli.progress import progress_bar
    from pertoken.probe._questions import TASKS, questions, words_in
    from pertoken.probe.characters import charbench, check_settings, default_words
    from pertoken.prompts import read_utf8

    asked = _names(tasks) if tasks is not None else list(TASKS)
    check_settings(
        asked, _names(forms), shots, max_new_tokens=max_new_tokens, batch=batch, limit=limit
    )
    read = default_words() if words is None else words_in([read_utf8(words, "file of words")])
    # What can be wrong with the words and tasks is said before a model is loaded too.
    questions(read, each, tasks=asked, seed=seed)
    with progress_bar() as tell:
        tell(f"loading {model}", 0, 0)
        loaded, own = shared.endpoint(model, timeout), None
        if loaded is None:
            loaded, own = shared.load(model, dtype)
        if tokenizer is not None:
            from pertoken.tokenize import open_tokenizer

            own = open_tokenizer(tokenizer)
        found = charbench(
            loaded,
            own,
            read,
            each=each,
            tasks=asked,
            forms=_names(forms),
            shots=shots,
            chat=False if no_chat else None,
            limit=limit,
            max_new_tokens=max_new_tokens,
            batch=batch,
            seed=seed,
            path=out,
            progress=tell,
        )
    found.settings = {"model": model, **found.settings}
    if not output.write(found):
        print(found.table())


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
