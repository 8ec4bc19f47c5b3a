"""Each law once kept and once broken: a law that cannot fail is worth nothing."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pertoken.errors import PertokenError
from pertoken.testing import (
    ARCHITECTURES,
    LawBroken,
    MockModel,
    check_batch_invariant,
    check_distribution,
    check_lossless,
    tiny_model,
)
from pertoken.testing.distribution import chi_square, compare_counts, enumerate_texts


def loop(
    change: Callable[[torch.Tensor, int], torch.Tensor] | None = None, *, masked: bool = True
) -> Callable[..., torch.Tensor]:
    """A plain decoding loop without a cache; `change(scores, step)` may spoil its scores."""

    def decode(
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **arguments: Any,
    ) -> torch.Tensor:
        mask = arguments.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None or not masked else mask
        alive = torch.ones(len(input_ids), dtype=torch.bool)
        step = 0
        while alive.any():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(input_ids, attention_mask=mask, position_ids=positions).logits
            scores = logits_processor(input_ids, logits[:, -1].float())
            scores = change(scores, step) if change else scores
            if generation_config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), 1)[:, 0]
            else:
                tokens = scores.argmax(-1)
            tokens = torch.where(alive, tokens, generation_config.pad_token_id)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(tokens[:, None])], dim=1)
            alive &= ~stopping_criteria(input_ids, None)
            step += 1
        return input_ids

    return decode


def second_best_at(step: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
    def change(scores: torch.Tensor, now: int) -> torch.Tensor:
        if now != step:
            return scores
        return scores.scatter(1, scores.argmax(-1, keepdim=True), -1e9)

    return change


# --- lossless


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lossless_accepts_right_decoders(architecture: str) -> None:
    model = tiny_model(architecture)
    for decoder in (loop(), {"prompt_lookup_num_tokens": 4}, {"assistant_model": model}):
        verdicts = check_lossless(decoder, model, max_new_tokens=16)
        assert [v.outcome for v in verdicts] == ["identical"] * 4


def test_lossless_names_prompt_step_and_tokens() -> None:
    model = tiny_model("llama")
    with pytest.raises(LawBroken, match=r"prompt 0 .*step 7: expected token \d+, got \d+.*noise"):
        check_lossless(loop(second_best_at(7)), model)


def test_lossless_sees_an_early_end_and_an_overshoot() -> None:
    model = tiny_model("llama")

    def short(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return loop()(model, input_ids, **arguments)[:, :-1]

    def long(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        ids = loop()(model, input_ids, **arguments)
        return torch.cat([ids, ids[:, -1:]], dim=1)

    with pytest.raises(LawBroken, match="got none"):
        check_lossless(short, model, max_new_tokens=8)
    with pytest.raises(LawBroken, match="expected token none"):
        check_lossless(long, model, max_new_tokens=8)


def test_a_decoder_that_forgets_the_prompt_is_told_so() -> None:
    def only_new(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return loop()(model, input_ids, **arguments)[:, input_ids.shape[1] :]

    with pytest.raises(PertokenError, match="must return the prompt and the new tokens"):
        check_lossless(only_new, tiny_model("llama"), max_new_tokens=4)


def test_lossless_holds_with_stop_ids_and_penalties() -> None:
    model, prompt = tiny_model("gpt2"), torch.tensor([5, 6, 7, 8])
    plain = model.generate(prompt[None], max_new_tokens=12, do_sample=False)[0, 4:].tolist()
    stop = plain[5]
    verdicts = check_lossless(loop(), model, [prompt], eos_token_id=stop)
    assert verdicts[0].new_tokens == plain.index(stop) + 1
    check_lossless(loop(), model, [prompt], repetition_penalty=1.5, no_repeat_ngram_size=2)

    def no_penalty(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return loop()(model, input_ids, **{**arguments, "logits_processor": lambda ids, s: s})

    with pytest.raises(LawBroken):
        check_lossless(no_penalty, model, repetition_penalty=3.0)


def test_lossless_forgives_ties_in_float32_but_not_in_float64() -> None:
    prompt = torch.tensor([3, 4, 5])

    def twin(dtype: torch.dtype) -> PreTrainedModel:
        # The best two tokens get the same row of the head: an exact tie, broken by index.
        model = tiny_model("llama", dtype=dtype)
        head = model.get_output_embeddings().weight.data
        best = int(model(prompt[None]).logits[0, -1].argmax())
        head[(best + 1) % 64] = head[best]
        return model

    def pick_last(scores: torch.Tensor, step: int) -> torch.Tensor:
        best = scores == scores.max(-1, keepdim=True).values
        return scores + torch.arange(scores.shape[-1]) * best

    verdicts = check_lossless(loop(pick_last), twin(torch.float32), [prompt], max_new_tokens=6)
    assert verdicts[0].outcome == "numerical tie"
    with pytest.raises(LawBroken, match="numerical tie"):
        check_lossless(loop(pick_last), twin(torch.float64), [prompt], max_new_tokens=6)


# --- batch = single


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batch_invariance_of_right_decoders(architecture: str) -> None:
    model = tiny_model(architecture)
    for decoder in (None, loop()):
        assert {v.outcome for v in check_batch_invariant(decoder, model)} == {"identical"}


def test_batch_invariance_with_rows_that_stop_apart() -> None:
    model = tiny_model("llama")
    verdicts = check_batch_invariant(loop(), model, eos_token_id=list(range(20, 30)))
    assert len({v.new_tokens for v in verdicts}) > 1


def test_batch_invariance_catches_a_decoder_that_sees_the_pads() -> None:
    with pytest.raises(LawBroken, match=r"batch differs from single runs: row \d"):
        check_batch_invariant(loop(masked=False), tiny_model("llama"))


def test_batch_invariance_catches_rows_that_leak() -> None:
    def leak(scores: torch.Tensor, step: int) -> torch.Tensor:
        return scores + 0.5 * scores.roll(1, dims=0)

    with pytest.raises(LawBroken):
        check_batch_invariant(loop(leak), tiny_model("llama"))


# --- distribution


def test_enumeration_is_the_chain_rule() -> None:
    rows = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
    rows = rows / rows.sum(-1, keepdim=True)
    texts = enumerate_texts(MockModel(rows), torch.tensor([2]), 2, top_k=0)
    assert sum(texts.values()) == pytest.approx(1.0)
    assert texts[3, 1] == pytest.approx(float(rows[2, 3] * rows[3, 1]), rel=1e-5)


def test_enumeration_ends_where_all_texts_do() -> None:
    always = MockModel([[0.0, 1.0]] * 2)
    assert enumerate_texts(always, torch.tensor([0]), 3, eos_token_id=1, top_k=1) == {(1,): 1.0}


def test_enumeration_stops_at_stop_ids_and_applies_warpers() -> None:
    model, prompt = tiny_model("llama", vocab_size=8), torch.tensor([1, 2])
    texts = enumerate_texts(model, prompt, 3, eos_token_id=4, top_k=3, temperature=0.7)
    assert sum(texts.values()) == pytest.approx(1.0)
    assert all(len(text) == 3 or text[-1] == 4 for text in texts)
    assert len({text[0] for text in texts}) == 3


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "top_k": 5},
    {"top_p": 0.8},
    {"eos_token_id": 3},
    {"repetition_penalty": 1.5},
]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("decoder", [None, loop()], ids=["generate", "loop"])
def test_distribution_accepts_right_samplers(decoder: Any, options: dict[str, Any]) -> None:
    model = tiny_model("llama", vocab_size=8)
    assert check_distribution(decoder, model, [1, 2, 3], **options).p_value > 0.001


@pytest.mark.parametrize(
    "setup",
    [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": tiny_model("llama", vocab_size=8, seed=1)},
    ],
    ids=["prompt-lookup", "assistant"],
)
def test_distribution_accepts_assisted_sampling(setup: dict[str, Any]) -> None:
    model = tiny_model("llama", vocab_size=8)
    check_distribution(setup, model, [1, 2, 3, 1, 2], draws=300, batch_size=1)


def test_distribution_catches_a_small_shift() -> None:
    def warmer(scores: torch.Tensor, step: int) -> torch.Tensor:
        return scores / 1.1 if step == 1 else scores

    model = tiny_model("llama", vocab_size=8)
    with pytest.raises(LawBroken, match=r"p = .* < 0.001 over 20000 draws; tokens \["):
        check_distribution(loop(warmer), model, [1, 2, 3])


def test_distribution_catches_a_token_that_cannot_be() -> None:
    def no_top_k(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return loop()(model, input_ids, **{**arguments, "logits_processor": lambda ids, s: s})

    model = tiny_model("llama", vocab_size=8)
    with pytest.raises(LawBroken, match="probability 0"):
        check_distribution(no_top_k, model, [1, 2, 3], top_k=2, draws=500)


def test_distribution_catches_an_early_end() -> None:
    def short(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        return loop()(model, input_ids, **arguments)[:, :-1]

    with pytest.raises(LawBroken, match="ended early"):
        check_distribution(short, tiny_model("llama", vocab_size=8), [1, 2, 3], draws=500)


def test_distribution_p_values_are_uniform_for_a_right_sampler() -> None:
    # Error probability of this test: the chance that 60 uniform numbers stray this far, < 1e-4.
    generator = torch.Generator().manual_seed(5)
    expected = {(i, j): 1 / 64 for i in range(8) for j in range(8)}
    values = []
    for _ in range(60):
        draws = torch.randint(64, (4000,), generator=generator).tolist()
        result = compare_counts(expected, Counter((d // 8, d % 8) for d in draws))
        values.append(result.by_length[1].p_value)
    assert 0.3 < sum(values) / 60 < 0.7
    assert min(values) < 0.2
    assert max(values) > 0.8


def test_chi_square_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    expected, observed = [20.0, 30.0, 50.0], [25, 35, 40]
    assert chi_square(expected, observed).p_value == pytest.approx(
        stats.chisquare(observed, expected).pvalue
    )


def test_chi_square_pools_rare_cells() -> None:
    result = chi_square([0.5] * 8 + [3.0] + [50.0, 43.0], [1] * 8 + [0] + [50, 42])
    assert result.degrees == 2


def test_distribution_refuses_large_vocabularies() -> None:
    with pytest.raises(PertokenError, match="smaller vocabulary"):
        check_distribution(None, tiny_model("llama"), steps=3)


def test_distribution_refuses_a_model_that_has_no_choice() -> None:
    with pytest.raises(PertokenError, match="nothing to test"):
        check_distribution(None, MockModel(torch.eye(4)), [1], draws=100)


def test_distribution_leaves_the_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    check_distribution(None, tiny_model("llama", vocab_size=8), draws=100, steps=1)
    assert torch.equal(torch.rand(1), expected)
