"""`pertoken generate` under a constraint: one weighted sample, or particles."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import typer
from transformers import TemperatureLogitsWarper

from pertoken.cli import options as shared
from pertoken.cli._attached import Held, Styled, cache_of, style_of
from pertoken.cli.generate import Streamer, decode_prompt, stats_lines
from pertoken.cli.objects import import_object
from pertoken.decode.awrs import AWRS
from pertoken.decode.constraint import Constraint, RegexConstraint, TextConstraint, ask
from pertoken.decode.particles import smc
from pertoken.errors import PertokenError
from pertoken.prompts import encode_prompt
from pertoken.testing import ByteTokenizer

Maker = Callable[..., Constraint]
"""Makes a constraint when it gets ``tokenizer=``."""


def run(
    prompt: str,
    constraint: tuple[str, Any],
    held: Held,
    *,
    model: str,
    dtype: str | None,
    particles: int | None,
    style: Styled,
    **settings: Any,
) -> bool:
    """Draw under the constraint of an option (its name and value); whether the text is allowed."""
    make = _maker(*constraint)
    loaded, tokenizer = shared.load(model, dtype)
    settings["logits_processor"] = style_of(style, tokenizer)
    if loaded.generation_config.eos_token_id is None:
        raise PertokenError(
            f"{type(loaded).__name__} has no stop token (generation_config.eos_token_id), so no "
            "text of it is ever whole; a constraint needs one"
        )
    draw = draw_one if particles is None else partial(draw_many, particles=particles)
    with cache_of(held, loaded) as cache:
        return draw(loaded, tokenizer, make(tokenizer=tokenizer), prompt, **cache, **settings)


def _maker(option: str, value: Any) -> Maker:
    """The constraint of an option; what can be known to be wrong without a model is said here."""
    if option == "--constraint":
        return partial(_from_python, import_object(value, option), value)
    if option == "--regex":
        make: Maker = partial(RegexConstraint, value)
        make(tokenizer=ByteTokenizer())
        return make
    from pertoken.decode.grammar import JSONSchemaConstraint, LarkConstraint

    kind = JSONSchemaConstraint if option == "--json-schema" else LarkConstraint
    make = partial(_from_file, kind, value, _read(value))
    if kind is JSONSchemaConstraint:  # a grammar may name special tokens of the model's tokenizer
        make(tokenizer=ByteTokenizer())
    return make


def draw_one(
    model: Any,
    tokenizer: Any,
    constraint: Constraint,
    prompt: str,
    *,
    max_new_tokens: int,
    output: shared.Output,
    stats: bool,
    **run: Any,
) -> bool:
    """Stream one text, say its weight on standard error; whether the text is an allowed one."""
    streamer = Streamer(tokenizer, silent=output.quiet)
    sampler = AWRS(constraint, masked=hasattr(constraint, "allowed"), streamer=streamer)
    try:
        ids, seconds = decode_prompt(
            model,
            tokenizer,
            sampler,
            prompt,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            **run,
            **_PLAIN,
        )
    except PertokenError:
        if streamer.tokens:
            streamer.end()
        if sampler.log_weights != [-math.inf]:
            raise
        raise PertokenError(
            f"weight 0: the constraint refused {sampler.max_rejects} tokens in a row, or all that "
            "the model gives mass to; loosen it, or draw several texts with --particles N"
        ) from None
    whole = sampler.completed[0]
    text = ids[:-1] if whole else ids
    found = {
        "text": tokenizer.decode(text),
        "ids": text,
        "log_weight": sampler.log_weights[0],
        "checks": sampler.checks[0],
        "allowed": whole or ask(constraint.complete, text),
        "cut": not whole,
    }
    typer.echo(_weight_line(found, len(ids)), err=True)
    if stats:
        typer.echo(stats_lines(len(ids), seconds, None)[0], err=True)
    output.write(found)
    return bool(found["allowed"])


def _weight_line(found: Mapping[str, Any], tokens: int) -> str:
    """What the one text is worth, and whether it is an allowed one where it was cut.

    >>> _weight_line({"log_weight": -1.5, "checks": 7, "cut": True, "allowed": False}, 3)
    'log-weight -1.50 nats; 7 checks ... tokens; cut at --max-new-tokens, not an allowed text ...'
    """
    line = (
        f"log-weight {found['log_weight']:.2f} nats; {found['checks']} checks of the constraint "
        f"for {tokens} tokens"
    )
    if found["cut"]:
        allowed = "" if found["allowed"] else "not "
        line += f"; cut at --max-new-tokens, {allowed}an allowed text as it is"
    return line


def draw_many(
    model: Any,
    tokenizer: Any,
    constraint: Constraint,
    prompt: str,
    *,
    particles: int,
    max_new_tokens: int,
    temperature: float,
    seed: int | None,
    chat: bool,
    output: shared.Output,
    stats: bool,
    logits_processor: list[Any],
) -> bool:
    """Print the texts of particles with their probabilities, and what the run was worth."""
    began = time.perf_counter()
    warmer = [TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
    found = smc(
        model,
        constraint,
        encode_prompt(tokenizer, model, prompt, max_new_tokens, chat),
        particles=particles,
        max_new_tokens=max_new_tokens,
        logits_processor=[*logits_processor, *warmer] or None,
        tokenizer=tokenizer,
        seed=seed,
        masked=hasattr(constraint, "allowed"),
    )
    if not output.quiet:
        print(found.table())
    if stats:
        seconds, tokens = time.perf_counter() - began, sum(map(len, found.ids))
        typer.echo(stats_lines(tokens, seconds, None)[0], err=True)
    texts = [
        {"text": tokenizer.decode(list(ids)), "ids": list(ids), "weight": weight}
        for ids, weight in found.posterior().items()
    ]
    result = {
        "texts": texts,
        "particles": particles,
        "effective_sample_size": found.effective_sample_size,
        "log_marginal": found.log_marginal,
        "checks": found.checks,
        "resampled": found.resampled,
    }
    output.write(result)
    return True


# What `generate` or a model's own settings would change in the distribution, undone.
_PLAIN: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + 1
        raise PertokenError(f"{file} is not UTF-8 (byte {at}); save it as UTF-8") from None
    except OSError as error:
        raise PertokenError(f"{file} can't be read: {error.strerror}") from None


def _from_file(kind: Maker, file: Path, text: str, *, tokenizer: Any) -> Constraint:
    try:
        return kind(text, tokenizer=tokenizer)
    except PertokenError as error:
        raise PertokenError(f"{file}: {error}") from None


def _from_python(found: Any, target: str, *, tokenizer: Any) -> Constraint:
    """A constraint from what the user wrote: see the help of --constraint."""
    if isinstance(found, type):
        try:
            found = found(tokenizer)
        except Exception as error:
            raise PertokenError(
                f"--constraint {target}: {found.__name__}(tokenizer) raised "
                f"{type(error).__name__} ({error})"
            ) from error
    if callable(getattr(found, "accepts", None)) and callable(getattr(found, "complete", None)):
        return found
    if not callable(found):
        raise PertokenError(
            f"--constraint {target}: this is neither a function of text nor an object with "
            "accepts(ids) and complete(ids)"
        )
    return TextConstraint(found, getattr(found, "complete", None), tokenizer=tokenizer)
