"""Groups of commands: a help that tells the whole first sentence of each, errors that name it."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

__all__ = ["Group"]


class Group(TyperGroup):
    """A group whose help wraps what its commands are for, where click would cut it."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; what is wrong with its options is told as its own, not the group's."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if getattr(error, "ctx", ctx) is None:
                name = ctx.invoked_subcommand
                command = self.get_command(ctx, name)
                error.ctx = type(ctx)(command, parent=ctx, info_name=name)  # type: ignore[attr-defined]
            raise

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a line, or several, for each command."""
        rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                sentence = (command.help or "").partition("\n\n")[0]
                rows.append((name, " ".join(sentence.split())))
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)
