"""`FiberPOTrainer` under `accelerate launch`: two processes are one."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

SCRIPT = Path(__file__).with_name("_two_processes.py")


def launched(out: Path) -> list[dict[str, Any]]:
    """What the script saved in each of two processes.

    On CPUs `accelerate launch --cpu` starts several processes through MPI only, and a single one
    without a word where there is no MPI. --multi_gpu hands over to torchrun, which needs no GPU:
    the script asks for CPUs, so the processes talk through gloo.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes=2", "--num_machines=1", "--mixed_precision=no"]
    command += ["--dynamo_backend=no", "--main_process_port=0", str(SCRIPT), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(path, weights_only=True) for path in sorted(out.iterdir())]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    """Same weights on both ranks after real steps; the gradient of one process on one batch.

    The batch of eight rows is given, since ranks sample with generators of their own: each rank
    takes four rows, and DDP averages the gradients. That is the whole batch's for the reductions
    whose divisor TRL takes over all processes (dapo) or that count equal shares of rows (grpo,
    dr_grpo). ``bnpo`` divides by the tokens of each rank and is left out.
    """
    first, second = launched(tmp_path)
    assert (first["processes"], second["processes"]) == (2, 2)
    assert first["steps"] == second["steps"] == 2
    pairs = list(zip(first["after"], second["after"], strict=True))
    assert all(torch.equal(one, two) for one, two in pairs)
    assert not all(map(torch.equal, first["before"], first["after"]))

    alone = runpy.run_path(str(SCRIPT))["gradients"](tmp_path / "alone", processes=1)
    for loss_type, whole in alone.items():
        mine, theirs = first[loss_type], second[loss_type]
        mean = (mine["loss"] + theirs["loss"]) / 2
        torch.testing.assert_close(mean, whole["loss"], rtol=1e-5, atol=1e-7)
        for one, two, all_rows in zip(
            mine["gradient"], theirs["gradient"], whole["gradient"], strict=True
        ):
            assert torch.equal(one, two)
            torch.testing.assert_close(one, all_rows, rtol=1e-5, atol=1e-7)
