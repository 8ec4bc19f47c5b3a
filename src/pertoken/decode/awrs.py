"""AWRS (arXiv 2504.05410): exact sampling under a constraint that can only be asked.

Masking needs the constraint's answer on the whole vocabulary, and draws from the wrong distribution
over whole texts. Adaptive weighted rejection sampling asks few tokens: it tries them in the order
of a draw without replacement until one is accepted, which is then a sample of the constrained
next-token distribution. A little more work gives an unbiased estimate of that distribution's
normaliser Z = sum of p(x) over accepted x (three estimators, see `pertoken.decode.rejection`); the
product of the estimates along a text is its importance weight, so that weighted texts follow the
model conditioned on the whole constraint.

With a proposal q tokens are drawn from q and the weight counts p(x)/q(x). Tokens outside the
constraint's ``vocabulary``, where it has one, lose their mass first and the weight counts what was
kept. (Both as in the authors' library.) Where the constraint can give the whole mask,
``masked=True`` draws from it with the exact Z (ours).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from transformers import LogitsProcessorList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from pertoken._shown import Shown
from pertoken.decode._settings import (
    prompt_mask,
    refuse_filled_cache,
    refuse_inputs,
    refuse_settings,
)
from pertoken.decode.constrained import Constrained
from pertoken.decode.constraint import Constraint, ask, call, check, fit
from pertoken.decode.drafter import Drafter
from pertoken.decode.forward import TextForward
from pertoken.decode.rejection import (
    Drawn,
    NextTokens,
    geometric,
    paper,
    recursive,
    unweighted,
)
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.cache_utils import Cache

Estimator = Literal["auto", "recursive", "geometric", "paper"]
DOMINANT = 2 / 3  # "auto" takes the geometric estimator where one token has this much, as published


class AWRS(Shown):
    """Samples text under a constraint: ``generate(..., do_sample=True, custom_generate=AWRS(c))``.

    Args:
        constraint: an object with ``accepts(ids)`` and ``complete(ids)`` on the new tokens, see
            `pertoken.decode.constraint`. A stop id is accepted where the text is complete.
        estimator: ``"recursive"``, ``"geometric"``, ``"paper"`` (see `pertoken.decode.rejection`),
            or ``"auto"``: geometric where one token has two thirds of the mass or more, else
            recursive. That is the default of the authors' library; ours is recursive, because
            repeated rejections count towards `max_rejects`, and where the great token is a refused
            one they are many.
        max_accepts: accepted draws that the geometric estimator waits for, at least 2: more are
            slower and vary less. With more than 2, ``"auto"`` is geometric everywhere.
        max_rejects: tokens refused at one place before the row is given up (weight 0, which keeps
            the estimate unbiased); at least 2. Not for ``"paper"``, which may ask all tokens.
        masked: draw from the constraint's ``allowed(ids)`` instead of asking token by token; the
            weight is then exact, and the settings above have no part in it.
        proposal: what to draw from instead of the model: another model of the same vocabulary, or
            a logits processor (or a list of them) that turns the model's logits into other ones.
            It must give mass to every token that the model does.
        weights: False takes the first accepted token and asks no further: a row is then what
            masking token by token samples (locally constrained decoding), and has no weight.
        streamer: gets the tokens of a single row; `generate` does not hand its own to a callable.

    Every row of the batch is one text, drawn by itself, from the model as `generate` warps it: its
    default of ``top_k=50`` is in force unless you pass ``top_k=0``. After a call, per row:
    `log_weights` (nats; -inf where the row was given up), `completed` (it ended at a stop id), and
    `checks`, how often the constraint was asked (a whole mask is one question). A text cut at the
    length limit carries the weight of a beginning.

    Raises PertokenError where the constraint refuses every beginning, every row was given up, or
    the settings are greedy, and for a constraint that raises or answers no bool.

    >>> from pertoken.testing import MockModel
    >>> class Even:
    ...     def accepts(self, ids): return all(token % 2 == 0 for token in ids)
    ...     def complete(self, ids): return True
    >>> model = MockModel([[0.4, 0.3, 0.2, 0.1]] * 4)
    >>> sampler = AWRS(Even())
    >>> ids = model.generate(torch.tensor([[0]]), do_sample=True, max_new_tokens=5,
    ...                      custom_generate=sampler)
    >>> bool((ids % 2 == 0).all()), sampler.checks[0] < 5 * 4
    (True, True)
    """

    slug = "awrs"

    def __init__(
        self,
        constraint: Constraint,
        *,
        estimator: Estimator = "recursive",
        max_accepts: int = 2,
        max_rejects: int = 1000,
        masked: bool = False,
        proposal: Any = None,
        weights: bool = True,
        streamer: Any = None,
    ) -> None:
        check(constraint)
        if estimator not in get_args(Estimator):
            raise PertokenError(
                f'estimator must be "auto", "recursive", "geometric" or "paper", not {estimator!r}'
            )
        for name, value in (("max_accepts", max_accepts), ("max_rejects", max_rejects)):
            if value < 2:
                raise PertokenError(f"{name} must be at least 2, got {value}")
        if max_accepts > 2 and estimator in ("recursive", "paper"):
            raise PertokenError(
                f"the {estimator} estimator has no max_accepts; "
                'take estimator="geometric" or "auto" with it'
            )
        if masked and not hasattr(constraint, "allowed"):
            raise PertokenError(
                f"masked=True needs a constraint with allowed(ids), which {constraint!r} has not; "
                "leave masked out to ask it token by token"
            )
        _check_proposal(proposal)
        self.constraint = constraint
        self.estimator = estimator
        self.max_accepts = max_accepts
        self.max_rejects = max_rejects
        self.masked = masked
        self.proposal = proposal
        self.weights = weights
        self.streamer = streamer
        self.log_weights: list[float] = []
        self.completed: list[bool] = []
        self.checks: list[int] = []

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        *,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Called by `model.generate(..., custom_generate=self)`; returns what generate returns."""
        mask = self._fitting(model, generation_config, input_ids, model_kwargs)
        rows = range(input_ids.shape[0])
        self.start(len(rows))
        forward = TextForward(model, model_kwargs.get("past_key_values"))
        propose = self.proposer()
        stops = _ids(generation_config._eos_token_tensor)
        pad = (_ids(generation_config._pad_token_tensor) or [0])[0]
        alive = [True for _ in rows]
        new: list[list[int]] = [[] for _ in rows]
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        while any(alive):
            logits = forward(input_ids, mask)
            scores = logits_processor(input_ids, logits) if logits_processor else logits
            drafts = None if propose is None else propose(input_ids, mask, scores)
            found = self.next_tokens(scores, drafts, stops)
            for row, ids in enumerate(new):
                alive[row] = alive[row] and self.extend(row, ids, found, row, stops)
            if not any(weight > -math.inf for weight in self.log_weights):
                raise PertokenError(self.given_up(new, "rows (num_return_sequences)"))
            tokens = [ids[-1] if going else pad for ids, going in zip(new, alive, strict=True)]
            feed = torch.tensor(tokens, device=input_ids.device).unsqueeze(-1)
            input_ids = torch.cat((input_ids, feed), -1)
            mask = torch.cat((mask, torch.ones_like(feed, dtype=mask.dtype)), -1)
            if self.streamer is not None and alive[0]:
                self.streamer.put(feed[0].cpu())
            ended = stopping_criteria(input_ids, None).tolist()
            for row, end in enumerate(ended):
                self.completed[row] |= alive[row] and tokens[row] in stops
                alive[row] = alive[row] and not end
        if self.streamer is not None:
            self.streamer.end()
        if not generation_config.return_dict_in_generate:
            return input_ids
        return GenerateDecoderOnlyOutput(sequences=input_ids, past_key_values=forward.cache)

    # The steps of a text, which `smc` takes with particles instead of rows.

    def start(self, rows: int) -> None:
        """Forget the last call; raises PertokenError if not even the empty text is accepted."""
        self.log_weights = [0.0] * rows
        self.completed, self.checks = [False] * rows, [0] * rows
        if not ask(self.constraint.accepts, []):
            raise PertokenError(
                "the constraint refuses every text: it does not accept the empty one"
            )

    def proposer(self) -> Proposer | None:
        """What `proposal` makes of a batch of texts; None without one."""
        if self.proposal is None:
            return None
        return Proposer(self.proposal)

    def next_tokens(
        self, logits: torch.Tensor, drafts: torch.Tensor | None, stops: Sequence[int]
    ) -> NextTokens:
        """Of logits [rows, vocab] of the model and of the proposal."""
        vocabulary = getattr(self.constraint, "vocabulary", None)
        if vocabulary is None or self.masked:
            return NextTokens(logits, drafts)
        keep = fit(vocabulary, logits.shape[-1], "vocabulary")
        keep[list(stops)] = True
        return NextTokens(logits, drafts, (~keep).nonzero().squeeze(-1).to(logits.device))

    def extend(
        self, row: int, ids: list[int], found: NextTokens, at: int, stops: Sequence[int]
    ) -> bool:
        """Draw the row's next token and weigh it; False where the row is given up.

        ids: the row's new tokens, extended here; found: the next tokens of a batch, of which row
        `at` stands behind these ids.
        """
        if self.masked:
            token, log_weight = found.draw_allowed(at, self._mask(row, ids, found.vocab, stops))
        else:
            drawn = self._ask(row, ids, found, at, stops)
            token, log_weight = drawn.token, -math.inf
            if drawn.weight > 0.0:
                log_weight = math.log(drawn.weight) + found.log_kept(at)
        if log_weight > -math.inf:
            log_weight = log_weight + found.log_ratio(at, token) if self.weights else 0.0
        self.log_weights[row] += log_weight
        if log_weight == -math.inf:
            return False
        ids.append(token)
        return True

    def finish(
        self, row: int, ids: list[int], found: NextTokens, at: int, stops: Sequence[int]
    ) -> bool:
        """Force the stop token and weigh it; False where the text is not complete."""
        self.checks[row] += 1
        chances = [found.log_p(at, token) for token in stops]
        mass = float(torch.tensor(chances, dtype=torch.float64).logsumexp(0))
        if mass == -math.inf or not ask(self.constraint.complete, ids):
            self.log_weights[row] = -math.inf
            return False
        ids.append(stops[0])
        self.log_weights[row] += mass
        return True

    def given_up(self, new: list[list[int]], rows: str) -> str:
        """What to say when no row is left; rows: what they are called."""
        longest = max(map(len, new))
        return (
            f"no text that the constraint allows was found: after {longest} tokens at most, "
            f"{self.max_rejects} tokens were refused in a row or all the model gives mass to were; "
            f"loosen the constraint, raise max_rejects or ask for more {rows}"
        )

    def _fitting(
        self,
        model: PreTrainedModel,
        config: GenerationConfig,
        input_ids: torch.Tensor,
        given: dict[str, Any],
    ) -> torch.Tensor:
        """The prompt's mask; raises PertokenError for what AWRS would silently do otherwise."""
        name = type(model).__name__
        if not config.do_sample:
            raise PertokenError(
                "AWRS samples: pass do_sample=True (its weights are those of samples)"
            )
        refuse_inputs(self, model, config, given)
        refuse_settings(config, input_ids, self, self.streamer)
        if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
            raise PertokenError(f"AWRS runs decoder-only models with a key-value cache, not {name}")
        cache: Cache | None = given.get("past_key_values")
        if cache is not None:
            refuse_filled_cache(cache, input_ids, self)
        return prompt_mask(model, input_ids, given)

    def _ask(
        self, row: int, ids: list[int], found: NextTokens, at: int, stops: Sequence[int]
    ) -> Drawn:
        """One token by asking the constraint."""
        verdicts: dict[int, bool] = {}

        def ok(token: int) -> bool:
            key = -1 if token in stops else token  # one answer for all stop ids
            if key not in verdicts:
                self.checks[row] += 1
                if key < 0:
                    verdicts[key] = ask(self.constraint.complete, ids)
                else:
                    verdicts[key] = ask(self.constraint.accepts, [*ids, token])
            return verdicts[key]

        return self._estimate(found, at)(
            found.chance(at), found.draws(at), ok, max_rejects=self.max_rejects
        )

    def _estimate(self, found: NextTokens, at: int) -> Callable[..., Drawn]:
        if not self.weights:
            return unweighted
        name = self.estimator
        if name == "auto":
            counting = self.max_accepts > 2 or found.greatest(at) >= DOMINANT
            name = "geometric" if counting else "recursive"
        if name == "geometric":
            return partial(geometric, max_accepts=self.max_accepts)
        return recursive if name == "recursive" else paper

    def _mask(self, row: int, ids: list[int], size: int, stops: Sequence[int]) -> torch.Tensor:
        """The constraint's answer on the whole vocabulary, stop ids included; bool [vocab]."""
        constraint: Any = self.constraint
        self.checks[row] += 2
        mask = fit(call(constraint.allowed, ids), size, "allowed(ids)")
        mask[list(stops)] = ask(self.constraint.complete, ids)
        return mask


class Proposer:
    """Logits [rows, vocab] of a proposal, behind the same texts as the model's."""

    def __init__(self, proposal: Any) -> None:
        self._forward = TextForward(proposal) if isinstance(proposal, torch.nn.Module) else None
        given = proposal if isinstance(proposal, list) else [proposal]
        self._processors = LogitsProcessorList([] if self._forward else given)

    def __call__(
        self, input_ids: torch.Tensor, mask: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """input_ids, mask: [rows, time]; logits: the model's, for a proposal made of them."""
        if self._forward is None:
            return self._processors(input_ids, logits.clone())
        drafts = self._forward(input_ids, mask)
        if drafts.shape != logits.shape:
            raise PertokenError(
                f"the proposal has {drafts.shape[-1]} tokens and the model {logits.shape[-1]}; "
                "a proposal must share the model's vocabulary"
            )
        return drafts

    def select(self, rows: torch.Tensor) -> None:
        """See `TextForward.select`."""
        if self._forward is not None:
            self._forward.select(rows)


def _ids(found: torch.Tensor | None) -> list[int]:
    return [] if found is None else found.flatten().tolist()


def _check_proposal(proposal: Any) -> None:
    """Raise PertokenError for what turns no logits into others, such as a drafter."""
    for one in proposal if isinstance(proposal, list) else [proposal]:
        decodes = isinstance(one, Drafter | Constrained | AWRS)
        if one is not None and (decodes or not callable(one)):
            raise PertokenError(
                "the proposal of AWRS is a model, a logits processor or a list of processors, not "
                f"{type(one).__name__}"
            )
