"""`pertoken cache`: a conversation's KV cache on disk, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pertoken.cli import options as shared
from pertoken.cli._group import Group
from pertoken.errors import PertokenError
from pertoken.prompts import positions

if TYPE_CHECKING:
    from pertoken.cache.archive import Inspection, Restored, Saved

group = typer.Typer(
    cls=Group,
    help="A conversation's KV cache on disk, and back.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(group, name="cache")


@group.command("save")
def save(
    conversation: Annotated[
        Path,
        typer.Argument(
            help='.jsonl with {"role": "user", "content": "…"} lines, .json with a list of them, '
            "or .txt."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.ptkv", help="The file to write.")],
    level: Annotated[
        str,
        typer.Option(
            metavar="raw|int8|tokens",
            help="raw: keys and values, fastest back; int8: a quarter of float32, rounded; tokens: "
            "only the ids, coded by the model itself, tiny but slow back.",
        ),
    ] = "raw",
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    as_json: shared.Json = None,
) -> None:
    """Read a conversation with a model and store what it would have to compute again."""
    from pertoken.cache.archive import check_level, save_cache
    from pertoken.conversation import encode_conversation, read_conversation

    output = shared.Output(as_json, out=out)
    check_level(level)  # all that can be refused before a model is loaded
    messages = read_conversation(conversation)
    loaded, tokenizer = shared.load(model, dtype)
    ids = encode_conversation(tokenizer, loaded, messages)
    if level == "tokens":
        typer.echo(f"coding {ids.shape[1]:,} tokens, two forward passes each", err=True)
    saved = save_cache(out, loaded, ids, level=level)
    if not output.write(saved):
        typer.echo("\n".join(saved_lines(saved)))


@group.command("restore")
def restore(
    file: Annotated[Path, typer.Argument(help="A .ptkv file.")],
    turn: Annotated[
        str | None,
        typer.Option("--continue", metavar="TEXT", help="Go on with this message of the user."),
    ] = None,
    model: shared.Model = "smollm2",
    dtype: shared.Dtype = None,
    max_new_tokens: shared.MaxNewTokens = 256,
    no_chat: shared.NoChat = False,
) -> None:
    """Bring a conversation and its cache back, print it, and go on with it."""
    from pertoken.cache.archive import inspect_cache, restore_cache

    if turn is not None and not turn.strip():
        raise PertokenError("--continue is empty: there is no text to go on with")
    header = inspect_cache(file).header  # no model is loaded for a file that is none
    loaded, tokenizer = shared.load(model, dtype)
    new: list[int] = []
    if turn is not None:  # what does not fit is refused before the cache is read or computed
        new = _turn_ids(loaded, tokenizer, turn, header.tokens, max_new_tokens, no_chat)
    if header.level == "tokens":
        typer.echo(f"decoding {header.tokens:,} tokens, a forward pass each", err=True)
    restored = restore_cache(file, loaded)
    typer.echo(tokenizer.decode(restored.input_ids[0], skip_special_tokens=True))
    for line in restored_lines(restored):
        typer.echo(line, err=True)
    if turn is not None:
        _go_on(loaded, tokenizer, restored, new, max_new_tokens)


def _turn_ids(
    model: Any, tokenizer: Any, turn: str, held: int, max_new_tokens: int, no_chat: bool
) -> list[int]:
    """Ids of another message behind `held` tokens; PertokenError where it does not fit."""
    from pertoken.conversation import next_turn

    if no_chat:
        new: list[int] = tokenizer(turn, add_special_tokens=False)["input_ids"]
    else:
        new = next_turn(tokenizer, turn, closed=True)
    room = positions(model)
    if room is not None and held + len(new) + max_new_tokens > room:
        raise PertokenError(
            f"{held + len(new)} tokens and {max_new_tokens} new ones do not fit the model's {room} "
            "positions; shorten --continue or --max-new-tokens"
        )
    return new


def _go_on(
    model: Any, tokenizer: Any, restored: Restored, new: list[int], max_new_tokens: int
) -> None:
    """Stream the answer to another message, behind the cache that was restored."""
    import torch

    from pertoken.cli.generate import Streamer

    ids = torch.cat((restored.input_ids, restored.input_ids.new_tensor([new])), -1)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=restored.cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=Streamer(tokenizer),
    )


@group.command("inspect")
def inspect(
    file: Annotated[Path, typer.Argument(help="A .ptkv file.")],
    as_json: shared.Json = None,
) -> None:
    """Say what a file holds and whether all of it is whole; 1 where it is not."""
    from pertoken.cache.archive import inspect_cache

    output = shared.Output(as_json)
    found = inspect_cache(file)
    if not output.write(found):
        typer.echo("\n".join(inspection_lines(found)))
    if found.damage:
        raise typer.Exit(1)


def saved_lines(saved: Saved) -> list[str]:
    """What was written, for people."""
    lines = [
        f"{saved.path}: {saved.tokens:,} tokens at level {saved.level}, {saved.bytes:,} bytes, "
        f"{saved.seconds:.2f} s"
    ]
    if saved.cross_entropy is not None:
        lines.append(
            f"ids coded in {saved.bits_per_token:.2f} bits per token; the model's cross-entropy is "
            f"{saved.cross_entropy:.2f}"
        )
    if saved.raw_chunks:
        lines.append(f"{saved.raw_chunks} chunks did not come out the same twice: kept as ids")
    return lines


def restored_lines(restored: Restored) -> list[str]:
    """What came out of a file and what had to be computed, for people."""
    lines = [
        f"{restored.input_ids.shape[1]:,} tokens in {restored.seconds:.2f} s; keys and values of "
        f"{restored.verified:,} read and checked, of {restored.prefilled:,} computed"
    ]
    if restored.damage:
        lines.append(f"{restored.damage}: what is missing was computed from the ids")
    return lines


def inspection_lines(found: Inspection) -> list[str]:
    """What a file says of itself, for people."""
    header = found.header
    per_token = 8 * found.payload_bytes / header.tokens
    chunks = len(header.spans(header.tokens))
    facts = {
        "file": f"{found.path}, {found.bytes:,} bytes, format version {header.version}",
        "model": f"{header.model} ({header.dtype}), fingerprint {header.fingerprint}",
        "level": f"{header.level}, {per_token:,.2f} bits per token without frames",
        "tokens": f"{header.tokens:,} in chunks of {header.chunk}; the cache has {header.rows:,}",
        "ids": f"{found.coded_chunks} of {chunks} chunks coded by the model",
        "written": ", ".join(f"{name} {value}" for name, value in header.numerics.items()),
        "whole": f"no: {found.damage}" if found.damage else "yes, every part",
    }
    return [f"{name:8}{fact}" for name, fact in facts.items()]
