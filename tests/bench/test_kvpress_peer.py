"""The kvpress bench: what it compares, how it judges, and what it says without the peer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pertoken.cache import H2OCache, SnapKVCache, TOVACache
from pertoken.testing import tiny_model
from pertoken.timing import alternate

BENCH = Path(__file__).parents[2] / "bench"
peer = pytest.importorskip("kvpress_peer")


def pair(cache: Any) -> Any:
    return peer.Pair("one", cache, lambda drop, budget: None)


@pytest.mark.parametrize("time", [129, 421, 1000, 2047])
@pytest.mark.parametrize("budget", [32, 128])
def test_the_peer_is_asked_for_as_many_rows(time: int, budget: int) -> None:
    assert int(time * (1 - peer.share_to_drop(time, budget))) == budget


def test_agreement_counts_rows_of_every_head() -> None:
    heads = [torch.tensor([[0, 1], [4, 5]])]
    assert peer.agreement(heads, heads) == 100.0
    assert peer.agreement(heads, [torch.tensor([[1, 0], [0, 1]])]) == 50.0
    # One set for all heads of a layer on our side.
    assert peer.agreement([torch.tensor([[0, 1]])], [torch.tensor([[0, 1], [0, 9]])]) == 75.0


@torch.no_grad()
def test_averages_become_sums_again() -> None:
    """Weights of a prompt, averaged as the peer does, rank as the sums of H2O do."""
    weights = torch.rand(1, 2, 9, 9).tril()
    average = weights.sum(2) / torch.arange(9, 0, -1)
    found = peer.summed(average, 3)
    assert torch.allclose(found[..., :6], weights.sum(2)[..., :6])
    assert bool(found[..., 6:].isinf().all())


@torch.no_grad()
@pytest.mark.parametrize("kind", [H2OCache, TOVACache, lambda m, b: SnapKVCache(m, b, window=4)])
def test_ours_tells_the_places_it_keeps(kind: Any) -> None:
    model = tiny_model("llama")
    ids = torch.randint(1, 64, (1, 30), generator=torch.Generator().manual_seed(0))
    kept = peer.run_ours(pair(kind), model, ids, 8)
    assert [layer.shape[-1] for layer in kept] == [8, 8]
    assert not model.get_decoder()._forward_hooks


def test_the_peer_gets_what_its_hooks_want() -> None:
    model = tiny_model("llama")
    seen = []
    attention = model.model.layers[0].self_attn

    def look(_: Any, __: Any, kwargs: dict[str, Any], ___: Any) -> None:
        seen.append((kwargs["cache_position"].tolist(), model.config._attn_implementation))

    handle = attention.register_forward_hook(look, with_kwargs=True)
    with peer.served(model, eager=True):
        cache = model(torch.tensor([[5, 6, 7]])).past_key_values
        model(torch.tensor([[8]]), past_key_values=cache)
    handle.remove()
    assert seen == [([0, 1, 2], "eager"), ([3], "eager")]
    assert model.config._attn_implementation == "sdpa"
    assert not attention._forward_pre_hooks


def test_the_report_judges_what_is_the_same_rule() -> None:
    ticks = iter(range(10_000))
    run = alternate(
        {"ours": lambda i: None, "kvpress": lambda i: None},
        3,
        watch=0,
        clock=lambda: float(next(ticks)),
        counters=lambda: None,
    )
    agreed = {"same": [99.0, 97.0], "other": [60.0, 50.0]}
    written = peer.report(agreed, {"same": run}, {"same": True, "other": False}, {})
    rows = {row["metric"]: row for row in written["rows"]}
    assert rows["same: rows kept by both, percent"]["holds"]
    assert rows["same: rows kept by both, percent"]["least"] == 97.0
    assert "bar" not in rows["other: rows kept by both, percent"]
    speed = rows["same: seconds of kvpress over ours"]
    assert (speed["here"], speed["bar"], speed["holds"]) == (1.0, ">= 1", True)
    json.dumps(written, allow_nan=False)
    run.kept.clear()
    nothing = peer.report(agreed, {"same": run}, {"same": True, "other": False}, {})["rows"][-1]
    assert nothing["here"] is None
    assert not nothing["holds"]
