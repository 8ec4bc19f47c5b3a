"""Critical tokens: the token of a wrong answer after which the answer can no longer become right.

From behind every token of the answer many continuations are sampled, and the share that is right is
the token's score. The critical token is the first with score 0 after which no score recovers
(arXiv 2411.19943, section 2). With another token in its place the answer is often right; that is
what `replaced` measures, and what makes it critical.

    found = rollout_scores(model, tokenizer, prompt_ids, answer_ids, is_correct=check)
    found.critical                          # its place in the answer
    replaced(model, tokenizer, prompt_ids, answer_ids, found.critical, is_correct=check).right

The score is an estimate: at `n` continuations a token with a true share of 1 % has score 0 half the
time (n = 64). And the critical token was chosen for its zeros: to say how bad it is, sample again.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pertoken._files import check_target
from pertoken._replies import drawing, written
from pertoken.conversation import stop_ids
from pertoken.errors import PertokenError
from pertoken.result import Part, Result, cells
from pertoken.signal import TokenSignal
from pertoken.train._kept import keep_row, kept_rows

__all__ = [
    "Replaced",
    "Rollouts",
    "continued",
    "critical_token",
    "pass_at_k",
    "replaced",
    "rollout_scores",
]

Judge = Callable[[str], bool]
"""Whether the text of a whole answer is right."""
Progress = Callable[[str, int, int], None]

THRESHOLD = 0.05  # from this share on a prefix has recovered


@dataclass
class Rollouts(Result):
    """How often the answer still became right from behind each of its tokens.

    right: of `n` continuations each, None where none was sampled (`every`). text: the prompt's.
    """

    answer_ids: list[int]
    right: list[int | None]
    n: int
    tokenizer: Any = field(repr=False)
    text: str = ""
    threshold: float = THRESHOLD

    @property
    def scores(self) -> list[float]:
        """The share that is right, for each answer token; NaN where none was sampled."""
        return [math.nan if one is None else one / self.n for one in self.right]

    @property
    def critical(self) -> int | None:
        """The place of the critical token in the answer, see `critical_token`."""
        return critical_token(self.scores, self.threshold)

    @property
    def signal(self) -> TokenSignal:
        """The scores over the answer's text."""
        return TokenSignal.from_ids(
            self.tokenizer, self.answer_ids, self.scores, "share of continuations that are right"
        )

    def to_dict(self) -> dict[str, Any]:
        """The prompt, n, the critical token's place, and a record per token."""
        return {"prompt": self.text, "n": self.n, "critical": self.critical, "tokens": self.rows()}

    def rows(self) -> list[dict[str, Any]]:
        """A record per answer token: its text, how many continuations are right, the share."""
        texts, critical = self.signal.tokens, self.critical
        return [
            {"token_index": at, "token": text, "right": right, "score": score}
            | {"critical": at == critical}
            for at, (text, right, score) in enumerate(
                zip(texts, self.right, self.scores, strict=True)
            )
        ]

    def notes(self) -> list[str]:
        """Which token is critical."""
        if self.critical is None:
            return ["no token is critical: the answer could become right until its end"]
        token = self.signal.tokens[self.critical]
        return [f"critical: token {self.critical}, {token!r}; {self.n} continuations each"]

    def plot(self) -> Any:
        """The scores over the answer, a plotly figure (extra `plot`)."""
        return self.signal.plot()

    def _parts(self) -> list[Part]:
        return [Part("", cells(self.rows()), self.notes())]

    def _page(self) -> str:
        return self.signal.to_html()


@dataclass(frozen=True)
class Replaced:
    """Answers with another token in one place.

    right: of `n` continuations; tokens: what stood there instead, for each; same_text: how many of
    them are written like the token that was there, blanks aside, so that they are no alternative.
    """

    right: int
    n: int
    tokens: list[int]
    same_text: int


def rollout_scores(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    *,
    is_correct: Judge,
    n: int = 64,
    every: int = 1,
    temperature: float = 0.5,
    top_p: float = 0.95,
    max_new_tokens: int = 1024,
    batch: int = 64,
    seed: int = 0,
    path: str | Path | None = None,
    progress: Progress | None = None,
) -> Rollouts:
    """Sample `n` continuations from behind each token of a wrong answer and judge them.

    prompt_ids, answer_ids: [time] each. is_correct: judges the text of a whole answer; one that
    can't be read counts as wrong. every: with 4 only each fourth token and the last are looked at,
    so the critical one is found to within 4 (scores need not fall steadily: no search by halves is
    safe). temperature: the paper's 0.5 is that of Llama-3-8B on GSM8K; it chose such that about ten
    different wrong answers arise. batch: continuations at once. seed: of the sampling; torch's
    global generator is left as it was. Behind a stop token nothing is sampled, and the answer
    itself is judged. path: a file that keeps the texts; a search that was interrupted samples only
    what is missing in it, from another seed, and judges all.

    PertokenError for an empty prompt or answer, an answer that is right (nothing in it is
    critical), settings out of range, and a `path` that can't be written or holds another search.

    >>> from pertoken.testing import ByteTokenizer, MockModel
    >>> import torch
    >>> table = torch.zeros(258, 258)
    >>> table[:, 1] = 1  # every token is the last one
    >>> table[97] = torch.eye(258)[98]  # but "_" (id 97) goes on with "`"
    >>> model, ids = MockModel(table), ByteTokenizer().encode("_a")
    >>> model.generation_config.eos_token_id = 1
    >>> right = lambda text: text == "_`"
    >>> found = rollout_scores(model, ByteTokenizer(), [5], ids, is_correct=right, n=4)
    >>> found.right, found.critical
    ([4, 0], 1)
    """
    check_sampling(n, batch, temperature, top_p)
    prompt, answer = _listed(prompt_ids, answer_ids)
    if every < 1:
        raise PertokenError(f"every must be 1 or more, got {every}")
    if is_correct(_text(tokenizer, answer)):
        raise PertokenError("the answer is right: only wrong ones have a critical token")
    last = len(answer) - 1
    looked = [at for at in range(len(answer)) if at % every == 0 or at == last]
    right: list[int | None] = [None] * len(answer)
    if answer[-1] in stop_ids(model):
        right[last], looked = 0, looked[:-1]
    options = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    texts: list[list[str]] = [[] for _ in answer]
    file = None if path is None else Path(path)
    if file is not None:
        check_target(file)
        settings = {**_made_by(model, tokenizer, prompt, answer), **options, "seed": seed}
        for row in kept_rows(file, settings):
            texts[row["token"]].append(row["text"])
    places = [at for at in looked for _ in range(n - len(texts[at]))]

    def keep(number: int, text: str) -> None:
        if file is not None:
            keep_row(file, settings, {"token": places[number], "text": text})

    prefixes = [(prompt, answer[: at + 1]) for at in places]
    again = sum(map(len, texts))  # what is left is drawn from another seed than what is there
    new = _written(model, tokenizer, prefixes, batch, seed + again, progress, keep, **options)
    for at, text in zip(places, new, strict=True):
        texts[at].append(text)
    for at in looked:
        right[at] = sum(bool(is_correct(text)) for text in texts[at][:n])
    return Rollouts(answer, right, n, tokenizer, _text(tokenizer, prompt))


def critical_token(scores: Sequence[float], threshold: float = THRESHOLD) -> int | None:
    """The first token with score 0 behind which no score reaches the threshold; None for none.

    A score that reaches it drops the candidate, and the search goes on behind; where nothing new is
    found, the last candidate dropped is taken, as in the authors' code. NaN is passed over. The
    threshold is the paper's 5 %, in 64 continuations more than three.

    >>> critical_token([0.9, 0.0, 0.03, 0.0])
    1
    >>> critical_token([0.9, 0.0, 0.5, 0.2, 0.0, 0.0])
    4
    >>> critical_token([0.9, 0.0, 0.5]), critical_token([0.9, 0.5])
    (1, None)
    """
    if not 0 < threshold <= 1:
        raise PertokenError(f"threshold is a share above 0 and at most 1, got {threshold}")
    candidate = dropped = None
    for place, score in enumerate(scores):
        if candidate is None and score == 0:
            candidate = place
        elif candidate is not None and score >= threshold:
            candidate, dropped = None, candidate
    return dropped if candidate is None else candidate


def continued(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    *,
    is_correct: Judge,
    n: int = 64,
    temperature: float = 0.5,
    top_p: float = 0.95,
    max_new_tokens: int = 1024,
    batch: int = 64,
    seed: int = 0,
) -> int:
    """How many of `n` continuations of the beginning of an answer are right.

    Arguments as of `rollout_scores`. Of an answer up to its critical token, that one with it, this
    is with `pass_at_k(n, right, k)` the paper's "with critical token".

    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> model, everything = tiny_model("llama", vocab_size=258), lambda text: True
    >>> continued(model, ByteTokenizer(), [5], [6], is_correct=everything, n=3, max_new_tokens=2)
    3
    """
    check_sampling(n, batch, temperature, top_p)
    texts = _written(
        model,
        tokenizer,
        [_listed(prompt_ids, answer_ids)] * n,
        batch,
        seed,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
    )
    return sum(bool(is_correct(text)) for text in texts)


@torch.no_grad()
def replaced(
    model: Any,
    tokenizer: Any,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    place: int,
    *,
    is_correct: Judge,
    n: int = 64,
    temperature: float = 0.5,
    top_p: float = 0.95,
    max_new_tokens: int = 1024,
    batch: int = 64,
    seed: int = 0,
) -> Replaced:
    """Put other tokens in one place of an answer, go on from each, and judge what comes.

    The `n` tokens are drawn from the model's distribution (temperature 1, all of it, as in the
    authors' code) with that token's probability set to 0, and each has one continuation. Arguments
    as of `rollout_scores`. With `pass_at_k(n, right, k)` it is the paper's "without critical
    token".
    """
    check_sampling(n, batch, temperature, top_p)
    prompt, answer = _listed(prompt_ids, answer_ids)
    if not 0 <= place < len(answer):
        raise PertokenError(f"place must be one of the answer's {len(answer)} tokens, got {place}")
    ids = torch.tensor([*prompt, *answer[:place]], device=model.device)
    shares = model(input_ids=ids[None], use_cache=False).logits[0, -1].double().softmax(-1)
    shares[answer[place]] = 0
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.multinomial(shares.cpu(), n, replacement=True, generator=draw).tolist()
    texts = _written(
        model,
        tokenizer,
        [(prompt, [*answer[:place], token]) for token in tokens],
        batch,
        seed,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
    )
    there = _text(tokenizer, [answer[place]]).strip()
    same = sum(_text(tokenizer, [token]).strip() == there for token in tokens)
    return Replaced(sum(bool(is_correct(text)) for text in texts), n, tokens, same)


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that one of `k` answers out of `n` is right, `right` of which are: unbiased.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 4), round(pass_at_k(4, 2, 2), 4)
    (0.25, 1.0, 0.8333)
    """
    if not 0 <= right <= n or not 1 <= k <= n:
        raise PertokenError(f"wanted 0 <= right <= n and 1 <= k <= n, got {right}, {n}, {k}")
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def _written(
    model: Any,
    tokenizer: Any,
    prefixes: Sequence[tuple[list[int], list[int]]],
    batch: int,
    seed: int,
    progress: Progress | None = None,
    keep: Callable[[int, str], None] | None = None,
    **options: Any,
) -> list[str]:
    """The texts of answers written to their end; of those that have ended, as they are.

    keep: called with the number and the text of each that was written, batch by batch.
    """
    stops = stop_ids(model)
    texts = [_text(tokenizer, answer) for _, answer in prefixes]
    opened = [place for place, (_, answer) in enumerate(prefixes) if answer[-1] not in stops]
    rows = [[*prefixes[place][0], *prefixes[place][1]] for place in opened]
    done = 0
    with drawing(model, seed):
        for places, new in written(model, rows, batch=batch, do_sample=True, top_k=0, **options):
            for number, ids in zip(places, new, strict=True):
                place = opened[number]
                texts[place] = _text(tokenizer, [*prefixes[place][1], *ids])
                if keep is not None:
                    keep(place, texts[place])
            done += len(places)
            if progress is not None:
                progress("continuations", done, len(rows))
    return texts


def _made_by(model: Any, tokenizer: Any, prompt: list[int], answer: list[int]) -> dict[str, Any]:
    """What names a search in a file: the model, the tokenizer, and the ids."""
    from pertoken._tokenizer_hash import tokenizer_hash
    from pertoken.cache import model_fingerprint

    return {
        "model": model_fingerprint(model)[:16],
        "tokenizer": tokenizer_hash(tokenizer)[:8],
        "ids": f"{zlib.crc32(repr((prompt, answer)).encode()):08x}",
    }


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def check_sampling(n: int, batch: int, temperature: float, top_p: float) -> None:
    """Raise PertokenError for settings of a sampling that are out of range."""
    for label, value in (("n", n), ("batch", batch)):
        if value < 1:
            raise PertokenError(f"{label} must be 1 or more, got {value}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise PertokenError(f"temperature must be above 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise PertokenError(f"top_p is a share above 0 and at most 1, got {top_p}")


def _listed(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> tuple[list[int], list[int]]:
    for name, ids in (("prompt", prompt_ids), ("answer", answer_ids)):
        if not len(ids):
            raise PertokenError(f"the {name} has no token")
    return [int(one) for one in prompt_ids], [int(one) for one in answer_ids]
