"""AWRS (arXiv 2504.05410): exact sampling under a constraint that can only be asked.

Masking needs the constraint's answer on the whole vocabulary, and draws from the wrong distribution
over whole texts. Adaptive weighted rejection sampling asks few tokens: it tries them in the order
of a draw without replacement (log-probability plus Gumbel noise) until one is accepted, which is
then a sample of the constrained next-token distribution. A little more work gives an unbiased
estimate of that distribution's normaliser Z = sum of p(x) over accepted x; the product of the
estimates along a text is its importance weight, so that weighted texts follow the model conditioned
on the whole constraint.

Three estimators (p the model's distribution, R the mass of the rejected tokens):

- *recursive*: behind the first accepted x the next token in order is asked too; W = 1 - R if it is
  accepted, else p(x). At most two questions more than rejections. (The authors' library; the
  product over rejected tokens of 1 - p/(1 - R) telescopes to 1 - R.)
- *geometric*: rounds with fresh noise, in which accepted tokens stay and every token once rejected
  is skipped but counted as often as draws with replacement would have met it; W = (a - 1)/(a + r -
  1) after a accepts and r rejections. (The authors' library.)
- *paper*: a second round behind the first accept; W = (1 - R)/(n1 + n2 + 1), n the rejections of
  the rounds. (The authors' replication code.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from transformers import DynamicCache

from pertoken.decode.constraint import Constraint, ask
from pertoken.decode.forward import text_logits
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

Estimator = Literal["auto", "recursive", "geometric", "paper"]
DOMINANT = 2 / 3  # "auto" takes the geometric estimator where one token has this much, as published
_FIRST = 32  # tokens ordered at once; more are ordered only if all of these are rejected


class Draws(Protocol):
    """The randomness that the estimators use, so that tests can enumerate it."""

    def order(self, rejected: Collection[int]) -> Iterator[int]:
        """Tokens with mass as a draw without replacement gives them, without the rejected ones."""

    def skipped(self, rejected_mass: float) -> int:
        """How often draws with replacement meet a rejected token before one that is not."""


class GumbelDraws:
    """Draws by Gumbel noise on log-probabilities [vocab], in float64."""

    def __init__(self, log_probs: torch.Tensor) -> None:
        self._log_probs = log_probs

    def order(self, rejected: Collection[int]) -> Iterator[int]:
        """Best key first; see `Draws`."""
        uniform = torch.rand_like(self._log_probs).clamp_(min=torch.finfo(torch.float64).tiny)
        keys = self._log_probs - torch.log(-torch.log(uniform))
        if rejected:
            keys[list(rejected)] = -math.inf
        first = keys.topk(min(_FIRST, len(keys)))
        for key, token in zip(first.values.tolist(), first.indices.tolist(), strict=True):
            if key == -math.inf:
                return
            yield token
        rest = keys.sort(descending=True)
        count = int((rest.values > -math.inf).sum())
        yield from rest.indices[_FIRST:count].tolist()

    def skipped(self, rejected_mass: float) -> int:
        """Geometric number of failures at success probability 1 - `rejected_mass`."""
        uniform = 1.0 - float(torch.rand((), dtype=torch.float64))  # in (0, 1]
        if rejected_mass <= 0.0:
            return 0
        return int(math.log(uniform) / math.log(rejected_mass)) if rejected_mass < 1.0 else 2**62


@dataclass(frozen=True)
class Drawn:
    """One token drawn under a constraint.

    token: -1 where none was accepted; weight: unbiased estimate of the accepted mass.
    """

    token: int
    weight: float


_DEAD = Drawn(-1, 0.0)
Verdict = Callable[[int], bool]


def recursive(p: Callable[[int], float], draws: Draws, ok: Verdict, max_rejects: int) -> Drawn:
    """The recursive estimator; p: probability of a token; ok: the constraint's answer on it."""
    rejected_mass = 0.0
    order = draws.order(())
    for rejects, token in enumerate(islice(order, max_rejects)):
        if ok(token):
            # With one rejection left the draw itself was the coin that a second question tosses.
            following = None if rejects == max_rejects - 1 else next(order, None)
            if following is None or ok(following):
                return Drawn(token, max(0.0, 1.0 - rejected_mass))
            return Drawn(token, p(token))
        rejected_mass += p(token)
    return _DEAD


def geometric(
    p: Callable[[int], float], draws: Draws, ok: Verdict, max_rejects: int, max_accepts: int = 2
) -> Drawn:
    """The estimator from counts, as of draws with replacement until `max_accepts` accepts."""
    rejected: set[int] = set()
    rejected_mass, rejects, accepts, first = 0.0, 0, 0, -1
    while accepts < max_accepts and rejects < max_rejects:
        accepted = False
        for token in draws.order(rejected):
            if rejected:
                rejects += draws.skipped(rejected_mass)
            if rejects >= max_rejects:
                break
            if ok(token):
                accepts += 1
                first = token if first < 0 else first
                accepted = True
                break
            rejected.add(token)
            rejected_mass += p(token)
            rejects += 1
            if rejects >= max_rejects:
                break
        if not accepted and rejects < max_rejects:  # every token with mass was rejected
            return _DEAD
    if accepts == 0:
        return _DEAD
    weight = min(max_accepts - 1, accepts) / (accepts + min(rejects, max_rejects) - 1)
    return Drawn(first, weight)


def paper(p: Callable[[int], float], draws: Draws, ok: Verdict, max_rejects: int) -> Drawn:
    """The paper's own estimator: a second round over what was not rejected in the first.

    It has no cap of rejections and would be biased with one: `max_rejects` does not apply.
    """
    rejected: list[int] = []
    first = -1
    for token in draws.order(()):
        if ok(token):
            first = token
            break
        rejected.append(token)
    if first < 0:
        return _DEAD
    rest = max(0.0, 1.0 - sum(map(p, rejected)))
    more = 0
    for token in draws.order(rejected):
        if ok(token):
            break
        more += 1
    return Drawn(first, rest / (len(rejected) + more + 1))


class AWRS:
    """Samples text under a constraint: ``generate(..., do_sample=True, custom_generate=AWRS(c))``.

    Args:
        constraint: an object with ``accepts(ids)`` and ``complete(ids)`` on the new tokens, see
            `pertoken.decode.constraint`. A stop id is accepted where the text is complete.
        estimator: ``"recursive"``, ``"geometric"``, ``"paper"`` (see the module), or ``"auto"``:
            geometric where one token has two thirds of the mass or more, else recursive. That is
            the default of the authors' library; ours is recursive, because repeated rejections
            count towards `max_rejects`, and where the great token is a refused one they are many.
        max_rejects: tokens refused at one place before the row is given up (weight 0, which keeps
            the estimate unbiased); at least 2. Not for ``"paper"``, which may ask all tokens.
        streamer: gets the tokens of a single row; `generate` does not hand its own to a callable.

    Every row of the batch is one text, drawn by itself, from the model as `generate` warps it: its
    default of ``top_k=50`` is in force unless you pass ``top_k=0``. After a call, per row:
    `log_weights` (nats; -inf where the row was given up), `completed` (it ended at a stop id), and
    `checks`, how often the constraint was asked. A text cut at the length limit carries the weight
    of a beginning.

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

    def __init__(
        self,
        constraint: Constraint,
        *,
        estimator: Estimator = "recursive",
        max_rejects: int = 1000,
        streamer: Any = None,
    ) -> None:
        if estimator not in ("auto", "recursive", "geometric", "paper"):
            raise PertokenError(
                f'estimator must be "auto", "recursive", "geometric" or "paper", not {estimator!r}'
            )
        if max_rejects < 2:
            raise PertokenError(f"max_rejects must be at least 2, got {max_rejects}")
        self.constraint = constraint
        self.estimator = estimator
        self.max_rejects = max_rejects
        self.streamer = streamer
        self.log_weights: list[float] = []
        self.completed: list[bool] = []
        self.checks: list[int] = []

    def __repr__(self) -> str:
        return f"AWRS({self.constraint!r}, estimator={self.estimator!r})"

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        *,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        **model_kwargs: Any,
    ) -> torch.Tensor:
        """Called by `model.generate(..., custom_generate=self)`; returns ids [batch, time]."""
        _refuse(model, generation_config, input_ids, self.streamer)
        self.start(input_ids.shape[0])
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        mask = model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        stops = _ids(generation_config._eos_token_tensor)
        pad = (_ids(generation_config._pad_token_tensor) or [0])[0]
        alive = [True] * input_ids.shape[0]
        new: list[list[int]] = [[] for _ in alive]
        feed = input_ids[:, int(cache.get_seq_length()) :]
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        while any(alive):
            logits = text_logits(model, feed, mask, cache)[:, -1].float()  # as generate does
            scores = logits_processor(input_ids, logits) if logits_processor else logits
            log_probs = scores.double().log_softmax(-1)
            for row, ids in enumerate(new):
                alive[row] = alive[row] and self.extend(row, ids, log_probs[row], stops)
            if not any(weight > -math.inf for weight in self.log_weights):
                raise PertokenError(self.given_up(new))
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
        return input_ids

    # The steps of a text, which `smc` takes with particles instead of rows.

    def start(self, rows: int) -> None:
        """Forget the last call; raises PertokenError if not even the empty text is accepted."""
        self.log_weights = [0.0] * rows
        self.completed, self.checks = [False] * rows, [0] * rows
        if not ask(self.constraint.accepts, []):
            raise PertokenError(
                "the constraint refuses every text: it does not accept the empty one"
            )

    def extend(
        self, row: int, ids: list[int], log_probs: torch.Tensor, stops: Sequence[int]
    ) -> bool:
        """Draw the row's next token and weigh it; False where the row is given up.

        ids: the row's new tokens, extended here; log_probs: [vocab], normalised.
        """

        def ok(token: int) -> bool:
            self.checks[row] += 1
            if token in stops:
                return ask(self.constraint.complete, ids)
            return ask(self.constraint.accepts, [*ids, token])

        drawn = self.draw(log_probs, ok)
        if drawn.weight <= 0.0:
            self.log_weights[row] = -math.inf
            return False
        ids.append(drawn.token)
        self.log_weights[row] += math.log(drawn.weight)
        return True

    def finish(
        self, row: int, ids: list[int], log_probs: torch.Tensor, stops: Sequence[int]
    ) -> bool:
        """Force the stop token and weigh it; False where the text is not complete."""
        self.checks[row] += 1
        mass = float(log_probs[list(stops)].logsumexp(0))
        if mass == -math.inf or not ask(self.constraint.complete, ids):
            self.log_weights[row] = -math.inf
            return False
        ids.append(stops[0])
        self.log_weights[row] += mass
        return True

    def given_up(self, new: list[list[int]]) -> str:
        """What to say when no row is left."""
        longest = max(map(len, new))
        return (
            f"no text that the constraint allows was found: after {longest} tokens at most, "
            f"{self.max_rejects} tokens were refused in a row or all the model gives mass to were; "
            "loosen the constraint, raise max_rejects or ask for more rows (num_return_sequences)"
        )

    def draw(self, log_probs: torch.Tensor, ok: Verdict) -> Drawn:
        """One token from log-probabilities [vocab], normalised, under ``ok(token)``."""
        log_probs = log_probs.double()
        draws = GumbelDraws(log_probs)

        def p(token: int) -> float:
            return math.exp(float(log_probs[token]))

        verdicts: dict[int, bool] = {}

        def once(token: int) -> bool:
            if token not in verdicts:
                verdicts[token] = ok(token)
            return verdicts[token]

        name = self.estimator
        if name == "auto":
            peaked = float(log_probs.max()) >= math.log(DOMINANT)
            name = "geometric" if peaked else "recursive"
        estimate = {"recursive": recursive, "geometric": geometric, "paper": paper}[name]
        return estimate(p, draws, once, self.max_rejects)


def _ids(found: torch.Tensor | None) -> list[int]:
    return [] if found is None else found.flatten().tolist()


def _refuse(
    model: PreTrainedModel, config: GenerationConfig, input_ids: torch.Tensor, streamer: Any
) -> None:
    """Raise PertokenError for what AWRS would silently do otherwise."""
    name = type(model).__name__
    if not config.do_sample:
        raise PertokenError("AWRS samples: pass do_sample=True (its weights are those of samples)")
    if (config.num_beams or 1) > 1:
        raise PertokenError("AWRS draws one text per row; it does not go with beam search")
    if config.use_cache is False:
        raise PertokenError("AWRS needs the cache; drop use_cache=False")
    if input_ids.shape[1] == 0:
        raise PertokenError("the prompt is empty; give at least one token")
    if streamer is not None and input_ids.shape[0] > 1:
        raise PertokenError("a streamer shows one text; draw a batch without it")
    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        raise PertokenError(f"AWRS runs decoder-only models with a key-value cache, not {name}")
