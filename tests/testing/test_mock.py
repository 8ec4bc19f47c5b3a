"""The mock model draws from its table; the byte tokenizer serves streamers and stop strings."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import StopStringCriteria, TextStreamer

from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, MockModel, tiny_model


def table(size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(size, size, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_mock_follows_its_table_with_and_without_a_cache() -> None:
    rows, model = table(), MockModel(table())
    ids = torch.tensor([[3, 1, 7, 2, 2]])
    torch.testing.assert_close(model(ids).logits.softmax(-1)[0], rows[ids[0]])
    first = model(ids[:, :2], use_cache=True)
    second = model(ids[:, 2:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits.softmax(-1)[0], rows[ids[0, 2:]])


def test_mock_decodes_greedily_along_its_chain() -> None:
    model = MockModel(torch.eye(5).roll(1, dims=1))
    out = model.generate(torch.tensor([[1]]), max_new_tokens=6, do_sample=False)
    assert out[0].tolist() == [1, 2, 3, 4, 0, 1, 2]


@pytest.mark.parametrize("bad", [[[1.0, 0.0]], [[0.5, 0.2], [0.5, 0.5]], [[2.0, -1.0], [0, 1]]])
def test_mock_refuses_what_is_no_table(bad: list[list[float]]) -> None:
    with pytest.raises(PertokenError):
        MockModel(bad)


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a")) == ["<0x61>"]


def test_padding_is_on_the_left_and_masked() -> None:
    batch = ByteTokenizer()(["abc", "ş"], padding=True, return_tensors="pt")
    assert batch.input_ids[1, 0] == 0
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]


def test_streamer_prints_text(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = ByteTokenizer()
    streamer = TextStreamer(tokenizer)  # type: ignore[arg-type]
    streamer.put(torch.tensor([tokenizer.encode("grün und ")]))
    streamer.put(torch.tensor(tokenizer.encode("blau")))
    streamer.end()
    assert capsys.readouterr().out == "grün und blau\n"


@pytest.mark.parametrize(("text", "stops"), [("eins, zwö", True), ("eins, zwo", False)])
def test_stop_strings_are_matched_in_bytes(text: str, stops: bool) -> None:
    tokenizer = ByteTokenizer()
    criterion = StopStringCriteria(tokenizer, ["zwö"])  # type: ignore[arg-type]
    ids = torch.tensor([tokenizer.encode(text)])
    assert criterion(ids, None).tolist() == [stops]  # type: ignore[arg-type]


def test_generate_takes_the_tokenizer_for_stop_strings() -> None:
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=tokenizer.vocab_size)
    inputs = tokenizer("hello", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    new = [tokenizer.decode([token]) for token in plain[0, 5:].tolist()]
    stop = next(text for text in new if len(text) == 1 and text != "�")
    cut = model.generate(
        **inputs, max_new_tokens=20, do_sample=False, stop_strings=[stop], tokenizer=tokenizer
    )
    assert cut.shape[1] == 5 + new.index(stop) + 1
