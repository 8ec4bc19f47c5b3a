"""Masked thought: fine-tuning on worked answers whose own tokens are partly hidden in the input.

In each step a share of the answer's *input* tokens is replaced by a mask token, or by a random one.
The targets stay what they were, those of hidden tokens too: it is noise on the input, no masked
language model. The question is never touched. The share rises in a line from 0 to its largest over
the first two thirds of training. A step of reasoning can then lean less on the token just before
it, and has to look at the question and at earlier steps (arXiv 2403.02178, section 3).

    class Trainer(MaskedThought, SFTTrainer):
        pass

    Trainer(model, args=SFTConfig(...), train_dataset=data, rate=0.4, mask_id=add_mask_token(...))

The authors' code replaces by random tokens for GSM8K (rate 0.4) and by a new mask token for their
other data (0.4, and 0.2 for MATH, MetaMath and MathInstruct); both are here (`noise`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from pertoken.errors import PertokenError

if TYPE_CHECKING:  # a Trainer of transformers or TRL is behind the mixin in the class that is made
    _Trainer: Any
else:
    _Trainer = object

__all__ = ["MaskedThought", "add_mask_token", "linear_rate", "mask_thought", "question_dependence"]

Noise = Literal["mask", "random"]
"""What takes a token's place: the mask token, or any token of the vocabulary."""

IGNORED = -100  # the label of what is not learned


def mask_thought(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    rate: float,
    *,
    mask_id: int | None = None,
    vocab_size: int | None = None,
    noise: Noise = "mask",
    seed: int = 0,
    protect: torch.Tensor | None = None,
) -> torch.Tensor:
    """Input ids with a share of the answer's tokens hidden; labels stay as they are.

    input_ids, labels: [batch, time], labels not shifted: position j belongs to the answer where
    labels[j] is not -100. rate: the chance of each of its tokens, in [0, 1]. noise: "mask" puts
    `mask_id` there, "random" a uniform id below `vocab_size`. seed: the same one hides the same
    tokens. protect: bool [batch, time], tokens that are never hidden. Section 3.1 of the paper.

    >>> ids = torch.tensor([[5, 6, 7, 8]])
    >>> mask_thought(ids, torch.tensor([[-100, -100, 7, 8]]), 1.0, mask_id=1).tolist()
    [[5, 6, 1, 1]]
    """
    filler = _checked(rate, mask_id, vocab_size, noise)
    if input_ids.shape != labels.shape:
        raise PertokenError(
            f"input_ids {list(input_ids.shape)} and labels {list(labels.shape)} must have one shape"
        )
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.rand(input_ids.shape, generator=draw, dtype=torch.float64) < rate
    hidden = hidden.to(input_ids.device) & (labels != IGNORED)
    if protect is not None:
        hidden &= ~protect.to(input_ids.device).bool()
    if noise == "mask":
        return input_ids.masked_fill(hidden, filler)
    others = torch.randint(filler, input_ids.shape, generator=draw).to(input_ids)
    return torch.where(hidden, others, input_ids)


def linear_rate(step: int, total: int, max_rate: float, warmup: float = 2 / 3) -> float:
    """The share that is hidden in a step: from 0 up to `max_rate` at `warmup` of all, then level.

    step: from 0; total: steps of the whole training.

    >>> [linear_rate(step, 9, 0.4) for step in (0, 3, 6, 8)]
    [0.0, 0.2, 0.4, 0.4]
    """
    rise = total * warmup
    return max_rate if step >= rise else max_rate * (step / rise)


def add_mask_token(model: Any, tokenizer: Any) -> int:
    """The id of a mask token that the model reads and never writes; made where there is none.

    The tokenizer's own mask token is taken where it has one. Else "<mask>" is added; its row in the
    embeddings and in the head is the mean of all tokens before it, since the noise should mean
    nothing. A model without room for it gets a further row. `generate` suppresses the token either
    way.
    """
    new = tokenizer.mask_token_id is None and "<mask>" not in tokenizer.get_vocab()
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
    found = int(tokenizer.mask_token_id)
    rows = model.get_input_embeddings().weight.shape[0]
    if found >= rows:
        model.resize_token_embeddings(found + 1, mean_resizing=False)
    if new or found >= rows:  # a padded vocabulary has a row for it, which is no token's
        first = min(found, rows)
        with torch.no_grad():
            for part in (model.get_input_embeddings(), model.get_output_embeddings()):
                part.weight[first : found + 1] = part.weight[:first].mean(0)
    suppressed = list(getattr(model.generation_config, "suppress_tokens", None) or [])
    if found not in suppressed:
        model.generation_config.suppress_tokens = [*suppressed, found]
    return found


@torch.no_grad()
def question_dependence(
    model: Any,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    seed: int = 0,
) -> torch.Tensor:
    """How much worse each answer is known when its question's tokens are shuffled.

    input_ids, labels: [batch, time] as in `mask_thought`; the question is what stands before the
    first token that is learned. Gives, [batch], the rise of the mean negative log-likelihood per
    answer token, in nats; the paper measures dependence on the question in a like way (section 5,
    our reading). PertokenError for a row that learns nothing.
    """
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    learned = labels != IGNORED
    if not bool(learned.any(1).all()):
        raise PertokenError("a row has no token that is learned, so there is no answer to measure")
    question = (learned.cumsum(1) == 0) & (real != 0)
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(input_ids.shape, generator=draw).to(input_ids.device)
    # Sorted by a random key, places of the question take its tokens; all others stay.
    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    source = torch.where(question, order - 2, places.float()).argsort(1)
    target = torch.where(question, places - input_ids.shape[1], places).argsort(1)
    shuffled = input_ids.scatter(1, target, input_ids.gather(1, source))
    before, after = (_nll(model, ids, labels, real) for ids in (input_ids, shuffled))
    return after - before


class MaskedThought(_Trainer):
    """A mixin for `Trainer` of transformers and TRL's `SFTTrainer`: answers are masked in training.

    rate: the largest share (the paper's 0.4 and 0.2). noise: "mask" needs `mask_id`, see
    `add_mask_token`; "random" takes ids of the model's vocabulary. warmup: the share of training
    over which the rate rises. Everything else, labels and loss too, is the trainer's own; with
    rate 0 it is that trainer to the bit. Evaluation sees the text as it is.

    What is hidden of a row follows from `args.seed`, the step, its place in the step's batch and
    the process: a resumed run hides the same, and so do micro-batches of another size. TRL logs
    ``masked_thought/rate``. PertokenError for a rate outside [0, 1] and a mask token that is
    missing, is the stop token or is not in the model.
    """

    def __init__(
        self,
        *rest: Any,
        rate: float = 0.4,
        noise: Noise = "mask",
        mask_id: int | None = None,
        warmup: float = 2 / 3,
        **more: Any,
    ) -> None:
        if not 0 <= warmup <= 1:
            raise PertokenError(f"warmup is a share of training, 0 to 1, got {warmup}")
        _checked(rate, mask_id, 1, noise)
        super().__init__(*rest, **more)
        self._rate, self._noise, self._warmup = rate, noise, warmup
        self._mask_id, self._at, self._seen = mask_id, -1, 0  # rows of step _at so far
        rows = self.model.get_input_embeddings().weight.shape[0]
        self._vocab = rows
        if noise == "mask" and not 0 <= (mask_id or 0) < rows:
            raise PertokenError(
                f"mask_id {mask_id} is not among the model's {rows} tokens: see add_mask_token"
            )
        if noise == "mask" and mask_id == getattr(self.processing_class, "eos_token_id", None):
            raise PertokenError(
                f"mask_id {mask_id} is the stop token: the model would learn to go on behind it"
            )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The trainer's loss on masked inputs."""
        if self.model.training:
            inputs = {**inputs, "input_ids": self._masked(inputs)}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _masked(self, inputs: dict[str, Any]) -> torch.Tensor:
        if "labels" not in inputs:
            raise PertokenError("the batch has no labels, so the answer can't be told: give them")
        step, ids, labels = self.state.global_step, inputs["input_ids"], inputs["labels"]
        first = self._seen if step == self._at else 0
        self._at, self._seen = step, first + len(ids)
        rate = linear_rate(step, self.state.max_steps, self._rate, self._warmup)
        if hasattr(self, "_metrics"):
            self._metrics["train"]["masked_thought/rate"].append(rate)
        made = ids.clone()
        for row, learned in enumerate(labels != IGNORED):
            (made[row, learned],) = mask_thought(
                ids[row, learned][None],
                labels[row, learned][None],
                rate,
                mask_id=self._mask_id,
                vocab_size=self._vocab,
                noise=self._noise,
                seed=self._drawn(step, first + row),
            )
        return made

    def _drawn(self, step: int, row: int) -> int:
        """The seed of a row of a step's batch, whatever micro-batch and width it comes in."""
        parts = [self.args.seed, step, row, self.accelerator.process_index]
        return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def check_noise(rate: float, noise: str) -> None:
    """Raise PertokenError for a rate that is no share, and for noise of an unknown kind."""
    if not 0 <= rate <= 1:
        raise PertokenError(f"rate is a share of the answer's tokens, 0 to 1, got {rate}")
    if noise not in get_args(Noise):
        raise PertokenError(f'noise must be "mask" or "random", got {noise!r}')


def _checked(rate: float, mask_id: int | None, vocab_size: int | None, noise: str) -> int:
    """The mask token, or of random noise the number of tokens to draw from."""
    check_noise(rate, noise)
    if noise == "mask":
        if mask_id is None:
            raise PertokenError(
                'noise "mask" needs mask_id, a token the model never writes: add_mask_token(model, '
                'tokenizer) gives one; or noise="random"'
            )
        return mask_id
    if vocab_size is None or vocab_size < 1:
        raise PertokenError('noise "random" needs vocab_size, the number of tokens to draw from')
    return vocab_size


def _nll(model: Any, ids: torch.Tensor, labels: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood per learned token, [batch], in nats."""
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1].float()
    learned = labels[:, 1:] != IGNORED
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    return torch.where(learned, losses, 0.0).sum(1) / learned.sum(1)
