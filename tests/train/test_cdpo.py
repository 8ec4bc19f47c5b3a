"""Critical-token DPO: its limits, its gradient, the two reductions, and TRL's trainer with it."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.train import (
    Sampled,
    contrast_data,
    contrastive_scores,
    log_ratio,
    token_dpo_loss,
)
from pertoken.train.cdpo import CDPOMixin
from pertoken.train.contrast import scored

pytest.importorskip("trl", reason="TRL is not installed")

_place = Path(__file__).parent / "_supervised.py"
_spec = importlib.util.spec_from_file_location("_supervised", _place)
lab: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lab)

MIXINS = (CDPOMixin,)


def drawn(seed: int = 0, vocab: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 2, 5, vocab, generator=draw, dtype=torch.float64)
    ids = torch.randint(vocab, (2, 5), generator=draw)
    return logits[0], logits[1], ids


def sides(seed: int = 0, times: tuple[int, int] = (4, 3)) -> list[torch.Tensor]:
    """Policy and reference of chosen and rejected, and masks with a hidden last column of row 0."""
    draw = torch.Generator().manual_seed(seed)
    made = [
        -torch.rand(2, time, generator=draw, dtype=torch.float64) * 3
        for _ in range(2)
        for time in times
    ]
    masks = [torch.ones(2, time, dtype=torch.bool) for time in times]
    for mask in masks:
        mask[0, -1] = False
    return [*made, *masks]


def test_scores_are_the_formula() -> None:
    positive, negative, ids = drawn()
    mask = torch.ones(2, 5)
    mask[1, 3] = 0
    found = contrastive_scores(positive, negative, ids, mask, beta=0.7)
    p, q = positive.softmax(-1), negative.softmax(-1)
    for row in range(2):
        for place in range(4):
            mixed = p[row, place] ** 1.7 / q[row, place] ** 0.7
            expected = (mixed / mixed.sum())[ids[row, place + 1]].item()
            expected *= float(mask[row, place + 1])
            assert found[row, place].item() == pytest.approx(expected, abs=1e-12)


def test_one_model_twice_or_beta_0_gives_its_probability() -> None:
    positive, negative, ids = drawn()
    mask = torch.ones(2, 5)
    expected = positive[:, :-1].softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(contrastive_scores(positive, positive, ids, mask, 3.0), expected)
    torch.testing.assert_close(contrastive_scores(positive, negative, ids, mask, 0.0), expected)
    assert not log_ratio(positive, positive, ids, mask).any()


def test_scores_of_many_texts_are_those_of_each() -> None:
    one, other = lab.model(0), lab.model(1)
    rows = [([3, 4, 5, 6, 7], 2), ([8, 9, 10], 1), ([3, 3, 4, 5, 5, 6, 7], 3), ([9, 8], 0)]
    one.train()
    found = scored(one, other, rows)
    assert one.training
    assert not other.training
    one.eval()
    for (ids, before), (scores, ratios) in zip(rows, found, strict=True):
        given = torch.tensor([ids])
        logits = one(given).logits, other(given).logits
        mask = torch.ones_like(given)
        for values, each in ((scores, contrastive_scores), (ratios, log_ratio)):
            expected = each(*logits, given, mask)[0, max(before - 1, 0) :].tolist()
            assert values == pytest.approx(expected, abs=1e-5)


def test_weights_of_one_are_the_sigmoid_loss() -> None:
    pc, pr, rc, rr, cm, rm = sides()
    loss, stats = token_dpo_loss(pc, pr, rc, rr, cm, rm, beta=0.3)
    chosen = torch.where(cm, pc - rc, 0).sum(1)
    rejected = torch.where(rm, pr - rr, 0).sum(1)
    expected = -torch.nn.functional.logsigmoid(0.3 * (chosen - rejected)).mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert stats["rewards/chosen"].item() == pytest.approx(0.3 * chosen.mean().item())


def test_weights_of_zero_take_the_rejected_answer_away() -> None:
    pc, pr, rc, rr, cm, rm = sides()
    nothing = torch.zeros_like(pr)
    first, _ = token_dpo_loss(pc, pr, rc, rr, cm, rm, rejected_weights=nothing)
    second, _ = token_dpo_loss(pc, pr + 5, rc, rr, cm, rm, rejected_weights=nothing)
    assert first.item() == second.item()


@pytest.mark.parametrize("reduction", ["sequence", "position"])
def test_the_gradient_of_a_rejected_token_goes_with_its_weight(reduction: Any) -> None:
    pc, pr, rc, rr, cm, rm = sides(times=(4, 4))
    pr.requires_grad_()
    weights = torch.tensor([[0.0, 0.5, 1.0, 2.0], [0.25, 1.0, 0.0, 1.0]], dtype=torch.float64)
    given = {"rejected_weights": weights, "beta": 0.2, "reduction": reduction}
    loss, _ = token_dpo_loss(pc, pr, rc, rr, cm, rm, **given)
    (slope,) = torch.autograd.grad(loss, pr)
    margins = torch.where(cm, pc - rc, 0) - torch.where(rm, weights * (pr - rr), 0)
    if reduction == "sequence":
        margins = margins.sum(1, keepdim=True)
    pull = 0.2 * torch.sigmoid(-0.2 * margins) / margins.numel()
    torch.testing.assert_close(slope, torch.where(rm, weights * pull, 0))


def test_an_empty_position_adds_log_2_to_the_released_mean() -> None:
    pc, pr, rc, rr, cm, rm = sides(times=(3, 3))
    wide = [torch.nn.functional.pad(each, (0, 2)) for each in (pc, pr, rc, rr, cm, rm)]
    narrow, _ = token_dpo_loss(pc, pr, rc, rr, cm, rm, reduction="position")
    padded, _ = token_dpo_loss(*wide, reduction="position")
    assert padded.item() == pytest.approx((3 * narrow.item() + 2 * math.log(2)) / 5)
    both = [token_dpo_loss(*each)[0].item() for each in ((pc, pr, rc, rr, cm, rm), wide)]
    assert both[0] == pytest.approx(both[1], abs=1e-12)


def test_nothing_under_a_mask_is_read() -> None:
    pc, pr, rc, rr, cm, rm = sides()
    first, _ = token_dpo_loss(pc, pr, rc, rr, cm, rm)
    pr[0, -1], rc[0, -1] = math.nan, -math.inf
    assert token_dpo_loss(pc, pr, rc, rr, cm, rm)[0].item() == first.item()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (1, {}, "must share the shape"),
        (None, {"reduction": "token"}, "reduction must be"),
        (None, {"reduction": "position"}, "must be one shape"),
        (None, {"rejected_weights": torch.ones(2, 2)}, "weights .2, 2. for tokens .2, 3."),
        ("hidden", {}, "hides a whole rejected answer"),
        ("nan", {}, "NaN or infinite"),
    ],
)
def test_mistakes_of_the_loss(change: Any, options: Any, message: str) -> None:
    given = sides()
    if change == 1:
        given[1] = given[1][:, 1:]
    elif change == "hidden":
        given[5][0] = False
    elif change == "nan":
        given[0][1, 0] = math.nan
    with pytest.raises(PertokenError, match=message):
        token_dpo_loss(*given, **options)


def test_mistakes_of_the_scores() -> None:
    positive, negative, ids = drawn()
    with pytest.raises(PertokenError, match="must have the same tokens"):
        contrastive_scores(positive, negative[..., :5], ids, torch.ones(2, 5))
    with pytest.raises(PertokenError, match="beta must be 0 or more"):
        contrastive_scores(positive, negative, ids, torch.ones(2, 5), beta=-1.0)


def answer(text: str, right: bool = False) -> Sampled:
    return Sampled(f"so {text} ", text, right)


def test_data_of_the_two_models() -> None:
    # Ten wrong: 4 x "7", 3 x "8", 2 x "9", 1 x "6"; half of ten is reached by "7" and "8".
    wrong = [answer(text) for text in "7777888996"]
    first = [*wrong, answer("5", True), answer("5", True), answer("")]
    second = [answer("1"), answer("2")]  # the first of one each, no second that was given once
    third = [answer("3", True)]
    found = contrast_data(["a", "b", "c"], [first, second, third])
    assert [(one.prompt, one.answer) for one in found.positive] == [("a", "so 5"), ("c", "so 3")]
    negative = [(one.prompt, one.answer) for one in found.negative]
    assert negative == [("a", "so 7"), ("a", "so 8"), ("b", "so 1")]
    assert [(one.chosen, one.rejected) for one in found.pairs] == [("so 5", "so 7")]
    assert found.unread == 1


@pytest.mark.parametrize(("right", "missing"), [(True, "wrong"), (False, "right")])
def test_data_without_a_side(right: bool, missing: str) -> None:
    with pytest.raises(PertokenError, match=f"none of 2 sampled answers is {missing}"):
        contrast_data(["a"], [[answer("1", right), answer("1", right)]])


def blamed(seed: int = 0) -> list[dict[str, Any]]:
    """The pairs with weights of the rejected answers."""
    draw = torch.Generator().manual_seed(seed)
    counts = (4, 2)  # tokens of the rejected answers, their ends among them
    weights = [torch.rand(count, generator=draw).tolist() for count in counts]
    return [{**row, "rejected_weights": own} for row, own in zip(lab.PAIRS, weights, strict=True)]


def test_weights_of_one_are_dpo_to_the_bit(tmp_path: Path) -> None:
    parent = lab.preference(tmp_path)
    rows = [
        {**row, "rejected_weights": [1.0] * len(own["rejected_weights"])}
        for row, own in zip(lab.PAIRS, blamed(), strict=True)
    ]
    child = lab.preference(tmp_path, MIXINS, rows)
    assert lab.run(child) == lab.run(parent)
    assert lab.same_weights(child, parent)


@pytest.mark.parametrize("reduction", ["sequence", "position"])
def test_the_trainer_takes_the_loss(tmp_path: Path, reduction: Any) -> None:
    made = lab.preference(tmp_path, MIXINS, blamed(), reduction=reduction, max_steps=1, beta=0.4)
    batch = lab.one_batch(made)
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
    both = []
    for model in (made.model, made.ref_model):
        logits = model(ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
        both.append(logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].detach())
    expected, _ = token_dpo_loss(
        *both[0].chunk(2),
        *both[1].chunk(2),
        *mask.chunk(2),
        rejected_weights=batch["token_weights"][:, 1:].chunk(2)[1],
        beta=0.4,
        reduction=reduction,
    )
    assert lab.run(made)[0] == pytest.approx(expected.item(), abs=1e-5)
    logged = made.state.log_history[0]["cdpo/weight"]
    weights = [one for row in blamed() for one in row["rejected_weights"]]
    assert logged == pytest.approx(sum(weights) / len(weights), abs=1e-5)


def test_micro_batches_are_one_batch_of_sequences(tmp_path: Path) -> None:
    found = []
    for size in (2, 1):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 2 // size}
        made = lab.preference(tmp_path, MIXINS, blamed(), **cut, max_steps=2, optim="sgd")
        found.append((lab.run(made), list(made.model.parameters())))
    (whole, ends), (parts, others) = found
    assert parts == pytest.approx(whole, abs=1e-6)
    for one, other in zip(ends, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("only_rejected", [True, False])
def test_the_scores_are_of_the_ids_that_are_trained_on(tmp_path: Path, only_rejected: Any) -> None:
    positive, negative = lab.model(2), lab.model(3)
    more = {"positive": positive, "negative": negative, "only_rejected": only_rejected}
    made = lab.preference(tmp_path, MIXINS, **more)
    for row in made.train_dataset:
        before = len(row["prompt_ids"])
        for side, weights in zip(("chosen", "rejected"), row["token_weights"], strict=True):
            ids = torch.tensor([[*row["prompt_ids"], *row[f"{side}_ids"]]])
            logits = positive(ids).logits, negative(ids).logits
            own = contrastive_scores(*logits, ids, torch.ones_like(ids))[0, before - 1 :]
            own = 1 - own if side == "rejected" else own if not only_rejected else own * 0 + 1
            assert weights == pytest.approx([1.0] * before + own.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("mode", "kept"), [("keep_start", slice(None, 4)), ("keep_end", slice(-4, None))]
)
def test_the_scores_are_of_what_stays_of_a_row(tmp_path: Path, mode: str, kept: slice) -> None:
    pair = {"positive": lab.model(2), "negative": lab.model(3)}
    rows = [
        {"prompt": "a b ", "chosen": "c", "rejected": "e f g h"},
        {**lab.PAIRS[1], "prompt": ""},
    ]
    seen = []
    for each in pair.values():
        each.register_forward_pre_hook(
            lambda _, args, more: seen.append((args or [more["input_ids"]])[0].shape[1]),
            with_kwargs=True,
        )
    made = lab.preference(tmp_path, MIXINS, rows, max_length=4, truncation_mode=mode, **pair)
    assert max(seen) == 4
    for row in made.train_dataset:
        whole = torch.tensor([*row["prompt_ids"], *row["rejected_ids"]])
        place = torch.arange(len(whole))[kept]
        ids = whole[None, kept]
        logits = [each(ids).logits for each in pair.values()]
        wanted = torch.ones(len(whole))
        wanted[place[1:]] = 1 - contrastive_scores(*logits, ids, torch.ones_like(ids))[0]
        wanted[: len(row["prompt_ids"])] = 1
        assert row["token_weights"][1] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert len(lab.run(made)) == 3


@pytest.mark.parametrize("reduction", ["sequence", "position"])
def test_a_resumed_run_has_the_identical_next_loss(tmp_path: Path, reduction: Any) -> None:
    more = {"reduction": reduction, "max_steps": 4}
    whole = lab.run(lab.preference(tmp_path / "a", MIXINS, blamed(), **more))
    saving = {"save_strategy": "steps", "save_steps": 2}
    lab.run(lab.preference(tmp_path / "b", MIXINS, blamed(), **more, **saving))
    again = lab.preference(tmp_path / "b", MIXINS, blamed(), **more)
    resumed = lab.run(again, resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert resumed[-2:] == whole[-2:]


@pytest.mark.parametrize("reduction", ["sequence", "position"])
def test_an_adapter_has_the_model_without_it_as_reference(tmp_path: Path, reduction: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    more = {"reduction": reduction, "ref_model": None, "peft_config": adapter}
    made = lab.preference(tmp_path, MIXINS, blamed(), **more)
    found = lab.run(made)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)  # the policy is the reference
    assert found[-1] < found[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive": "own"}, "the negative model is missing"),
        ({"positive": "own", "negative": "wide"}, "must have the same tokens"),
        ({"reduction": "sum"}, "reduction must be"),
        ({"reduction": "position", "loss_type": "ipo"}, "does not support loss_type"),
        ({}, "neither chosen_weights nor rejected_weights"),
    ],
)
def test_mistakes_of_the_trainer(tmp_path: Path, options: Any, message: str) -> None:
    from pertoken.testing import tiny_model

    models = {"own": lab.model(2), "wide": tiny_model("llama", vocab_size=40)}
    given = {name: models.get(value, value) for name, value in options.items()}
    with pytest.raises(PertokenError, match=message):
        lab.preference(tmp_path, MIXINS, **given)
