"""Masked thought: only inputs of the answer change, labels never; rate 0 is plain fine-tuning."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.testing import tiny_model
from pertoken.train import (
    MaskedThought,
    TokenWeightedSFT,
    add_mask_token,
    linear_rate,
    mask_thought,
    question_dependence,
)

_place = Path(__file__).parent / "_supervised.py"
_spec = importlib.util.spec_from_file_location("_supervised", _place)
lab: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lab)
MFT = (MaskedThought,)
MASK = 22  # a letter that no row has


def batch(rows: int = 50, time: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Questions, answers and padding of many lengths; the mask token is in none."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 20, (rows, time), generator=draw)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 3 + row % 9] = -100
        labels[row, time - row % 11 :] = -100
    return ids, labels


@pytest.mark.parametrize("noise", ["mask", "random"])
def test_only_inputs_of_the_answer_change(noise: Any) -> None:
    ids, labels = batch()
    before = ids.clone(), labels.clone()
    made = mask_thought(ids, labels, 0.4, mask_id=MASK, vocab_size=10**6, noise=noise, seed=3)
    answer = labels != -100
    changed = made != ids
    assert not changed[~answer].any()
    assert torch.equal(ids, before[0])
    assert torch.equal(labels, before[1])
    n, hidden = int(answer.sum()), int(changed.sum())
    assert abs(hidden / n - 0.4) < 4 * (0.4 * 0.6 / n) ** 0.5 + 1e-5  # 4 standard errors
    if noise == "mask":
        assert (made[changed] == MASK).all()
    else:
        drawn = made[changed].double() / 10**6
        assert abs(float(drawn.mean()) - 0.5) < 4 * (1 / 12 / hidden) ** 0.5


def test_rates_of_one_and_nought_seeds_and_protection() -> None:
    ids, labels = batch(8)
    whole = mask_thought(ids, labels, 1.0, mask_id=MASK)
    assert torch.equal(whole == MASK, labels != -100)
    assert torch.equal(mask_thought(ids, labels, 0.0, mask_id=MASK), ids)
    some = [mask_thought(ids, labels, 0.5, mask_id=MASK, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(some[0], some[1])
    assert not torch.equal(some[0], some[2])
    hidden = some[0] == MASK
    assert not torch.equal(hidden[0, 20:40], hidden[1, 20:40])  # rows are independent
    digits = ids == 7
    spared = mask_thought(ids, labels, 1.0, mask_id=MASK, protect=digits)
    assert torch.equal(spared == MASK, (labels != -100) & ~digits)


def test_the_rate_rises_in_a_line_and_stays() -> None:
    rates = [linear_rate(step, 300, 0.4) for step in range(300)]
    assert rates[0] == 0
    assert rates[100] == pytest.approx(0.2)
    assert rates[200:] == [0.4] * 100
    steps = torch.tensor(rates[:200]).diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 0.002), rtol=0, atol=1e-6)
    assert linear_rate(0, 10, 0.3, warmup=0) == 0.3


def test_a_mask_token_is_made_once_and_never_written() -> None:
    for tied in (False, True):
        model = tiny_model("llama", vocab_size=23)
        model.config.tie_word_embeddings = tied
        model.tie_weights()
        reader = lab.tokenizer()
        weights = model.get_input_embeddings().weight.detach().clone()
        found = add_mask_token(model, reader)
        assert found == add_mask_token(model, reader) == 23
        assert model.config.vocab_size == 24
        torch.testing.assert_close(model.get_input_embeddings().weight[23], weights.mean(0))
        assert torch.equal(model.get_input_embeddings().weight[:23], weights)
        with torch.no_grad():
            model.get_output_embeddings().weight[23] = 50 * weights.abs().max()
        written = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=True)
        assert 23 not in written
    given = lab.tokenizer()
    given.mask_token = "t"
    assert add_mask_token(tiny_model("llama", vocab_size=23), given) == 22


@pytest.mark.parametrize("tied", [False, True])
def test_a_mask_token_on_a_padding_row_is_the_mean_too(tied: bool) -> None:
    model = tiny_model("llama", vocab_size=30)  # 23 tokens and 7 rows that are none
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    reader = lab.tokenizer()
    both = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    before = [part.detach().clone() for part in both]
    assert add_mask_token(model, reader) == 23
    for part, was in zip(both, before, strict=True):
        torch.testing.assert_close(part[23], was[:23].mean(0))
        others = [row for row in range(30) if row != 23]
        assert torch.equal(part[others], was[others])
    with torch.no_grad():
        both[0][23] += 1  # as training would
    learned = both[0].detach().clone()
    assert add_mask_token(model, reader) == 23
    assert torch.equal(both[0], learned)


def test_a_token_that_is_there_keeps_its_embedding() -> None:
    model, reader = tiny_model("llama", vocab_size=30), lab.tokenizer()
    reader.add_tokens(["<mask>"])
    before = model.get_input_embeddings().weight.detach().clone()
    assert add_mask_token(model, reader) == 23
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_dependence_is_the_rise_under_a_shuffled_question() -> None:
    model = tiny_model("llama", vocab_size=23)
    ids = torch.tensor([[4, 5, 6, 7, 8, 9, 10], [0, 0, 11, 11, 11, 12, 13]])
    labels = torch.full_like(ids, -100)
    labels[0, 4:], labels[1, 5:] = ids[0, 4:], ids[1, 5:]
    real = (ids != 0).long()
    found = question_dependence(model, ids, labels, real, seed=1)
    assert found[0] != 0
    assert found[1] == 0  # all its tokens are one, so the order is no matter

    import itertools

    def nll(row: list[int]) -> float:
        given = torch.tensor([row])
        log_probs = model(given).logits[:, :-1].log_softmax(-1)
        chosen = log_probs.gather(-1, given[:, 1:, None])[0, 3:, 0]
        return float(-chosen.mean())

    start = nll(ids[0].tolist())
    all_orders = [nll([*order, 8, 9, 10]) - start for order in itertools.permutations([4, 5, 6, 7])]
    assert min(abs(float(found[0]) - one) for one in all_orders) < 1e-6
    with pytest.raises(PertokenError, match="a row has no token that is learned"):
        question_dependence(model, ids, torch.full_like(ids, -100))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.5}, "rate is a share of the answer's tokens, 0 to 1, got 1.5"),
        ({"noise": "masks", "mask_id": 1}, 'noise must be "mask" or "random", got \'masks\''),
        ({}, 'noise "mask" needs mask_id'),
        ({"noise": "random"}, 'noise "random" needs vocab_size'),
    ],
)
def test_mistakes_of_the_function(options: dict[str, Any], message: str) -> None:
    ids, labels = batch(2)
    with pytest.raises(PertokenError, match=message):
        mask_thought(ids, labels, **{"rate": 0.1, **options})
    with pytest.raises(PertokenError, match="must have one shape"):
        mask_thought(ids, labels[:1], 0.1, mask_id=1)


# --------------------------------------------------------------------------------------- trainer


@pytest.fixture
def trl() -> Any:
    return pytest.importorskip("trl", reason="TRL is not installed")


def test_rate_nought_is_sft_to_the_bit(trl: Any, tmp_path: Path) -> None:
    parent = lab.trainer(tmp_path)
    child = lab.trainer(tmp_path, MFT, rate=0.0, mask_id=MASK)
    assert lab.run(child) == lab.run(parent)
    assert lab.same_weights(child, parent)


def test_a_masked_position_still_counts_and_its_own_input_does_not(
    trl: Any, tmp_path: Path
) -> None:
    """With everything hidden the loss sees all labels and none of the answer's embeddings."""
    made = lab.trainer(tmp_path, MFT, rate=1.0, warmup=0.0, mask_id=MASK)
    made.model.train()
    given = lab.one_batch(made)
    made.state.max_steps = 1
    made.compute_loss(made.model, dict(given)).backward()
    answer = given["labels"] != -100
    loss = made.compute_loss(made.model, dict(given))
    hidden = given["input_ids"].masked_fill(answer, MASK)
    logits = made.model(hidden, attention_mask=given["attention_mask"]).logits[:, :-1]
    kept = answer[:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[kept], given["labels"][:, 1:][kept])
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    embedded = made.model.get_input_embeddings().weight.grad
    words = set(given["input_ids"][answer].tolist()) - set(given["input_ids"][~answer].tolist())
    assert words
    assert not embedded[sorted(words)].any()
    assert embedded[MASK].any()


def test_evaluation_sees_the_text_and_the_rate_is_logged(trl: Any, tmp_path: Path) -> None:
    made = lab.trainer(tmp_path, MFT, rate=1.0, mask_id=MASK, max_steps=3)
    parent = lab.trainer(tmp_path)
    found = [each.evaluate(each.train_dataset)["eval_loss"] for each in (made, parent)]
    assert found[0] == found[1]
    made.train()
    logged = [entry["masked_thought/rate"] for entry in made.state.log_history if "loss" in entry]
    assert logged == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("noise", ["mask", "random"])
def test_what_is_hidden_does_not_depend_on_the_cut_of_the_batch_nor_on_padding(
    trl: Any, tmp_path: Path, noise: Any
) -> None:
    options: dict[str, Any] = {"rate": 0.5, "noise": noise, "mask_id": MASK, "max_steps": 4}
    made = lab.trainer(tmp_path, MFT, **options)
    made.state.global_step, made.state.max_steps = 3, 4
    ids, labels = batch(4)

    def hidden(*cuts: slice, pad: tuple[int, int] = (0, 0)) -> torch.Tensor:
        made._at = -1  # the step begins anew
        parts = []
        for cut in cuts:
            given = {
                "input_ids": torch.nn.functional.pad(ids[cut], pad),
                "labels": torch.nn.functional.pad(labels[cut], pad, value=-100),
            }
            masked = made._masked(given)
            parts.append(masked[:, pad[0] : masked.shape[1] - pad[1]])
        return torch.cat(parts)

    whole = hidden(slice(0, 4))
    assert torch.equal(hidden(slice(0, 2), slice(2, 4)), whole)
    assert torch.equal(hidden(slice(0, 1), slice(1, 4)), whole)
    assert torch.equal(hidden(slice(0, 4), pad=(0, 9)), whole)
    assert torch.equal(hidden(slice(0, 4), pad=(5, 0)), whole)
    assert not (whole != ids)[labels == -100].any()
    share = (whole != ids).sum() / (labels != -100).sum()
    assert 0.3 < share < 0.7
    made.state.global_step = 2
    assert not torch.equal(hidden(slice(0, 4)), whole)


def test_micro_batches_are_one_batch(trl: Any, tmp_path: Path) -> None:
    """Loss and weights after two steps in which half of each answer is hidden."""
    found = []
    for size in (4, 2):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        more: dict[str, Any] = {"max_steps": 2, "optim": "sgd", "warmup": 0.0}
        made = lab.trainer(tmp_path, MFT, rate=0.5, mask_id=MASK, **cut, **more)
        found.append((lab.run(made), list(made.model.parameters())))
    (whole, ends), (parts, others) = found
    assert parts == pytest.approx(whole, abs=1e-6)
    for one, other in zip(ends, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_resumed_run_hides_the_same_and_micro_batches_differ(trl: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "rate": 0.5,
        "noise": "random",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = lab.trainer(tmp_path / "whole", MFT, **options)
    lab.run(whole)
    again = lab.trainer(tmp_path / "again", MFT, **options)
    lab.run(again, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert lab.losses(again)[-2:] == lab.losses(whole)[-2:]
    assert lab.same_weights(whole, again)
    again.state.global_step, again.state.max_steps = 3, 4
    row = {name: part[:1] for name, part in lab.one_batch(again).items()}
    long = {name: part.repeat(1, 20) for name, part in row.items()}
    one, other = again._masked(long), again._masked(long)
    assert not torch.equal(one, other)  # two rows that say the same are hidden apart


def test_it_goes_with_token_weights(trl: Any, tmp_path: Path) -> None:
    def ones(row: dict[str, Any]) -> list[float]:
        return [1.0] * len(row["input_ids"])

    both = lab.trainer(tmp_path, (TokenWeightedSFT, MaskedThought), weights=ones, mask_id=MASK)
    alone = lab.trainer(tmp_path, MFT, mask_id=MASK)
    assert lab.run(both) == lab.run(alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_id": None}, 'noise "mask" needs mask_id'),
        ({"mask_id": 23}, "mask_id 23 is not among the model's 23 tokens: see add_mask_token"),
        ({"mask_id": 1}, "mask_id 1 is the stop token"),
        ({"rate": -0.1}, "rate is a share of the answer's tokens"),
        ({"warmup": 2.0}, "warmup is a share of training"),
    ],
)
def test_mistakes_are_said_before_training(
    trl: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PertokenError, match=message):
        lab.trainer(tmp_path, MFT, **{"mask_id": MASK, **options})
