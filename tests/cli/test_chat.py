"""`pertoken chat` through a pipe and at a terminal, with a tiny model in a folder."""

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

import pertoken
from pertoken.cache.memory import full_cache_bytes
from pertoken.cache.named import CACHES
from pertoken.cli import main
from pertoken.cli._talk import Said, Talk
from pertoken.cli.generate import Streamer
from pertoken.conversation import read_conversation
from pertoken.errors import PertokenError

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
QUESTIONS = ["abc abc", "and then?", "so"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(tiny_folder: str) -> list[str]:
    return ["chat", "--model", tiny_folder, "--max-new-tokens", "8", "--cache", "full"]


def piped(monkeypatch: Patch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def typed(monkeypatch: Patch, *lines: str) -> None:
    """The user types these lines and then Ctrl-D."""
    waiting = list(lines)

    def answer(prompt: str) -> str:
        if not waiting:
            raise EOFError
        return waiting.pop(0)

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", answer)


def expected(folder: str, questions: list[str], new: int = 8) -> list[str]:
    """The answers by generate over the whole text each time, without a cache that lives on."""
    model, tokenizer = pertoken.load(folder)
    ids: list[int] = []
    found = []
    for place, question in enumerate(questions):
        head = "\n" if place else ""
        ids += tokenizer(f"{head}User: {question}\nAssistant:")["input_ids"]
        whole = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)[0].tolist()
        found.append(tokenizer.decode(whole[len(ids) :], skip_special_tokens=True))
        ids = whole
    return found


def test_each_line_of_a_pipe_is_a_turn_of_one_conversation(
    run: list[str], tiny_folder: str, capsys: Capture, monkeypatch: Patch
) -> None:
    piped(monkeypatch, QUESTIONS[0], "", *QUESTIONS[1:])
    assert main(run) == 0
    out, err = capsys.readouterr()
    assert out == "".join(f"{answer}\n" for answer in expected(tiny_folder, QUESTIONS))
    hint, *lines = err.splitlines()
    assert "has no chat template" in hint
    assert len(lines) == 3
    seen = [int(line.split("; ")[-1].split()[0]) for line in lines]
    lengths = [24, 24 + 8 + 27, 24 + 8 + 27 + 8 + 20]  # questions and answers as bytes
    assert seen == [length + 7 for length in lengths]  # the last token is not read yet
    assert all("MiB held, a full cache" in line for line in lines)


def test_only_the_new_part_is_read(run: list[str], capsys: Capture, monkeypatch: Patch) -> None:
    sizes: list[int] = []
    load = pertoken.load

    def watched(*arguments: Any, **options: Any) -> Any:
        model, tokenizer = load(*arguments, **options)
        model.register_forward_pre_hook(
            lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        return model, tokenizer

    monkeypatch.setattr(pertoken, "load", watched)
    piped(monkeypatch, *QUESTIONS[:2])
    assert main(run) == 0
    assert [size for size in sizes if size > 1] == [24, 1 + 27]


def test_the_line_counts_bytes(tiny_folder: str, capsys: Capture) -> None:
    model, tokenizer = pertoken.load(tiny_folder)
    talk = Talk(model, tokenizer, DynamicCache, 8, {"do_sample": False})
    said = talk.ask("abc")
    assert said.seen == len(talk.ids) - 1
    assert said.held == said.full == full_cache_bytes(model, said.seen)
    assert said.peak is None
    assert not said.stopped
    assert talk.messages[0] == {"role": "user", "content": "abc"}
    capsys.readouterr()
    peaked = Said([1] * 9, "", 3.0, False, 2**21, 2**22, 2**23, 40)
    assert peaked.line().startswith("2.00 MiB held (peak 4.00), a full cache 8.00 MiB; 3.0 tokens")


def test_peaks_ends_of_turns_and_closing_reach_the_cache(
    run: list[str], capsys: Capture, monkeypatch: Patch
) -> None:
    calls: list[str] = []

    class Noted(DynamicCache):
        budget = 7
        peak_bytes = 3 * 2**20
        kv_bytes = 5

        def __getattr__(self, name: str) -> Any:
            if name in ("reset_peak", "end_turn", "close"):
                return lambda: calls.append(name)
            raise AttributeError(name)

    monkeypatch.setitem(CACHES, "tova", lambda model, budget: Noted())
    piped(monkeypatch, "a", "b", "/stats", "/clear", "/stats", "c", "/exit", "never")
    assert main([*run, "--cache", "tova"]) == 0
    turn = ["reset_peak", "end_turn"]
    assert calls == [*turn, *turn, "close", *turn, "close"]
    err = capsys.readouterr().err
    assert "(peak 3.00)" in err
    assert "cache tova, budget 7 tokens" in err
    assert "2 questions, " in err
    assert "0 questions, 0 tokens seen" in err
    assert "5 bytes of keys and values" in err


def test_clear_begins_anew(
    run: list[str], tiny_folder: str, capsys: Capture, monkeypatch: Patch
) -> None:
    piped(monkeypatch, "abc abc", "/clear", "abc abc")
    assert main(run) == 0
    out, _ = capsys.readouterr()
    (answer,) = expected(tiny_folder, ["abc abc"])
    assert out == f"{answer}\n" * 2


def test_the_conversation_is_saved_for_other_commands(
    run: list[str], tiny_folder: str, here: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    piped(monkeypatch, *QUESTIONS[:2])
    assert main([*run, "--save", "talk.jsonl"]) == 0
    found = read_conversation(here / "talk.jsonl")
    assert [m["content"] for m in found if m["role"] == "user"] == QUESTIONS[:2]
    answers = [text.strip() for text in expected(tiny_folder, QUESTIONS[:2])]
    assert [m["content"] for m in found if m["role"] == "assistant"] == answers
    capsys.readouterr()
    arguments = ["--conversation", "talk.jsonl", "--model", run[2], "--max-new-tokens", "3"]
    assert main(["compare-caches", "full", *arguments, "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["turns"] == 2
    piped(monkeypatch, "x")
    assert main([*run, "--save", "talk.jsonl"]) == 2
    assert "talk.jsonl exists already" in capsys.readouterr().err
    assert read_conversation(here / "talk.jsonl") == found


def test_sampling_repeats_with_a_seed(run: list[str], capsys: Capture, monkeypatch: Patch) -> None:
    def said(*arguments: str) -> str:
        piped(monkeypatch, *QUESTIONS)
        assert main([*run, *arguments]) == 0
        return capsys.readouterr().out

    first = said("--sample", "--seed", "3")
    assert first == said("--sample", "--seed", "3")
    assert first != said("--temperature", "5", "--seed", "3")
    assert said("--top-p", "1e-9") == said()
    assert first != said()


def test_ctrl_c_ends_the_answer_and_not_the_chat(
    run: list[str], tiny_folder: str, capsys: Capture, monkeypatch: Patch
) -> None:
    put, interrupted = Streamer.put, []

    def pressed(self: Streamer, value: Any) -> None:
        put(self, value)
        if self.tokens == 3 and not interrupted:
            interrupted.append(True)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Streamer, "put", pressed)
    handler = signal.getsignal(signal.SIGINT)
    piped(monkeypatch, *QUESTIONS[:2])
    assert main(run) == 0
    out, err = capsys.readouterr()
    (first,) = expected(tiny_folder, QUESTIONS[:1])
    assert "(stopped)" in err.splitlines()[1]
    assert "(stopped)" not in err.splitlines()[2]
    seen = [int(line.split("; ")[2].split()[0]) for line in err.splitlines()[1:]]
    # 3 or 4 tokens, depending on whether the streamer is told before or after the question to stop
    kept = seen[0] - 24 + 1
    assert kept in (3, 4)
    assert seen[1] == seen[0] + 1 + 27 + 7
    assert out[: kept - 1] == first[: kept - 1]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_second_ctrl_c_ends_the_chat(
    run: list[str], here: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    def pressed(self: Streamer, value: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Streamer, "put", pressed)
    piped(monkeypatch, "a", "b")
    assert main([*run, "--save", "talk.jsonl"]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert signal.getsignal(signal.SIGINT) is handler
    assert os.listdir(here) == []


def test_at_a_terminal_mistakes_do_not_end_the_chat(
    run: list[str], tiny_folder: str, capsys: Capture, monkeypatch: Patch
) -> None:
    typed(monkeypatch, "/stat", "x" * 600, "\udcff", "abc abc")
    assert main(run) == 0
    out, err = capsys.readouterr()
    assert out == expected(tiny_folder, ["abc abc"])[0] + "\n\n"
    assert "unknown command /stat (did you mean '/stats'?); known: /exit" in err
    assert "the conversation has 617 tokens; the model has 512 positions: /clear" in err
    assert "its character 1 is a broken one" in err
    assert "Ctrl-C stops an answer" in err


def test_an_error_within_a_forward_ends_it(
    run: list[str], capsys: Capture, monkeypatch: Patch
) -> None:
    class Breaks(DynamicLayer):
        def update(self, *_: Any, **__: Any) -> Any:
            raise PertokenError("no room for a block")

    monkeypatch.setitem(CACHES, "tova", lambda *_: Cache(layers=[Breaks(), Breaks()]))
    typed(monkeypatch, "a", "b")
    assert main([*run, "--cache", "tova"]) == 2
    assert capsys.readouterr().err.endswith("error: no room for a block\n")


def test_answers_are_shortened_to_the_positions_left(
    run: list[str], capsys: Capture, monkeypatch: Patch
) -> None:
    piped(monkeypatch, "x" * 490, "more")
    assert main(run) == 2
    err = capsys.readouterr().err.splitlines()
    assert "511 tokens seen" in err[1]
    assert "/clear begins a new one" in err[2]


def test_an_empty_pipe_is_an_empty_chat(
    run: list[str], here: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    piped(monkeypatch)
    assert main([*run, "--save", "talk.jsonl"]) == 0
    assert capsys.readouterr().out == ""
    assert os.listdir(here) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache", "kv-drect"], "unknown cache 'kv-drect' (did you mean 'kv-direct'"),
        (["--budget", "0"], "a whole number from 1 on, got 0"),
        (["--budget", "25%"], "Invalid value for '--budget'"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be 1 or more, got 0"),
        (["--temperature", "0"], "--temperature must be above 0, got 0"),
        (["--top-p", "2"], "--top-p is a share above 0 and at most 1, got 2"),
        (["--model", "smolm2"], "did you mean 'smollm2'"),
        (["--dtype", "float31"], "did you mean"),
        (["--save", "none/talk.jsonl"], "there is no folder none"),
        (["--save", "."], "it is a folder"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    run: list[str], capsys: Capture, monkeypatch: Patch, arguments: list[str], message: str
) -> None:
    piped(monkeypatch, "a")
    assert main([*run, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_pipe_that_is_no_utf8(run: list[str], capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n\xff\n"), "utf-8"))
    assert main(run) == 2
    assert "error: the conversation on standard input is not UTF-8" in capsys.readouterr().err


@pytest.mark.model
def test_a_real_chat_says_what_the_template_over_the_whole_history_says(
    smollm2: Any, capsys: Capture
) -> None:
    model, tokenizer = smollm2
    talk = Talk(model, tokenizer, DynamicCache, 12, {"do_sample": False})
    messages: list[dict[str, str]] = []
    for question in ("What is the capital of France?", "And of Italy?", "Thanks."):
        messages.append({"role": "user", "content": question})
        whole = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        said = talk.ask(question)
        new = model.generate(**whole, max_new_tokens=12, do_sample=False)
        start = whole["input_ids"].shape[1]
        assert talk.ids[:start] == whole["input_ids"][0].tolist()
        text = tokenizer.decode(new[0, start:], skip_special_tokens=True)
        assert said.text == text.strip()
        messages.append({"role": "assistant", "content": text})
    assert capsys.readouterr().out.count("\n") >= 3
