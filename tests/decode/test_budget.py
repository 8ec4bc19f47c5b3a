"""budget="auto": planning from measured costs, calibration, and costs kept on disk."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from pertoken.decode import Goose, budget
from pertoken.decode.budget import Calibrator, Planner, measure_costs
from pertoken.decode.forward import TreeForward
from pertoken.testing import tiny_model

COSTS = {1: 1.0, 2: 1.2, 4: 1.3, 8: 1.5, 16: 1.9, 32: 3.0, 64: 5.0}


def test_more_tokens_never_look_cheaper() -> None:
    plan = Planner({1: 1.0, 2: 3.0, 4: 2.0, 8: 4.0})
    costs = [plan.cost(n) for n in range(1, 20)]
    assert costs == sorted(costs)
    assert costs[:4] == [1.0, 3.0, 3.0, 3.0]
    assert plan.cost(6) == pytest.approx(3.5)
    assert plan.cost(10) == pytest.approx(4.5)  # beyond the last size: on along the last line
    assert Planner({1: 2.0, 3: 2.0}).cost(1) == 2.0


def test_nothing_is_drafted_where_nothing_pays() -> None:
    plan = Planner(COSTS)
    assert plan.nodes([]) == 0
    assert plan.nodes([0.05] * 40) == 0
    steep = Planner({n: float(n) for n in COSTS})
    assert steep.nodes([0.9, 0.8, 0.7]) == 0  # a pass over two costs as much as two passes
    free = Planner(dict.fromkeys(COSTS, 1.0))
    assert free.nodes([0.5, 0.1, 0.01]) == 3


def test_a_process_in_which_drafts_never_hit_ends_in_plain_steps() -> None:
    plan, cal = Planner(COSTS), Calibrator()
    sizes = []
    for _ in range(60):
        p = cal.p("guess", 0.6)
        size = plan.nodes([p ** (i + 1) for i in range(plan.most)])
        sizes.append(size)
        if size:
            cal.update("guess", False)
        plan.record(1, size + 1)
    assert sizes[0] > 0
    assert set(sizes[30:]) == {0}


def simulate(chances: list[float], policy: int | None, steps: int = 6000) -> float:
    """Tokens per second of chains whose tokens are right with a chance that changes per step."""
    draw = random.Random(1)
    plan = Planner(COSTS)
    tokens, seconds = 0, 0.0
    for _ in range(steps):
        p = draw.choice(chances)
        size = plan.nodes([p ** (i + 1) for i in range(63)]) if policy is None else policy
        accepted = 0
        while accepted < size and draw.random() < p:
            accepted += 1
        plan.record(accepted + 1, size + 1)
        tokens += accepted + 1
        seconds += plan.cost(size + 1)
    return tokens / seconds


@pytest.mark.parametrize("chances", [[0.9], [0.6], [0.05], [0.05, 0.95], [0.1, 0.5, 0.8]])
def test_the_rate_reaches_that_of_the_best_fixed_size(chances: list[float]) -> None:
    best = max(simulate(chances, size) for size in (0, 1, 2, 3, 5, 7, 11, 15, 23, 31, 63))
    found = simulate(chances, None)
    assert found > 0.985 * best
    if len(chances) == 2:  # sure and hopeless steps in turn: one size for both is much worse
        assert found > 1.05 * best


def test_the_rate_is_that_of_the_process() -> None:
    plan = Planner(COSTS)
    for _ in range(2000):
        plan.record(3, 8)
    assert plan._gained / plan._spent == pytest.approx(3 / 1.5, rel=1e-3)


def test_drafts_stay_a_little_longer_than_what_was_worth_it() -> None:
    plan = Planner(COSTS)
    for _ in range(100):
        plan.nodes([])
    assert plan.most == 6
    for _ in range(100):
        plan.nodes([1.0] * 63)
    assert plan.most == 63


def test_calibration_finds_the_frequency_and_follows_a_change() -> None:
    cal, draw = Calibrator(), random.Random(0)
    assert cal.p("new", 0.3) == 0.3
    for _ in range(2000):
        cal.update("a", draw.random() < 0.8)
        cal.update(("b", 1), False)
    assert cal.p("a", 0.1) == pytest.approx(0.8, abs=0.12)
    assert cal.p(("b", 1), 0.9) < 0.1
    for _ in range(200):
        cal.update("a", False)
    assert cal.p("a", 0.1) < 0.1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path))
    monkeypatch.setattr(budget, "_measured", {})
    monkeypatch.setattr(budget, "foreign_share", lambda *_: 0.0)  # a busy machine keeps nothing
    return tmp_path


def test_costs_are_measured_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = TreeForward(tiny_model("llama"))
    costs = measure_costs(forward)
    assert list(costs) == list(budget.SIZES)
    assert all(seconds > 0 for seconds in costs.values())
    (file,) = folder.rglob("forward-costs.json")
    assert len(json.loads(file.read_text())) == 1

    def never(forward: TreeForward) -> dict[int, float]:
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr(budget, "_measure", never)
        assert measure_costs(forward) == costs
        patched.setattr(budget, "_measured", {})  # as another process would
        assert measure_costs(forward) == costs
        # Another model has its own.
        with pytest.raises(AssertionError, match="measured again"):
            measure_costs(TreeForward(tiny_model("gpt2")))
    monkeypatch.setattr(budget, "_measure", lambda forward: {1: 1.0, 2: 2.0})
    assert measure_costs(forward, fresh=True) == {1: 1.0, 2: 2.0}
    measure_costs(TreeForward(tiny_model("gpt2")))
    assert len(json.loads(file.read_text())) == 2
    assert not list(folder.rglob("*.part"))


def test_a_model_with_few_positions_is_measured_within_them(folder: Path) -> None:
    costs = measure_costs(TreeForward(tiny_model("gpt2", max_positions=24)))
    assert list(costs) == [1, 2, 3, 4, 6, 8, 12]


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0", '{"other": 3}'])
def test_an_unreadable_file_is_measured_anew(folder: Path, content: str) -> None:
    forward = TreeForward(tiny_model("llama"))
    budget._path().parent.mkdir(parents=True, exist_ok=True)
    budget._path().write_text(content)
    costs = measure_costs(forward)
    assert list(costs) == list(budget.SIZES)
    assert budget._key(forward.model) in json.loads(budget._path().read_text())


@pytest.mark.parametrize("entry", [None, 3, [], {}, {"1": "fast"}, {"one": 1.0}])
def test_an_entry_that_is_none_is_measured_anew(folder: Path, entry: object) -> None:
    forward = TreeForward(tiny_model("llama"))
    budget._path().parent.mkdir(parents=True, exist_ok=True)
    budget._path().write_text(json.dumps({budget._key(forward.model): entry}))
    assert list(measure_costs(forward)) == list(budget.SIZES)


def test_a_folder_that_cannot_be_written_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERTOKEN_HOME", str(folder / "file" / "below"))
    (folder / "file").write_text("not a folder")
    assert list(measure_costs(TreeForward(tiny_model("llama")))) == list(budget.SIZES)


def test_auto_falls_back_to_plain_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model = tiny_model("llama", vocab_size=16)
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3]])
    run = {"max_new_tokens": 30, "do_sample": False}
    wanted = model.generate(ids, **run)
    for costs, drafts in (({1: 1.0, 64: 64.0}, False), ({1: 1.0, 64: 1.0}, True)):
        drafter = Goose(budget="auto")
        monkeypatch.setattr("pertoken.decode.speculative.measure_costs", lambda forward, c=costs: c)
        assert torch.equal(model.generate(ids, custom_generate=drafter, **run), wanted)
        assert (drafter.stats.drafted.total() > 0) == drafts
