"""The page of all commands: what `--help` says of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from pertoken.cli.main import app

WIDTH = 92


def page() -> str:
    """The help of `pertoken` and of every command, as Markdown."""
    parts = ["# Commands", "What `--help` says, for every command."]
    for path, text in helps():
        parts += [f"## `{path}`", f"```text\n{text.rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def helps() -> Iterator[tuple[str, str]]:
    """(name, help) of the program and of every command, groups before what is in them."""
    yield from _walk(typer.main.get_command(app), None, "pertoken")


def _walk(command: Any, parent: Any, name: str) -> Iterator[tuple[str, str]]:
    context = command.context_class(
        command,
        info_name=name,
        parent=parent,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        **command.context_settings,
    )
    yield context.command_path, command.get_help(context)
    if hasattr(command, "list_commands"):
        for below in command.list_commands(context):
            yield from _walk(command.get_command(context, below), context, below)
