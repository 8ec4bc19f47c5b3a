"""One grammar over the whole public interface: the table in CONTRIBUTING.md, checked by looking.

An exception stands in one of the dicts below, with its reason.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
import torch
import typer

import pertoken
from pertoken import catalog
from pertoken._shown import Shown
from pertoken.cli import options as shared
from pertoken.cli.main import app, main
from pertoken.errors import PertokenError
from pertoken.result import Result
from pertoken.testing import tiny_model

SOURCE = Path(pertoken.__file__).parent
FAMILIES = (
    "attribute",
    "cache",
    "decode",
    "nets",
    "probe",
    "prune",
    "tokenize",
    "train",
    "testing",
)

# ---------------------------------------------------------------- what is an exception, and why

POSITIONAL = {
    "budget",
    "constraint",
    "corpus",
    "datastore",
    "direction",
    "drafter",
    "members",
    "model",
    "tokenizer",
}
"""Arguments of a method object that it cannot do without, or that say what it is."""

OTHER_POSITIONAL = {
    ("Cascade", "small"): "a cascade is of two models",
    ("Cascade", "large"): "a cascade is of two models",
    ("Cascade", "rule"): "what a cascade decides by",
    ("ConstraintMask", "stop_ids"): "a mask has to know what ends a text",
}

NOT_SHOWN = {
    "Analysis": "a named tuple: one reading of a word",
    "Analyzer": "a function of words with a memory, handed on as an argument",
    "ByteTokenizer": "a tokenizer",
    "CDPOTrainer": "a Trainer of TRL, made as TRL makes its own",
    "DynamicTanh": "a module to build models of",
    "FiberPOTrainer": "a Trainer of TRL, made as TRL makes its own",
    "GatedAttention": "a module to build models of",
    "GatedNorm": "a module to build models of",
    "MaskedThought": "a mixin for trainers of TRL and transformers",
    "KNNDatastore": "a folder on disk that is open",
    "MockModel": "a model",
    "NgramScorer": "what was learned, made by `fit` or `load`",
    "PreAffine": "a module to build models of",
    "RescaledLlamaConfig": "a config of transformers",
    "RescaledLlamaForCausalLM": "a model",
    "SSTokenSFT": "a mixin for a trainer of TRL",
    "SelfEmbedder": "a function of strings with a memory, handed on as an argument",
    "TokenTree": "the data of a draft",
    "TokenWeightedDPO": "a mixin for a trainer of TRL",
    "TokenWeightedSFT": "a mixin for a trainer of TRL",
    "Trajectories": "the index that the training losses share",
    "Transplant": "a step of `transplant` that is kept, with its notes and counts",
}
"""Public classes that are no method objects, results, records or errors."""

RECORDS = {
    "Code": "the bits of a tensor, for `decode_cache`",
    "Lesson": "a prompt and its answer, as read from a file",
    "Pair": "a prompt and its two answers, as read from a file",
    "Sampled": "an answer that a model wrote",
    "ContrastData": "lists of lessons and pairs, for three trainings",
    "Replaced": "four figures of one place of an answer",
    "Cost": "an estimate before the work: one line of text",
    "Quantity": "an argument of an attribution",
    "Predictor": "an argument of `Predictive`",
    "PairResult": "one line of `Compositions`",
    "Restored": "a cache to go on with, tensors and all",
    "ClosedGates": "tensors [batch, time]",
    "Verdict": "one line of a `VerifyReport`",
}
"""Data classes that public functions return though they are no results."""

SYNONYMS = {
    "new_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "num_tokens": "max_new_tokens",
    "lr": "learning_rate",
    "tell": "progress",
    "callback": "progress",
    "verbose": "progress",
    "batch_size": "batch",
    "layer_idx": "layer",
    "random_state": "seed",
    "generator": "seed",
    "rng": "seed",
    "keep_ratio": "keep",
    "ratio_kept": "keep",
    "fraction": "keep",
    "max_samples": "limit",
    "num_draws": "draws",
    "n_draws": "draws",
    "max_capacity": "budget",
    "cache_size": "budget",
    "file": "path",
    "name_or_path": "model",
}
"""Other word -> the one that is used."""

OTHER_WORDS = {
    (
        "check_distribution",
        "batch_size",
    ): "rows of a `generate` call, with pytest's own `batch` free",
    ("check_leaves_no_trace", "rng"): "whether the generators are watched, no seed",
}

OTHER_PROGRESS = dict.fromkeys(
    ("train_policy", "train_preference", "train_supervised"), "called with the row of each step"
)

OTHER_KEEP = {
    "Drafter": "whether a drafter keeps what it learned from call to call",
}

NO_DTYPE = {
    "style train": "loads the tokenizer alone",
    **dict.fromkeys(
        [
            f"train {name}"
            for name in ("cdpo", "cispo", "dpo", "fiberpo", "grpo", "gspo", "mft", "sft", "sstoken")
        ],
        "trains in float32",
    ),
    "compress": "a word's rating does not need it: encoders are read as they are",
}

NO_JSON = {
    "chat": "a conversation; --save keeps it",
    "fetch": "gives the path of what it fetched",
    "pairs": "writes .jsonl files for training",
    "new": "gives the paths of what it wrote",
    "cache restore": "goes on with a conversation",
}

COMMAND_SYNONYMS = {
    "--new-tokens",
    "--tokens",
    "--max-tokens",
    "--lr",
    "--output",
    "--num-samples",
    "--random-seed",
    "--precision",
    "--no-chat-template",
}

# ---------------------------------------------------------------- method objects


@cache
def public() -> dict[str, Any]:
    """Every public name of the families, less those whose extra is not installed."""
    found: dict[str, Any] = {}
    for family in FAMILIES:
        module = importlib.import_module(f"pertoken.{family}")
        for name in module.__all__:
            try:
                found[name] = getattr(module, name)
            except (PertokenError, ImportError):
                continue
    return found


def entries() -> dict[str, Any]:
    """What the cards of the catalogue name."""
    cards = [one for one in [*catalog.methods(), *catalog.baselines()] if one.status != "planned"]
    return {card.slug: card.load() for card in cards}


def methods() -> list[type]:
    """All classes of method objects, public ones and those of the catalogue."""
    classes = (one for one in [*public().values(), *entries().values()] if isinstance(one, type))
    return [one for one in dict.fromkeys(classes) if issubclass(one, Shown)]


def parameters(thing: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(thing).parameters.values())
    except (TypeError, ValueError):
        return []


class Any3:
    """A constraint that allows three tokens."""

    def accepts(self, ids: Any) -> bool:
        return len(ids) <= 3

    def complete(self, ids: Any) -> bool:
        return True


@cache
def store() -> Any:
    """A KNN-LM store of one text, which has the 64 entries that are looked up by default."""
    from pertoken.decode import KNNDatastore
    from pertoken.testing import ByteTokenizer

    model = tiny_model("llama", vocab_size=258, layers=1)
    with TemporaryDirectory() as folder:
        return KNNDatastore.build(model, ByteTokenizer(), ["ab" * 33], f"{folder}/store")


def made(kind: type) -> Any:
    """A method object of a class, with what it cannot do without."""
    from pertoken.decode import Plain
    from pertoken.decode._ngram_counts import count
    from pertoken.decode.ngram_style import Corpus

    about: dict[str, Any] = {"tokenizer": "t", "sha256": "", "texts": 1, "tokens": 3}
    needed: dict[str, Callable[[], Any]] = {
        "model": lambda: tiny_model("llama", vocab_size=258),
        "budget": lambda: 64,
        "constraint": Any3,
        "corpus": lambda: Corpus(count([[1, 2, 3]], 4, 3), **about),
        "drafter": Plain,
        "stop_ids": lambda: 3,
        "datastore": store,
        "direction": lambda: "r2l",
        "small": lambda: len,
        "large": lambda: len,
        "rule": lambda: "chow-sum",
    }
    given = [p.name for p in parameters(kind) if p.default is p.empty]
    return kind(*(needed[name]() for name in given))


def buildable() -> list[type]:
    """Those that need no byte view of a tokenizer; the others have tests of their own."""
    known = ("ByteModel", "ByteEnsemble", "SurfaceMask")
    return [one for one in methods() if one.__name__ not in known]


def test_every_card_that_is_a_class_is_a_method_object_with_its_slug() -> None:
    for slug, entry in entries().items():
        if isinstance(entry, type):
            assert issubclass(entry, Shown), entry
            assert entry.slug == slug


def test_every_public_class_is_one_of_a_few_kinds() -> None:
    strange = [
        name
        for name, thing in public().items()
        if isinstance(thing, type)
        and not issubclass(thing, Shown | Result | BaseException)
        and not dataclasses.is_dataclass(thing)
        and name not in NOT_SHOWN
    ]
    assert strange == []


@pytest.mark.parametrize("kind", methods(), ids=lambda kind: kind.__name__)
def test_settings_are_keyword_only(kind: type) -> None:
    for one in parameters(kind):
        if one.kind is not one.KEYWORD_ONLY:
            known = one.name in POSITIONAL or (kind.__name__, one.name) in OTHER_POSITIONAL
            assert known, f"{kind.__name__}: {one.name} must be keyword-only"


@pytest.mark.parametrize("kind", buildable(), ids=lambda kind: kind.__name__)
def test_a_method_keeps_what_it_was_given_and_shows_nothing_else(kind: type) -> None:
    method = made(kind)
    for one in parameters(kind):
        value = getattr(method, one.name)
        if one.default is not one.empty and not isinstance(one.default, tuple):
            assert value == one.default, f"{kind.__name__}.{one.name}"
    assert "=" not in repr(method).replace("Any3 object", "")
    assert repr(method).startswith(f"{kind.__name__}(")


def test_what_differs_from_the_default_is_shown() -> None:
    from pertoken.cache import KIVI, SnapKVCache
    from pertoken.decode import Goose

    assert repr(Goose(budget="auto", shape="paper")) == "Goose(shape='paper', budget='auto')"
    assert repr(KIVI(bits=4)) == "KIVI(bits=4)"
    model = tiny_model("llama")
    assert repr(SnapKVCache(model, 64, window=16)) == "SnapKVCache(LlamaForCausalLM, 64, window=16)"


# ---------------------------------------------------------------- results


def results() -> list[type[Result]]:
    """All results of the package; importing the families has defined them."""
    public()
    for module in ("compare_report", "signal", "reproduce._report", "cache.rate_distortion"):
        importlib.import_module(f"pertoken.{module}")
    importlib.import_module("pertoken.cli._caches_report")
    importlib.import_module("pertoken.cli.probe")

    def below(kind: type[Result]) -> Iterator[type[Result]]:
        for one in kind.__subclasses__():
            yield one
            yield from below(one)

    return [one for one in below(Result) if one.__module__.startswith("pertoken.")]


@pytest.mark.parametrize("kind", results(), ids=lambda kind: kind.__name__)
def test_a_result_is_read_without_arguments(kind: type[Result]) -> None:
    for name in ("table", "rows", "to_dict", "to_dataframe", "plot", "to_json", "to_html"):
        method = getattr(kind, name, None)
        if method is None:
            assert name == "plot"
            continue
        own = parameters(method)[1:]
        assert all(one.default is not one.empty for one in own), f"{kind.__name__}.{name}"
        if name in ("to_json", "to_html"):
            assert [one.name for one in own] == ["path"]
    assert inspect.signature(kind.table).return_annotation == "str"
    assert {"table", "rows", "to_dict"} <= {
        name for name in dir(kind) if inspect.getdoc(getattr(kind, name, None))
    }


def test_only_results_have_the_methods_of_results() -> None:
    words = {"to_json", "to_html", "to_dataframe", "plot"}
    bases: dict[str, set[str]] = {}
    having: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {base.id for base in node.bases if isinstance(base, ast.Name)}
                names = {one.name for one in node.body if isinstance(one, ast.FunctionDef)}
                having[node.name] = names & words

    def is_result(name: str) -> bool:
        return name == "Result" or any(map(is_result, bases.get(name, ())))

    assert [name for name, own in having.items() if own and not is_result(name)] == []


def test_what_a_public_function_returns_is_a_result_or_a_known_record() -> None:
    for name, thing in public().items():
        if isinstance(thing, type) or not callable(thing):
            continue
        said = str(inspect.signature(thing).return_annotation)
        module = importlib.import_module(thing.__module__)
        for word in re.findall(r"[A-Z]\w+", said):
            kind = getattr(module, word, None)
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                assert issubclass(kind, Result) or word in RECORDS, f"{name} -> {word}"


# ---------------------------------------------------------------- words


def signatures() -> Iterator[tuple[str, inspect.Parameter]]:
    things = {**public(), **{name: getattr(pertoken, name) for name in pertoken.__all__}}
    for name, thing in things.items():
        if dataclasses.is_dataclass(thing) and not issubclass(thing, Shown):  # type: ignore[arg-type]
            continue  # fields name what was found
        for one in parameters(thing):
            yield name, one


def test_the_same_words_for_the_same_things() -> None:
    others = [
        f"{name}: {one.name} is called {SYNONYMS[one.name]}"
        for name, one in signatures()
        if one.name in SYNONYMS and (name, one.name) not in OTHER_WORDS
    ]
    assert others == []


def test_words_have_one_type() -> None:
    for name, one in signatures():
        said = str(one.annotation)
        if one.name == "seed":
            assert said in ("int", "int | None"), f"{name}: {said}"
        if one.name == "progress" and name not in OTHER_PROGRESS:
            known = ("Progress", "Tell", "Callable[[str, int, int], None]")
            assert any(word in said for word in known), f"{name}: {said}"
        if one.name == "max_new_tokens":
            assert said in ("int", "int | None"), f"{name}: {said}"
        if one.name == "keep":
            thing = public().get(name)
            is_drafter = isinstance(thing, type) and any(
                base.__name__ in OTHER_KEEP for base in thing.__mro__
            )
            assert said == "float" or is_drafter or name == "compare", f"{name}: {said}"


# ---------------------------------------------------------------- the command line


def commands() -> dict[str, Any]:
    """Every command by its words."""
    found: dict[str, Any] = {}

    def walk(command: Any, words: str) -> None:
        if hasattr(command, "commands"):
            for name in command.list_commands(None):
                walk(command.get_command(None, name), f"{words} {name}".strip())
        else:
            found[words] = command

    walk(typer.main.get_command(app), "")
    return found


def option_of(alias: Any) -> Any:
    (found,) = (one for one in get_args(alias) if isinstance(one, typer.models.OptionInfo))
    return found


ORDER = (
    "--model",
    "--dtype",
    "--timeout",
    "--seed",
    "--limit",
    "--max-new-tokens",
    "--no-chat",
    "--json",
    "--html",
)
ALIASES = {
    "--model": shared.Model,
    "--dtype": shared.Dtype,
    "--timeout": shared.Timeout,
    "--seed": shared.Seed,
    "--limit": shared.Limit,
    "--max-new-tokens": shared.MaxNewTokens,
    "--no-chat": shared.NoChat,
    "--json": shared.Json,
    "--html": shared.Html,
}


def flags(command: Any) -> list[tuple[str, Any]]:
    return [
        (one.opts[0], one)
        for one in command.params
        if one.opts[0].startswith("--") and one.opts[0] != "--help"
    ]


@pytest.mark.parametrize("words", commands())
def test_shared_options_are_the_shared_ones_and_come_last(words: str) -> None:
    options = flags(commands()[words])
    names = [name for name, _ in options]
    found = [name for name in names if name in ORDER]
    assert found == sorted(found, key=ORDER.index)
    assert names[len(names) - len(found) :] == found, "a command's own options come first"
    for name, option in options:
        if name in ALIASES:
            assert option.help == option_of(ALIASES[name]).help, name
            assert option.metavar == option_of(ALIASES[name]).metavar, name


@pytest.mark.parametrize("words", commands())
def test_options_use_the_words_and_say_what_they_are(words: str) -> None:
    command = commands()[words]
    assert command.help
    for name, option in flags(command):
        assert name not in COMMAND_SYNONYMS
        assert option.help, name
        assert option.help.endswith((".", ".)")), option.help


@pytest.mark.parametrize("words", commands())
def test_what_loads_a_model_takes_a_dtype_and_what_finds_something_gives_json(words: str) -> None:
    command = commands()[words]
    names = {one.opts[0] for one in command.params}
    if {"--model", "model"} & names and words not in NO_DTYPE:
        assert "--dtype" in names
    assert ("--json" in names) == (words not in NO_JSON)
    if "--html" in names:
        assert "--json" in names


def test_exceptions_are_still_needed() -> None:
    assert set(NO_JSON) | set(NO_DTYPE) <= set(commands())
    assert set(NOT_SHOWN) <= {*public(), "FiberPOTrainer"}
    assert {name for name, _ in [*OTHER_POSITIONAL, *OTHER_WORDS]} <= set(public())
    assert all(name in (SOURCE / "testing" / "trace.py").read_text() for name in ("rng",))


@pytest.mark.parametrize("group", [[], ["cache"], ["premiums"], ["probe"], ["train"]])
def test_no_command_is_listed_with_half_a_sentence(
    group: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*group, "--help"]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    for words, command in commands().items():
        if words.split()[:-1] == group:
            assert " ".join(command.help.partition("\n\n")[0].split()) in listed


def test_the_table_is_in_contributing() -> None:
    text = (SOURCE.parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "## One grammar" in text
    for word in ("budget", "keep", "layer", "seed", "progress", "max_new_tokens", *ORDER):
        assert f"`{word}`" in text, word


def test_a_method_is_told_apart_from_its_tensors() -> None:
    # A tensor as a setting must not break the comparison with the default.
    class Odd(Shown):
        def __init__(self, *, bias: Any = None) -> None:
            self.bias = bias

    assert repr(Odd()) == "Odd()"
    assert repr(Odd(bias=torch.ones(2))).startswith("Odd(bias=tensor(")
