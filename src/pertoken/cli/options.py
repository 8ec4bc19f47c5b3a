"""The options that commands share: one definition each, so that they mean the same everywhere.

A command lists its own options first, then those of here in their order here: model, dtype,
time-out, seed, limit, length, chat, output. `Output` is what `--json` and `--html` mean, `load`
what `--model` and `--dtype` do.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pertoken.errors import PertokenError

__all__ = [
    "AcceptLicence",
    "Budget",
    "Dtype",
    "Html",
    "Json",
    "Limit",
    "MaxNewTokens",
    "Model",
    "ModelArgument",
    "NoChat",
    "OptionalMaxNewTokens",
    "OptionalModel",
    "OptionalSeed",
    "Output",
    "Prompts",
    "Ray",
    "Sample",
    "Seed",
    "Stats",
    "Temperature",
    "Timeout",
    "TopP",
    "given",
    "load",
    "positive",
    "read_prompt",
    "sampling",
]


def positive(parameter: typer.CallbackParam, value: int | None) -> int | None:
    """The check of an option that counts something."""
    if value is not None and value < 1:
        raise PertokenError(f"{parameter.opts[0]} must be 1 or more, got {value}")
    return value


def _temperature(value: float | None) -> float | None:
    if value is not None and not 0 < value < float("inf"):
        raise PertokenError(
            f"--temperature must be above 0, got {value:g}; leave it out for the best tokens"
        )
    return value


def _top_p(value: float | None) -> float | None:
    if value is not None and not 0 < value <= 1:
        raise PertokenError(f"--top-p is a share above 0 and at most 1, got {value:g}")
    return value


_MODEL = "Hub id, folder, .gguf file or short name."

Sample = Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the best.")]
Temperature = Annotated[
    float | None,
    typer.Option(callback=_temperature, help="Above 0; implies --sample. 1 is the model's own."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        callback=_top_p,
        help="Above 0, at most 1; implies --sample: among the likeliest tokens of this share.",
    ),
]
Budget = Annotated[str, typer.Option(metavar="auto|published|N", help="Tokens drafted per step.")]
Prompts = Annotated[
    Path | None, typer.Option(help=".jsonl or .txt; a built-in sample if not given.")
]
Stats = Annotated[bool, typer.Option("--stats", help="Say on standard error how it went.")]
AcceptLicence = Annotated[
    bool, typer.Option("--accept-licence", help="Consent to terms that are unclear or special.")
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL)]
Model = Annotated[str, typer.Option("--model", metavar="NAME", help=_MODEL)]
OptionalModel = Annotated[str | None, typer.Option("--model", metavar="NAME", help=_MODEL)]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="float32, bfloat16, float16 or float64; the device's default if not given.",
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout", metavar="SECONDS", help="That an endpoint may be silent; 60 if not given."
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Of all that is drawn at random.")]
OptionalSeed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Of all that is drawn at random.")
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", callback=positive, help="Only the first N."),
]
_MAX_NEW_TOKENS = typer.Option(
    "--max-new-tokens", metavar="N", callback=positive, help="Tokens written at most, each time."
)
MaxNewTokens = Annotated[int, _MAX_NEW_TOKENS]
OptionalMaxNewTokens = Annotated[int | None, _MAX_NEW_TOKENS]
NoChat = Annotated[
    bool, typer.Option("--no-chat", help="The bare text, without the chat template.")
]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="PATH", help="Write JSON; - prints it and nothing else."),
]
Ray = Annotated[
    bool, typer.Option("--ray", help="On Ray: a local one of --jobs workers, or RAY_ADDRESS.")
]
Html = Annotated[
    str | None,
    typer.Option("--html", metavar="PATH", help="Write a page; - prints it and nothing else."),
]


class Output:
    """Where a result goes: PATH, or "-" for standard output, which then holds nothing else.

    Raises PertokenError, before any work, for a place that could not be written, and for one that
    two results want: `others` are further files of the command by their option.
    """

    def __init__(
        self, as_json: str | None, html: str | None = None, **others: str | Path | None
    ) -> None:
        from pertoken._files import check_target

        self.json, self.html = as_json, html
        taken: dict[str, str] = {}
        for name, place in {**others, "json": as_json, "html": html}.items():
            if place is None:
                continue
            if str(place) in taken:
                where = "standard output" if place == "-" else place
                raise PertokenError(
                    f"--{taken[str(place)]} and --{name} both want to write {where}"
                )
            taken[str(place)] = name
            if place != "-":
                check_target(Path(place))

    @property
    def quiet(self) -> bool:
        """Whether standard output belongs to JSON or a page."""
        return "-" in (self.json, self.html)

    def write(self, result: Any, values: Any = None) -> bool:
        """Write a result where it was asked for; `quiet`, so that the caller prints it or not.

        result: a `Result`, or plain values where there is no page. values: the JSON, where it
        holds more than the result's own.
        """
        from pertoken.result import Result, to_json

        if values is None:
            values = result.to_dict() if isinstance(result, Result) else result
        if self.json == "-":
            _print(to_json(values))
        elif self.json is not None:
            to_json(values, self.json)
        if self.html == "-":
            _print(result.to_html())
        elif self.html is not None:
            result.to_html(self.html)
        return self.quiet


def _print(text: str) -> None:
    # Half a surrogate pair, such as Python makes of broken bytes in a name, can't be printed.
    print(text.encode("utf-8", "replace").decode("utf-8"))


def load(model: str, dtype: str | None = None) -> tuple[Any, Any]:
    """The decoder-only model of `--model` in the dtype of `--dtype`, and its tokenizer."""
    import pertoken

    return pertoken.load(model, dtype=dtype, kind="decoder")


def endpoint(name: str, timeout: float | None) -> Any:
    """The `Endpoint` that URL#NAME means; None for the name of a model here."""
    if not name.startswith(("http://", "https://")):
        return None
    from pertoken.endpoint import Endpoint

    url, _, model = name.partition("#")
    if not model:
        raise PertokenError(f"{name}: name the endpoint's model behind it, as in {url}#NAME")
    wait: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
    return Endpoint(url, model=model, **wait)


def given(context: typer.Context, name: str) -> bool:
    """Was an option given, or is it at its default?"""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def sampling(sample: bool, temperature: float | None, top_p: float | None = None) -> dict[str, Any]:
    """What `--sample`, `--temperature` and `--top-p` mean to `generate`.

    >>> sampling(False, None), sampling(False, 0.7)
    ({'do_sample': False}, {'do_sample': True, 'temperature': 0.7})
    """
    if sample or temperature is not None or top_p is not None:
        cut = {} if top_p is None else {"top_p": top_p}
        return {"do_sample": True, "temperature": temperature or 1.0, **cut}
    return {"do_sample": False}


def read_prompt(prompt: str | None, example: str) -> str:
    """A prompt from the command line, or all of standard input for "-" and for nothing.

    example: a call that works, shown where there is neither. Raises PertokenError for a prompt
    that is empty or not UTF-8.
    """
    if prompt is None and sys.stdin.isatty():
        raise PertokenError(f"give a prompt: {example}")
    if prompt in (None, "-"):
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise PertokenError(
                f"the prompt on standard input is not UTF-8 (byte {error.start + 1})"
            ) from None
    if not prompt or not prompt.strip():
        raise PertokenError("the prompt is empty")
    return prompt
