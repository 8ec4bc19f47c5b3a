"""Turns alternate, foreign load is told from our own, loaded rounds go for every contender."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pertoken.errors import PertokenError
from pertoken.testing import tiny_model
from pertoken.timing import (
    AlternatingRun,
    CpuTimes,
    alternate,
    bandwidth,
    bytes_per_token,
    foreign_share,
    read_cpu,
    spread,
)


class Machine:
    """Two cores, a clock, and other programs that use `foreign(now)` cores."""

    def __init__(self, foreign: Callable[[float], float]) -> None:
        self.foreign = foreign
        self.now = self.busy = self.own = 0.0

    def clock(self) -> float:
        return self.now

    def spend(self, seconds: float, own: float) -> None:
        self.busy += seconds * (own + self.foreign(self.now))
        self.own += seconds * own
        self.now += seconds

    def counters(self) -> CpuTimes:
        return CpuTimes(2 * self.now, self.busy, self.own)

    def run(self, seconds: dict[str, float], rounds: int, **options: Any) -> AlternatingRun:
        def contender(name: str) -> Callable[[int], str]:
            def call(index: int) -> str:
                self.spend(seconds[name], own=1.0)
                return f"{name}{index}"

            return call

        return alternate(
            {name: contender(name) for name in seconds},
            rounds,
            clock=self.clock,
            sleep=lambda pause: self.spend(pause, own=0.0),
            counters=self.counters,
            **options,
        )


def test_contenders_take_turns_and_the_first_place_moves_on() -> None:
    order: list[str] = []
    names = ("a", "b", "c")
    alternate({name: lambda i, name=name: order.append(name) for name in names}, 3, watch=0)
    assert "".join(order) == "abcbcacab"


def test_on_a_quiet_machine_every_round_is_kept() -> None:
    run = Machine(lambda now: 0.0).run({"fast": 1.0, "slow": 3.0}, rounds=4)
    assert run.seconds("slow") == [3.0] * 4
    assert run.values("fast") == ["fast0", "fast1", "fast2", "fast3"]
    assert run.speed_up("fast", over="slow") == 3.0
    assert run.noise()["foreign_share_max"] == 0.0


def test_our_own_work_is_not_foreign_load() -> None:
    before, after = CpuTimes(0, 0, 0), CpuTimes(4, 4, 4)  # both cores busy with us
    assert foreign_share(before, after) == 0.0


def test_a_loaded_round_is_run_again_and_dropped_for_all_if_it_stays_loaded() -> None:
    # a round takes 5 s; others take a whole core from second 5 to 15: round 1, both attempts
    machine = Machine(lambda now: 1.0 if 5 <= now < 15 else 0.0)
    run = machine.run({"a": 2.0, "b": 2.0}, rounds=4, retries=1)
    assert [entry.index for entry in run.kept] == [0, 2, 3]
    assert [(entry.index, entry.foreign) for entry in run.dropped] == [(1, 0.5)]
    assert run.noise()["attempts"] == 5
    assert len(run.seconds("a")) == len(run.seconds("b")) == 3


def test_load_that_goes_away_costs_a_repeat_not_a_round() -> None:
    machine = Machine(lambda now: 1.0 if now < 4 else 0.0)
    run = machine.run({"a": 2.0, "b": 2.0}, rounds=2, retries=1)
    assert (len(run.kept), len(run.dropped), run.attempts) == (2, 0, 3)


def test_load_seen_only_while_watching_drops_the_round_too() -> None:
    machine = Machine(lambda now: 1.0 if now < 0.9 else 0.0)
    assert len(machine.run({"a": 2.0}, rounds=1, retries=0).dropped) == 1


def test_with_nothing_kept_a_speed_up_is_nan() -> None:
    run = Machine(lambda now: 2.0).run({"a": 1.0, "b": 1.0}, rounds=2)
    assert math.isnan(run.speed_up("a", over="b"))
    assert math.isnan(spread(run.seconds("a")).median)


def test_without_counters_rounds_are_kept_and_the_share_is_unknown() -> None:
    run = alternate({"a": lambda i: i}, 2, watch=0, counters=lambda: None)
    assert len(run.kept) == 2
    assert run.foreign is None


@given(st.floats(0, 2), st.floats(0, 2), st.floats(0.2, 1e4))
def test_a_share_is_a_share(busy: float, own: float, window: float) -> None:
    share = foreign_share(CpuTimes(0, 0, 0), CpuTimes(2 * window, busy * window, own * window))
    assert share is not None
    assert 0 <= share <= 1


def test_a_window_shorter_than_the_counters_says_nothing() -> None:
    assert foreign_share(CpuTimes(0, 0, 0), CpuTimes(0.1, 0.1, 0)) is None


def test_counters_are_read_as_the_kernel_writes_them(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 30 1000 50 5 5 10 70 0\ncpu0 1 2 3 4\n")
    times = read_cpu(stat)
    assert times is not None
    assert times.busy / times.total == pytest.approx(170 / 1220)  # guest is part of user
    assert read_cpu(tmp_path / "missing") is None


@pytest.mark.parametrize(("contenders", "rounds"), [({}, 1), ({"a": lambda i: i}, 0)])
def test_nothing_to_time_is_refused(contenders: dict[str, Any], rounds: int) -> None:
    with pytest.raises(PertokenError, match="at least one"):
        alternate(contenders, rounds)


@pytest.mark.parametrize(("values", "median"), [([4.0], 4.0), ([1, 9, 2, 3], 2.5)])
def test_spread(values: Iterable[float], median: float) -> None:
    found = spread(list(values))
    assert found.low <= found.median == median <= found.high


def test_bandwidth_is_measured() -> None:
    assert 1e8 < bandwidth(seconds=0.02, megabytes=8) < 1e13


def test_tied_weights_are_read_once_and_a_looked_up_embedding_is_not() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    everything = sum(weight.nbytes for weight in model.parameters())
    table = model.get_input_embeddings().weight.nbytes
    assert bytes_per_token(model) == everything - table
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    assert bytes_per_token(model) == everything - table  # now one table, read as output layer
    assert bytes_per_token(torch.nn.Linear(4, 2, bias=False)) == 32
