"""Divergences: where, how close, and whether rounding may have done it."""

import pytest
import torch
from transformers import LogitsProcessorList, PreTrainedModel, RepetitionPenaltyLogitsProcessor

from pertoken.testing import ARCHITECTURES, EXTRA_ARCHITECTURES, compare_ids, tiny_model
from pertoken.testing.divergence import TIE_FACTOR, Divergence, measure
from pertoken.testing.setups import decode

ALL = (*ARCHITECTURES, *EXTRA_ARCHITECTURES)
PROMPT = torch.tensor([5, 9, 3, 22, 41, 8, 5, 9, 3, 17, 30, 2])


def plain(model: PreTrainedModel, prompt: torch.Tensor = PROMPT, n: int = 24) -> list[int]:
    return decode(model, None, prompt[None], max_new_tokens=n)[0]


def runner_up(model: PreTrainedModel, new: list[int]) -> int:
    text = torch.cat([PROMPT, torch.tensor(new, dtype=torch.long)])[None]
    return int(model(text).logits[0, -1].topk(2).indices[1])


@pytest.mark.parametrize("architecture", ALL)
def test_gap_is_the_models_own_and_noise_fits_float64(architecture: str) -> None:
    model = tiny_model(architecture)
    new = plain(model)
    other = runner_up(model, new[:20])
    parted = compare_ids(model, PROMPT, new, [*new[:20], other, *new[21:]]).divergence
    assert parted is not None
    assert (parted.step, parted.expected, parted.actual) == (20, new[20], other)
    text = torch.cat([PROMPT, torch.tensor(new[:20])])[None]
    logits = model(text).logits[0, -1]
    gap = (logits[new[20]] - logits[other]).item()
    # Scores are rounded to float32, as generate does before it picks.
    assert parted.gap == pytest.approx(gap, abs=1e-5)
    assert parted.gap_one_shot == pytest.approx(gap, abs=1e-5)
    assert parted.top2_gap == pytest.approx(gap, abs=1e-5)
    assert parted.noise is not None
    assert parted.noise < 2e-6
    assert not parted.is_tie


@pytest.mark.parametrize("architecture", ALL)
def test_noise_grows_with_coarser_types(architecture: str) -> None:
    noise = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = tiny_model(architecture, dtype=dtype)
        new = [7, 9, 11, 20, 33, 2, 8, 40, 41, 12, 3, 60, 61, 5, 6, 18, 19, 21]
        found = measure(model, PROMPT, new, 1, 2).noise
        assert found is not None
        noise.append(found)
    # How far bfloat16 moves depends on the processor; some compute every shape alike.
    assert noise[0] < noise[1] < 1e-4
    assert noise[1] < noise[2] < 0.5


@pytest.mark.parametrize("length", [0, 1, 5])
def test_noise_is_measured_after_short_texts_too(length: int) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    parted = measure(model, PROMPT[:1], [4] * length, 1, 2)
    assert parted.step == length
    assert parted.noise is not None
    assert parted.noise > 0


def twins(dtype: torch.dtype, apart: float) -> tuple[PreTrainedModel, list[int], list[int]]:
    """A model whose best first token has a twin `apart` lower; plain ids with and without it."""
    model = tiny_model("llama", dtype=dtype)
    hidden = model.model(PROMPT[None]).last_hidden_state[0, -1]
    head = model.get_output_embeddings().weight.data
    best = int((head @ hidden).argmax())
    twin = (best + 1) % 64
    head[twin] = head[best] - apart * hidden / hidden.dot(hidden)
    new = plain(model)
    branch = torch.cat([PROMPT, torch.tensor([twin])])
    return model, new, [twin, *plain(model, branch, len(new) - 1)]


def test_a_gap_under_the_noise_is_a_tie_and_over_it_is_not() -> None:
    model, expected, actual = twins(torch.float32, 1e-6)
    assert compare_ids(model, PROMPT, expected, actual).outcome == "numerical tie"
    model, expected, actual = twins(torch.float32, 1e-3)
    verdict = compare_ids(model, PROMPT, expected, actual)
    assert verdict.outcome == "different"
    assert verdict.divergence is not None
    assert verdict.divergence.gap == pytest.approx(1e-3, rel=0.1)
    # The same gap is rounding in bfloat16.
    model, expected, actual = twins(torch.bfloat16, 1e-3)
    if expected != actual:
        assert compare_ids(model, PROMPT, expected, actual).outcome == "numerical tie"


def test_a_wrong_token_behind_a_tie_is_found() -> None:
    model, expected, actual = twins(torch.float32, 1e-6)
    actual[9] = (actual[9] + 1) % 64
    verdict = compare_ids(model, PROMPT, expected, actual)
    assert verdict.outcome == "different"
    assert verdict.divergence is not None
    assert verdict.divergence.step == 9


def test_a_wrong_end_behind_a_tie_is_found() -> None:
    model, expected, actual = twins(torch.float32, 1e-6)
    for text, limit in ((actual[:12], 24), (actual, 20)):
        verdict = compare_ids(model, PROMPT, expected, text, max_new_tokens=limit)
        assert verdict.outcome == "different"
    assert "ended early" in str(
        compare_ids(model, PROMPT, expected, actual[:12], max_new_tokens=24).divergence
    )
    ended = compare_ids(
        model, PROMPT, expected, actual[:12], max_new_tokens=24, stops=frozenset([actual[11]])
    )
    assert ended.outcome == "numerical tie"


def test_two_close_candidates_far_below_the_top_are_no_tie() -> None:
    tie = Divergence(3, 1, 2, gap=1e-6, gap_one_shot=0.0, below_top=1e-6, top2_gap=1e-6, noise=1e-5)
    assert tie.is_tie
    far = Divergence(3, 1, 2, gap=1e-6, gap_one_shot=0.0, below_top=2.0, top2_gap=2.0, noise=1e-5)
    assert not far.is_tie
    model, expected, _ = twins(torch.float32, 1e-6)
    worst = model(PROMPT[None]).logits[0, -1].argsort()[:2].tolist()
    verdict = compare_ids(model, PROMPT, [worst[0], *expected[1:]], [worst[1], *expected[1:]])
    assert verdict.outcome == "different"


def test_the_factor_is_what_two_logits_can_move() -> None:
    edge = {"expected": 1, "actual": 2, "gap": 0.0, "gap_one_shot": 0.0, "top2_gap": 0.0}
    assert Divergence(0, **edge, below_top=2.0, noise=1.0).is_tie  # type: ignore[arg-type]
    assert not Divergence(0, **edge, below_top=2.1, noise=1.0).is_tie  # type: ignore[arg-type]
    assert TIE_FACTOR == 2.0


def test_an_early_end_is_different() -> None:
    model = tiny_model("llama")
    new = plain(model)
    verdict = compare_ids(model, PROMPT, new, new[:10])
    assert verdict.outcome == "different"
    assert verdict.divergence is not None
    assert (verdict.divergence.step, verdict.divergence.actual) == (10, None)
    assert "none (it had ended)" in str(verdict.divergence)
    assert verdict.to_dict()["divergence"]["step"] == 10


def test_gaps_are_of_processed_scores() -> None:
    model = tiny_model("llama")
    new = plain(model)[:12]
    used = new[3]
    processor = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0)])
    raw = measure(model, PROMPT, new[:4], used, 1)
    processed = measure(model, PROMPT, new[:4], used, 1, processor=processor)
    assert raw.gap is not None
    assert processed.gap is not None
    assert processed.gap < raw.gap


def test_models_with_recurrent_state_are_measured_too() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    parted = measure(model, PROMPT, [4, 5, 6], 1, 2)
    assert parted.noise is not None
    assert parted.noise < 1e-3
