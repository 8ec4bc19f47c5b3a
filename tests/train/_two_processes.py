"""What each process of test_distributed runs: `accelerate launch … _two_processes.py FOLDER`."""

from __future__ import annotations

import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

LOSS_TYPES = ("grpo", "dapo", "dr_grpo")


def fixed_batch() -> dict[str, torch.Tensor]:
    """Eight rows as TRL gives them to the loss."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(6) < torch.tensor([6, 3, 1, 5, 2, 6, 4, 4])[:, None]).long()
    return {
        "prompt_ids": torch.randint(3, 20, (8, 3), generator=generator),
        "prompt_mask": torch.ones(8, 3, dtype=torch.long),
        "completion_ids": torch.randint(3, 20, (8, 6), generator=generator),
        "completion_mask": mask,
        "advantages": torch.randn(8, generator=generator),
        "old_per_token_logps": -3 + 0.3 * torch.randn(8, 6, generator=generator),
        "num_items_in_batch": mask.sum(),
    }


def trainer(folder: Path, processes: int) -> Any:
    """The trainer of test_trl, with the eight rows of a step shared between the processes."""
    made = runpy.run_path(str(Path(__file__).with_name("test_trl.py")))["trainer"]
    rows = 8 // processes  # in float32: TRL's default, bfloat16, would hide a wrong gradient
    return made(folder, per_device_train_batch_size=rows, num_iterations=2, max_steps=2, bf16=False)


def gradients(folder: Path, processes: int) -> dict[str, dict[str, Any]]:
    """Loss of this process's rows of the fixed batch, and the gradient that DDP leaves."""
    made = trainer(folder, processes)
    made.current_gradient_accumulation_steps = 1
    rows = 8 // processes
    first = rows * made.accelerator.process_index
    own = {
        name: value if value.dim() == 0 else value[first : first + rows]
        for name, value in fixed_batch().items()
    }
    model = made.accelerator.prepare(made.model).train()
    found = {}
    for made.loss_type in LOSS_TYPES:
        model.zero_grad()
        loss = made._compute_loss(model, own)
        made.accelerator.backward(loss)
        grads = [each.grad.clone() for each in model.parameters() if each.grad is not None]
        found[made.loss_type] = {"loss": loss.detach(), "gradient": grads}
    return found


def main(out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = dict(gradients(Path(folder), processes=2))
        made = trainer(Path(folder), processes=2)
        found["processes"] = made.accelerator.num_processes
        found["before"] = [each.detach().clone() for each in made.model.parameters()]
        made.train()
        found["after"] = [each.detach().clone() for each in made.model.parameters()]
        found["steps"] = made.state.global_step
        torch.save(found, out / f"rank-{made.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
