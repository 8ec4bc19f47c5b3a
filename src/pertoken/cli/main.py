"""The command line: the app, its global options, and errors as one line with an exit code.

Exit codes: 0 done, 1 the command says no (or something unexpected), 2 a mistake of the caller,
130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from pertoken.cli._group import Group
from pertoken.errors import PertokenError

# One file per group of commands, and its commands, in the order of the help; each has
# `register(app)`. A file is read when one of its commands is asked for.
COMMANDS = {
    "catalog": ("list", "show", "new"),
    "doctor": ("doctor", "fetch"),
    "generate": ("generate",),
    "chat": ("chat",),
    "sift": ("sift",),
    "cascade": ("cascade",),
    "style": ("style",),
    "knn": ("knn",),
    "compare": ("compare",),
    "caches": ("compare-caches",),
    "cache": ("cache",),
    "verify": ("verify",),
    "explain": ("explain", "evaluate-attribution"),
    "compress": ("compress",),
    "audit": ("audit",),
    "premiums": ("premiums",),
    "transplant": ("transplant",),
    "turkish": ("turkish", "turkish-sweep"),
    "arithmetic": ("arithmetic",),
    "probe": ("probe",),
    "select_data": ("select-data",),
    "pairs": ("pairs",),
    "tokens": ("tokens",),
    "train": ("train",),
    "reproduce": ("reproduce",),
}

_debug = False  # --debug of the run in progress


class Program(Group):
    """The commands of all files, each read when it is needed: `pertoken list` starts at once."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; for an unknown one all are read, so that it can be mended."""
        if cmd_name not in self.commands:
            owners = [file for file, names in COMMANDS.items() if cmd_name in names]
            for file in owners or COMMANDS:
                self.commands.update(_read(file))
        return self.commands.get(cmd_name)

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of the help."""
        return [name for names in COMMANDS.values() for name in names]


def _read(file: str) -> dict[str, Any]:
    """The commands of one file by name."""
    part = typer.Typer(callback=lambda: None, add_completion=False, rich_markup_mode=None)
    import_module(f"pertoken.cli.{file}").register(part)
    return dict(typer.main.get_group(part).commands)


app = typer.Typer(
    cls=Program,
    help="Published per-token methods for language models: run, compare and check them.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            envvar="PERTOKEN_DEBUG",
            help="Show the traceback of an error; anywhere on the line.",
        ),
    ] = False,
) -> None:
    global _debug
    _debug = _debug or debug
    if version:
        import pertoken

        print(f"pertoken {pertoken.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return its exit code."""
    global _debug
    arguments, _debug = _without_debug(list(sys.argv[1:] if argv is None else argv))
    try:
        code = app(arguments, prog_name="pertoken", standalone_mode=False)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:  # `pertoken list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if _debug:
            raise
        return _report(error)
    if code == 130:
        print("interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The line without `--debug`, and whether it was there; behind `--` it is an argument.

    >>> _without_debug(["list", "--debug", "--", "--debug"])
    (['list', '--', '--debug'], True)
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    before = [each for each in arguments[:end] if each != "--debug"]
    return [*before, *arguments[end:]], len(before) < end


def _report(error: Exception) -> int:
    """One line on stderr for `error`; the exit code."""
    if isinstance(error, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    if isinstance(error, PertokenError):
        line, code = str(error), 2
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" for {error.filename}" if error.filename else ""
        line, code = f"no space left on the disk{where}; free some and run again", 2
    elif hasattr(error, "format_message"):  # a usage error of the option parser
        path = getattr(getattr(error, "ctx", None), "command_path", "pertoken")
        line, code = error.format_message().rstrip("."), 2
        if getattr(error, "option_name", None) in ("--json", "--html") and "requires" in line:
            line += ": a file, or - to print it"
        line += f" (see `{path} --help`)"
    else:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        line, code = f"unexpected {what} (run it again with --debug for the traceback)", 1
    print("error:", " ".join(line.split()), file=sys.stderr)
    return code
