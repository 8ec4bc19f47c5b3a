"""FiberPO in TRL: `FiberPOTrainer`, a `GRPOTrainer` with another loss.

    from pertoken.train import FiberPOTrainer
    FiberPOTrainer(model, reward, args=GRPOConfig(...), train_dataset=data, trajectory=(0.99, 1.01))

Two levels only: TRL shuffles a generation batch before it cuts it into micro-batches, so the
members of a prompt group are not together when the loss is taken. Options of `GRPOConfig` that
change the loss and are not carried are refused by name. Needs the extra ``rl``
(``pip install "pertoken[rl]"``), TRL 1.16 or later of version 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pertoken.errors import PertokenError
from pertoken.train._guard import GuardMixin, grpo_trainer
from pertoken.train._inputs import log_bounds
from pertoken.train.fiberpo import Bounds, Variant, fiberpo_loss
from pertoken.train.reducer import reduce

if TYPE_CHECKING:  # GRPOTrainer is behind the mixin in the class that is made
    _GRPOTrainer: Any
    FiberPOTrainer: Any
    """TRL's `GRPOTrainer` with the loss of FiberPO: `FiberPOMixin` over it, see there."""
else:
    _GRPOTrainer = object

__all__ = ["FiberPOMixin", "FiberPOTrainer"]

# Options of GRPOConfig that change the loss, with the only value that is carried.
_CARRIED = {
    "delta": None,
    "entropy_coef": 0.0,
    "epsilon": 0.2,
    "epsilon_high": None,
    "importance_sampling_level": "token",
    "off_policy_mask_threshold": None,
    "top_entropy_quantile": 1.0,
    "use_adaptive_entropy": False,
    "use_liger_kernel": False,
}
# What `fiberpo_loss` reports of the two levels, in its order.
_STATS = tuple(
    f"{level}/{what}"
    for level in ("trajectory", "token")
    for what in ("closed_low", "closed_high", "drift_low", "drift_high")
)
_LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "bnpo")
_INSTEAD = {
    "epsilon": "the token gate is token=(low, high)",
    "epsilon_high": "the token gate is token=(low, high)",
    "importance_sampling_level": "FiberPO has both levels",
}


class FiberPOMixin(_GRPOTrainer):
    """What `FiberPOTrainer` has over `GRPOTrainer`: the loss of FiberPO.

    trajectory, token, variant: as in `pertoken.train.fiberpo_loss`; everything else as in
    `GRPOTrainer`. ``args.loss_type`` says how tokens are summed up and no more: "grpo" is the
    mean over sequences, the paper's; "dapo" (TRL's default), "dr_grpo" and "bnpo" as in TRL.
    ``args.beta`` adds TRL's KL term. With ``num_iterations=1`` and one step per generation the
    policy is the sampling policy and all objectives are one.

    The class itself is put together when it is first asked for, since only then TRL is needed.

    Logged besides the metrics of TRL: ``fiberpo/<level>/closed_low``, ``closed_high``,
    ``drift_low``, ``drift_high``, and ``approx_kl`` between the sampling policy and this one.
    PertokenError for what is not carried, before anything is loaded, and before the step for
    rewards, advantages or log-probabilities that cannot be trained on. A checkpoint may lie
    anywhere: one between two uses of a generation batch holds that batch.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "fiberpo"]

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        *rest: Any,
        trajectory: Bounds,
        token: Bounds = (0.8, 1.25),
        variant: Variant = "paper",
        **more: Any,
    ) -> None:
        log_bounds(trajectory, "trajectory")
        log_bounds(token, "token")
        _refuse(args, more)
        self._gates: dict[str, Any] = {
            "trajectory": trajectory,
            "token": token,
            "variant": variant,
        }
        super().__init__(model, reward_funcs, args, *rest, **more)
        if self.aux_loss_enabled:
            raise PertokenError("FiberPOTrainer does not carry router_aux_loss_coef")

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        for name in ("tool_mask", "importance_sampling_ratio", "pixel_values"):
            if inputs.get(name) is not None:
                raise PertokenError(f"FiberPOTrainer does not carry {name}")
        mask = inputs["completion_mask"]
        log_probs, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            mask.size(1),
            compute_entropy=True,
        )
        mode = "train" if self.model.training else "eval"
        if not bool(mask.any()):  # truncated completions alone, with mask_truncated_completions
            return self._nothing(mode, log_probs)
        old = inputs.get("old_per_token_logps")
        old = log_probs.detach() if old is None else old
        how, total, share = self._reduction(inputs, mask)
        loss, stats = fiberpo_loss(
            log_probs, old, inputs["advantages"], mask, reduction=how, total=total, **self._gates
        )
        if self.beta != 0.0:
            gap = inputs["ref_per_token_logps"] - log_probs
            kl = torch.exp(gap) - gap - 1
            if self.args.use_bias_correction_kl:
                kl = kl * torch.exp(log_probs - old)
            loss = loss + self.beta * reduce(kl, mask, how, total)
            self._log(mode, "kl", reduce(kl.detach(), mask))
        self._log(mode, "entropy", reduce(entropies.detach(), mask))
        for name, value in stats.items():
            self._log(mode, f"fiberpo/{name}", value, largest="/drift_" in name)
        return loss * share

    def _reduction(
        self, inputs: dict[str, Any], mask: torch.Tensor
    ) -> tuple[str, float | torch.Tensor | None, float]:
        """The reduction of TRL's `loss_type`, its total, and this micro-batch's share."""
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        if self.loss_type == "grpo":
            return "sequence_mean", len(mask), 1 / steps
        if self.loss_type == "bnpo":
            return "token_mean", None, 1 / steps
        if self.loss_type == "dr_grpo":
            return "constant", len(mask) * self.max_completion_length, 1 / steps
        # The count spans the generation batch; one step sees its share of it.
        total = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            total = total * steps / self.args.steps_per_generation
        return "token_mean", total, 1.0

    def _nothing(self, mode: str, log_probs: torch.Tensor) -> torch.Tensor:
        """The loss where no token counts: 0, with a gradient.

        It logs what every other does: the other processes wait for what is gathered.
        """
        zero = log_probs.new_zeros(())
        if self.beta != 0.0:
            self._log(mode, "kl", zero)
        self._log(mode, "entropy", zero)
        for name in _STATS:
            self._log(mode, f"fiberpo/{name}", zero, largest="/drift_" in name)
        return log_probs.sum() * 0.0

    def _log(self, mode: str, name: str, value: torch.Tensor, largest: bool = False) -> None:
        gathered = self.accelerator.gather(value.float())
        self._metrics[mode][name].append((gathered.max() if largest else gathered.mean()).item())


def _refuse(args: Any, more: dict[str, Any]) -> None:
    """Raise PertokenError for an option that would be ignored."""
    for name in ("group", "domain", "group_ids", "domain_ids"):
        if name in more:
            raise PertokenError(
                f"FiberPOTrainer has two levels, no {name}: TRL shuffles groups apart before the "
                "loss is taken; pertoken.train.fiberpo_loss has it"
            )
    for name in ("tools", "environment_factory"):
        if more.get(name):
            raise PertokenError(f"FiberPOTrainer does not carry {name}: tool tokens are masked out")
    if args is None:
        return
    if args.loss_type not in _LOSS_TYPES:
        raise PertokenError(
            f"FiberPOTrainer does not support loss_type={args.loss_type!r}: it says how tokens are "
            f"summed up here, {', '.join(_LOSS_TYPES)}"
        )
    for name, value in _CARRIED.items():
        given = getattr(args, name, value)
        if given != value:
            instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
            raise PertokenError(
                f"FiberPOTrainer does not support {name}={given!r}: leave it at {value!r}{instead}"
            )
    if args.use_vllm and args.vllm_importance_sampling_correction:
        raise PertokenError(
            "FiberPOTrainer does not support vllm_importance_sampling_correction=True: set it to "
            "False with use_vllm"
        )


def __getattr__(name: str) -> Any:
    if name != "FiberPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    bases = (GuardMixin, FiberPOMixin, grpo_trainer())
    made = type(name, bases, {"__module__": __name__, "__doc__": FiberPOMixin.__doc__})
    globals()[name] = made
    return made
