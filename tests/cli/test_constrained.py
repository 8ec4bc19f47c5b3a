"""`pertoken generate` under a constraint, with a tiny model in a folder."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib import invalidate_caches
from pathlib import Path

import pytest
import torch

from pertoken.cli import main
from pertoken.testing import MockModel

Capture = pytest.CaptureFixture[str]

# Of the signs that the constraints here want, the stop token, and the others. The tokenizer's bytes
# are in the order of their GPT-2 letters: "!" is 1.
WANTED = [ord(sign) - 32 for sign in 'abeiouxy0123456789+{}":,']
CHANCES = torch.full((257,), 0.002 / 257)
CHANCES[WANTED] += 0.848 / len(WANTED)
CHANCES[0] += 0.15

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 99},
        "b": {"enum": ["x", "y"]},
    },
    "required": ["a", "b"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
GRAMMAR = 'start: NUMBER ("+" NUMBER){1,2}\nNUMBER: /[1-9]/\n'
PYTHON = '''
def short(text):
    return len(text) <= 5 and text.isascii()

def vowels(text):
    return set(text) <= set("aeiou") and len(text) <= 4

vowels.complete = lambda text: vowels(text) and len(text) == 4

class Even:
    """Three even ids."""

    def __init__(self, tokenizer):
        self.special = set(tokenizer.all_special_ids)

    def accepts(self, ids):
        return len(ids) <= 3 and all(t % 2 == 0 and t not in self.special for t in ids)

    def complete(self, ids):
        return len(ids) == 3

class Dead:
    accepts = staticmethod(lambda ids: len(ids) <= 2)
    complete = staticmethod(lambda ids: False)

dead = Dead()

class Endless(Dead):
    accepts = staticmethod(lambda ids: True)

endless = Endless()

class Empty(Dead):
    accepts = staticmethod(lambda ids: not ids)
    complete = staticmethod(lambda ids: not ids)

empty = Empty()

def nothing(text):
    return False

def raises(text):
    return 1 / 0

def no_bool(text):
    return "yes"

class Broken:
    def __init__(self):
        pass

number = 3
'''


@pytest.fixture(scope="module")
def folder(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that mostly writes the signs the constraints here want, and ends with id 0."""
    path = tmp_path_factory.mktemp("model")
    for file in Path(tiny_folder).glob("tokenizer*"):
        shutil.copy(file, path)
    model = MockModel(CHANCES.repeat(257, 1))
    model.generation_config.eos_token_id = 0
    model.save_pretrained(path)
    return str(path)


@pytest.fixture
def run(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command without its constraint, in a folder with files for one."""
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    for name in ("rules", "rules_that_fail", "rules_of_3"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    Path("rules.py").write_text(PYTHON)
    Path("rules_that_fail.py").write_text("import no_such_module_at_all")
    Path("rules_of_3.py").write_text("def f(text) text")
    invalidate_caches()
    Path("schema.json").write_text(json.dumps(SCHEMA))
    Path("sum.lark").write_text(GRAMMAR)
    return ["generate", "ab", "--model", folder, "--max-new-tokens", "40", "--seed", "1"]


def allowed(constraint: list[str], text: str) -> bool:
    if constraint[0] == "--json-schema":
        value = json.loads(text)
        return value.keys() == {"a", "b"} and 0 <= value["a"] <= 99 and value["b"] in ("x", "y")
    pattern = {
        "--regex": r"(?!ab)[ab]{2,4}",
        "--grammar": r"[1-9](\+[1-9]){1,2}",
        "rules:vowels": r"[aeiou]{4}",
        "rules:short": r"[\x00-\x7f]{0,5}",
        "rules:Even": r"(?s).*",
    }[constraint[-1] if constraint[0] == "--constraint" else constraint[0]]
    return re.fullmatch(pattern, text) is not None


CONSTRAINTS = [
    ["--json-schema", "schema.json"],
    ["--regex", r"(?!ab)[ab]{2,4}"],
    ["--grammar", "sum.lark"],
    ["--constraint", "rules:vowels"],
    ["--constraint", "rules:short"],
    ["--constraint", "rules:Even"],
]


def needs_llguidance(constraint: list[str]) -> None:
    if constraint[0] in ("--json-schema", "--grammar"):
        pytest.importorskip("llguidance")


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=" ".join)
def test_one_text_goes_to_standard_output_and_its_weight_to_standard_error(
    run: list[str], constraint: list[str], capsys: Capture
) -> None:
    needs_llguidance(constraint)
    assert main([*run, *constraint]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert allowed(constraint, out[:-1])
    assert re.fullmatch(r"log-weight -?\d+\.\d\d nats; \d+ checks .* for \d+ tokens\n", err)
    assert main([*run, *constraint, "--method", "awrs", "--json", "-", "--stats"]) == 0
    again, err = capsys.readouterr()
    found = json.loads(again)
    assert found["text"] + "\n" == out  # the same seed
    assert found["allowed"]
    assert not found["cut"]
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=" ".join)
def test_particles_print_texts_with_probabilities(
    run: list[str], constraint: list[str], capsys: Capture, tmp_path: Path
) -> None:
    needs_llguidance(constraint)
    assert main([*run, *constraint, "--particles", "6", "--json", "found.json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.search(
        r"\n6 particles worth \d\.\d(?:, resampled \d+ x)?; "
        r"log-probability of the constraint -?\d+\.\d\d nats; "
        r"\d+ checks of it\n$",
        out,
    )
    found = json.loads(Path("found.json").read_text())
    assert all(allowed(constraint, row["text"]) for row in found["texts"])
    assert sum(row["weight"] for row in found["texts"]) == pytest.approx(1.0)
    assert 1.0 <= found["effective_sample_size"] <= 6.0 + 1e-9
    assert repr(found["texts"][0]["text"]) in out.splitlines()[0]
    assert main([*run, *constraint, "--particles", "6", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.parametrize("way", [[], ["--particles", "3"]], ids=["one", "particles"])
@pytest.mark.parametrize("temperature", [1.0, 50.0])
def test_the_model_is_sampled_as_it_is_at_the_temperature(
    run: list[str], way: list[str], temperature: float, capsys: Capture
) -> None:
    more = ["--constraint", "rules:empty", "--temperature", str(temperature), "--json", "-"]
    assert main([*run, *way, *more]) == 0
    found = json.loads(capsys.readouterr().out)
    scaled = CHANCES.log() / temperature
    # Nothing but the stop token is allowed: its probability is the weight.
    weight = found["log_marginal"] if way else found["log_weight"]
    assert weight == pytest.approx(float(scaled.log_softmax(0)[0]), abs=1e-3)


def test_a_text_that_is_cut_is_said_and_fails_unless_allowed(
    run: list[str], capsys: Capture
) -> None:
    short = [*run, "--max-new-tokens", "2"]
    assert main([*short, "--regex", "[ab]{3}"]) == 1
    out, err = capsys.readouterr()
    assert len(out) == 3
    assert err.endswith("; cut at --max-new-tokens, not an allowed text as it is\n")
    assert main([*short, "--regex", "[ab]{2,3}"]) == 0
    assert capsys.readouterr().err.endswith(
        " tokens; cut at --max-new-tokens, an allowed text as it is\n"
    )
    assert main([*short, "--constraint", "rules:endless"]) == 1


REFUSED = [
    (["--regex", "a", "--grammar", "sum.lark"], "give one constraint, not --regex and --grammar"),
    (["--regex", "a", "--method", "goose"], "--regex is sampled by awrs; leave out --method goose"),
    (["--regex", "a", "--stop", "x"], "--regex says where the text ends; leave out --stop"),
    (["--regex", "a", "--budget", "4"], "nothing is drafted under --regex; leave out --budget"),
    (["--method", "awrs"], "--method awrs needs a constraint: --regex, --json-schema,"),
    (["--particles", "3"], "--particles goes with a constraint: --regex, --json-schema"),
    (["--regex", "a", "--particles", "0"], "--particles must be 1 or more, got 0"),
    (["--regex", "a", "--json", "no/folder.json"], "there is no folder no"),
    (
        ["--regex", "(a"],
        "not a regular expression: '(a': missing ) at position 2",
    ),
    (["--regex", "(a", "--model", "./none"], "not a regular expression"),
    (["--json-schema", "none.json"], "none.json can't be read: No such file"),
    (["--grammar", "."], ". can't be read: Is a directory"),
    (["--json-schema", "latin.json"], "latin.json is not UTF-8 (byte 3); save it as UTF-8"),
    (
        ["--json-schema", "cut.json"],
        "cut.json: the schema is not JSON: line 1, column 10: Expecting",
    ),
    (["--json-schema", "odd.json"], "odd.json: llguidance refuses the JSON schema at #/items: Inv"),
    (
        ["--json-schema", "never.json"],
        "never.json: llguidance refuses the JSON schema: Unsatisfiabl",
    ),
    (
        ["--grammar", "odd.lark"],
        "odd.lark: llguidance refuses the grammar: line 2, column 4: unkno",
    ),
    (["--grammar", "never.lark"], "never.lark: llguidance refuses the grammar: no text satisfies"),
    (["--constraint", "rules"], "--constraint takes MODULE:OBJECT, got 'rules'"),
    (
        ["--constraint", "ruled:short"],
        "--constraint ruled:short: No module named 'ruled'",
    ),
    (
        ["--constraint", "rules:shord"],
        "--constraint rules:shord: rules has no 'shord' (did you mean 'short'?)",
    ),
    (
        ["--constraint", "rules_that_fail:f"],
        "--constraint rules_that_fail:f: No module named 'no_such_mod",
    ),
    (["--constraint", "rules_of_3:f"], "rules_of_3:f: importing it raised SyntaxError ("),
    (["--constraint", "rules:number"], "rules:number: this is neither a function of text nor an"),
    (
        ["--constraint", "rules:Broken"],
        "--constraint rules:Broken: Broken(tokenizer) raised TypeError",
    ),
    (
        ["--constraint", "rules:nothing"],
        "the constraint refuses every text: it does not accept the",
    ),
    (
        ["--constraint", "rules:raises"],
        "the constraint raised ZeroDivisionError (division by zero)",
    ),
    (["--constraint", "rules:no_bool"], "the constraint must answer True or False, got str on ''"),
    (
        ["--constraint", "rules:dead"],
        "weight 0: the constraint refused 1000 tokens in a row, or all",
    ),
    (
        ["--constraint", "rules:dead", "--particles", "3"],
        "no text that the constraint allows was fou",
    ),
    (
        ["--constraint", "rules:endless", "--particles", "3"],
        "no text was whole after 40 tokens: raise max_new_tokens",
    ),
]


@pytest.mark.parametrize(("constraint", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_mistakes_are_one_line_and_exit_code_2(
    run: list[str], constraint: list[str], message: str, capsys: Capture
) -> None:
    needs_llguidance(constraint)
    Path("latin.json").write_bytes(b'{"\xe9": 1}')
    Path("cut.json").write_text('{"type": ')
    Path("odd.json").write_text('{"items": {"type": "strin"}}')
    Path("never.json").write_text("false")
    Path("odd.lark").write_text("start: b\nb: c\n")
    Path("never.lark").write_text("start: /[^\\s\\S]/")
    assert main([*run, *constraint]) == 2
    out, err = capsys.readouterr()
    if constraint != ["--constraint", "rules:dead"]:
        assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", [["--json-schema", "schema.json"], ["--grammar", "sum.lark"]])
def test_without_llguidance_the_error_says_what_to_install(
    run: list[str], option: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert main([*run, *option]) == 2
    assert 'pip install "pertoken[constrained]"' in capsys.readouterr().err


def test_a_model_without_a_stop_token_is_refused(
    run: list[str], tiny_folder: str, capsys: Capture
) -> None:
    assert main([*run, "--model", tiny_folder, "--regex", "a"]) == 2
    assert "has no stop token" in capsys.readouterr().err


def test_the_prompt_is_checked_as_without_a_constraint(run: list[str], capsys: Capture) -> None:
    assert main(["generate", "", *run[2:], "--regex", "a"]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    assert main(["generate", "x" * 3000, *run[2:], "--regex", "a", "--particles", "2"]) == 2
    assert "do not fit the model's 2048 positions" in capsys.readouterr().err


@pytest.mark.parametrize("particles", [[], ["--particles", "3"]])
def test_a_style_goes_with_a_constraint(
    run: list[str], folder: str, particles: list[str], capsys: Capture
) -> None:
    Path("corpus.txt").write_text("aaaa")
    train = ["style", "train", "corpus.txt", "--out", "a.style", "--model", folder]
    assert main(train) == 0
    capsys.readouterr()
    given = ["--regex", "(?!ab)[ab]{2,4}", "--style", "a.style", "--strength", "1"]
    assert main([*run, *given, *particles]) == 0
    texts = re.findall(r"\b[ab]{2,4}\b", capsys.readouterr().out)
    assert set("".join(texts)) == {"a"}
