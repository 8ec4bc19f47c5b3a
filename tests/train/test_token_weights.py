"""Weights per token: 1 is the parent, the divisor is the whole batch's, nothing is lost."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.signal import TokenSignal
from pertoken.testing import ByteTokenizer
from pertoken.train import TokenWeightedDPO, TokenWeightedSFT, signal_weights, weighted_nll

pytest.importorskip("trl", reason="TRL is not installed")

_place = Path(__file__).parent / "_supervised.py"
_spec = importlib.util.spec_from_file_location("_supervised", _place)
lab: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lab)
trainer, preference, run, one_batch = lab.trainer, lab.preference, lab.run, lab.one_batch
ROWS, PAIRS, LEARNED = lab.ROWS, lab.PAIRS, lab.LEARNED


SFT, DPO = (TokenWeightedSFT,), (TokenWeightedDPO,)


def drawn(seed: int = 0) -> list[list[float]]:
    """Weights of the learned tokens of every row."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.rand(count, generator=draw).tolist() for count in LEARNED]


def with_weights(weights: list[Any], rows: list[dict[str, Any]] = ROWS) -> list[dict[str, Any]]:
    return [{**row, "token_weights": own} for row, own in zip(rows, weights, strict=True)]


def ones(row: dict[str, Any]) -> list[float]:
    return [1.0] * len(row["input_ids"])


@pytest.mark.parametrize("normalizer", ["tokens", "weights"])
def test_weights_of_one_are_sft_to_the_bit(tmp_path: Path, normalizer: Any) -> None:
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    parent = trainer(tmp_path, **cut)
    child = trainer(tmp_path, SFT, weights=ones, normalizer=normalizer, **cut)
    assert run(child) == run(parent)
    assert lab.same_weights(child, parent)


@pytest.mark.parametrize("normalizer", ["tokens", "weights"])
def test_micro_batches_are_one_batch_and_its_formula(tmp_path: Path, normalizer: Any) -> None:
    rows = with_weights(drawn())
    found = []
    for size in (4, 1):
        made = trainer(
            tmp_path,
            SFT,
            rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            normalizer=normalizer,
            max_steps=1,
            optim="sgd",
        )
        found.append((run(made)[0], [each.detach() for each in made.model.parameters()]))
    (whole, ends), (parts, others) = found
    assert parts == pytest.approx(whole, abs=1e-6)
    for one, other in zip(ends, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)

    made = trainer(tmp_path, SFT, rows)
    batch = one_batch(made)
    logits = made.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    log_probs = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    mask, weights = batch["labels"][:, 1:] != -100, batch["token_weights"][:, 1:]
    expected = weighted_nll(log_probs, weights, mask, normalizer)
    assert whole == pytest.approx(expected.item(), abs=1e-6)


def test_a_weight_of_zero_takes_the_gradient_away(tmp_path: Path) -> None:
    rows = with_weights([[0.0] * count for count in LEARNED])
    made = trainer(tmp_path, SFT, rows, max_steps=1)
    assert run(made) == [0.0]
    assert made.state.log_history[0]["grad_norm"] == 0


def test_evaluation_is_the_parents_own(tmp_path: Path) -> None:
    rows = with_weights([[0.0] * count for count in LEARNED])
    made, parent = trainer(tmp_path, SFT, rows), trainer(tmp_path)
    found = [each.evaluate(each.train_dataset)["eval_loss"] for each in (made, parent)]
    assert found[0] == found[1] > 0


def test_a_column_a_function_and_a_signal_are_one(tmp_path: Path) -> None:
    def signal(row: dict[str, Any]) -> TokenSignal:
        learned = [
            i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label >= 0
        ]
        values = [float(i) / 20 for i in learned]
        return TokenSignal.from_ids(lab.tokenizer(), learned, values, "w")

    def numbers(row: dict[str, Any]) -> list[float]:
        return [float(i) / 20 for i in row["input_ids"]]

    text = [
        signal({"input_ids": ids, "labels": ids}).to_json()
        for row in ROWS
        for ids in [lab.tokenizer()(row["completion"] + "<eos>")["input_ids"]]
    ]
    found = [
        one_batch(trainer(tmp_path, SFT, rows, **more))
        for rows, more in (
            (ROWS, {"weights": signal}),
            (ROWS, {"weights": numbers}),
            (with_weights(text), {}),
        )
    ]
    learned = found[0]["labels"] != -100
    for other in found[1:]:
        assert torch.equal(found[0]["input_ids"], other["input_ids"])
        assert torch.equal(found[0]["token_weights"][learned], other["token_weights"][learned])


def test_weights_are_cut_as_trl_cuts_the_row(tmp_path: Path) -> None:
    rows = [{"input_ids": [3, 4, 5, 6, 7], "labels": [3, 4, 5, 6, 7], "w": [1, 2, 3, 4, 5]}] * 4
    made = trainer(tmp_path, SFT, rows, weights="w", max_length=3, truncation_mode="keep_end")
    assert one_batch(made)["token_weights"].tolist() == [[3, 4, 5]] * 4


@pytest.mark.parametrize(
    ("mode", "ids", "weights"),
    [("keep_start", [3, 4, 5, 6], [1, 1, 1, 10]), ("keep_end", [6, 7, 8, 9], [10, 11, 12, 13])],
)
def test_weights_of_the_learned_tokens_are_cut_with_the_row(
    tmp_path: Path, mode: str, ids: list[int], weights: list[float]
) -> None:
    whole, hidden = [3, 4, 5, 6, 7, 8, 9], [-100] * 3
    rows = [{"input_ids": whole, "labels": hidden + whole[3:], "w": [10, 11, 12, 13]}] * 4
    made = trainer(tmp_path, SFT, rows, weights="w", max_length=4, truncation_mode=mode)
    batch = one_batch(made)
    assert (batch["input_ids"].tolist(), batch["token_weights"].tolist()) == (
        [ids] * 4,
        [weights] * 4,
    )


def test_rows_without_labels_are_dropped_as_by_trl(tmp_path: Path) -> None:
    long = {"prompt": "a b c d e f ", "completion": "g"}
    rows = [long, *ROWS]
    weights = with_weights([[1.0, 1.0], *drawn()], rows)
    cut = {"max_length": 6, "shuffle_dataset": True}
    made, parent = trainer(tmp_path, SFT, weights, **cut), trainer(tmp_path, (), rows, **cut)
    assert len(made.train_dataset) == 4
    assert made.train_dataset["input_ids"][:] == parent.train_dataset["input_ids"][:]


def test_a_signal_of_other_tokens_goes_by_characters() -> None:
    ids = ByteTokenizer().encode("a to be")
    signal = TokenSignal("to be", [0.5, 2.0], [(0, 2), (2, 5)], "w")
    assert signal_weights(signal, ByteTokenizer(), ids) == [1, 1, 0.5, 0.5, 2, 2, 2]
    nothing = TokenSignal("to be", [float("nan"), 2.0], [(0, 2), (2, 5)], "w")
    assert signal_weights(nothing, ByteTokenizer(), ids, outside=0)[:4] == [0, 0, 0, 0]
    with pytest.raises(PertokenError, match="stands 2 times in the tokens of the row"):
        signal_weights(
            TokenSignal("b", [1.0], [(0, 1)], "w"), ByteTokenizer(), ids[:1] + ids[-2:-1] * 2
        )
    with pytest.raises(PertokenError, match="has a value per target"):
        signal_weights(TokenSignal("b", [[1.0]], [(0, 1)], "w", ["x"]), ByteTokenizer(), ids)


def test_a_token_inside_a_character_keeps_its_value() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("aç京")
    values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    same = TokenSignal.from_ids(tokenizer, ids, values, "w")
    assert signal_weights(same, tokenizer, ids) == values
    assert signal_weights(same, tokenizer, [*ids, *ids[:1]])[:6] == values
    other = TokenSignal("ç京", [2.0, 3.0], [(0, 1), (1, 2)], "w")
    assert signal_weights(other, tokenizer, [*ids, *ids[:3]][:6]) == [1, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (ROWS, {}, "the training data has no column 'token_weights', only prompt, completion"),
        (ROWS, {"weights": "w"}, "has no column 'w'"),
        (with_weights([[1.0]] * 4), {}, "row 0: 1 weights for 8 tokens, 5 of them learned"),
        (with_weights([[float("nan")] * n for n in LEARNED]), {}, "row 0: a weight is NaN"),
        (with_weights(["no"] * 4), {}, "this is no token signal"),
        (ROWS, {"weights": lambda row: 1.0}, "row 0: weights must be a list of numbers"),
        (ROWS, {"weights": ones, "normalizer": "token"}, 'normalizer must be "tokens" or'),
        (ROWS, {"weights": ones, "packing": True}, "does not support packing=True"),
        (ROWS, {"weights": ones, "loss_type": "dft"}, "does not support loss_type='dft'"),
        (ROWS, {"weights": ones, "label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        (
            [{"input_ids": [3, 4, 5], "labels": [-100, 4, 5], "token_weights": [0.5, 2.0]}],
            {"dataset_kwargs": {"skip_prepare_dataset": True}},
            "leave skip_prepare_dataset out of dataset_kwargs",
        ),
    ],
)
def test_mistakes_are_said_before_training(
    tmp_path: Path, rows: Any, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(PertokenError, match=message):
        trainer(tmp_path, SFT, rows, **more)


def test_a_dropped_column_stops_training(tmp_path: Path) -> None:
    made = trainer(tmp_path, SFT, weights=ones)
    made.train_dataset = made.train_dataset.remove_columns("token_weights")
    with pytest.raises(PertokenError, match="the batch has no token_weights: a collator or"):
        made.train()
    assert made.state.global_step == 0


def test_weights_of_another_number_than_tokens_stop_training(tmp_path: Path) -> None:
    made = trainer(tmp_path, SFT, weights=ones)
    short = [row[:-1] for row in made.train_dataset["token_weights"]]
    made.train_dataset = made.train_dataset.remove_columns("token_weights")
    made.train_dataset = made.train_dataset.add_column("token_weights", short)
    with pytest.raises(PertokenError, match=r"token_weights for a row of . tokens"):
        made.train()


def test_weights_that_sum_to_nothing_are_no_divisor(tmp_path: Path) -> None:
    rows = with_weights([[0.0] * count for count in LEARNED])
    with pytest.raises(PertokenError, match="the weights of a batch sum to 0, not above 0"):
        trainer(tmp_path, SFT, rows, normalizer="weights").train()


# ------------------------------------------------------------------------------------ preference


def answer_ones(side: str) -> Any:
    return lambda row: [1.0] * len(row[f"{side}_ids"])


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"ld_alpha": 0.5}])
def test_weights_of_one_are_dpo_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    parent = preference(tmp_path, **options)
    child = preference(tmp_path, DPO, rejected_weights=answer_ones("rejected"), **options)
    assert run(child) == run(parent)
    assert lab.same_weights(child, parent)


def test_each_token_of_an_answer_counts_its_weight(tmp_path: Path) -> None:
    weights = {
        "chosen": [[0.5, 2.0, 0.0], [1.0, 1.0, 3.0, 0.1]],
        "rejected": [[0.0, 1.5, 1, 1], [2, 0]],
    }
    rows = [
        {**row, **{f"{side}_weights": own[place] for side, own in weights.items()}}
        for place, row in enumerate(PAIRS)
    ]
    made = preference(tmp_path, DPO, rows, max_steps=1)
    batch = one_batch(made)
    total = []
    for model in (made.model, made.ref_model):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        log_probs = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        kept = batch["completion_mask"][:, 1:] * batch["token_weights"][:, 1:]
        total.append((log_probs * kept).sum(1))
    numbers = [sorted(row) for row in batch["token_weights"].tolist()]
    for own, prompt in ((weights["chosen"][0], 2), (weights["rejected"][1], 1)):
        width = batch["input_ids"].shape[1]
        padding = [0.0] * (width - prompt - len(own))
        wanted = sorted([*[1.0] * prompt, *own, *padding])
        assert any(row == pytest.approx(wanted) for row in numbers)
    chosen, rejected = (total[0] - total[1]).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    assert run(made)[0] == pytest.approx(expected.item(), abs=1e-6)


def test_micro_batches_of_pairs_are_one_batch(tmp_path: Path) -> None:
    more = [{"prompt": "p q ", "chosen": "r", "rejected": "s t a b"}, {**PAIRS[0], "chosen": "g"}]
    pairs = [*PAIRS, *more]

    def drawn_of(side: str) -> Any:
        return lambda row: [0.1 * (token % 7) for token in row[f"{side}_ids"]]

    weights = {f"{side}_weights": drawn_of(side) for side in ("chosen", "rejected")}
    found = []
    for size in (4, 1):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        made = preference(tmp_path, DPO, pairs, **weights, **cut, max_steps=2, optim="sgd")
        found.append((run(made), list(made.model.parameters())))
    (whole, ends), (parts, others) = found
    assert parts == pytest.approx(whole, abs=1e-6)
    for one, other in zip(ends, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_rejected_weights_of_zero_remove_that_side(tmp_path: Path) -> None:
    def zeros(row: dict[str, Any]) -> list[float]:
        return [0.0] * len(row["rejected_ids"])

    made = preference(tmp_path, DPO, rejected_weights=zeros, max_steps=1)
    other = [{**row, "rejected": "t t t t"} for row in PAIRS]
    again = preference(tmp_path, DPO, other, rejected_weights=zeros, max_steps=1)
    assert run(made) == pytest.approx(run(again), abs=1e-6)
    assert lab.losses(made)[0] != lab.losses(preference_run(tmp_path))[0]


def preference_run(folder: Path) -> Any:
    made = preference(folder, max_steps=1)
    made.train()
    return made


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "neither chosen_weights nor rejected_weights, only chosen, prompt, rejected"),
        ({"rejected_weights": "w"}, "has no column 'w'"),
        ({"rejected_weights": lambda row: [1.0]}, "row 0, rejected: 1 weights for 4 tokens"),
        (
            {"rejected_weights": answer_ones("rejected"), "use_weighting": True},
            "does not support use_weighting=True",
        ),
    ],
)
def test_mistakes_of_preference_are_said_before_training(
    tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(PertokenError, match=message):
        preference(tmp_path, DPO, **more)
