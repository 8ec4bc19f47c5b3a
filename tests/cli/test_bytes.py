"""`pertoken generate --bytes`: prompts cut anywhere, whole characters out."""

import io
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pertoken
import pertoken.decode
from pertoken.cli import main
from pertoken.cli.bytes import characters, until

Capture = pytest.CaptureFixture[str]
NEW = "é, naïve 🎉 done"


def single(content: bytes) -> Iterator[bytes]:
    return (bytes([byte]) for byte in content)


class Scripted:
    """A byte model that says what it was told to, and keeps what it was asked."""

    says = b""
    asked: dict[str, Any]
    forwards, fed, invalid_mass = 7, 8, 0.125

    def __init__(self, model: Any, tokenizer: Any) -> None:
        pass

    def stream(self, prefix: bytes, max_bytes: int, **options: Any) -> Iterator[bytes]:
        Scripted.asked = {"prefix": prefix, "max_bytes": max_bytes, **options}
        yield from single(self.says[:max_bytes])


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setattr(pertoken.decode, "ByteModel", Scripted, raising=False)
    monkeypatch.setattr(pertoken, "load", lambda *_, **__: (None, None))
    monkeypatch.setattr(Scripted, "says", NEW.encode())
    return Scripted


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))


def test_greedy_and_256_bytes_unless_told_otherwise(
    scripted: type[Scripted], capsys: Capture
) -> None:
    assert main(["generate", "caf", "--bytes"]) == 0
    assert capsys.readouterr().out == NEW + "\n"
    assert scripted.asked == {"prefix": b"caf", "max_bytes": 256, "temperature": 0.0, "seed": None}


def test_sampling_options_reach_the_model(scripted: type[Scripted], capsys: Capture) -> None:
    def asked(*arguments: str) -> dict[str, Any]:
        assert main(["generate", "a", "--bytes", *arguments]) == 0
        return scripted.asked

    assert asked("--sample", "--seed", "3")["temperature"] == 1.0
    assert asked("--temperature", "0.7", "--seed", "3")["temperature"] == 0.7
    assert scripted.asked["seed"] == 3
    assert asked("--max-new-bytes", "5")["max_bytes"] == 5


def test_the_prompt_is_raw_even_where_there_is_a_chat_template(
    scripted: type[Scripted], capsys: Capture
) -> None:
    for arguments in ([], ["--no-chat"]):
        assert main(["generate", "  two\n", "--bytes", *arguments]) == 0
        assert scripted.asked["prefix"] == b"  two\n"


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_prompt_from_a_pipe_may_end_inside_a_character(
    scripted: type[Scripted], capsys: Capture, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    party = "🎉".encode()
    monkeypatch.setattr(scripted, "says", party[cut:] + b"!")
    piped(monkeypatch, b"a " + party[:cut])
    assert main(["generate", "--bytes"]) == 0
    assert capsys.readouterr().out == "🎉!\n"
    assert scripted.asked["prefix"] == b"a " + party[:cut]


def test_so_may_one_from_the_command_line(scripted: type[Scripted], capsys: Capture) -> None:
    scripted.says = b"\xa9!"
    cut = os.fsdecode("café".encode()[:-1])  # as a shell hands over $'caf\xc3'
    assert main(["generate", cut, "--bytes"]) == 0
    assert capsys.readouterr().out == "é!\n"
    assert scripted.asked["prefix"] == b"caf\xc3"


def test_no_half_character_is_printed(scripted: type[Scripted], capsys: Capture) -> None:
    whole = NEW.encode()
    for most in range(1, len(whole) + 1):
        assert main(["generate", "caf", "--bytes", "--max-new-bytes", str(most)]) == 0
        assert capsys.readouterr().out == whole[:most].decode(errors="ignore") + "\n"


def test_a_character_is_printed_with_its_last_byte() -> None:
    given: list[bytes] = []

    def bytes_one_by_one() -> Iterator[bytes]:
        for byte in single("aé🎉".encode()):
            given.append(byte)
            yield byte

    shown = [(text, len(given)) for text in characters(b"", bytes_one_by_one())]
    assert shown == [("a", 1), ("é", 3), ("🎉", 7)]


def test_bytes_that_are_no_character_are_marked() -> None:
    assert "".join(characters(b"", single(b"a\xffb\xc3("))) == "a�b�("
    assert "".join(characters(b"\xe2\x82", single(b"x"))) == "�x"


def test_stop_texts(scripted: type[Scripted], capsys: Capture) -> None:
    assert main(["generate", "caf", "--bytes", "--stop", "never", "--stop", "ïv"]) == 0
    assert capsys.readouterr().out == "é, naïv\n"
    assert b"".join(until(single(b"aabb"), [b"ab", b"aab"])) == b"aab"


def test_stats_say_how_it_went(scripted: type[Scripted], capsys: Capture) -> None:
    assert main(["generate", "caf", "--bytes", "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == NEW + "\n"
    first, second = err.splitlines()
    assert first.startswith(f"{len(NEW.encode())} new bytes in ")
    assert second.startswith("7 forward passes of 8 tokens; 12.5%")


def test_ctrl_c_ends_the_line(
    scripted: type[Scripted], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Iterator[bytes]:
        yield from single(b"abc")
        raise KeyboardInterrupt

    monkeypatch.setattr(scripted, "stream", interrupted)
    assert main(["generate", "x", "--bytes"]) == 130
    assert capsys.readouterr() == ("abc\n", "interrupted\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["", "--bytes"], "the prompt is empty"),
        (["a\udcffb", "--bytes"], "not UTF-8: byte 2 of it is 0xff"),
        (["a\udcc3(", "--bytes"], "not UTF-8: byte 2 of it is 0xc3"),
        (["a", "--bytes", "--method", "goose"], "--bytes and --method do not go together"),
        (["a", "--bytes", "--budget", "3"], "--bytes and --budget do not go together"),
        (["a", "--bytes", "--max-new-tokens", "9"], "give --max-new-bytes instead"),
        (["a", "--bytes", "--max-new-bytes", "0"], "--max-new-bytes must be 1 or more, got 0"),
        (["a", "--max-new-bytes", "5"], "--max-new-bytes needs --bytes"),
        (["a", "--bytes", "--temperature", "0"], "--temperature must be above 0"),
        (["a", "--bytes", "--stop", ""], "--stop needs some text"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    scripted: type[Scripted], capsys: Capture, arguments: list[str], message: str
) -> None:
    assert main(["generate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_broken_prompt_from_a_pipe(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, message in ((b"", "the prompt is empty"), (b"ok \xff", "byte 4 of it is 0xff")):
        piped(monkeypatch, content)
        assert main(["generate", "--bytes"]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def cafe_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that says "café." again and again, and has one token for it and one for " un"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from pertoken.testing import MockModel

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {sign: place for place, sign in enumerate(["</s>", *letters])}
    merges = []
    for word in ("cafÃ©", "Ġun"):
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocab[word[:end]] = len(vocab)
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("cafe")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    table = torch.full((len(vocab), len(vocab)), 1e-5)
    for token, following in (("Ġun", "Ġ"), ("Ġ", "cafÃ©"), ("cafÃ©", "."), (".", "Ġ")):
        table[vocab[token], vocab[following]] = 1.0
    # A cut token leads the token model astray: behind "ca" or "caf" it ends the text.
    for token in ("c", "ca", "caf", "cafÃ"):
        table[vocab[token], vocab["</s>"]] = 1.0
    model = MockModel(table / table.sum(-1, keepdim=True))
    model.config.eos_token_id = model.generation_config.eos_token_id = 0
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("cut", "rest"), [(1, "afé."), (2, "fé."), (3, "é."), (4, "é."), (5, ".")])
def test_a_word_cut_anywhere_is_completed(
    cafe_folder: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch, cut: int, rest: str
) -> None:
    word = "café.".encode()
    piped(monkeypatch, b"or un " + word[:cut])
    arguments = ["--model", cafe_folder, "--max-new-bytes", str(len(word) - cut)]
    assert main(["generate", "--bytes", *arguments]) == 0
    assert capsys.readouterr().out == rest + "\n"


def test_the_token_model_alone_does_not_complete_it(cafe_folder: str, capsys: Capture) -> None:
    arguments = ["--model", cafe_folder, "--max-new-tokens", "5", "--method", "hf"]
    assert main(["generate", "or un ca", *arguments]) == 0
    assert capsys.readouterr().out == "\n"


def test_sampling_repeats_with_a_seed(tiny_folder: str, capsys: Capture) -> None:
    def sampled(*arguments: str) -> str:
        fixed = ["--bytes", "--max-new-bytes", "12", "--model", tiny_folder]
        assert main(["generate", "abc abc", *fixed, *arguments]) == 0
        return capsys.readouterr().out

    first = sampled("--sample", "--seed", "3")
    assert first == sampled("--sample", "--seed", "3")
    assert first != sampled("--sample", "--seed", "4")


def test_a_prompt_of_one_token_without_a_token_before_texts(
    cafe_folder: str, capsys: Capture
) -> None:
    assert main(["generate", "ca", "--bytes", "--model", cafe_folder]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no beginning-of-text token" in err
    assert err.count("\n") == 1
