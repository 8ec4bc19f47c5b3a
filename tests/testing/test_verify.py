"""`verify`: two set-ups, a verdict per prompt, a table, one line."""

import json
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pertoken.errors import PertokenError
from pertoken.prompts import Prompt
from pertoken.testing import ByteTokenizer, tiny_model, verify
from pertoken.testing.distribution import enumerate_texts
from pertoken.testing.verify import SAMPLE_PROMPT, SAMPLED, as_setup, setup_name

TOKENIZER = ByteTokenizer()
TEXTS = ["a bird, a bird, a", Prompt("hello there", category="chat", id="h1"), "x"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=TOKENIZER.vocab_size)


def wrong_at(step: int) -> Any:
    """A decoder that takes token 7 at one step."""

    def spoiled(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        total = arguments["generation_config"].max_length - input_ids.shape[1]
        ids = model.generate(input_ids, max_new_tokens=total, do_sample=False)
        ids[:, input_ids.shape[1] + step] = 7
        return ids

    return spoiled


def test_right_setups_are_lossless(model: PreTrainedModel) -> None:
    assistant = tiny_model("llama", vocab_size=TOKENIZER.vocab_size, seed=1)
    for setup in ("hf", {"prompt_lookup_num_tokens": 10}, {"assistant_model": assistant}):
        report = verify(model, TOKENIZER, TEXTS, setup, max_new_tokens=16)
        assert report.outcome == "identical"
        assert report.lossless
        assert report.line().startswith("LOSSLESS: ")
        assert report.line().endswith("against hf: 3 identical; 3 prompts, 48 tokens")


def test_a_wrong_token_is_named(model: PreTrainedModel) -> None:
    report = verify(model, TOKENIZER, TEXTS, wrong_at(5), max_new_tokens=16)
    assert not report.lossless
    assert report.line().startswith("NOT LOSSLESS: spoiled against hf: 3 different")
    row = report.checks[1]
    assert (row.name, row.category, row.outcome) == ("h1", "chat", "different")
    assert row.divergence is not None
    assert (row.divergence.step, row.divergence.actual) == (5, 7)
    assert row.actual_text == "\x05"
    table = report.table().splitlines()
    assert table[0].split()[:4] == ["prompt", "tokens", "verdict", "step"]
    assert "h1 chat" in table[2]
    assert r"7 '\x05'" in table[2]


def test_report_goes_through_json(model: PreTrainedModel) -> None:
    report = verify(model, TOKENIZER, TEXTS[:1], wrong_at(2), max_new_tokens=8)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["outcome"] == "different"
    assert data["settings"]["dtype"] == "float64"
    assert data["rows"][0]["divergence"]["step"] == 2
    assert "p_value" not in data["rows"][0]


def test_ids_need_no_tokenizer_and_any_two_setups_compare(model: PreTrainedModel) -> None:
    report = verify(
        model, None, [[5, 6, 7]], {"prompt_lookup_num_tokens": 4}, wrong_at(1), max_new_tokens=6
    )
    assert report.checks[0].outcome == "different"
    assert report.b == "spoiled"
    with pytest.raises(PertokenError, match="tokenizer"):
        verify(model, None, ["text"], "hf")


def test_ties_are_lossless_up_to_rounding() -> None:
    model = tiny_model("llama", vocab_size=TOKENIZER.vocab_size, dtype=torch.float32)
    head = model.get_output_embeddings().weight.data
    ids = torch.tensor([TOKENIZER.encode("tie")])
    best = int(model(ids).logits[0, -1].argmax())
    head[best + 1] = head[best]

    def last(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        while input_ids.shape[1] < arguments["generation_config"].max_length:
            flipped = model(input_ids).logits[:, -1].flip(-1)
            token = model.config.vocab_size - 1 - flipped.argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, token], dim=1)
        return input_ids

    report = verify(model, TOKENIZER, ["tie"], last, max_new_tokens=5)
    assert report.outcome == "numerical tie"
    assert report.lossless
    assert report.line().startswith("LOSSLESS up to rounding: last against hf: 1 numerical tie(s)")


@pytest.mark.parametrize(
    "setup", ["hf", "hf-prompt-lookup", {"assistant_model": "replaced by a tiny one"}], ids=str
)
def test_sampling_of_right_setups_fits(setup: Any) -> None:
    report = verify(None, None, [], setup, sample=True, draws=120)
    assert report.outcome == "identical"
    assert [row.new_tokens for row in report.checks] == [120] * 4


@pytest.mark.parametrize(("architecture", "options"), SAMPLED)
def test_sampled_models_leave_room_for_mistakes(architecture: str, options: dict[str, Any]) -> None:
    # A distribution that is all but one token would let any sampler pass.
    model = tiny_model(architecture, vocab_size=8)
    first = enumerate_texts(model, torch.tensor(SAMPLE_PROMPT), 1, **options)
    assert max(first.values()) < 0.7
    assert sum(p > 0.05 for p in first.values()) >= 3


def test_sampling_of_a_greedy_decoder_is_different() -> None:
    def greedy(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        total = arguments["generation_config"].max_length - input_ids.shape[1]
        return model.generate(input_ids, max_new_tokens=total, do_sample=False)

    report = verify(None, None, [], greedy, sample=True, draws=400)
    assert report.outcome == "different"
    assert "p = 0" in report.table()
    assert report.line() == (
        "NOT LOSSLESS: greedy: the model's distribution on 0 of 4 models, 1600 draws"
    )


def test_mistakes_are_named(model: PreTrainedModel) -> None:
    with pytest.raises(PertokenError, match=r"unknown way of decoding 'gose' \(did you mean 'goo"):
        verify(model, TOKENIZER, TEXTS, "gose")
    with pytest.raises(
        PertokenError, match=r"awrs does not run by its name alone: .* a constraint"
    ):
        verify(model, TOKENIZER, TEXTS, "awrs")
    with pytest.raises(PertokenError, match="1 or more, got 0"):
        verify(model, TOKENIZER, TEXTS, "hf", max_new_tokens=0)
    with pytest.raises(PertokenError, match="no prompt"):
        verify(model, TOKENIZER, [], "hf")
    with pytest.raises(PertokenError, match="cntp is not lossless: its text need not be that of"):
        verify(model, TOKENIZER, ["a"], "cntp")
    with pytest.raises(PertokenError, match="needs a model"):
        verify(None, TOKENIZER, TEXTS, "hf")

    def broken(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        raise KeyError("keys")

    with pytest.raises(PertokenError, match="broken raised KeyError: 'keys'"):
        verify(model, TOKENIZER, TEXTS, broken)


def test_names_and_options_of_setups() -> None:
    assert as_setup("hf") is None
    assert as_setup("hf", repetition_penalty=1.2) == {"repetition_penalty": 1.2}
    assert as_setup("hf-prompt-lookup", prompt_lookup_num_tokens=3) == {
        "prompt_lookup_num_tokens": 3
    }
    assert setup_name({"assistant_model": object(), "x": 1}) == "generate(assistant_model=…, x=1)"
    assert setup_name(wrong_at(1)) == "spoiled"


@pytest.mark.model
def test_prompt_lookup_of_transformers_on_a_real_model(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    prompts = ["List the days of the week twice.", "What is the capital of France?"]
    report = verify(model, tokenizer, prompts, "hf-prompt-lookup", max_new_tokens=24)
    assert report.lossless, report.table()
