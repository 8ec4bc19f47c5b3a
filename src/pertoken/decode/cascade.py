"""Language model cascades: a small model answers, and a large one where the small is not sure.

The small model answers greedily. A rule makes a score of its tokens' log-probabilities, and answers
of low score are deferred: asked again of the large model. Source: Language Model Cascades, arXiv
2404.10136. Its claim: the log-probability of the answer (Chow-Sum) defers long answers too readily
and the mean (Chow-Average) over-corrects; quantiles over the tokens, and above all a rule learned
on them, defer the right ones.

Rules: "chow-sum", "chow-average", "chow-quantile-A" (the A-quantile; 0 is the least sure token),
"chow-quantile" (the best A on the calibration data), "post-hoc-quantile" (learned on eleven
quantiles), "post-hoc-embed-1" (also on the small model's last layer), "post-hoc-embed-1+2" (also on
an early layer of the large one, which costs that part of its reading every question), "random".

Where we differ. Decoder-only models in place of FLAN-T5: the small model's embedding is the mean
over the answer's places, the large one's the mean over the prompt at a quarter of its depth (our
reading). A learned rule is a logistic regression; `net="mlp"` is the paper's kind. The score of a
threshold comes from rules fitted without the question at hand, so that the deferral rate holds on
new ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from pertoken._files import check_target, write_whole
from pertoken._shown import Shown
from pertoken.cache.fingerprint import model_fingerprint, model_name
from pertoken.decode._cascade_run import CascadeRun
from pertoken.decode._deferral_rule import RULES, Rule, qualities
from pertoken.decode._pairs import AnswerFile, Pair, Quality, exact_match, judged
from pertoken.decode.answers import (
    Answer,
    Progress,
    early_states,
    endpoint_answers,
    greedy_answers,
)
from pertoken.decode.deferral import DeferralCurves, deferral_curves
from pertoken.endpoint import Endpoint
from pertoken.errors import PertokenError
from pertoken.prompts import encode_prompt, read_utf8

__all__ = ["RULES", "Cascade", "CascadeRun", "Member", "Pair"]

Member = tuple[Any, Any] | Endpoint | Callable[[Sequence[str]], Sequence[Answer]]
"""(model, tokenizer), an endpoint, or a function from prompts to answers."""

_FORMAT = 1  # of a saved rule


class Cascade(Shown):
    """Two models and the rule that says whose answer counts.

    small, large: (model, tokenizer) as `pertoken.load` gives them, an `Endpoint`, or a function
    from prompts to `Answer`s. rule: one of `RULES`. net: of a learned rule, "logistic" or "mlp".
    layer: the large model's block that "post-hoc-embed-1+2" reads; None for a quarter of them.
    max_new_tokens, stop, chat: of the answers, see `greedy_answers`. batch: prompts, or requests
    to an endpoint, at once. seed: of the net, of random deferral and of ties.

        cascade = Cascade(load("smollm2"), load("gemma3-270m"), "post-hoc-quantile")
        pairs = cascade.answer(prompts, references)  # asks both models
        cascade.fit(pairs[:200])
        print(cascade.curve(pairs[200:]).table())
        print(cascade.generate(new_prompts, rate=0.3).table())

    Raises PertokenError for an unknown rule, and a rule that reads inside a model that is behind an
    endpoint.
    """

    slug: ClassVar[str] = "lm-cascades"

    def __init__(
        self,
        small: Member,
        large: Member,
        rule: str,
        *,
        net: str = "logistic",
        layer: int | None = None,
        max_new_tokens: int = 64,
        stop: Sequence[str] = (),
        chat: bool = True,
        batch: int = 8,
        seed: int = 0,
    ) -> None:
        self.small, self.large, self.rule = small, large, rule
        self.net, self.layer, self.max_new_tokens = net, layer, max_new_tokens
        self.stop, self.chat, self.batch, self.seed = tuple(stop), chat, batch, seed
        self._rule = Rule(rule, net, seed)
        if self._rule.reads_small and isinstance(small, Endpoint):
            raise PertokenError(f"{rule} reads the small model's layers: an endpoint shows none")
        if self._rule.reads_large:
            if not isinstance(large, tuple):
                raise PertokenError(f"{rule} reads the large model's layers: give it as a model")
            blocks = large[0].config.get_text_config(decoder=True).num_hidden_layers
            if layer is not None and not 0 <= layer < blocks:
                raise PertokenError(f"layer {layer}: the large model has blocks 0 to {blocks - 1}")
        self._fitted_on: frozenset[str] = frozenset()

    def answer(
        self,
        prompts: Sequence[str],
        references: Sequence[str] | None = None,
        *,
        quality: Quality = exact_match,
        path: str | Path | None = None,
        progress: Progress | None = None,
    ) -> list[Pair]:
        """Ask both models, and judge their answers; without references the small one alone.

        quality: (answer, reference) -> 0 … 1. path: a file of JSON lines that keeps the answers;
        what is in it is not asked again, so that an interrupted call goes on behind it.

        Raises PertokenError for no prompts, columns of unlike length, prompts that do not fit, and
        a file of other models or settings.
        """
        self._check(prompts)
        if references is not None and len(references) != len(prompts):
            raise PertokenError(f"{len(prompts)} prompts have {len(references)} references")
        file = AnswerFile(path, self._head(references is not None))
        self._fill(file, prompts, references is not None, progress)
        pairs = [file.pairs[each] for each in prompts]
        if references is None:
            return pairs
        return [judged(pair, ref, quality) for pair, ref in zip(pairs, references, strict=True)]

    def _fill(
        self, file: AnswerFile, prompts: Sequence[str], both: bool, progress: Progress | None
    ) -> None:
        """Ask for what the file does not hold, some questions at a time, and keep it at once."""
        known = file.pairs
        missing = [
            each
            for each in dict.fromkeys(prompts)
            if each not in known or (both and known[each].large is None)
        ]
        step = 4 * self.batch
        for start in range(0, len(missing), step):
            chunk = missing[start : start + step]
            with file.hinting():
                if fresh := [each for each in chunk if each not in known]:
                    found = zip(
                        fresh, self._ask(self.small, fresh, True), self._early(fresh), strict=True
                    )
                    file.add([Pair(prompt, one, early=state) for prompt, one, state in found])
                if both:
                    large = zip(chunk, self._ask(self.large, chunk, False), strict=True)
                    file.add([replace(known[prompt], large=one) for prompt, one in large])
            if progress is not None:
                progress("questions", min(start + step, len(missing)), len(missing))

    def fit(self, pairs: Sequence[Pair]) -> Cascade:
        """Learn the rule, where it is one to be learned, and the scores that rates are taken from.

        pairs: of `answer`, calibration data. A rule that is not learned needs no references.

        Raises PertokenError without a question, without judged answers where they are needed, and
        for calibration data of one class: nothing that deferring would gain.
        """
        self._rule.fit(pairs)
        self._fitted_on = frozenset(_mark(pair.prompt) for pair in pairs)
        return self

    def check_fit(self, prompts: Sequence[str]) -> None:
        """Raise PertokenError, before anybody is asked, for fewer prompts than `fit` takes."""
        self._rule.refuse_few(len(prompts))

    @property
    def alpha(self) -> float | None:
        """The quantile of a Chow-Quantile rule, chosen or given."""
        return self._rule.alpha

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """How well each answer of the small model may stand: the lowest are deferred first."""
        return self._rule.scores(pairs)

    def curve(self, pairs: Sequence[Pair]) -> DeferralCurves:
        """The rule's deferral curve beside Chow-Sum's, Chow-Average's, random and the oracle's.

        pairs: of `answer` with references; PertokenError where the rule was fitted on one of them.
        """
        self.check_curve([pair.prompt for pair in pairs])
        small, large = qualities(pairs, "a curve")
        scores = {} if self.rule == "random" else {self.rule: self.scores(pairs)}
        for rule in ("chow-sum", "chow-average"):
            scores.setdefault(rule, Rule(rule).scores(pairs))
        return deferral_curves(
            scores,
            small,
            large,
            lengths=[len(pair.small.logprobs) for pair in pairs],
            overhead={self.rule: self.overhead(pairs)},
            seed=self.seed,
        )

    def check_curve(self, prompts: Sequence[str]) -> None:
        """Raise PertokenError, before anybody is asked, where the rule was fitted on a prompt."""
        known = sum(_mark(prompt) in self._fitted_on for prompt in prompts)
        if known:
            raise PertokenError(
                f"{known} of {len(prompts)} questions were used to fit the rule: draw its curve on "
                "others"
            )

    def overhead(self, pairs: Sequence[Pair]) -> float:
        """What the rule asks of the large model for every question: the early layers' share of all
        that it reads and writes to answer, 0 for rules that leave it alone.
        """
        if not self._rule.reads_large:
            return 0.0
        model, tokenizer = self._large_model()
        read = whole = 0
        for pair in pairs:
            assert pair.large is not None
            tokens = encode_prompt(tokenizer, model, pair.prompt, 0, self.chat).shape[1]
            read += tokens
            whole += tokens + max(len(pair.large.logprobs) - 1, 0)  # the last one is not read
        return (self._layer() + 1) / self._blocks() * read / whole

    def threshold(self, rate: float) -> tuple[float, float]:
        """(score, share): to defer `rate` of the questions, defer all below the score, and this
        share of those that have exactly it.

        Raises PertokenError for a rate outside 0 … 1, and before `fit`.
        """
        return self._rule.threshold(rate)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        rate: float,
        path: str | Path | None = None,
        progress: Progress | None = None,
    ) -> CascadeRun:
        """Answer prompts, about `rate` of them by the large model.

        Each prompt is decided by itself, whatever else is asked with it. path: as of `answer`.
        Raises PertokenError for no prompts, a rate outside 0 … 1, a file of other models or
        settings, and before `fit`.
        """
        self.threshold(rate)
        self._check(prompts)
        file = AnswerFile(path, self._head(both=True))
        self._fill(file, prompts, False, progress)
        pairs = [file.pairs[each] for each in prompts]
        scores = self.scores(pairs)
        deferred = self._rule.defers(pairs, scores, rate)
        asked = [prompt for prompt, yes in zip(prompts, deferred, strict=True) if yes]
        self._fill(file, asked, True, progress)
        answers = [
            file.pairs[prompt].large if yes else file.pairs[prompt].small
            for prompt, yes in zip(prompts, deferred, strict=True)
        ]
        texts = tuple(each.text for each in answers if each is not None)
        return CascadeRun(rate, tuple(prompts), texts, tuple(scores), tuple(deferred))

    def save(self, path: str | Path) -> None:
        """Write the fitted rule, without the models; PertokenError before `fit`."""
        self.threshold(0.5)
        check_target(Path(path))
        state = {
            "pertoken cascade": _FORMAT,
            "rule": self.rule,
            "settings": self._settings(),
            "members": {"small": _name(self.small), "large": _name(self.large)},
            "found": self._rule.to_dict(),
            "fitted_on": sorted(self._fitted_on),
        }
        write_whole(Path(path), json.dumps(state, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path, small: Member, large: Member, *, batch: int = 8) -> Cascade:
        """The rule of `save` on the models it was fitted with.

        Raises PertokenError for a file that holds none, and for other models.
        """
        text = read_utf8(Path(path), "rule")
        try:
            state = json.loads(text)
            if state["pertoken cascade"] != _FORMAT:
                raise KeyError
            found = cls(small, large, state["rule"], **state["settings"], batch=batch)
            found._rule.restore(state["found"])
            found._fitted_on = frozenset(state["fitted_on"])
            members = dict(state["members"])
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
            raise PertokenError(f"{path} holds no rule of this version: fit it again") from None
        for role, member in (("small", small), ("large", large)):
            if members.get(role) != _name(member):
                raise PertokenError(
                    f"the rule in {path} was fitted with another {role} model ("
                    f"{members.get(role)}, not {_name(member)}): fit it again"
                )
        return found

    def _settings(self) -> dict[str, Any]:
        names = ("net", "layer", "max_new_tokens", "chat", "seed")
        return {name: getattr(self, name) for name in names} | {"stop": list(self.stop)}

    def _head(self, both: bool) -> dict[str, Any]:
        """What the answers in a file depend on."""
        return {
            "cascade": _FORMAT,
            "small": _name(self.small),
            "large": _name(self.large) if both else None,
            "max_new_tokens": self.max_new_tokens,
            "stop": list(self.stop),
            "chat": self.chat,
            "states": self._rule.reads_small,
            "layer": self._layer() if self._rule.reads_large else None,
        }

    def _check(self, prompts: Sequence[str]) -> None:
        """Refuse, before anything is asked, prompts that one of the models can't take."""
        if isinstance(prompts, str) or not len(prompts):
            raise PertokenError("a cascade takes a list of prompts, at least one")
        for prompt in prompts:
            if not prompt.strip():
                raise PertokenError("the prompt is empty")
            for member in (self.small, self.large):
                if isinstance(member, tuple):
                    model, tokenizer = member
                    encode_prompt(tokenizer, model, prompt, self.max_new_tokens, self.chat)

    def _ask(self, member: Member, prompts: Sequence[str], small: bool) -> Sequence[Answer]:
        given: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "stop": self.stop}
        if isinstance(member, Endpoint):
            given |= {"logprobs": small, "threads": self.batch}
            return endpoint_answers(member, prompts, **given)
        if not isinstance(member, tuple):
            found = member(prompts)
            if len(found) != len(prompts):
                raise PertokenError(f"{_name(member)} gave {len(found)} of {len(prompts)} answers")
            return found
        given |= {"chat": self.chat, "batch": self.batch}
        return greedy_answers(*member, prompts, states=small and self._rule.reads_small, **given)

    def _early(self, prompts: Sequence[str]) -> Sequence[tuple[float, ...]]:
        if not self._rule.reads_large:
            return [()] * len(prompts)
        model, tokenizer = self._large_model()
        return early_states(model, tokenizer, prompts, self._layer(), chat=self.chat)

    def _large_model(self) -> tuple[Any, Any]:
        assert isinstance(self.large, tuple)
        return self.large

    def _blocks(self) -> int:
        return int(self._large_model()[0].config.get_text_config(decoder=True).num_hidden_layers)

    def _layer(self) -> int:
        return self._blocks() // 4 if self.layer is None else self.layer


def _name(member: Member) -> str:
    """What a member is, so that a rule is not used with another."""
    if isinstance(member, Endpoint):
        return f"{member.model} at {member.url}"
    if isinstance(member, tuple):
        return f"{model_name(member[0])} {model_fingerprint(member[0])}"
    return str(getattr(member, "__qualname__", type(member).__qualname__))


def _mark(prompt: str) -> str:
    return hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()[:16]
