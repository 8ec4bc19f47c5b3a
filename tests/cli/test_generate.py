"""`pertoken generate` as a user types it, with a tiny model in a folder."""

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import pertoken
from pertoken.cli import main
from pertoken.cli.generate import Streamer, stats_lines
from pertoken.testing import ByteTokenizer

Capture = pytest.CaptureFixture[str]
METHODS = ["goose", "token-recycling", "prompt-lookup", "lookahead", "suffix", "plain"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured costs of tiny models do not belong into the user's cache."""
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def run(tiny_folder: str) -> list[str]:
    return ["--model", tiny_folder, "--max-new-tokens", "24"]


@pytest.fixture
def expected(run: list[str], capsys: Capture) -> str:
    """What transformers' own generate makes of "abc abc"."""
    model, tokenizer = pertoken.load(run[1])
    ids = tokenizer("abc abc", return_tensors="pt")["input_ids"]
    new = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    return str(tokenizer.decode(new, skip_special_tokens=True)) + "\n"


@pytest.mark.parametrize("method", [*METHODS, "hf", "hf-prompt-lookup"])
def test_every_method_prints_the_same_text(
    run: list[str], expected: str, capsys: Capture, method: str
) -> None:
    assert main(["generate", "abc abc", "--method", method, *run]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("method", [*METHODS, "hf", "hf-prompt-lookup", "cntp"])
def test_of_the_least_share_every_method_draws_the_best_token(
    run: list[str], expected: str, capsys: Capture, method: str
) -> None:
    assert main(["generate", "abc abc", "--method", method, *run, "--top-p", "1e-9"]) == 0
    assert capsys.readouterr().out == expected
    hot = ["--temperature", "50", "--seed", "3"]
    assert main(["generate", "abc abc", "--method", method, *run, *hot, "--top-p", "1"]) == 0
    assert capsys.readouterr().out != expected


@pytest.mark.parametrize("method", ["goose", "plain", "hf"])
@pytest.mark.parametrize("cache", ["full", "kv-direct", "kv-direct:turn"])
def test_an_exact_cache_writes_the_same_text(
    run: list[str], expected: str, capsys: Capture, method: str, cache: str
) -> None:
    given = ["--method", method, "--cache", cache, "--cache-budget", "4"]
    assert main(["generate", "abc abc", *given, *run]) == 0
    assert capsys.readouterr().out == expected


def test_a_constraint_goes_with_an_exact_cache(
    run: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rule_of_e.py").write_text("def no_e(text):\n    return 'e' not in text\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    model, tokenizer = pertoken.load(run[1])
    model.generation_config.eos_token_id = 0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    run[1] = str(tmp_path)
    capsys.readouterr()
    given = ["generate", "abc abc", "--constraint", "rule_of_e:no_e", "--seed", "1", *run]
    assert main(given) == 0
    expected = capsys.readouterr().out
    assert expected.strip()
    assert main([*given, "--cache", "kv-direct", "--cache-budget", "4"]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--cache", "snapkvv"], "unknown cache 'snapkvv' (did you mean 'snapkv'?)"),
        (["--cache-budget", "4"], "--cache-budget goes with --cache"),
        (
            ["--cache", "full", "--regex", "a", "--particles", "2"],
            "--cache holds one text and --particles draws many",
        ),
        (
            ["--cache", "h2o", "--method", "goose"],
            "Goose drops the rows of rejected drafts, which H2OCache cannot",
        ),
        (["--cache", "h2o", "--cache-budget", "0"], "must be 1 or more"),
    ],
)
def test_a_cache_that_does_not_fit_is_one_line(
    run: list[str], capsys: Capture, given: list[str], said: str
) -> None:
    assert main(["generate", "abc abc", *given, *run]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_goose_is_the_default(run: list[str], expected: str, capsys: Capture) -> None:
    assert main(["generate", "abc abc", *run, "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == expected
    assert err.splitlines()[0].startswith("24 new tokens in ")
    assert "forward passes behind the prompt" in err


def test_text_comes_in_pieces(run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=shown.append, flush=lambda: None))
    assert main(["generate", "abc abc", "--method", "plain", *run]) == 0
    assert len([piece for piece in shown if piece.strip()]) > 5


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_prompt_from_a_pipe(
    run: list[str],
    expected: str,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abc abc"), "utf-8"))
    assert main(["generate", *arguments, *run]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("method", ["goose", "hf"])
def test_stop_strings(run: list[str], expected: str, capsys: Capture, method: str) -> None:
    stop = re.findall(r"[!-~]{2}", expected)[0]
    arguments = ["--method", method, "--stop", "never", "--stop", stop]
    assert main(["generate", "abc abc", *arguments, *run]) == 0
    end = expected.index(stop) + len(stop)
    assert capsys.readouterr().out.rstrip("\n") == expected[:end].rstrip("\n")


def test_sampling_repeats_with_a_seed(run: list[str], capsys: Capture) -> None:
    def sampled(*arguments: str) -> str:
        assert main(["generate", "abc abc", *run, *arguments]) == 0
        return capsys.readouterr().out

    first = sampled("--sample", "--seed", "3")
    assert first == sampled("--sample", "--seed", "3")
    assert first != sampled("--sample", "--seed", "4")
    assert first != sampled("--temperature", "5", "--seed", "3")


def test_cautious_decoding_streams_its_spans_and_tells_its_cost(
    run: list[str], capsys: Capture
) -> None:
    texts = []
    for _ in range(2):
        command = ["generate", "abc abc", *run, "--method", "cntp", "--temperature", "1.2"]
        assert main([*command, "--seed", "3", "--stats"]) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        assert "24 new tokens" in err
        assert "rows of them for each new token" in err
        assert "unsure at" in err
    assert texts[0] == texts[1]


def test_chat_template_is_used_unless_declined(
    run: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    load = pertoken.load

    def with_template(*arguments: Any, **options: Any) -> tuple[Any, Any]:
        model, tokenizer = load(*arguments, **options)
        tokenizer.chat_template = "<<{{ messages[0]['content'] }}>>"
        generate = model.generate

        def watch(ids: torch.Tensor, **options: Any) -> Any:
            seen.append(ids.shape[1])
            return generate(ids, **options)

        monkeypatch.setattr(model, "generate", watch)
        return model, tokenizer

    monkeypatch.setattr(pertoken, "load", with_template)
    for arguments in ([], ["--no-chat"]):
        assert main(["generate", "abcdef", "--method", "plain", *arguments, *run]) == 0
    assert seen == [10, 6]


def test_budget_and_dtype(run: list[str], capsys: Capture) -> None:
    for budget in ("auto", "published", "3"):
        assert main(["generate", "ab", "--budget", budget, "--dtype", "float64", *run]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([""], "the prompt is empty"),
        (["  \n"], "the prompt is empty"),
        (["x" * 600], "prompt of 600 tokens and 24 new ones do not fit the model's 512 positions"),
        (["a \udcff"], "the prompt is not UTF-8 text: its character 3"),
        (["a", "--method", "gose"], "did you mean 'goose'"),
        (["a", "--method", "skipdecode"], "planned"),
        (["a", "--model", "smolm2"], "did you mean 'smollm2'"),
        (["a", "--model", "./none"], "no such model folder"),
        (["a", "--max-new-tokens", "0"], "--max-new-tokens must be 1 or more, got 0"),
        (["a", "--budget", "0"], "--budget is auto or a number from 1 on"),
        (["a", "--budget", "x"], "--budget is auto or a number from 1 on"),
        (["a", "--temperature", "0"], "--temperature must be above 0, got 0"),
        (["a", "--temperature", "nan"], "--temperature must be above 0"),
        (["a", "--top-p", "0"], "--top-p is a share above 0 and at most 1, got 0"),
        (["a", "--top-p", "nan"], "--top-p is a share above 0"),
        (["a", "--top-p", "0.9", "--regex", "a+"], "leave out --top-p"),
        (["a", "--top-p", "0.9", "--bytes"], "--bytes and --top-p do not go together"),
        (["a", "--stop", ""], "--stop needs some text"),
        (["a", "--dtype", "float31"], "unknown dtype"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    run: list[str], capsys: Capture, arguments: list[str], message: str
) -> None:
    assert main(["generate", *run, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_without_a_prompt_at_a_terminal(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert main(["generate"]) == 2
    assert "give a prompt" in capsys.readouterr().err


def test_empty_and_broken_input(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, message in ((b"", "the prompt is empty"), (b"\xff", "not UTF-8")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))
        assert main(["generate"]) == 2
        assert message in capsys.readouterr().err


def test_ctrl_c_ends_the_line(
    run: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Streamer.put
    calls: list[int] = []

    def interrupted(self: Streamer, value: Any) -> None:
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        put(self, value)

    monkeypatch.setattr(Streamer, "put", interrupted)
    assert main(["generate", "abc abc", "--method", "plain", *run]) == 130
    out, err = capsys.readouterr()
    assert len(out) > 1
    assert out.endswith("\n")
    assert err == "interrupted\n"


def test_streamer_shows_new_text_once(capsys: Capture) -> None:
    tokenizer = ByteTokenizer()
    streamer = Streamer(tokenizer)
    streamer.put(torch.tensor([tokenizer.encode("the prompt")]))
    for token in tokenizer.encode("nœud"):
        streamer.put(torch.tensor([token]))
    streamer.put(torch.tensor(tokenizer.encode("s\nok")))
    streamer.end()
    assert capsys.readouterr().out == "nœuds\nok\n"
    assert streamer.tokens == len("nœuds\nok".encode())


def test_stats_of_a_drafter() -> None:
    stats = SimpleNamespace(
        forwards=10,
        accepted_per_forward=2.5,
        draft_share=0.031,
        drafted={"spine": 40, "branch": 9},
        accepted={"spine": 12},
    )
    assert stats_lines(25, 2.0, stats)[1:] == [
        "10 forward passes behind the prompt, 2.50 tokens each; drafting took 3.1%",
        "accepted of drafted: spine 12 of 40, branch 0 of 9",
    ]


def test_state_space_model(tiny_folder: str, tmp_path: Path, capsys: Capture) -> None:
    import shutil

    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    for file in Path(tiny_folder).glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    capsys.readouterr()
    assert main(["generate", "abc", "--model", str(tmp_path), "--max-new-tokens", "4"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
