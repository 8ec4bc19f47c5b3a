"""Cautious next token prediction (arXiv 2507.03038): where the model is unsure, try several ways.

At every place the entropy H (nats) of the next-token distribution, as `generate` has processed it,
sets a number of trials N. With N = 1 one token is drawn as ever. Else N continuations are drawn
from here, each up to a punctuation mark or the end of the text; the one of lowest perplexity,
exp(mean -log p) under the same distribution, is committed whole (Algorithm 1; first on ties).

Two formulas of N are published, with x = (H - min_entropy) / (max_entropy - min_entropy):

    paper, Algorithm 1:  N = clamp(floor(x * max_trials), 1, max_trials)
    the authors' code:   N = floor(1 + (max_trials - 1) * clamp(x, 0, 1))

The ablations are settings: ``trials=6`` tries six at every place, ``trials="inverted"`` tries few
where the model is unsure, ``trials=6, punctuation=()`` is the best of six whole answers.

The released loop runs one trial after the other, each from a forward of its own and a copy of the
cache. Here all trials of all prompts go through the model together, a row of the cache each; trials
that have drawn the same tokens share a row; the row of the chosen one stays, so nothing is read
twice. Every trial draws from a generator of its own, so that the text does not depend on it.

Perplexity per token favours what is short and certain: a trial that draws a comma at once often
wins. `stats.mean_span` shows how long committed trials are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from pertoken._shown import Shown
from pertoken.decode._settings import (
    prompt_mask,
    refuse_empty_rows,
    refuse_filled_cache,
    refuse_inputs,
    refuse_settings,
)
from pertoken.decode.rows import unfit
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

__all__ = ["CautiousDecoding", "CautiousOutput", "CautiousStats", "trial_counts"]

Rule = Literal["code", "paper", "inverted"]
MARKS = ".,\n?!:;)]}"
"""What ends a trial: the ten marks of the authors' code."""


def trial_counts(
    entropy: torch.Tensor,
    rule: Rule = "code",
    *,
    max_trials: int = 10,
    min_entropy: float = 0.01,
    max_entropy: float = 1.5,
) -> torch.Tensor:
    """How many trials at each entropy (nats), whole numbers of the same shape.

    rule: "code" or "paper", see the module; "inverted" is max_trials + 1 minus that of the code
    (the paper's ablation).

    >>> entropy = torch.tensor([0.0, 0.18, 0.31, 1.0, 2.0])
    >>> trial_counts(entropy).tolist()
    [1, 2, 2, 6, 10]
    >>> trial_counts(entropy, "paper").tolist()
    [1, 1, 2, 6, 10]
    """
    share = (entropy.double() - min_entropy) / (max_entropy - min_entropy)
    # With an endless threshold the share is not a number where the upper one is endless too.
    share = share.nan_to_num(nan=0.0).clamp(0.0, 1.0)
    if rule == "paper":
        return (share * max_trials).floor().clamp(min=1).long()
    counts = (1 + (max_trials - 1) * share).floor().long()
    return max_trials + 1 - counts if rule == "inverted" else counts


@dataclass
class CautiousStats:
    """What a run did, summed over the batch.

    places: where it was decided how many trials there are; uncertain: those with more than one;
    trials: of the uncertain places; span_tokens: tokens committed there, new_tokens: all new ones;
    drawn: tokens of all trials; forwards: passes behind the prompt, prefills: those over prompts;
    rows: rows in these passes that were still drawn from, over which their cost is counted.
    """

    places: int = 0
    uncertain: int = 0
    trials: int = 0
    span_tokens: int = 0
    new_tokens: int = 0
    drawn: int = 0
    forwards: int = 0
    prefills: int = 0
    rows: int = 0
    seconds_total: float = 0.0

    @property
    def uncertain_share(self) -> float:
        """Share of the places where there was more than one trial (the paper's rho)."""
        return self.uncertain / self.places if self.places else float("nan")

    @property
    def mean_trials(self) -> float:
        """Trials at an uncertain place."""
        return self.trials / self.uncertain if self.uncertain else float("nan")

    @property
    def mean_span(self) -> float:
        """Tokens of the trial that was committed."""
        return self.span_tokens / self.uncertain if self.uncertain else float("nan")

    @property
    def rows_per_token(self) -> float:
        """What a new token cost, in tokens that the model read; plain decoding has 1."""
        return self.rows / self.new_tokens if self.new_tokens else float("nan")

    def lines(self) -> list[str]:
        """How it went, for people."""
        found = [
            f"{self.forwards} forward passes behind the prompt; {self.rows_per_token:.2f} rows of "
            "them for each new token",
            f"unsure at {self.uncertain} of {self.places} places ({self.uncertain_share:.1%})",
        ]
        if self.uncertain:
            found[1] += f": {self.mean_trials:.1f} trials, {self.mean_span:.1f} tokens committed"
        return found


@dataclass
class CautiousOutput(GenerateDecoderOnlyOutput):
    """What `generate(..., return_dict_in_generate=True)` returns: with `stats` of the run."""

    stats: CautiousStats | None = None


class CautiousDecoding(Shown):
    """Tries several ways where the model is unsure, and keeps the most probable one.

    Args:
        tokenizer: tells which tokens are punctuation; not needed where they are given by id.
        max_trials: at the greatest entropy; the paper finds 10 to 30 good.
        min_entropy, max_entropy: nats at which the trials begin to grow and are at their most;
            an endless `min_entropy` is the ordinary sampler with "code" and "paper".
        trials: which formula, "code" or "paper"; "inverted", the ablation; or a number, then it is
            that many at every place.
        punctuation: what ends a trial. "code": the first token of each of the ten marks of the
            authors' code, so that a mark with a blank before it, or two in one token, do not end a
            trial; "text": every token whose last character is such a mark; or ids, none of which
            means whole answers.
        cap: tokens of a trial at most; the paper has no limit, which a text without punctuation
            can make long.
        stop_strings: end the text behind any of these; `generate` refuses its own with a callable.
        streamer: gets each committed span of a single row; `generate` does not hand its own to a
            callable.

    Pass ``do_sample=True`` with the temperature and top-p that you would sample with. Without it
    the best token is taken where the model is sure; trials always draw. Rows of a batch go on by
    themselves. With one trial everywhere the text is that of `generate` under the same seed.

    Not lossless: its texts are more probable than those of the model. After a call `stats` counts
    what happened. Raises PertokenError, before any work, for a model, cache or setting that does
    not go with it: the cache must take a row per trial and give one back, so no static, quantized
    or recurrent ones.

    >>> from pertoken.testing import MockModel
    >>> model = MockModel([[0.0, 0.6, 0.3, 0.1]] * 4)
    >>> cautious = CautiousDecoding(punctuation=[3], cap=4)
    >>> ids = model.generate(torch.tensor([[1]]), do_sample=True, max_new_tokens=8,
    ...                      custom_generate=cautious)
    >>> ids.shape, cautious.stats.mean_trials > 1, cautious.stats.new_tokens
    (torch.Size([1, 9]), True, 8)
    """

    slug = "cntp"
    lossless = False

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        max_trials: int = 10,
        min_entropy: float = 0.01,
        max_entropy: float = 1.5,
        trials: Rule | int = "code",
        punctuation: Literal["code", "text"] | Collection[int] = "code",
        cap: int | None = None,
        stop_strings: Sequence[str] = (),
        streamer: Any = None,
    ) -> None:
        known = trials in get_args(Rule) if isinstance(trials, str) else _counts(trials)
        if not known:
            raise PertokenError(
                f'trials must be "code", "paper", "inverted" or a number from 1 on, not {trials!r}'
            )
        if not _counts(max_trials):
            raise PertokenError(f"max_trials must be 1 or more, got {max_trials!r}")
        if cap is not None and not _counts(cap):
            raise PertokenError(f"cap must be 1 or more tokens, got {cap!r}")
        if not (min_entropy == float("inf") or 0 <= min_entropy < max_entropy):
            raise PertokenError(
                "entropies are nats with 0 <= min_entropy < max_entropy, got "
                f"{min_entropy:g} and {max_entropy:g}"
            )
        if isinstance(punctuation, str) and punctuation not in ("code", "text"):
            raise PertokenError(
                f'punctuation must be "code", "text" or ids of tokens, not {punctuation!r}'
            )
        if isinstance(stop_strings, str):
            stop_strings = [stop_strings]
        if stop_strings and tokenizer is None:
            raise PertokenError("stop_strings need the tokenizer too: CautiousDecoding(tokenizer)")
        self.tokenizer = tokenizer
        self.max_trials = max_trials
        self.min_entropy = min_entropy
        self.max_entropy = max_entropy
        self.trials = trials
        self.punctuation = punctuation
        self.cap = cap
        self.stop_strings = list(stop_strings)
        self.streamer = streamer
        self.stats = CautiousStats()

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
        from pertoken.decode._trials import TrialRun

        started = time.perf_counter()
        cache, mask = self._fitting(model, input_ids, generation_config, model_kwargs)
        run = TrialRun(
            self,
            model,
            cache,
            mask,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
        )
        self.stats = run.stats
        try:
            sequences = run.decode()
        finally:
            self.stats.seconds_total = time.perf_counter() - started
        if not generation_config.return_dict_in_generate:
            return sequences
        return CautiousOutput(sequences=sequences, past_key_values=cache, stats=self.stats)

    def counts(self, entropy: torch.Tensor) -> list[int]:
        """How many trials at each place; entropy: nats [rows]."""
        if not isinstance(self.trials, str):
            return [self.trials] * len(entropy)
        counts: list[int] = trial_counts(
            entropy,
            self.trials,
            max_trials=self.max_trials,
            min_entropy=self.min_entropy,
            max_entropy=self.max_entropy,
        ).tolist()
        return counts

    def ends_trial(self) -> Callable[[int], bool]:
        """Whether a token ends a trial, by its id."""
        if not isinstance(self.punctuation, str):
            return frozenset(self.punctuation).__contains__
        if self.tokenizer is None:
            raise PertokenError(
                "CautiousDecoding needs the tokenizer to know what is punctuation: "
                "CautiousDecoding(tokenizer), or punctuation= with the ids"
            )
        if self.punctuation == "code":
            return punctuation_ids(self.tokenizer).__contains__
        return _LastCharacter(self.tokenizer)

    def _fitting(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        config: Any,
        given: dict[str, Any],
    ) -> tuple[Cache, torch.Tensor]:
        """Cache and mask of the prompt; raises PertokenError for what does not go with trials."""
        from transformers import DynamicCache

        name = type(model).__name__
        refuse_inputs(self, model, config, given)
        refuse_settings(config, input_ids, self, self.streamer)
        if model.config.is_encoder_decoder:
            raise PertokenError(
                f"CautiousDecoding runs decoder-only models; {name} is an encoder-decoder model"
            )
        if getattr(model, "_is_stateful", False):
            raise PertokenError(
                f"CautiousDecoding lets trials that have ended wait for the others, and {name} "
                "keeps a recurrent state, which cannot wait; decode it with transformers' generate"
            )
        cache = given.get("past_key_values")
        if cache is None:
            cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        if reason := unfit(cache, static=False):
            raise PertokenError(
                "CautiousDecoding gives each trial a row of the cache and keeps one, which "
                f"{type(cache).__name__} cannot: it {reason}; use DynamicCache or KVDirectCache"
            )
        refuse_filled_cache(cache, input_ids, self)
        mask = prompt_mask(model, input_ids, given)
        refuse_empty_rows(mask)
        return cache, mask


def punctuation_ids(tokenizer: Any) -> frozenset[int]:
    """First token of each of the ten marks, as in the authors' code, as it stands behind a word.

    (Ours: a tokenizer that puts a blank before a text would give the token of a blank and a mark.)

    >>> from pertoken.testing import ByteTokenizer
    >>> sorted(chr(token - 2) for token in punctuation_ids(ByteTokenizer()))
    ['\\n', '!', ')', ',', '.', ':', ';', '?', ']', '}']
    """
    encode = partial(tokenizer.encode, add_special_tokens=False)
    word, found = encode("a"), set[int]()
    for mark in MARKS:
        both = encode(f"a{mark}")
        behind = both[len(word) :] if both[: len(word)] == word else []
        found.update((behind or encode(mark))[:1])
    return frozenset(found)


class _LastCharacter:
    """Whether a token's text ends in a mark; each token is decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bool] = {}

    def __call__(self, token: int) -> bool:
        if token not in self._known:
            self._known[token] = self._tokenizer.decode([token]).endswith(tuple(MARKS))
        return self._known[token]


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
