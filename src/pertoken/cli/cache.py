"""`pertoken cache`: a conversation's KV cache on disk, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from pertoken.cache.archive import Inspection, Restored, Saved

group = typer.Typer(
    help="A conversation's KV cache on disk, and back.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_Model = Annotated[str, typer.Option(help="Hub id, folder, .gguf file or short name.")]
_Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float64; the device's default.")
]


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
    model: _Model = "smollm2",
    dtype: _Dtype = None,
) -> None:
    """Read a conversation with a model and store what it would have to compute again."""
    import pertoken
    from pertoken._files import check_target
    from pertoken.cache.archive import check_level, save_cache
    from pertoken.conversation import encode_conversation, read_conversation

    check_level(level)  # all that can be refused before a model is loaded
    messages = read_conversation(conversation)
    check_target(out)
    loaded, tokenizer = pertoken.load(model, dtype=dtype, kind="decoder")
    ids = encode_conversation(tokenizer, loaded, messages)
    if level == "tokens":
        typer.echo(f"coding {ids.shape[1]:,} tokens, two forward passes each", err=True)
    for line in saved_lines(save_cache(out, loaded, ids, level=level)):
        typer.echo(line)


@group.command("restore")
def restore(
    file: Annotated[Path, typer.Argument(help="A .ptkv file.")],
    model: _Model = "smollm2",
    dtype: _Dtype = None,
    turn: Annotated[
        str | None,
        typer.Option("--continue", metavar="TEXT", help="Go on with this message of the user."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="With --continue: new tokens at most.")] = 256,
    no_chat: Annotated[
        bool, typer.Option("--no-chat", help="With --continue: the bare text, no chat template.")
    ] = False,
) -> None:
    """Bring a conversation and its cache back, print it, and go on with it."""
    import torch

    import pertoken
    from pertoken.cache.archive import inspect_cache, restore_cache
    from pertoken.cli.generate import Streamer
    from pertoken.conversation import next_turn

    if max_new_tokens < 1:
        raise PertokenError(f"--max-new-tokens must be 1 or more, got {max_new_tokens}")
    if turn is not None and not turn.strip():
        raise PertokenError("--continue is empty: there is no text to go on with")
    header = inspect_cache(file).header  # no model is loaded for a file that is none
    loaded, tokenizer = pertoken.load(model, dtype=dtype, kind="decoder")
    if header.level == "tokens":
        typer.echo(f"decoding {header.tokens:,} tokens, a forward pass each", err=True)
    restored = restore_cache(file, loaded)
    typer.echo(tokenizer.decode(restored.input_ids[0], skip_special_tokens=True))
    for line in restored_lines(restored):
        typer.echo(line, err=True)
    if turn is None:
        return
    if no_chat:
        new = tokenizer(turn, add_special_tokens=False)["input_ids"]
    else:
        new = next_turn(tokenizer, turn, closed=True)
    ids = torch.cat((restored.input_ids, restored.input_ids.new_tensor([new])), -1)
    room = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and ids.shape[1] + max_new_tokens > room:
        raise PertokenError(
            f"{ids.shape[1]} tokens and {max_new_tokens} new ones do not fit the model's {room} "
            "positions; shorten --continue or --max-new-tokens"
        )
    loaded.generate(
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
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a file holds and whether all of it is whole; 1 where it is not."""
    from pertoken.cache.archive import inspect_cache

    found = inspect_cache(file)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
    else:
        for line in inspection_lines(found):
            typer.echo(line)
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
