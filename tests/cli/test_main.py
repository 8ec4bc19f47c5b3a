"""Global options, and errors as one line with an exit code."""

import errno
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module

import pytest
import typer

import pertoken
from pertoken.cli import main
from pertoken.errors import PertokenError

Fail = Callable[[BaseException], None]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Make every command raise."""

    def set_error(error: BaseException) -> None:
        def app(*args: object, **options: object) -> None:
            real(*args, **options)
            raise error

        monkeypatch.setattr(module, "app", app)

    module = import_module("pertoken.cli.main")
    real = module.app
    return set_error


def test_alone_it_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    alone = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.split() == alone.split()
    for command in ("list", "show", "new"):
        assert command in alone


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pertoken {pertoken.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "list"),
        (["--colour"], "--colour"),
        (["list", "--famly", "decode"], "--famly"),
        (["show"], "METHOD"),
        (["show", "goose", "sift"], "sift"),
        (["list", "--json"], "a file, or - to print it (see `pertoken list --help`)"),
        (["train", "mft", "data.jsonl", "--rate"], "(see `pertoken train mft --help`)"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert "--help" in err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PertokenError("no such\nmodel"), 2, "error: no such model"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.bin"),
            2,
            "error: no space left on the disk for a.bin; free some and run again",
        ),
        (
            RuntimeError("boom"),
            1,
            "error: unexpected RuntimeError: boom (run it again with --debug for the traceback)",
        ),
        (
            AssertionError(),
            1,
            "error: unexpected AssertionError (run it again with --debug for the traceback)",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.Abort(), 130, "interrupted"),
    ],
)
def test_error_is_one_line(
    error: BaseException, code: int, line: str, fail: Fail, capsys: pytest.CaptureFixture[str]
) -> None:
    fail(error)
    assert main(["--version"]) == code
    assert capsys.readouterr().err == line + "\n"


def test_ctrl_c_inside_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(slug: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pertoken.cli.catalog.card", interrupted)
    assert main(["show", "goose"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_lets_the_traceback_through(
    how: str, fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(PertokenError("boom"))
    if how == "environment":
        monkeypatch.setenv("PERTOKEN_DEBUG", "1")
    with pytest.raises(PertokenError, match="boom"):
        main(["--debug", "--version"] if how == "option" else ["--version"])


@pytest.mark.parametrize("line", [["--debug", "show", "x"], ["show", "--debug", "x"]])
def test_debug_stands_anywhere_on_the_line(line: list[str]) -> None:
    with pytest.raises(PertokenError, match="x"):
        main(line)


def test_behind_two_dashes_debug_is_an_argument(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "--", "--debug"]) == 2
    assert "'--debug'" in capsys.readouterr().err


def test_debug_does_not_outlive_its_run(fail: Fail) -> None:
    fail(PertokenError("boom"))
    with pytest.raises(PertokenError):
        main(["--debug", "--version"])
    assert main(["--version"]) == 2


def test_closed_pipe_is_silent() -> None:
    command = f"{sys.executable} -m pertoken list | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_python_m_returns_the_exit_code() -> None:
    command = [sys.executable, "-m", "pertoken", "show", "gose"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean 'goose'?" in done.stderr


def test_the_table_of_commands_is_what_the_files_register() -> None:
    import typer

    for file, names in import_module("pertoken.cli.main").COMMANDS.items():
        part = typer.Typer(callback=lambda: None)
        import_module(f"pertoken.cli.{file}").register(part)
        assert tuple(typer.main.get_group(part).commands) == names, file


def test_a_command_reads_its_own_file_alone() -> None:
    code = (
        "import sys; from pertoken.cli import main; main(['show', 'goose']); "
        "print([name for name in sys.modules if name.startswith('pertoken.cli.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    read = done.stdout.splitlines()[-1]
    assert "cli.catalog" in read
    assert "cli.generate" not in read
