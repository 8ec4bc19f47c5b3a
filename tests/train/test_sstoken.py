"""ssToken: its scores by hand, attention against eager, keep=1 is the parent, four histories."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.select import top_share
from pertoken.testing import tiny_model
from pertoken.train import (
    SSTokenSFT,
    prompt_attention,
    ss_scores,
    sstoken_loss,
)
from pertoken.train._prompt_attention import watching
from pertoken.train.sstoken import kept_by_place

_place = Path(__file__).parent / "_supervised.py"
_spec = importlib.util.spec_from_file_location("_supervised", _place)
lab: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lab)
SS = (SSTokenSFT,)


def ragged(seed: int = 0) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.zeros(5, 12, dtype=torch.bool)
    for row, (first, last) in enumerate([(2, 12), (0, 7), (5, 6), (3, 10), (1, 11)]):
        mask[row, first:last] = True
    normal = [torch.randn(5, 12, generator=draw, dtype=torch.float64) for _ in range(2)]
    return {
        "log_probs": normal[0] - 3,
        "history_log_probs": normal[1] - 3,
        "attention": torch.rand(5, 12, generator=draw, dtype=torch.float64),
        "mask": mask,
    }


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.6, 1.0])
def test_exactly_the_share_is_kept_and_the_loss_is_their_mean(keep: float) -> None:
    given = ragged()
    loss, stats = sstoken_loss(**given, keep=keep)
    kept, mask = stats["kept"], given["mask"]
    assert not kept[~mask].any()
    assert kept.sum(1).tolist() == [math.ceil(keep * n - 1e-9) for n in mask.sum(1).tolist()]
    torch.testing.assert_close(loss, -given["log_probs"][kept].mean(), rtol=0, atol=1e-12)
    for row in range(5):  # no token that was left out scores above one that was kept
        left = mask[row] & ~kept[row]
        if left.any():
            scores = stats["scores"][row]
            assert scores[kept[row]].min() >= scores[left].max()


def test_gamma_gives_the_pure_orders() -> None:
    given = ragged(1)
    rel = given["log_probs"] - given["history_log_probs"]
    for gamma, pure in ((1.0, rel), (0.0, given["attention"])):
        _, stats = sstoken_loss(**given, gamma=gamma, keep=0.4)
        assert torch.equal(stats["kept"], top_share(pure, 0.4, given["mask"]))


def test_a_history_that_is_the_model_leaves_the_attention() -> None:
    given = ragged(2)
    given["history_log_probs"] = given["log_probs"]
    _, stats = sstoken_loss(**given)
    assert not stats["rel"].any()
    expected = torch.where(given["mask"], 0.5 * given["attention"], 0.0)
    torch.testing.assert_close(stats["scores"], expected)


def test_ties_go_to_the_earlier_token_and_rows_are_alone() -> None:
    ones = torch.ones(2, 4)
    _, stats = sstoken_loss(-ones, -ones, ones, ones, keep=0.5)
    assert stats["kept"].tolist() == [[True, True, False, False]] * 2
    given = ragged(3)
    whole = sstoken_loss(**given)[1]["scores"]
    for row in range(5):
        alone = sstoken_loss(**{name: part[row : row + 1] for name, part in given.items()})
        assert torch.equal(alone[1]["scores"][0], whole[row])


def ranked(rel: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    nowhere = torch.zeros_like(rel)
    return ss_scores(rel, nowhere, mask, gamma=1.0, normalize="rank")


def test_ranks_are_the_share_of_tokens_that_are_lower() -> None:
    rel, mask = ragged()["log_probs"].round(decimals=1), ragged()["mask"]
    found = ranked(rel, mask)
    for row in range(5):
        own = rel[row][mask[row]]
        lower = [(own < one).sum().item() / max(1, len(own) - 1) for one in own]
        assert found[row][mask[row]].tolist() == lower
    assert not found[~mask].any()
    assert torch.equal(ranked(torch.where(mask, rel, 1e9), mask), found)
    assert not ranked(torch.ones(2, 4), torch.ones(2, 4)).any()  # as min-max has it


@pytest.mark.parametrize(
    "increasing", [torch.exp, lambda rel: rel**3, lambda rel: 5 * rel + 1, torch.atan]
)
def test_ranks_stay_under_any_increasing_map(increasing: Any) -> None:
    given = ragged(6)
    rel, mask = given["log_probs"] - given["history_log_probs"], given["mask"]
    assert torch.equal(ranked(increasing(rel), mask), ranked(rel, mask))
    # One outlier leaves min-max with a flat rest; the order of the ranks it can't change.
    far = torch.where(rel == rel.max(), 1e6, rel)
    assert torch.equal(ranked(far, mask), ranked(rel, mask))
    kept = [
        sstoken_loss(**given, gamma=1.0, normalize=how)[1]["kept"] for how in ("minmax", "rank")
    ]
    assert torch.equal(*kept)  # of REL alone both have one order


def test_kept_tokens_are_counted_by_place() -> None:
    kept = torch.tensor([[False, True, True, False, True], [True, False, False, False, False]])
    mask = torch.tensor([[False, True, True, True, True], [True, True, False, False, False]])
    assert kept_by_place(kept, mask, 2).tolist() == [1.0, 1 / 3]
    given = ragged(7)
    kept = sstoken_loss(**given)[1]["kept"]
    counts = [[0, 0] for _ in range(10)]
    for row, own in zip(kept, given["mask"], strict=True):
        for number, one in enumerate(row[own].tolist()):
            counts[10 * number // int(own.sum())][0] += one
            counts[10 * number // int(own.sum())][1] += 1
    shares = [some / all_ for some, all_ in counts]
    assert kept_by_place(kept, given["mask"]).tolist() == pytest.approx(shares, abs=1e-12)
    empty = kept_by_place(torch.ones(1, 3), torch.ones(1, 3)).tolist()
    assert [one for one in empty if one == one] == [1.0] * 3


def test_selection_carries_no_gradient() -> None:
    given = ragged(4)
    leaves = {name: part.clone().requires_grad_() for name, part in given.items() if name != "mask"}
    loss, stats = sstoken_loss(**leaves, mask=given["mask"])
    loss.backward()
    assert leaves["history_log_probs"].grad is None
    assert leaves["attention"].grad is None
    expected = torch.where(stats["kept"], -1.0 / stats["kept"].sum(), 0.0).double()
    torch.testing.assert_close(leaves["log_probs"].grad, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 1.5}, "gamma is the share of the excess loss, 0 to 1, got 1.5"),
        ({"normalize": "ranks"}, r"unknown normalize 'ranks' \(did you mean 'rank'"),
        ({"keep": 0.0}, "the share to keep must be above 0"),
        ({"attention": torch.ones(1, 1)}, "rel, attention and mask must share the shape"),
        ({"history_log_probs": torch.ones(1, 1)}, "history_log_probs and mask must share"),
        ({"history_log_probs": torch.full((5, 12), math.inf)}, "log_probs or history_log_probs is"),
        ({"mask": torch.zeros(5, 12)}, "the mask hides every token"),
    ],
)
def test_mistakes_of_the_loss(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PertokenError, match=message):
        sstoken_loss(**{**ragged(), **change})


# ------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "gpt-neox"])
def test_sums_are_those_of_eager_attention(name: str) -> None:
    eager = tiny_model(name, attention="eager", layers=3 if name == "gemma3" else 2)
    fast = tiny_model(name, layers=3 if name == "gemma3" else 2)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (3, 20), generator=draw)
    real = (
        torch.arange(20) < torch.tensor([[20], [13], [15]])
    ).long()  # eager gives NaN for a window of padding
    prompt = torch.arange(20) < torch.tensor([[6], [3], [2]])
    for layer in (-1, 0):
        full = eager(ids, attention_mask=real, output_attentions=True).attentions[layer].mean(1)
        wanted = (full * prompt[:, None]).sum(-1)[:, 1:]
        for kind, rows in (("token", slice(1, None)), ("predictor", slice(None, -1))):
            found = prompt_attention(fast, ids, prompt, real, layer=layer, query=kind)
            wanted = (full * prompt[:, None]).sum(-1)[:, rows]
            kept = real[:, rows] != 0
            torch.testing.assert_close(found.double()[kept], wanted[kept], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "gpt-neox"])
def test_without_the_sink_and_the_sink_are_the_whole(name: str) -> None:
    eager, fast = (
        tiny_model(name, attention=kind, layers=3 if name == "gemma3" else 2)
        for kind in ("eager", "sdpa")
    )
    ids = torch.randint(1, 60, (3, 20), generator=torch.Generator().manual_seed(1))
    real = (torch.arange(20) < torch.tensor([[20], [13], [15]])).long()
    prompt = (torch.arange(20) < torch.tensor([[6], [11], [2]])) & (real != 0)
    prompt[2, 0] = False  # a sink that is no prompt is not counted anyway
    for layer in (-1, 0):
        full = eager(ids, attention_mask=real, output_attentions=True).attentions[layer].mean(1)
        for kind, rows in (("token", slice(1, None)), ("predictor", slice(None, -1))):
            given: Any = {"layer": layer, "query": kind}
            whole = prompt_attention(fast, ids, prompt, real, **given)
            without = prompt_attention(fast, ids, prompt, real, **given, exclude_sink=True)
            sink = full[:, rows, 0] * prompt[:, :1]
            kept = real[:, rows] != 0
            torch.testing.assert_close(
                (without.double() + sink.double())[kept], whole.double()[kept], rtol=0, atol=1e-5
            )
            assert (sink[:2][kept[:2]] > 1e-3).any()


def test_the_sink_is_the_first_token_that_is_no_padding() -> None:
    model, ids = tiny_model("llama"), torch.arange(1, 14)[None]
    prompt = torch.arange(13)[None] < 5
    alone = prompt_attention(model, ids, prompt, exclude_sink=True)
    left, right = (torch.nn.functional.pad(ids, pad) for pad in ((7, 0), (0, 7)))
    for padded, pad, rows in ((left, (7, 0), slice(7, None)), (right, (0, 7), slice(0, 12))):
        own = [torch.nn.functional.pad(one, pad) for one in (prompt, torch.ones_like(ids))]
        found = prompt_attention(model, padded, *own, exclude_sink=True)
        torch.testing.assert_close(found[:, rows], alone, rtol=0, atol=1e-5)


def test_long_rows_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from pertoken.train import _prompt_attention

    model, ids = tiny_model("llama"), torch.arange(1, 21)[None]
    prompt = torch.arange(20)[None] < 4
    whole = prompt_attention(model, ids, prompt)
    monkeypatch.setattr(_prompt_attention, "_QUERIES", 7)
    torch.testing.assert_close(prompt_attention(model, ids, prompt), whole, rtol=0, atol=1e-6)


def test_watching_leaves_no_trace_and_what_cannot_be_watched_is_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = tiny_model("llama")
    before = str(model.config._attn_implementation)
    with contextlib.suppress(ZeroDivisionError), watching(model) as watch:
        raise ZeroDivisionError
    assert not watch.block._forward_pre_hooks
    assert model.config._attn_implementation == before
    with pytest.raises(PertokenError, match="the model has not run"):
        watch.prompt_shares(torch.ones(1, 1), torch.ones(1, 1))
    with pytest.raises(PertokenError, match="layer must be 0 to 1"):
        prompt_attention(model, torch.ones(1, 3).long(), torch.ones(1, 3), layer=2)
    with pytest.raises(PertokenError, match="prompt_mask must be"):
        prompt_attention(model, torch.ones(1, 3).long(), torch.ones(1, 2))
    with pytest.raises(PertokenError, match='query must be "token"'):
        prompt_attention(model, torch.ones(1, 3).long(), torch.ones(1, 3), query="row")
    bloom = BloomForCausalLM(BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(PertokenError, match="attention on the prompt cannot serve Bloom"):
        prompt_attention(bloom, torch.ones(1, 3).long(), torch.ones(1, 3))


# --------------------------------------------------------------------------------------- trainer


@pytest.fixture
def trl() -> Any:
    return pytest.importorskip("trl", reason="TRL is not installed")


def test_keep_all_is_sft_to_the_bit(trl: Any, tmp_path: Path) -> None:
    parent, child = lab.trainer(tmp_path), lab.trainer(tmp_path, SS, keep=1.0)
    assert lab.run(child) == lab.run(parent)
    assert lab.same_weights(child, parent)


def test_micro_batches_are_one_batch_and_its_formula(trl: Any, tmp_path: Path) -> None:
    found = []
    for size in (4, 1):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        made = lab.trainer(tmp_path, SS, max_steps=1, warmup=0.0, optim="sgd", **cut)
        if size == 4:
            given = lab.one_batch(made)
            ids, real = given["input_ids"], given["attention_mask"]
            with torch.no_grad():
                log_probs = made.model(ids, attention_mask=real).logits[:, :-1].log_softmax(-1)
                log_probs = log_probs.gather(-1, ids[:, 1:, None])[..., 0]
                learned = given["labels"] != -100
                shares = prompt_attention(made.model, ids, ~learned & (real != 0), real)
            expected, _ = sstoken_loss(log_probs, log_probs, shares, learned[:, 1:])
        found.append((lab.run(made)[0], [one.detach() for one in made.model.parameters()]))
    (whole, ends), (parts, others) = found
    assert whole == pytest.approx(float(expected), abs=1e-6)
    assert parts == pytest.approx(whole, abs=1e-6)
    for one, other in zip(ends, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_histories_that_are_one_state_train_alike(trl: Any, tmp_path: Path) -> None:
    """A frozen copy, its log-probabilities taken before, and a moving average that never moves."""
    options: dict[str, Any] = {"warmup": 0.0, "gamma": 1.0, "max_steps": 3}
    found = [
        lab.run(lab.trainer(tmp_path, SS, history=kind, **options, **more))
        for kind, more in (("base", {}), ("precomputed", {}), ("ema", {"decay": 1.0}))
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert found[0] == found[2]
    # An average that forgets at once is the model itself: no REL, the attention alone is left.
    moving = lab.trainer(tmp_path, SS, history="ema", decay=0.0, warmup=0.0)
    assert lab.run(moving) == lab.run(lab.trainer(tmp_path, SS, warmup=1.0))
    assert all(one["sstoken/rel"] == 0 for one in moving.state.log_history if "loss" in one)


def test_the_moving_average_moves_though_the_model_is_in_half_precision(
    trl: Any, tmp_path: Path
) -> None:
    half = lab.model().to(torch.bfloat16)
    more = {"model": half, "history": "ema", "learning_rate": 1e-2}
    made = lab.trainer(tmp_path, SS, **more)
    start, moved, model_moved = [each.clone() for each in made._past.parameters()], 0, 0
    made.train()
    for was, old, new in zip(start, made._past.parameters(), made.model.parameters(), strict=True):
        assert old.dtype == torch.float32
        moved, model_moved = moved + (old != was).sum(), model_moved + (new != was).sum()
    assert moved > 0.9 * model_moved > 0


def test_the_options_of_the_score_are_those_of_the_functions(trl: Any, tmp_path: Path) -> None:
    ways: dict[str, Any] = {"query": "predictor", "exclude_sink": True}
    made = lab.trainer(tmp_path, SS, warmup=0.0, max_steps=1, normalize="rank", **ways)
    old, new = lab.model(), lab.model(seed=1)
    made.model.load_state_dict(new.state_dict())
    given = lab.one_batch(made)
    ids, real, learned = given["input_ids"], given["attention_mask"], given["labels"] != -100
    with torch.no_grad():
        both = [one(ids, attention_mask=real).logits[:, :-1].log_softmax(-1) for one in (new, old)]
        log_probs, past = (one.gather(-1, ids[:, 1:, None])[..., 0] for one in both)
        prompt = ~learned & (real != 0)
        shares = prompt_attention(new, ids, prompt, real, **ways)
    loss, _ = sstoken_loss(log_probs, past, shares, learned[:, 1:], normalize="rank")
    assert lab.run(made)[0] == pytest.approx(float(loss), abs=1e-6)


def test_an_adapter_is_taken_off_for_the_history(trl: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def made(history: str) -> Any:
        adapter = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        more = {"history": history, "gamma": 1.0, "warmup": 0.0, "peft_config": adapter}
        return lab.trainer(tmp_path, SS, learning_rate=0.1, **more)

    off, base = made("adapter_off"), made("base")
    assert lab.run(off) == lab.run(base)
    assert lab.same_weights(off, base)
    assert off._past is None  # no second model
    logged = [entry["sstoken/rel"] for entry in off.state.log_history if "sstoken/rel" in entry]
    assert logged[0] == 0  # a new adapter adds nothing
    assert logged[-1] != 0


@pytest.mark.parametrize("history", ["base", "ema"])
def test_a_resumed_run_has_the_identical_next_loss(trl: Any, tmp_path: Path, history: str) -> None:
    options: dict[str, Any] = {
        "history": history,
        "decay": 0.5,
        "max_steps": 4,
        "warmup": 0.25,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = lab.trainer(tmp_path / "whole", SS, **options)
    lab.run(whole)
    again = lab.trainer(tmp_path / "again", SS, **options)
    lab.run(again, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert lab.losses(again)[-2:] == lab.losses(whole)[-2:]
    assert lab.same_weights(whole, again)
    logged = [entry for entry in whole.state.log_history if "loss" in entry]
    assert logged[0]["sstoken/rel"] == 0 != logged[-1]["sstoken/rel"]
    assert all(0 <= entry["sstoken/place"] <= 1 for entry in logged)
    assert all(0 < entry["sstoken/attention"] < 1 for entry in logged)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history": "bases"}, r"unknown history 'bases' \(did you mean 'base'"),
        ({"history": "adapter_off"}, 'history "adapter_off" needs a PEFT model, not Llama'),
        ({"keep": 0.0}, "keep must be above 0 and at most 1, got 0.0"),
        ({"normalize": "ranks"}, r"unknown normalize 'ranks' \(did you mean 'rank'"),
        ({"gamma": -0.1}, "gamma is a share, 0 to 1, got -0.1"),
        ({"warmup": 3.0}, "warmup is a share, 0 to 1, got 3.0"),
        ({"packing": True}, "does not support packing=True"),
    ],
)
def test_mistakes_are_said_before_training(
    trl: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PertokenError, match=message):
        lab.trainer(tmp_path, SS, **options)


def test_a_dropped_history_and_a_stream_are_named(trl: Any, tmp_path: Path) -> None:
    made = lab.trainer(tmp_path, SS, history="precomputed")
    made.train_dataset = made.train_dataset.remove_columns("history_log_probs")
    with pytest.raises(PertokenError, match="the batch has no history_log_probs"):
        made.train()
    from datasets import Dataset

    stream = Dataset.from_list(lab.ROWS).to_iterable_dataset()
    with pytest.raises(PertokenError, match="needs a data set that can be read twice"):
        lab.trainer(tmp_path, SS, stream, history="precomputed")
