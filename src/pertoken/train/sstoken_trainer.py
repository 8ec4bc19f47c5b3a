"""ssToken in TRL: `SSTokenSFT`, a mixin for `SFTTrainer` with four kinds of history.

    class Trainer(SSTokenSFT, SFTTrainer):
        pass

    Trainer(model, args=SFTConfig(...), train_dataset=data, history="base")

| history | the earlier state | cost |
|---|---|---|
| ``"base"`` | a frozen copy of the model as it was given | a second model, a forward per step |
| ``"precomputed"`` | the same, its log-probabilities taken before training | a pass over the data |
| ``"adapter_off"`` | the model without its PEFT adapter | a forward per step, no second model |
| ``"ema"`` | each step its weights become decay · its own + (1 - decay) · the model's | as base |

The moving average is kept in float32.
"""

from __future__ import annotations

import copy
import os
from typing import Any, Literal, get_args

import torch

from pertoken.errors import PertokenError
from pertoken.select import top_share
from pertoken.train._prompt_attention import Query, Watch, watching
from pertoken.train._weighed import WeighedSFT, dropped
from pertoken.train.sstoken import (
    Normalize,
    check_choice,
    check_word,
    kept_total,
    place,
    retrospective_excess_loss,
    ss_scores,
)

__all__ = ["SSTokenSFT"]

History = Literal["base", "precomputed", "adapter_off", "ema"]
HISTORY = "history_log_probs"
_FILE = "history.pt"


class SSTokenSFT(WeighedSFT):
    """A mixin for TRL's `SFTTrainer`: only the tokens that ssToken keeps are learned.

    keep, gamma, normalize: as in `sstoken_loss`; query, exclude_sink: as in `prompt_attention`.
    history: see the module. warmup: the share of training in which the attention alone selects,
    since REL is 0 before the model has moved; the authors' script means the first 10,000 of its
    50,000 examples. decay: of the moving average.

    The loss is the mean over the kept tokens of the whole accumulated batch; with keep=1 it is
    `SFTTrainer` to the bit. A row is one example; its prompt is what is not learned. Evaluation is
    TRL's own. Logged: ``sstoken/rel`` (mean REL, nats), ``sstoken/rel_kept``, ``sstoken/attention``
    and ``sstoken/place`` (0.5 where no part of the answers is preferred).

    When a run is resumed, give the trainer the model that the run began with, as the first time:
    that is its history. Options as of `TokenWeightedSFT` are refused, and a model whose attention
    can't be watched, before training.
    """

    _columns = (HISTORY,)

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *rest: Any,
        keep: float = 0.6,
        gamma: float = 0.5,
        history: History = "base",
        warmup: float = 0.2,
        decay: float = 0.99,
        normalize: Normalize = "minmax",
        query: Query = "token",
        exclude_sink: bool = False,
        **more: Any,
    ) -> None:
        check_choice(keep, normalize, gamma=gamma, warmup=warmup, decay=decay)
        check_word("history", history, get_args(History))
        check_word("query", query, get_args(Query))
        super().__init__(model, args, *rest, **more)
        self._keep, self._gamma, self._kind = keep, gamma, history
        self._warmup, self._decay = warmup, decay
        self._normalize, self._query, self._exclude_sink = normalize, query, exclude_sink
        Watch(self.model, -1)
        self._past: Any = None
        self._at = 0  # the step whose weights the moving average has last seen
        if history in ("base", "ema"):
            self._past = copy.deepcopy(self.model).requires_grad_(False).eval()
            if history == "ema":
                self._past.float()  # an average in half precision stands still
        elif history == "precomputed":
            self.train_dataset: Any = self._precomputed(self.train_dataset)
        elif not hasattr(self.model, "disable_adapter"):
            raise PertokenError(
                f'history "adapter_off" needs a PEFT model, not {type(self.model).__name__}: give '
                'peft_config, or take history="base"'
            )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss over the kept tokens; in evaluation over all."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        past = self._history(inputs)  # before the watch, which notes the first forward
        with watching(self.model) as self._watch:
            return super().compute_loss(
                model, {**inputs, HISTORY: past}, return_outputs, num_items_in_batch
            )

    def _weigh(self, inputs: dict[str, Any], output: Any) -> torch.Tensor:
        mask, real = output.label_mask, inputs["attention_mask"]
        rel = retrospective_excess_loss(output.log_probs, inputs[HISTORY][:, 1:], mask)
        prompt = (inputs["labels"] == -100) & (real != 0)
        attention = self._watch.prompt_shares(
            prompt, real, query=self._query, exclude_sink=self._exclude_sink
        )
        early = self.state.global_step < self._warmup * self.state.max_steps
        gamma = 0.0 if early else self._gamma
        scores = ss_scores(rel, attention, mask, gamma, normalize=self._normalize)
        kept = top_share(scores, self._keep, mask)
        if bool(kept.any()):
            logged = self._metrics["train"]
            logged["sstoken/rel"].append(rel[mask].mean().item())
            logged["sstoken/rel_kept"].append(rel[kept].mean().item())
            logged["sstoken/attention"].append(attention[mask].mean().item())
            logged["sstoken/place"].append(place(kept, mask).item())
        return kept

    def _total(self, inputs: dict[str, Any]) -> torch.Tensor:
        return kept_total(inputs["labels"][:, 1:] != -100, self._keep)

    def _history(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities of the earlier state, [batch, time], the first column unused."""
        if self._kind == "precomputed":
            if HISTORY not in inputs:
                raise dropped(HISTORY)
            found: torch.Tensor = inputs[HISTORY]
            return found
        if self._kind == "adapter_off":
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                return self._log_probs(self.model, inputs)
        if self._kind == "ema" and self.state.global_step != self._at:
            own = self.accelerator.unwrap_model(self.model).parameters()
            for old, new in zip(self._past.parameters(), own, strict=True):
                old.lerp_(new.detach().float(), 1 - self._decay)
            self._at = self.state.global_step
        return self._log_probs(self._past, inputs)

    @torch.no_grad()
    def _log_probs(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        was, given = model.training, {k: v for k, v in inputs.items() if k != HISTORY}
        model.eval()  # a history that drops out at random would be noise in the scores
        try:
            with self.accelerator.autocast():
                found: torch.Tensor = model(**given, fused_lm_head=True).log_probs
        finally:
            model.train(was)
        return torch.nn.functional.pad(found, (1, 0))

    def _precomputed(self, data: Any) -> Any:
        """The training data with the log-probabilities of the model as it is."""
        if not hasattr(data, "__len__"):
            raise PertokenError(
                'history "precomputed" needs a data set that can be read twice, not a stream: take '
                'history="base"'
            )
        found: list[list[float]] = []
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(data), size):
            rows = [data[place] for place in range(start, min(start + size, len(data)))]
            batch = self.data_collator([{**row} for row in rows])
            values = self._log_probs(self.model, self._prepare_inputs(batch))
            lengths = [len(row["input_ids"]) for row in rows]
            found += [own[:n].tolist() for own, n in zip(values, lengths, strict=True)]
        return data.add_column(HISTORY, found)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._kind == "ema":
            folder = f"checkpoint-{self.state.global_step}"
            place = os.path.join(self._get_output_dir(trial=trial), folder, _FILE)
            torch.save({"step": self._at, "weights": self._past.state_dict()}, place)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._kind != "ema" or checkpoint is None:
            return
        place = os.path.join(checkpoint, _FILE)
        if not os.path.exists(place):
            raise PertokenError(
                f"{checkpoint} holds no {_FILE}: it is of a run without history ema"
            )
        found = torch.load(place, map_location=self.accelerator.device, weights_only=True)
        self._past.load_state_dict(found["weights"])
        self._at = found["step"]
