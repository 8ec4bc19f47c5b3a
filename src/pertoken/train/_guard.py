"""What a run with TRL's GRPO trainer needs so that nothing goes wrong in silence.

`GuardMixin` sits in front of a `GRPOTrainer` and adds four things:

- a reward function that raises, returns another number of values or an infinite one stops the run
  with one line, before the step (TRL would turn an infinite advantage into the largest float);
- so do log-probabilities or a loss that are no numbers, whatever the objective;
- ``approx_kl`` is logged: the estimate r - 1 - log r of KL(old, new), r the ratio new over old,
  averaged over the tokens sampled from the old policy;
- a checkpoint between two uses of one generation batch holds that batch. TRL drops it and samples
  anew after a resume, so the next loss would be another one.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import torch

from pertoken._extras import need
from pertoken.errors import PertokenError
from pertoken.train.reducer import must_be_finite, widened

if TYPE_CHECKING:  # GRPOTrainer is behind the mixin in the class that is made
    _GRPOTrainer: Any
else:
    _GRPOTrainer = object

__all__ = ["Batch", "GuardMixin", "grpo_trainer"]

Batch = dict[str, torch.Tensor]
_SHOWN = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "rewards")


def grpo_trainer() -> Any:
    """TRL's `GRPOTrainer`; PertokenError where TRL is missing or of a version not known."""
    version = need("trl", "rl").__version__
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not (1, 16) <= found < (2, 0):
        raise PertokenError(
            f'pertoken knows TRL 1.16 and later 1.x, found {version}: pip install "pertoken[rl]"'
        )
    return need("trl.trainer.grpo_trainer", "rl").GRPOTrainer


class GuardMixin(_GRPOTrainer):
    """See the module. `batch` holds the micro-batches of the last step with their log_probs."""

    batch: list[Batch]

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        try:
            found = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        except PertokenError:
            raise
        except Exception as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())
            raise PertokenError(f"the rewards could not be computed ({told})") from error
        if bool(torch.isinf(found).any()):
            raise PertokenError(
                "a reward is infinite: rewards must be finite, or None for no answer"
            )
        self._rewards = found
        return found

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        weights = self.reward_weights.to(self._rewards.device)
        rewards = (self._rewards * weights).nansum(1)
        count = len(output["advantages"])  # this process's share of what was gathered
        first = count * self.accelerator.process_index
        output["rewards"] = rewards[first : first + count]
        return output

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._log_probs = found[0].detach()
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        must_be_finite(inputs["advantages"], "advantages")
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        keep = inputs["completion_mask"] != 0
        log_probs = torch.where(keep, widened(self._log_probs), 0.0)
        must_be_finite(log_probs, "log_probs")
        must_be_finite(loss[None], "loss")
        old = inputs.get("old_per_token_logps")
        old = log_probs if old is None else torch.where(keep, widened(old), 0.0)
        gap = log_probs - old
        sums = torch.stack([(torch.expm1(gap) - gap).sum(), keep.sum()])
        total, tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["approx_kl"].append(total / max(tokens, 1.0))
        if mode == "eval":
            return loss
        if self._step % self.args.gradient_accumulation_steps == 0:
            self.batch = []
        kept = {name: inputs[name] for name in _SHOWN if name in inputs}
        self.batch.append({**kept, "log_probs": log_probs, "old_log_probs": old})
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            return
        folder = os.path.join(
            self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}"
        )
        os.makedirs(folder, exist_ok=True)
        torch.save({"step": self._step, "batches": self._buffered_inputs}, self._generation(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not os.path.exists(self._generation(checkpoint)):
            return
        found = torch.load(
            self._generation(checkpoint), map_location=self.accelerator.device, weights_only=True
        )
        self._step, self._buffered_inputs = found["step"], found["batches"]

    def _generation(self, folder: str) -> str:
        return os.path.join(folder, f"generation_{self.accelerator.process_index}.pt")
