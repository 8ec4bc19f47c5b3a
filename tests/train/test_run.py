"""`train_policy` on a tiny model: the objectives, resume to the bit, and what stops a run."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.train.tasks import Example, Task

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("tensorboard", reason="TensorBoard is not installed")

from pertoken.train.run import Run, train_policy


def letters(split: str, count: int, seed: int) -> list[Example]:
    return [Example(f"{seed} {place % 7}", "e") for place in range(count)]


def share(text: str, example: Example) -> float:
    """Varies between texts of a random model, so that advantages are not all 0."""
    return sum(ord(sign) % 3 for sign in text) / (1 + len(text))


TASK = Task("letters", "share of some letters", letters, share)


@pytest.fixture(scope="module")
def tiny(tiny_folder: str) -> str:
    return tiny_folder


def go(out: Path, tiny: str, method: str = "fiberpo", **options: Any) -> Run:
    given: dict[str, Any] = {
        "model": tiny,
        "task": TASK,
        "steps": 4,
        "group": 4,
        "batch": 8,
        "iterations": 4,
        "max_new_tokens": 5,
        "learning_rate": 3e-3,
        **options,
    }
    return train_policy(method, out, **given)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def runs(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {method: go(folder / method, tiny, method) for method in METHODS}


METHODS = ("fiberpo", "grpo", "gspo", "cispo")


def test_the_objectives_part_after_the_first_step_and_not_before(runs: dict[str, Run]) -> None:
    norms = {method: [row["grad_norm"] for row in run.steps] for method, run in runs.items()}
    first = norms["grpo"][0]
    assert first > 0
    for method in ("fiberpo", "gspo"):
        assert norms[method][0] == pytest.approx(first, rel=1e-4)
    for place, method in enumerate(METHODS):
        for other in METHODS[:place]:
            assert norms[method][1:] != norms[other][1:]
    assert all(run.steps[0]["kl"] == 0 < run.steps[-1]["kl"] for run in runs.values())


def test_rows_and_results(runs: dict[str, Run]) -> None:
    for method, run in runs.items():
        found = json.loads((run.folder / "run.json").read_text())
        assert found == json.loads(json.dumps(run.to_dict()))
        assert found["settings"]["method"] == method
        assert found["versions"].keys() == {"pertoken", "python", "torch", "transformers", "trl"}
        assert found["tokens_sampled"] == found["rows"][0]["tokens"] > 0
        assert [row["step"] for row in found["rows"]] == [1, 2, 3, 4]
        assert [row["reward"] is None for row in found["rows"]] == [False, True, True, True]
    levels = {method: list(run.steps[0]["closed"]) for method, run in runs.items()}
    assert levels == {
        "fiberpo": ["token", "trajectory"],
        "grpo": ["token"],
        "gspo": ["trajectory"],
        "cispo": ["token"],
    }


def test_the_trained_model_loads_in_plain_transformers(runs: dict[str, Run], tiny: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = runs["fiberpo"].folder / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("ab", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape == (1, 5)
    start, end = weights(Path(tiny)), weights(folder)
    assert any(not torch.equal(start[name], end[name]) for name in start)


def test_one_checkpoint_and_a_log_stay(runs: dict[str, Run]) -> None:
    folder = runs["grpo"].folder
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert list((folder / "tensorboard").glob("events.*"))


def test_the_page_of_the_last_batch(runs: dict[str, Run]) -> None:
    for run in runs.values():
        page = run.to_html()
        assert page.count("<section>") == 8
        assert page.count('title="ratio ') == int(run.batch["completion_mask"].sum())
        assert f"<title>{run.settings['method']} on letters, step 4</title>" in page
    rewards, advantages = (runs["grpo"].batch[name] for name in ("rewards", "advantages"))
    assert rewards.std() > 0
    assert (rewards[advantages > 0].mean() > rewards[advantages < 0].mean()).item()


class Stop(BaseException):
    """What Ctrl-C raises, told apart."""


@pytest.mark.parametrize("stop", [3, 4, 5], ids="stopped in step {}".format)
def test_a_run_goes_on_with_the_identical_next_loss(tmp_path: Path, tiny: str, stop: int) -> None:
    """Checkpoints after 2, 3 and 4 of the 4 steps of a generation batch."""
    options: dict[str, Any] = {"steps": 6, "save_every": stop - 1}
    whole = go(tmp_path / "whole", tiny, **options)

    def interrupt(row: dict[str, Any]) -> None:
        if row["step"] == stop:
            raise Stop

    with pytest.raises(Stop):
        go(tmp_path / "cut", tiny, **options, progress=interrupt)
    assert [path.name for path in (tmp_path / "cut").glob("checkpoint-*")] == [
        f"checkpoint-{stop - 1}"
    ]
    again = go(tmp_path / "cut", tiny, **options, resume=True)
    timeless = [
        [{name: row[name] for name in row if name != "seconds"} for row in run.steps]
        for run in (whole, again)
    ]
    assert timeless[0] == timeless[1]
    one, other = (weights(run.folder / "model") for run in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_can_be_made_longer(tmp_path: Path, tiny: str) -> None:
    go(tmp_path / "a", tiny, steps=2)
    longer = go(tmp_path / "a", tiny, steps=4, resume=True)
    whole = go(tmp_path / "b", tiny, steps=4)
    assert [row["loss"] for row in longer.steps] == [row["loss"] for row in whole.steps]


def test_with_a_kl_term_the_reference_is_the_start(tmp_path: Path, tiny: str) -> None:
    from transformers import AutoTokenizer

    from pertoken.testing import tiny_model

    model = tiny_model("llama", vocab_size=257, dtype=torch.float32, seed=5)  # lies in no folder
    given = (model, AutoTokenizer.from_pretrained(tiny))
    run = go(tmp_path / "a", tiny, model=given, beta=0.1)
    assert run.to_dict()["kl"] == "to the start"
    assert run.steps[0]["kl"] == 0 < run.steps[-1]["kl"]


# ------------------------------------------------------------------------------ what stops a run


def broken_after(calls: int, failure: Any) -> Task:
    """The task, with a reward that fails once it was asked `calls` times."""
    asked = [0]

    def reward(text: str, example: Example) -> Any:
        asked[0] += 1
        if asked[0] <= calls:
            return share(text, example)
        return failure(text)

    return Task("letters", "breaks", letters, reward)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (lambda text: 1 / 0, "reward of 'letters' raised ZeroDivisionError: division by zero"),
        (lambda text: [1.0, 2.0], r"one finite number for a text, got \[1.0, 2.0\]"),
        (lambda text: None, "one finite number for a text, got None"),
        (lambda text: float("inf"), "one finite number for a text, got inf"),
        (lambda text: float("nan"), "one finite number for a text, got nan"),
    ],
)
def test_a_bad_reward_stops_before_the_step(
    tmp_path: Path, tiny: str, failure: Any, message: str
) -> None:
    options: dict[str, Any] = {"iterations": 1, "save_every": 1}
    with pytest.raises(PertokenError, match=message):
        go(tmp_path / "a", tiny, task=broken_after(8, failure), **options)
    assert [path.name for path in (tmp_path / "a").glob("checkpoint-*")] == ["checkpoint-1"]
    once = go(tmp_path / "b", tiny, steps=1, **options)
    kept, wanted = weights(tmp_path / "a" / "checkpoint-1"), weights(once.folder / "model")
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("method", METHODS)
def test_log_probabilities_that_are_no_numbers_stop_before_the_step(
    tmp_path: Path, tiny: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pertoken.train._guard import GuardMixin

    plain = GuardMixin._get_per_token_logps_and_entropies

    def spoilt(self: Any, *args: Any, **kwargs: Any) -> Any:
        log_probs, *rest = plain(self, *args, **kwargs)
        if torch.is_grad_enabled() and self.state.global_step == 1:
            first = torch.arange(log_probs.shape[1]) == 0
            log_probs = log_probs * torch.where(first, float("inf"), 1.0)
            self._log_probs = log_probs.detach()
        return (log_probs, *rest)

    monkeypatch.setattr(GuardMixin, "_get_per_token_logps_and_entropies", spoilt)
    with pytest.raises(PertokenError, match=r"log_probs is NaN or infinite at \[0, 0\]"):
        go(tmp_path / "a", tiny, method, save_every=1)
    kept = weights(tmp_path / "a" / "checkpoint-1")
    assert all(bool(values.isfinite().all()) for values in kept.values())


def test_an_infinite_gradient_stops_before_the_step(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pertoken.train._guard import GuardMixin

    plain = GuardMixin._compute_loss

    def steep(self: Any, model: Any, inputs: Any) -> Any:
        loss = plain(self, model, inputs)
        if self.state.global_step == 1:  # the loss stays as it is, its gradient does not
            loss = loss + (loss - loss.detach()) * torch.tensor(1e38) * 1e10
        return loss

    monkeypatch.setattr(GuardMixin, "_compute_loss", steep)
    with pytest.raises(PertokenError, match="the gradient of step 2 is NaN or infinite"):
        go(tmp_path / "a", tiny, save_every=1)
    assert (tmp_path / "a" / "checkpoint-1" / "whole").is_file()


def test_a_model_of_nan_cannot_be_sampled(tmp_path: Path, tiny: str) -> None:
    from transformers import AutoTokenizer

    from pertoken.testing import tiny_model

    model = tiny_model("llama", vocab_size=257, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    given = (model, AutoTokenizer.from_pretrained(tiny))
    with pytest.raises(PertokenError, match="probabilities are NaN or infinite"):
        go(tmp_path / "a", tiny, model=given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "grop"}, r"unknown method 'grop' \(did you mean 'grpo'"),
        ({"task": "arithmetics"}, r"no task named 'arithmetics' \(did you mean 'arithmetic'"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"group": 1}, "group must be 2 or more"),
        ({"batch": 6}, "6 completions are no multiple of group 4"),
        ({"iterations": 0}, "iterations must be 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"save_every": 0}, "save_every must be 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"beta": -1.0}, "beta must be 0 or more"),
        ({"token": (1.0, 1.1)}, "token bounds are ratios around 1"),
        ({"method": "gspo", "token": (0.8, 1.2)}, "gspo has no token gate"),
        ({"method": "grpo", "trajectory": (0.8, 1.2)}, "grpo has no trajectory gate"),
        ({"resume": True}, "there is no whole checkpoint in .*: leave --resume out"),
        ({"model": "smollm"}, "unknown model 'smollm'"),
    ],
)
def test_mistakes_are_said_before_the_first_step(
    tmp_path: Path, tiny: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PertokenError, match=message):
        go(tmp_path / "a", tiny, **options)
    assert not list(tmp_path.glob("a/*"))


def test_several_processes_are_refused(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PertokenError, match="runs in one process"):
        go(tmp_path / "a", tiny)


def test_the_folder_of_another_run_is_refused(
    tmp_path: Path, runs: dict[str, Run], tiny: str
) -> None:
    folder = runs["grpo"].folder
    before = (folder / "run.json").read_bytes()
    for options, message in (
        ({}, "holds a run at step 4: go on with --resume"),
        ({"resume": True}, "is at step 4 of 4 already"),
        ({"resume": True, "steps": 9, "learning_rate": 1.0}, "learning_rate 0.003, not 1.0"),
        ({"resume": True, "steps": 9, "seed": 1}, "seed 0, not 1"),
    ):
        with pytest.raises(PertokenError, match=message):
            go(folder, tiny, "grpo", **options)
    with pytest.raises(PertokenError, match="was run with method grpo, not gspo"):
        go(folder, tiny, "gspo", steps=9, resume=True)
    assert (folder / "run.json").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(PertokenError, match="is not empty and holds no run"):
        go(tmp_path, tiny)
    with pytest.raises(PertokenError, match="it is a file"):
        go(tmp_path / "notes.txt", tiny)


def test_a_checkpoint_that_is_not_whole_is_passed_over(tmp_path: Path) -> None:
    from pertoken.train._folder import claim, latest, mark_whole, write_run

    settings = {"steps": 9, "save_every": 1}
    write_run(tmp_path, {"settings": settings})
    for step in (1, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert latest(tmp_path) is None
    assert claim(tmp_path, settings, resume=False) is None  # nothing whole is lost by a new start
    (tmp_path / "checkpoint-3").mkdir()
    mark_whole(tmp_path, 3)
    (tmp_path / "checkpoint-4").mkdir()
    assert claim(tmp_path, {"steps": 12, "save_every": 2}, resume=True) == tmp_path / "checkpoint-3"
    assert not (tmp_path / "checkpoint-4").exists()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(PertokenError, match="can't read the settings"):
        claim(tmp_path, settings, resume=True)


def test_a_missing_extra_and_an_unknown_trl_are_named(
    tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_module("pertoken.train.run")
    for name in ("trl", "tensorboard"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            message = rf'{name} is not installed: pip install "pertoken\[rl\]"'
            with pytest.raises(PertokenError, match=message):
                go(tmp_path / "a", tiny, "grpo")
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(__version__="2.0.0"))
    with pytest.raises(PertokenError, match=r"knows TRL 1\.16 and later 1\.x, found 2\.0\.0"):
        go(tmp_path / "a", tiny, "grpo")
    assert not (tmp_path / "a").exists()
