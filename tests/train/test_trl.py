"""`FiberPOTrainer` on a tiny model: the parent's loss at open gates, resume, what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pertoken.errors import PertokenError
from pertoken.train.trl import FiberPOMixin

WORDS = [chr(ord("a") + i) for i in range(20)]


@pytest.fixture
def trl() -> Any:
    return pytest.importorskip("trl", reason="TRL is not installed")


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *WORDS]
    inner = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(text.count("a") - text.count("b")) + len(text) / 100 for text in completions]


def trainer(
    folder: Path, *, parent: bool = False, reward: Callable[..., Any] = reward, **more: Any
) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from pertoken.testing import tiny_model
    from pertoken.train import FiberPOTrainer

    gates = {key: more.pop(key) for key in ("trajectory", "token", "variant") if key in more}
    options: dict[str, Any] = {
        "loss_type": "grpo",
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "seed": 7,
        "disable_tqdm": True,
        **more,
    }
    reader = tokenizer()
    model = tiny_model("llama", vocab_size=len(reader), dtype=torch.float32)
    model.generation_config.eos_token_id = reader.eos_token_id
    model.generation_config.pad_token_id = reader.pad_token_id
    data = Dataset.from_dict({"prompt": ["a b c", "d e", "f g h a", "b b"] * 4})
    made = GRPOTrainer if parent else FiberPOTrainer
    if not parent:
        gates.setdefault("trajectory", (0.9, 1.1))
    return made(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(folder), **options),
        train_dataset=data,
        processing_class=reader,
        **gates,
    )


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(6) < torch.tensor([[6], [3], [1], [5]])).long()
    return {
        "prompt_ids": torch.randint(3, 20, (4, 3), generator=generator),
        "prompt_mask": torch.ones(4, 3, dtype=torch.long),
        "completion_ids": torch.randint(3, 20, (4, 6), generator=generator),
        "completion_mask": mask,
        "advantages": torch.randn(4, generator=generator),
        "old_per_token_logps": -3 + 0.3 * torch.randn(4, 6, generator=generator),
        "ref_per_token_logps": -3 + 0.3 * torch.randn(4, 6, generator=generator),
        "num_items_in_batch": mask.sum(),
    }


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_open_gates_are_the_parent_without_clipping(
    trl: Any, tmp_path: Path, loss_type: str, beta: float
) -> None:
    open_gates = (0.0, float("inf"))
    found = []
    for parent in (False, True):
        clip = {"epsilon": 1.0, "epsilon_high": 1e9} if parent else {}
        gates = {} if parent else {"trajectory": open_gates, "token": open_gates}
        made = trainer(tmp_path, parent=parent, loss_type=loss_type, **clip, **gates)
        made.beta = beta  # set late: TRL would load a reference model by name
        made.model.train()
        made.current_gradient_accumulation_steps = 1
        loss = made._compute_loss(made.model, inputs())
        loss.backward()
        grads = [p.grad.clone() for p in made.model.parameters() if p.grad is not None]
        found.append((loss.detach(), grads))
    (one, mine), (other, theirs) = found
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_it_trains_and_logs_every_level(trl: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path, num_iterations=2)
    made.train()
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(logged) == 4
    for level in ("token", "trajectory"):
        for what in ("closed_low", "closed_high", "drift_low", "drift_high"):
            assert all(f"fiberpo/{level}/{what}" in entry for entry in logged)
    assert max(entry["fiberpo/token/drift_high"] for entry in logged) > 0


@pytest.mark.parametrize("iterations", [2, 4], ids=["between batches", "within a batch"])
def test_a_run_resumes_with_the_identical_next_loss(
    trl: Any, tmp_path: Path, iterations: int
) -> None:
    def losses(made: Any) -> list[float]:
        return [entry["loss"] for entry in made.state.log_history if "loss" in entry]

    options: dict[str, Any] = {
        "num_iterations": iterations,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    again = trainer(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(again)[-2:] == losses(whole)[-2:]
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def fail(**_: Any) -> Any:
    raise KeyError("no such column")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (fail, r"the rewards could not be computed \(KeyError: 'no such column'\)"),
        (lambda **_: [1.0], "returned 1 rewards, but 4 were expected"),
        (lambda **_: 1.0, "'float' object is not iterable"),
        (lambda **_: [0.0, 1.0, 2.0, float("inf")], "a reward is infinite"),
    ],
)
def test_bad_rewards_stop_before_the_step(
    trl: Any, tmp_path: Path, bad: Callable[..., Any], message: str
) -> None:
    calls: list[int] = []

    def good_once(completions: list[str], **more: Any) -> Any:
        calls.append(1)
        return reward(completions) if len(calls) == 1 else bad(completions=completions, **more)

    made = trainer(tmp_path, reward=good_once, save_strategy="steps", save_steps=1)
    with pytest.raises(PertokenError, match=message):
        made.train()
    kept = torch.load(tmp_path / "checkpoint-1" / "optimizer.pt", weights_only=True)
    assert kept["state"][0]["step"] == 1
    assert made.state.global_step == 1


def test_advantages_that_are_no_numbers_are_refused(trl: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path)
    for value in (float("nan"), float("inf")):
        with pytest.raises(PertokenError, match="advantages is NaN or infinite"):
            made._compute_loss(made.model, {**inputs(), "advantages": torch.full((4,), value)})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"loss_type": "vespo"}, "does not support loss_type='vespo'"),
        ({"loss_type": "cispo"}, "does not support loss_type='cispo'"),
        ({"epsilon": 0.3}, r"epsilon=0.3: leave it at 0.2; the token gate is token=\(low, high\)"),
        ({"epsilon_high": 0.28}, "epsilon_high=0.28"),
        ({"delta": 1.5}, "delta=1.5"),
        ({"importance_sampling_level": "sequence"}, "FiberPO has both levels"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile=0.2"),
        ({"entropy_coef": 0.01}, "entropy_coef=0.01"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold=0.5"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True"),
        (
            {"use_vllm": True, "vllm_importance_sampling_correction": True},
            "vllm_importance_sampling_correction=True",
        ),
        ({"trajectory": (1.0, 1.1)}, "trajectory bounds are ratios around 1"),
    ],
)
def test_what_is_not_carried_is_refused_by_name(option: dict[str, Any], message: str) -> None:
    gates = {"trajectory": option.pop("trajectory", (0.9, 1.1))}
    args = SimpleNamespace(**{"loss_type": "grpo", "use_vllm": False, **option})
    with pytest.raises(PertokenError, match=message):
        FiberPOMixin("no model is loaded", reward, args, **gates)


def test_more_levels_and_tools_are_refused_by_name() -> None:
    for more, message in (
        ({"group": (0.9, 1.1)}, "two levels, no group"),
        ({"tools": [print]}, "does not carry tools"),
    ):
        with pytest.raises(PertokenError, match=message):
            FiberPOMixin("no model is loaded", reward, trajectory=(0.9, 1.1), **more)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_defaults_of_the_installed_trl_are_carried(
    trl: Any, tmp_path: Path, loss_type: str
) -> None:
    assert trainer(tmp_path, loss_type=loss_type).loss_type == loss_type


def test_tool_masks_and_sampler_weights_are_refused(trl: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path)
    for name in ("tool_mask", "importance_sampling_ratio", "pixel_values"):
        with pytest.raises(PertokenError, match=f"does not carry {name}"):
            made._compute_loss(made.model, {**inputs(), name: torch.ones(4, 6)})


def test_a_micro_batch_of_truncated_texts_alone_adds_nothing(trl: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path)
    given = inputs()
    given["completion_mask"] = torch.zeros_like(given["completion_mask"])
    loss = made._compute_loss(made.model, given)
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_micro_batch_without_tokens_gathers_what_the_others_do(
    trl: Any, tmp_path: Path, beta: float
) -> None:
    """Else the processes wait for each other without end."""
    made, calls = trainer(tmp_path), []
    made.beta = beta  # as an option TRL would load the reference by the model's name
    made._log = lambda mode, name, value, largest=False: calls.append((mode, name, largest))
    given = {**inputs(), "ref_per_token_logps": torch.full((4, 6), -3.0)}
    made._compute_loss(made.model, given)
    own = list(calls)
    calls.clear()
    made._compute_loss(made.model, {**given, "completion_mask": 0 * given["completion_mask"]})
    assert calls == own
    assert len(own) == 9 + (beta > 0)


def test_without_trl_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "pertoken.train.trl", raising=False)
    from importlib import import_module

    module = import_module("pertoken.train.trl")
    with pytest.raises(PertokenError, match=r'trl is not installed: pip install "pertoken\[rl\]"'):
        module.FiberPOTrainer  # noqa: B018


def test_a_trl_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(__version__="2.0.0"))
    monkeypatch.delitem(sys.modules, "pertoken.train.trl", raising=False)
    module = import_module("pertoken.train.trl")
    with pytest.raises(PertokenError, match=r"found 2\.0\.0"):
        module.FiberPOTrainer  # noqa: B018


def test_importing_the_family_does_not_import_trl() -> None:
    import subprocess

    code = (
        "import sys, pertoken.train, pertoken.train.fiberpo, pertoken.train.verl; "
        "sys.exit('trl' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
