"""Critical-token DPO (cDPO): preference training that blames the critical tokens of a wrong answer.

DPO pushes down every token of the rejected answer alike. Here each counts by how critical it is,
1 - s_t of `contrastive_scores` (arXiv 2411.19943, section 3.3); the chosen answer counts in full:

    -log σ(β [Σ_t Δ_t(chosen) - Σ_t (1 - s_t) Δ_t(rejected)]),   Δ = log π - log π_ref

That is ``reduction="sequence"``, our reading of the abstract. The authors' code does otherwise: it
takes -log σ(β [Δ_t(chosen) - (1 - s_t) Δ_t(rejected)]) at every position, which pairs token t of
one answer with token t of the other, and means over all positions of the padded batch, where each
empty one adds log 2. That is ``reduction="position"``.

Elsewhere "cDPO" is conservative DPO, with smoothed labels: another method.

    from pertoken.train import CDPOTrainer
    CDPOTrainer(model, args=DPOConfig(...), train_dataset=pairs, positive=one, negative=other)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch

from pertoken._extras import need
from pertoken.errors import PertokenError
from pertoken.train._weighed import refuse
from pertoken.train.contrast import scored
from pertoken.train.reducer import must_be_finite, widened
from pertoken.train.token_weights import TokenWeightedDPO

if TYPE_CHECKING:
    CDPOTrainer: Any
    """TRL's `DPOTrainer` that blames critical tokens: `CDPOMixin` over it, see there."""

__all__ = ["CDPOMixin", "CDPOTrainer", "tdpo_loss", "token_dpo_loss"]

Reduction = Literal["sequence", "position"]
Stats = dict[str, torch.Tensor]

# Options of DPOConfig that reduction="position" replaces, with the only value that is carried.
_BY_POSITION = {
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "label_smoothing": 0.0,
    "precompute_ref_log_probs": False,
}


def token_dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    chosen_mask: torch.Tensor,
    rejected_mask: torch.Tensor,
    *,
    rejected_weights: torch.Tensor | None = None,
    chosen_weights: torch.Tensor | None = None,
    beta: float = 0.1,
    reduction: Reduction = "sequence",
) -> tuple[torch.Tensor, Stats]:
    """The DPO loss of a batch of pairs with a weight per token.

    Log-probabilities of the answers' tokens under policy and reference, masks (true where a token
    counts) and weights are [batch, time]; the two answers may be padded to different widths, but
    not with "position". Weights of None are 1, and then "sequence" is TRL's sigmoid loss. beta: the
    paper's 0.1. reduction: see the module. Nothing under a mask is read.

    Gives the mean loss and, without gradient, chosen and rejected rewards (unweighted, as the
    authors log them) and the share of pairs whose chosen one is the higher, each [] in β nats.
    PertokenError for shapes that differ, a mask that hides an answer, NaN or infinity.

    >>> zeros, ones = torch.zeros(1, 2), torch.ones(1, 2)
    >>> moved = torch.tensor([[0.0, 1.0]])
    >>> blame = torch.tensor([[1.0, 0.0]])  # the token that moved is not to blame
    >>> loss, _ = token_dpo_loss(zeros, moved, zeros, zeros, ones, ones, rejected_weights=blame)
    >>> round(loss.item(), 4)  # log 2: as if nothing had moved
    0.6931
    """
    if reduction not in get_args(Reduction):
        raise PertokenError(f'reduction must be "sequence" or "position", got {reduction!r}')
    chosen = _log_ratio(policy_chosen, ref_chosen, chosen_mask, "chosen")
    rejected = _log_ratio(policy_rejected, ref_rejected, rejected_mask, "rejected")
    if len(chosen) != len(rejected):
        raise PertokenError(f"{len(chosen)} chosen and {len(rejected)} rejected answers")
    sides = [
        each if weights is None else each * _weights(weights, mask)
        for each, weights, mask in (
            (chosen, chosen_weights, chosen_mask),
            (rejected, rejected_weights, rejected_mask),
        )
    ]
    if reduction == "sequence":
        margins = sides[0].sum(1) - sides[1].sum(1)
    elif chosen.shape == rejected.shape:
        margins = sides[0] - sides[1]
    else:
        raise PertokenError(
            f'reduction "position" pairs the tokens of both answers: {list(chosen.shape)} and '
            f"{list(rejected.shape)} must be one shape"
        )
    loss = -torch.nn.functional.logsigmoid(beta * margins).mean()
    return loss, _stats(chosen, rejected, beta)


def tdpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    chosen_mask: torch.Tensor,
    rejected_mask: torch.Tensor,
    chosen_kl: torch.Tensor,
    rejected_kl: torch.Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.1,
) -> tuple[torch.Tensor, Stats]:
    """Token-level DPO (TDPO2, arXiv 2404.11999, eq. 17), a baseline: DPO with a term of KL.

        -log σ(β [Σ Δ(chosen) - Σ Δ(rejected) - α (Σ KL(rejected) - sg(Σ KL(chosen)))])

    kl: [batch, time], KL(π_ref | π) of the whole next-token distribution at each token of the
    answer, with gradient; the rest as of `token_dpo_loss`. alpha: its authors' 0.5.

    >>> zeros, ones = torch.zeros(1, 2), torch.ones(1, 2)
    >>> loss, _ = tdpo_loss(zeros, zeros, zeros, zeros, ones, ones, zeros, zeros)
    >>> round(loss.item(), 4)
    0.6931
    """
    chosen = _log_ratio(policy_chosen, ref_chosen, chosen_mask, "chosen")
    rejected = _log_ratio(policy_rejected, ref_rejected, rejected_mask, "rejected")
    drift = torch.where(rejected_mask.bool(), widened(rejected_kl), 0.0).sum(1)
    drift = drift - torch.where(chosen_mask.bool(), widened(chosen_kl), 0.0).sum(1).detach()
    margins = chosen.sum(1) - rejected.sum(1) - alpha * drift
    loss = -torch.nn.functional.logsigmoid(beta * margins).mean()
    return loss, _stats(chosen, rejected, beta)


def _stats(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> Stats:
    """Rewards of both sides in β nats, and how often the chosen one's is higher."""
    one, other = (beta * each.detach().sum(1) for each in (chosen, rejected))
    return {
        "rewards/chosen": one.mean(),
        "rewards/rejected": other.mean(),
        "rewards/accuracies": (one > other).to(one.dtype).mean(),
    }


def _log_ratio(
    policy: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor, name: str
) -> torch.Tensor:
    """log π - log π_ref of an answer's tokens, 0 under the mask."""
    if not policy.shape == reference.shape == mask.shape or mask.dim() != 2:
        raise PertokenError(
            f"policy, reference and mask of the {name} answers must share the shape [batch, time], "
            f"got {list(policy.shape)}, {list(reference.shape)} and {list(mask.shape)}"
        )
    if not bool(mask.bool().any(1).all()):
        raise PertokenError(f"the mask hides a whole {name} answer: nothing to learn of that pair")
    found = torch.where(mask.bool(), widened(policy) - widened(reference.detach()), 0.0)
    must_be_finite(found.detach(), f"log-probabilities of the {name} answers")
    return found


def _weights(weights: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if weights.shape != mask.shape:
        raise PertokenError(f"weights {list(weights.shape)} for tokens {list(mask.shape)}")
    return torch.where(mask.bool(), widened(weights.detach()), 0.0)


class CDPOMixin(TokenWeightedDPO):
    """What `CDPOTrainer` has over TRL's `DPOTrainer`: weights of critical tokens.

    positive, negative: the two fine-tuned copies (`contrast_data` chooses what they learn), with
    the model's tokens; they are read once, before training, on the very ids that are trained on.
    contrast: β of `contrastive_scores`, not to be confused with DPO's ``args.beta``. only_rejected:
    chosen tokens count 1, as in the paper's runs; else they count s_t. reduction: see the module;
    "position" takes the place of TRL's objective in training, "sequence" works with every one of
    them; evaluation is TRL's own, unweighted. Micro-batches are one batch with "sequence"; with
    "position", a mean over the padded batch, they are so only where all are as wide.

    With positive = negative = None the training data's own `rejected_weights` (and
    `chosen_weights`) are taken, see `TokenWeightedDPO`; with weights of 1 "sequence" is
    `DPOTrainer` to the bit. Logged besides TRL's metrics: ``cdpo/weight``, the mean weight of the
    rejected tokens. PertokenError for one model without the other, models of other tokens, and with
    "position" for options of `DPOConfig` that it does not carry.

    The class itself is put together when it is first asked for, since only then TRL is needed.
    """

    _tag_names: ClassVar[list[str]] = ["trl", "cdpo"]

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        *rest: Any,
        positive: Any = None,
        negative: Any = None,
        contrast: float = 1.0,
        only_rejected: bool = True,
        reduction: Reduction = "sequence",
        **more: Any,
    ) -> None:
        if reduction not in get_args(Reduction):
            raise PertokenError(f'reduction must be "sequence" or "position", got {reduction!r}')
        if (positive is None) != (negative is None):
            missing = "positive" if positive is None else "negative"
            raise PertokenError(f"the {missing} model is missing: the scores compare the two")
        if positive is not None:
            sizes = [_tokens(one) for one in (model, positive, negative) if hasattr(one, "config")]
            if len(set(sizes)) > 1:
                raise PertokenError(
                    f"model, positive and negative must have the same tokens, they have {sizes}"
                )
        if reduction == "position":
            refuse(f'reduction "position" of {type(self).__name__}', args, more, _BY_POSITION)
        self._pair = None if positive is None else (positive, negative)
        self._contrast, self._only_rejected = contrast, only_rejected
        self._how: Reduction = reduction
        super().__init__(model, ref_model, args, *rest, **more)
        if reduction == "position" and self.aux_loss_enabled:
            raise PertokenError('reduction "position" does not carry router_aux_loss_coef')

    def _read_from(self, dataset: Any) -> Any:
        return super()._read_from(dataset) if self._pair is None else {}

    def _with_weights(self, dataset: Any, sources: Any, kept: slice) -> Any:
        if self._pair is not None:
            for side in ("rejected",) if self._only_rejected else ("chosen", "rejected"):
                weights = self._critical(self._pair, dataset, side, kept)
                dataset = dataset.add_column(f"{side}_weights", weights)
                sources = {**sources, side: f"{side}_weights"}
            self._pair = None  # their memory is free for the training
        return super()._with_weights(dataset, sources, kept)

    def _critical(
        self, pair: tuple[Any, Any], dataset: Any, side: str, kept: slice
    ) -> list[list[float]]:
        """The weights of each answer of a side, of what stays of it; 1 for what is cut away.

        Nothing predicts the first token of a row: it has no score, and counts in no loss.
        """
        texts, rows = [], []
        for row in dataset:
            prompt, ids = len(row["prompt_ids"]), [*row["prompt_ids"], *row[f"{side}_ids"]]
            start = range(len(ids))[kept].start
            first = max(prompt, start + 1)
            texts.append((len(ids), prompt, first))
            rows.append((ids[kept], first - start))
        weights = []
        for (length, prompt, first), (scores, _) in zip(
            texts, scored(*pair, rows, self._contrast), strict=True
        ):
            own = [1 - one for one in scores] if side == "rejected" else scores
            whole = [*[1.0] * first, *own]
            weights.append([*whole, *[1.0] * length][prompt:length])
        return weights

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        mask = inputs["completion_mask"][:, 1:]
        weights = inputs.get("token_weights")
        if weights is not None and self.model.training:
            own = weights[:, 1:].chunk(2)[1][mask.chunk(2)[1] != 0].mean()
            gathered = self.accelerator.gather_for_metrics(own.to(self.accelerator.device))
            self._metrics["train"]["cdpo/weight"].append(gathered.mean().item())
        if self._how == "sequence" or not self.model.training:
            return super()._compute_loss(model, inputs, return_outputs)
        return self._by_position(model, inputs, return_outputs)

    def _by_position(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """TRL's forwards and metrics, with the loss of the authors' code in place of its own."""
        seen: list[torch.Tensor] = []

        def note(_: Any, __: Any, output: Any) -> None:
            if getattr(output, "log_probs", None) is not None:
                seen.append(output.log_probs)

        weighted = self.accelerator.unwrap_model(model)
        models = {id(one): one for one in (weighted, self.ref_model) if one is not None}
        hooks = [one.register_forward_hook(note) for one in models.values()]
        try:
            found = super()._compute_loss(model, inputs, return_outputs)
        finally:
            for hook in hooks:
                hook.remove()
        # Unweighted: these hooks are before those of the weights.
        (chosen, rejected), (ref_chosen, ref_rejected) = (each.chunk(2) for each in seen)
        chosen_mask, rejected_mask = inputs["completion_mask"][:, 1:].chunk(2)
        chosen_weights, rejected_weights = inputs["token_weights"][:, 1:].chunk(2)
        loss, _ = token_dpo_loss(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            chosen_mask,
            rejected_mask,
            rejected_weights=rejected_weights,
            chosen_weights=chosen_weights,
            beta=self.beta,
            reduction="position",
        )
        return (loss, found[1]) if return_outputs else loss


def _tokens(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def __getattr__(name: str) -> Any:
    if name != "CDPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    bases = (CDPOMixin, need("trl", "rl").DPOTrainer)
    made = type(name, bases, {"__module__": __name__, "__doc__": CDPOMixin.__doc__})
    globals()[name] = made
    return made
