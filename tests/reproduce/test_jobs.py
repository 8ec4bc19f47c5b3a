"""Several processes share the units of a reproduction: each is computed once, none is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest

from pertoken.errors import PertokenError
from pertoken.reproduce import _harness as harness
from pertoken.reproduce._checkpoint import Checkpoint

MODULE = """
import os, time
from pathlib import Path
from pertoken.reproduce import Row

BARS = {"sum": ">= 1"}
LOG = Path(os.environ["PERTOKEN_TEST_LOG"])

def unit(number):
    if number == 0 and "PERTOKEN_TEST_PAIR" in os.environ:  # until the other one is at work
        for _ in range(1200):
            if LOG.exists() and LOG.read_text():
                break
            time.sleep(0.1)
    with LOG.open("a") as file:
        file.write(f"{number} {os.getpid()}\\n")
    return number

def run(context):
    units = {n: (["unit", n], lambda n=n: unit(n)) for n in range(40)}
    found = context.remember_all(units, "units")
    last = context.remember("last", lambda: os.getpid())
    return context.reproduction([Row("sum", sum(found.values())), Row("last", last)])
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    from importlib import import_module

    name = f"jobs_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PERTOKEN_TEST_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    monkeypatch.syspath_prepend(str(tmp_path))
    return import_module(name)


def log(tmp_path: Path) -> list[tuple[int, int]]:
    lines = (tmp_path / "log").read_text().splitlines()
    return [tuple(map(int, line.split())) for line in lines]  # type: ignore[misc]


def test_two_processes_share_the_units(
    module: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rich.console import Console

    monkeypatch.setenv("PERTOKEN_TEST_PAIR", "1")
    console = Console(stderr=True)
    report = harness.run_module(module, "fake", out=tmp_path, jobs=2, console=console)
    assert capsys.readouterr().err == ""
    done = log(tmp_path)
    assert sorted(number for number, _ in done) == list(range(40))
    assert len({pid for _, pid in done}) == 2
    figures = {row.metric: row.here for row in report.figures}
    assert figures == {"sum": sum(range(40)), "last": os.getpid()}
    assert not list((tmp_path / "home" / "reproduce").glob("*"))


def test_later_units_are_shared_too(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second call has helpers of its own, which pass by what is done."""
    source = Path(str(module.__file__))
    code = source.read_text().replace(
        "    units =",
        "    context.remember_all({n: (['before', n], lambda: n) for n in range(3)}, 'before')\n"
        "    units =",
    )
    source.write_text(code)
    exec(compile(code, str(source), "exec"), module.__dict__)
    monkeypatch.setenv("PERTOKEN_TEST_PAIR", "1")
    report = harness.run_module(module, "fake", out=tmp_path, jobs=2)
    done = log(tmp_path)
    assert sorted(number for number, _ in done) == list(range(40))
    assert len({pid for _, pid in done}) == 2
    assert report.figures[0].here == sum(range(40))


def test_one_process_does_it_alone(module: ModuleType, tmp_path: Path) -> None:
    report = harness.run_module(module, "fake", out=tmp_path)
    assert {pid for _, pid in log(tmp_path)} == {os.getpid()}
    assert report.figures[0].here == sum(range(40))


def test_a_helper_that_fails_costs_no_unit(
    module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    module.__dict__["__name__"] = "no_such_module_here"
    report = harness.run_module(
        module, "fake", out=tmp_path, jobs=2, console=Console(stderr=True, width=200)
    )
    assert report.figures[0].here == sum(range(40))
    assert "fake: a helper process ended early: ModuleNotFoundError" in capsys.readouterr().err


def test_no_jobs_is_refused(module: ModuleType) -> None:
    with pytest.raises(PertokenError, match="--jobs must be 1 or more, got 0"):
        harness.run_module(module, "fake", jobs=0)


def test_a_unit_is_claimed_once_and_waited_for(tmp_path: Path) -> None:
    first = Checkpoint(tmp_path, "goose", {}, resume=False)
    second = Checkpoint(tmp_path, "goose", {}, resume=True, helper=True)
    assert first.claim("a")
    assert not second.claim("a")
    found: list[Any] = []
    waiting = Thread(target=lambda: found.append(second.wait("a", pytest.fail, pause=0.01)))
    waiting.start()
    first.remember("a", lambda: 7)
    waiting.join(timeout=10)
    assert found == [7]
    assert not first.claim("a")


def test_the_claim_of_a_process_that_died_is_taken_over(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    checkpoint = Checkpoint(tmp_path, "goose", {}, resume=False)
    assert checkpoint.claim("a")
    (claim,) = checkpoint._claims.iterdir()
    claim.write_text(str(dead.pid))
    assert checkpoint.wait("a", lambda: 3) == 3
    lines = checkpoint.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"key": "a", "value": 3}]
    checkpoint.discard()
    assert not checkpoint.path.exists()
    assert not checkpoint._claims.exists()


def test_a_helper_leaves_an_unfinished_line_alone(tmp_path: Path) -> None:
    first = Checkpoint(tmp_path, "goose", {}, resume=False)
    first.remember("a", lambda: 1)
    with first.path.open("a") as file:
        file.write('{"key": "b", "va')
    helper = Checkpoint(tmp_path, "goose", {}, resume=True, helper=True)
    assert helper.resumed == 1
    assert first.path.read_text().endswith('"va')
    with first.path.open("a") as file:
        file.write('lue": 2}\n')
    assert helper.wait("b", pytest.fail) == 2


def test_a_helper_ends_when_its_run_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from pertoken.reproduce import _jobs

    _jobs.check_parent()
    monkeypatch.setattr("os.getppid", lambda: 1)
    with pytest.raises(_jobs.HelperDone):
        _jobs.check_parent()
