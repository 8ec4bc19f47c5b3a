"""What `import pertoken` may and may not do."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import pertoken

HEAVY = {"torch", "transformers", "numpy", "tokenizers", "safetensors", "rich", "typer", "pydantic"}


def modules_after(code: str) -> set[str]:
    """Top-level modules a fresh interpreter has loaded after `code`."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.splitlines()[-1].split())


def test_import_is_light() -> None:
    loaded = modules_after("import pertoken\ndir(pertoken)\npertoken.__version__")
    assert not HEAVY & loaded


def test_catalogue_is_light() -> None:
    code = "import pertoken\n[card.status for card in pertoken.methods()]"
    assert not HEAVY & modules_after(code)


@pytest.mark.parametrize(
    "command", [["--help"], ["list"], ["show", "goose"], ["list", "--json", "-"]]
)
def test_cheap_commands_load_no_framework(command: list[str]) -> None:
    code = f"from pertoken.cli import main\nassert main({command!r}) == 0"
    assert not {"torch", "transformers", "numpy"} & modules_after(code)


def test_public_names_are_listed() -> None:
    assert set(pertoken.__all__) <= set(dir(pertoken))
    assert pertoken._HOME.keys() | {"__version__"} == set(pertoken.__all__)


@pytest.mark.parametrize("name", sorted(pertoken._HOME))
def test_public_name_can_be_called(name: str) -> None:
    assert callable(getattr(pertoken, name))


def test_wrong_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'goose'"):
        _ = pertoken.goose


@pytest.mark.parametrize("name", ["compare", "data", "reproduce"])
def test_submodule_does_not_take_the_place_of_its_function(name: str) -> None:
    code = (
        f"import pertoken.{name}, pertoken\n"
        f"assert callable(pertoken.{name}), pertoken.{name}\n"
        f"from pertoken import {name}\n"
        f"assert callable({name}), {name}\n"
    )
    modules_after(code)
    assert importlib.import_module(f"pertoken.{name}").__name__ == f"pertoken.{name}"


PACKAGES = [each.name for each in pkgutil.iter_modules(pertoken.__path__) if each.ispkg]


@pytest.mark.parametrize("name", PACKAGES)
def test_no_module_is_called_like_a_public_name(name: str) -> None:
    """Once imported, the module would stand where the lazy name should."""
    package = importlib.import_module(f"pertoken.{name}")
    modules = {each.name for each in pkgutil.iter_modules(package.__path__)}
    assert not modules & set(getattr(package, "_HOME", {}))
