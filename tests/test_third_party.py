"""Another package brings methods: catalogue and command line have them, and it can break nothing.

tests/example_package is not installed: a folder of metadata, as an installer would write it from
its pyproject.toml, is put on the path.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pertoken import catalog
from pertoken.catalog import baselines, card, get, methods
from pertoken.cli import main
from pertoken.errors import PertokenError
from pertoken.testing.verify import as_setup

Capture = pytest.CaptureFixture[str]
Log = pytest.LogCaptureFixture
Install = Callable[..., None]
EXAMPLE = Path(__file__).parent / "example_package"


def write_metadata(folder: Path, name: str, entries: dict[str, str]) -> None:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}\n" for key, value in entries.items()]
    (info / "entry_points.txt").write_text("[pertoken.methods]\n" + "".join(lines))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a package of one module, `source`, on the path, with its entries."""
    before = set(sys.modules)
    catalog._cards.cache_clear()
    monkeypatch.setenv("COLUMNS", "300")

    def install(name: str, source: str, **entries: str) -> None:
        folder = tmp_path / name
        write_metadata(folder, name, entries)
        (folder / f"{name.replace('-', '_')}.py").write_text(source)
        monkeypatch.syspath_prepend(folder)

    yield install
    catalog._cards.cache_clear()
    for module in set(sys.modules) - before:
        if not module.startswith(("pertoken.", "torch", "transformers", "numpy")):
            del sys.modules[module]


@pytest.fixture
def example(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example package, as if it were installed; the folder of its metadata."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    write_metadata(tmp_path, project["name"], project["entry-points"]["pertoken.methods"])
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_catalogue_has_its_methods_behind_ours(example: Path) -> None:
    assert [one.slug for one in methods()][-2:] == ["echo", "one-by-one"]
    echo = card("echo")
    assert (echo.package, echo.status, echo.report) == ("pertoken_example", "built", None)
    assert echo.path == EXAMPLE / "pertoken_example" / "methods.py"
    assert get("echo").__name__ == "Echo"
    assert not {"echo", "one-by-one"} & {one.slug for one in baselines()}


def test_looking_imports_the_cards_and_nothing_of_the_methods(example: Path) -> None:
    code = (
        "import sys, pertoken\n"
        "print(pertoken.methods()[-1].status)\n"
        "assert 'torch' not in sys.modules and 'pertoken_example.methods' not in sys.modules"
    )
    script = f"import sys\nsys.path[:0] = [{str(example)!r}, {str(EXAMPLE)!r}]\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("built\n", "")


def test_list_and_show(example: Path, capsys: Capture) -> None:
    assert main(["list"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "(package pertoken_example)" in out
    assert out.count(" the next ids ") == 1
    assert main(["list", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)[-1] == card("one-by-one").to_dict()
    assert main(["show", "echo"]) == 0
    out = capsys.readouterr().out
    assert "from pertoken_example.methods import Echo" in out
    assert "plug generate" in out
    assert "pertoken reproduce" not in out


@pytest.mark.parametrize("slug", ["echo", "one-by-one"])
def test_a_set_up_by_name_and_the_battery(slug: str, example: Path) -> None:
    from pertoken.testing import check_lossless, check_method, tiny_model

    check_lossless(as_setup(slug), tiny_model("gpt2"), max_new_tokens=8)
    assert len(check_method(slug, "gemma3").holds) == 5


def test_generate_compare_and_verify(example: Path, tiny_folder: str, capsys: Capture) -> None:
    texts = []
    for method in ("plain", "echo", "one-by-one"):
        run = ["generate", "One, two,", "--method", method, "--max-new-tokens", "9"]
        assert main([*run, "--model", tiny_folder]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert texts[0].strip()
    run = ["--limit", "1", "--max-new-tokens", "4", "--model", tiny_folder]
    assert main(["compare", "echo", "one-by-one", *run]) == 0
    assert "one-by-one" in capsys.readouterr().out
    assert main(["verify", "echo", *run]) == 0
    assert "LOSSLESS: echo" in capsys.readouterr().out


def test_a_budget_it_has_not_is_refused(example: Path, capsys: Capture) -> None:
    run = ["generate", "One,", "--method", "one-by-one", "--budget", "4"]
    assert main(run) == 2
    assert "one-by-one" in capsys.readouterr().err


CARD = """from pertoken import Card
CARD = Card(slug={slug!r}, title="T", family={family!r}, plug={plug!r}, does="D.",
            use_when="Use it.", entry={entry!r})
class Method: ...
"""
SOUND = {"slug": "theirs", "family": "decode", "plug": "generate", "entry": "other_pkg:Method"}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import no_such_module_anywhere", "'m' raised ModuleNotFoundError"),
        ("raise SystemExit(3)", "'m' raised SystemExit"),
        ("CARD = 3", "it is a int, not a pertoken.Card"),
        ("", "'m' raised AttributeError"),
        (CARD.format(**SOUND | {"plug": "generat"}), "no plug 'generat' (did you mean"),
        (CARD.format(**SOUND | {"family": "dec"}), "no family 'dec'"),
        (CARD.format(**SOUND | {"slug": "No Slug"}), "'No Slug' is no slug"),
        (CARD.format(**SOUND | {"slug": 3}), "its slug is no text"),
        (CARD.format(**SOUND | {"entry": None}), 'must be "package.module:object", got None'),
        (CARD.format(**SOUND | {"entry": "pertoken.decode.goose:Goose"}), "in its own package"),
        (CARD.format(**SOUND | {"entry": "nowhere_at_all:X"}), "is in no file"),
        (
            CARD.format(**SOUND | {"slug": "goose"}),
            "'goose' (other_pkg:Method) has the name of one pertoken's own "
            "(pertoken.decode.goose:Goose), which stays",
        ),
    ],
)
def test_a_broken_package_is_one_line_and_breaks_nothing(
    source: str, said: str, install: Install, caplog: Log
) -> None:
    install("other-pkg", source, m="other_pkg:CARD")
    with caplog.at_level(logging.WARNING, "pertoken"):
        found = [one.slug for one in methods()]
    assert "theirs" not in found
    assert get("goose").__module__ == "pertoken.decode.goose"
    (line,) = caplog.messages
    assert "\n" not in line
    assert line.startswith("the package other-pkg is left out of the catalogue: ")
    assert said in line


def test_the_line_on_standard_error(install: Install, tmp_path: Path) -> None:
    install("other-pkg", "1 / 0", m="other_pkg:CARD")
    path = str(tmp_path / "other-pkg")
    script = f"import sys\nsys.path.insert(0, {path!r})\nimport pertoken\npertoken.methods()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == (
        "the package other-pkg is left out of the catalogue: its entry 'm' raised "
        "ZeroDivisionError: division by zero\n"
    )


def test_of_two_packages_with_one_name_the_first_stays(install: Install, caplog: Log) -> None:
    for name in ("aa-pkg", "bb-pkg"):
        entry = f"{name.replace('-', '_')}:Method"
        source = CARD.format(**SOUND | {"entry": entry})
        install(name, source, m=f"{name.replace('-', '_')}:CARD")
    with caplog.at_level(logging.WARNING, "pertoken"):
        assert card("theirs").package == "aa_pkg"
    (line,) = caplog.messages
    assert "package bb-pkg" in line
    assert "(bb_pkg:Method) has the name of one of aa_pkg (aa_pkg:Method)" in line


def test_a_method_that_cannot_be_imported_is_one_line(install: Install) -> None:
    install("other-pkg", CARD.format(**SOUND | {"entry": "other_pkg:Gone"}), m="other_pkg:CARD")
    with pytest.raises(PertokenError, match="theirs of the package other_pkg cannot be loaded"):
        get("theirs")
