"""The project's files agree with each other, and make does what it says."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from pertoken.catalog import source_tree

TREE = source_tree()
pytestmark = pytest.mark.skipif(TREE is None, reason="needs the source tree")
ROOT = TREE or Path()


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pins() -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)$", read("constraints.txt"), re.M))


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # A make that runs these tests hands its own settings down; they are not wanted here.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with what make looks at, and no environment."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_what_is_asked_for_is_pinned() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["dev"], *extras["docs"]]
    names = {match[0] for one in asked if (match := re.match(r"[\w-]+", one))}
    assert names - {"pertoken"} <= pins().keys()


def test_hooks_use_the_pinned_tools() -> None:
    used = set(re.findall(r"\[([\w-]+)==([\d.]+)\]", read(".pre-commit-config.yaml")))
    assert used
    for name, version in used:
        assert pins().get(name, version) == version


def test_extras_are_part_of_all() -> None:
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    named = {one for extra in extras["all"] for one in re.findall(r"\[([\w,]+)\]", extra)}
    assert extras.keys() - {"all", "dev", "docs"} == named  # those are for working on pertoken


def test_one_version() -> None:
    version = tomllib.loads(read("pyproject.toml"))["project"]["version"]
    assert f"\nversion: {version}\n" in read("CITATION.cff")
    assert f"\n## {version} " in read("CHANGELOG.md")


def test_ci_runs_the_tests() -> None:
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert "\nmake test\n" in read(".ci/run")


def test_make_alone_lists_the_targets(copy: Path) -> None:
    done = make(copy)
    assert done.returncode == 0
    for target in [
        "run",
        "test",
        "check",
        "format",
        "readme",
        "docs",
        "docs-serve",
        "api",
        "reproduce",
        "bench",
        "new",
        "clean",
    ]:
        assert f"\n  {target} " in done.stdout


def test_make_without_a_python_says_so(copy: Path) -> None:
    done = make(copy, "test", "PYTHON=no-such-python")
    assert done.returncode == 2
    assert "error: no Python 3.11 or newer" in done.stderr
    assert "no-such-python" in done.stderr
    assert not (copy / ".venv").exists()


def test_make_refuses_an_old_python(copy: Path) -> None:
    old = copy / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    assert "tried ./old-python" in make(copy, "test", "PYTHON=./old-python").stderr


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_make_installs_once_and_again_after_a_change(changed: str, copy: Path) -> None:
    assert "pip install" in make(copy, "-n", "test").stdout
    stamp = copy / ".venv" / ".stamp"
    stamp.parent.mkdir()
    stamp.touch()
    assert "pip install" not in make(copy, "-n", "test").stdout
    later = stamp.stat().st_mtime + 10
    os.utime(copy / changed, (later, later))
    assert "pip install" in make(copy, "-n", "test").stdout


def test_wheel_carries_its_data(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/goose.json").write_text("{}")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    packaged = {
        path.relative_to(ROOT / "src").as_posix() for path in ROOT.glob("src/pertoken/**/*")
    }
    wanted = {name for name in packaged if "." in Path(name).name and "__pycache__" not in name}
    assert wanted <= names
    assert "pertoken/_reports/goose.json" in names
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"pertoken"}
