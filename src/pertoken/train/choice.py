"""What a training method would do with each token of your data, before any training.

    choice = choose_tokens("sstoken", read_lessons("data.jsonl"), model, tokenizer)
    choice.to_html("tokens.html")     # every text, each token in the colour of its score

``sstoken`` gives each answer token its score and says whether it is kept; with a history model (an
earlier state, such as the model before its fine-tuning) the retrospective excess loss is in it,
without one the attention alone is. ``mft`` shows what one step at the full rate would hide.
``cdpo`` gives each token of a wrong answer its weight, how critical two fine-tuned copies find it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch

from pertoken._html import document
from pertoken._padded import batches
from pertoken._pieces import pieces
from pertoken._signal_html import _style
from pertoken.errors import PertokenError, nearest
from pertoken.result import Part, Result, cells
from pertoken.select import top_share
from pertoken.signal import TokenSignal
from pertoken.train._prompt_attention import watching
from pertoken.train.contrast import scored
from pertoken.train.lessons import Lesson, encode_lesson
from pertoken.train.masked_thought import check_noise, mask_thought
from pertoken.train.sstoken import (
    Normalize,
    check_choice,
    kept_by_place,
    place,
    retrospective_excess_loss,
    ss_scores,
)

__all__ = ["CHOOSERS", "TokenChoice", "choose_tokens"]

Row = dict[str, Any]
Progress = Callable[[str, int, int], None]
CHOOSERS = ("cdpo", "mft", "sstoken")
"""The methods that `choose_tokens` knows."""
_PLACES = 4096  # tokens of a batch, at most
_OUT = '<span class="out">struck out</span>: '
_STRUCK = {"cdpo": "", "mft": f"{_OUT}hidden in the input; ", "sstoken": f"{_OUT}not learned; "}
_MASK = -1  # stands where a token is hidden; no id


@dataclass(frozen=True)
class ChosenRow:
    """A lesson's tokens: ids and labels [time], value and whether it is kept of each answer token.

    value: NaN in the prompt. more: name -> further figures [time], for the page and the records.
    """

    ids: list[int]
    labels: list[int]
    values: list[float]
    kept: list[bool]
    more: dict[str, list[float]]


@dataclass
class TokenChoice(Result):
    """What a method chooses: settings, and the tokens of each lesson."""

    settings: Row
    chosen: list[ChosenRow]
    tokenizer: Any

    @property
    def signals(self) -> list[TokenSignal]:
        """A signal per lesson: the value of every answer token, nothing for the prompt's."""
        name = {"sstoken": "score", "mft": "hidden", "cdpo": "weight"}[self.settings["method"]]
        return [
            TokenSignal.from_ids(self.tokenizer, row.ids, row.values, name) for row in self.chosen
        ]

    def to_dict(self) -> Row:
        """Settings, the share kept of each tenth, a summary per lesson, a record per token."""
        return {
            "settings": self.settings,
            "kept_by_tenth": self.kept_by_tenth,
            "lessons": self.lessons(),
            "tokens": self.rows(),
        }

    def rows(self) -> list[Row]:
        """A record per answer token: lesson, its place among the tokens, text, value, kept."""
        found = []
        for number, row in enumerate(self.chosen):
            texts = pieces(self.tokenizer, row.ids)
            for at, text in enumerate(texts):
                if row.labels[at] < 0:
                    continue
                more = {name: values[at] for name, values in row.more.items()}
                shown = {"value": row.values[at], "kept": row.kept[at], **more}
                found.append({"lesson": number, "token_index": at, "token": text, **shown})
        return found

    def lessons(self) -> list[Row]:
        """A record per lesson: tokens, those of the answer, those kept, and where these stand."""
        found = []
        for number, row in enumerate(self.chosen):
            learned = torch.tensor([label >= 0 for label in row.labels])
            kept = torch.tensor(row.kept) & learned
            found.append(
                {
                    "lesson": number,
                    "tokens": len(row.ids),
                    "answer": int(learned.sum()),
                    "kept": int(kept.sum()),
                    "place": float(place(kept[None], learned[None])) if kept.any() else None,
                }
            )
        return found

    @property
    def kept_by_tenth(self) -> list[float | None]:
        """The share of each tenth of the answers that is kept; None where none has a token."""
        learned = [torch.tensor([label >= 0 for label in row.labels]) for row in self.chosen]
        kept = [torch.tensor(row.kept) for row in self.chosen]
        pad = torch.nn.utils.rnn.pad_sequence
        shares = kept_by_place(pad(kept, True), pad(learned, True)).tolist()
        return [None if math.isnan(one) else one for one in shares]

    def notes(self) -> list[str]:
        """The shares over all lessons, and how far into the answers the kept tokens stand."""
        if self.settings["method"] == "cdpo":
            return self._critical()
        lessons = self.lessons()
        answer, kept = (sum(row[name] for row in lessons) for name in ("answer", "kept"))
        told = [f"{kept} of {answer} answer tokens are kept ({kept / answer:.1%})"]
        if self.settings["method"] == "mft":
            told = [f"{answer - kept} of {answer} answer tokens are hidden in this draw"]
        places = [row["place"] for row in lessons if row["place"] is not None]
        if places:
            told.append(
                f"a kept token stands {sum(places) / len(places):.2f} into its answer on average "
                "(0 the first token, 1 the last, 0.50 no preference)"
            )
            tenths = ["-" if one is None else f"{one:.0%}" for one in self.kept_by_tenth]
            told.append(f"of the tenths of the answers are kept: {', '.join(tenths)}")
        if self.settings["method"] == "sstoken" and not self.settings["history"]:
            told.append("no history model: REL is 0 everywhere, and the attention alone selects")
        return told

    def _critical(self) -> list[str]:
        """Of cdpo: the token of each answer that is blamed most."""
        told = []
        for number, signal in enumerate(self.signals):
            top = signal.top(1)[0]
            told.append(f"lesson {number}: {top.token!r} counts most, {top.value:.3f}")
        return told

    def _parts(self) -> list[Part]:
        """The lessons, and the shares over all of them."""
        return [Part("", cells(self.lessons()), self.notes())]

    def _page(self) -> str:
        """Each text, its answer tokens coloured by value; those that are not learned struck out."""
        shades = [signal.shades() for signal in self.signals]
        blocks = [
            f"<section>\n<h2>lesson {number + 1}</h2>\n<p>"
            + "".join(map(_span, pieces(self.tokenizer, row.ids), *_columns(row, own)))
            + "</p>\n</section>"
            for number, (row, own) in enumerate(zip(self.chosen, shades, strict=True))
        ]
        lines = "".join(f"<li>{escape(line)}</li>" for line in self.notes())
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        looks = ".asked { opacity: .6; } .out { text-decoration: line-through; }"
        title = f"Tokens by {self.settings['method']}"
        body = (
            f"<h1>{escape(title)}</h1>\n<p><small>{escape(settings)}</small></p>\n<ul>{lines}"
            '<li><span class="p9">high</span> to <span class="p1">low</span> value; '
            + _STRUCK[self.settings["method"]]
            + "the prompt is pale</li></ul>\n"
            + "\n".join(blocks)
        )
        return document(title, body, style="\n".join([_style(), looks]))


def choose_tokens(
    method: str,
    lessons: Sequence[Lesson],
    model: Any,
    tokenizer: Any,
    *,
    history: Any = None,
    negative: Any = None,
    contrast: float = 1.0,
    rate: float = 0.4,
    gamma: float = 0.5,
    keep: float = 0.6,
    normalize: Normalize = "minmax",
    exclude_sink: bool = False,
    max_length: int = 1024,
    chat: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> TokenChoice:
    """What a method of `CHOOSERS` makes of each answer token of your lessons.

    history: a model, an earlier state of this one with the same tokenizer. rate: of mft; gamma,
    keep, normalize, exclude_sink: of sstoken, see `SSTokenSFT`; seed: of what mft hides. For cdpo
    the lessons are wrong answers, model is the copy fine-tuned on right ones and `negative` that on
    wrong ones; contrast: β of `contrastive_scores`. One forward per lesson, with a second model
    two; mft needs none.
    PertokenError for an unknown method, a model that is missing or has another number of tokens.

    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> lesson, model = Lesson("1+1=", "2 and no more"), tiny_model("llama", vocab_size=258)
    >>> choice = choose_tokens("sstoken", [lesson], model, ByteTokenizer(), keep=0.5)
    >>> choice.lessons()[0]["answer"], choice.lessons()[0]["kept"]
    (14, 7)
    """
    if method not in CHOOSERS:
        raise PertokenError(
            f"no tokens can be shown of {method!r}{nearest(method, CHOOSERS)}; there is: "
            f"{', '.join(CHOOSERS)}"
        )
    check_settings(rate, keep, gamma, normalize)
    if not lessons:
        raise PertokenError("there is no lesson to show")
    _check_models(method, model, history, negative)
    encoded = [encode_lesson(one, tokenizer, chat=chat, max_length=max_length) for one in lessons]
    settings: Row = {"method": method, "max_length": max_length}
    if method == "mft":
        settings |= {"rate": rate, "seed": seed}
        found = [_hidden(*one, rate, seed + number) for number, one in enumerate(encoded)]
        return TokenChoice(settings, found, tokenizer)
    if method == "cdpo":
        settings |= {"contrast": contrast}
        return TokenChoice(settings, _blamed(encoded, model, negative, contrast), tokenizer)
    settings |= {"gamma": gamma, "keep": keep, "history": history is not None}
    settings |= {"normalize": normalize, "exclude_sink": exclude_sink}
    rows: list[ChosenRow | None] = [None] * len(encoded)
    done = 0
    for part in batches([len(ids) for ids, _ in encoded], _PLACES):
        if progress is not None:
            progress("lessons", done, len(encoded))
        scored = _scored([encoded[one] for one in part], model, history, settings)
        for one, row in zip(part, scored, strict=True):
            rows[one] = row
        done += len(part)
    return TokenChoice(settings, [row for row in rows if row is not None], tokenizer)


def check_settings(rate: float, keep: float, gamma: float, normalize: str) -> None:
    """Raise PertokenError for settings of `choose_tokens` that are out of their range."""
    check_noise(rate, "mask")
    check_choice(keep, normalize, gamma=gamma)


def _check_models(method: str, model: Any, history: Any, negative: Any) -> None:
    """Raise PertokenError for a second model that the method has not, or that does not fit."""
    if history is not None and method != "sstoken":
        why = "hides at random" if method == "mft" else "compares two copies"
        raise PertokenError(f"{method} {why}: it has no history")
    if (negative is None) == (method == "cdpo"):
        raise PertokenError(
            "cdpo needs negative, the copy that was fine-tuned on wrong answers"
            if method == "cdpo"
            else f"{method} has no negative model: it belongs to cdpo"
        )
    other = negative if history is None else history
    if other is not None and _vocabulary(other) != _vocabulary(model):
        raise PertokenError(
            "negative and model must be copies of one model: they have other tokens"
            if history is None
            else "history must be an earlier state of the model: it has other tokens"
        )


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _blamed(
    encoded: Sequence[tuple[list[int], list[int]]], positive: Any, negative: Any, contrast: float
) -> list[ChosenRow]:
    """The weights of critical-token DPO, and the log ratio of the two models."""
    rows = [(ids, sum(label < 0 for label in labels)) for ids, labels in encoded]
    found = []
    for (ids, before), (_, labels), (scores, ratios) in zip(
        rows, encoded, scored(positive, negative, rows, contrast), strict=True
    ):
        nothing = [float("nan")] * before
        weights = [1 - one for one in scores]
        more = {"log_ratio": [*nothing, *ratios]}
        found.append(ChosenRow(ids, labels, [*nothing, *weights], [True] * len(ids), more))
    return found


def _hidden(ids: list[int], labels: list[int], rate: float, seed: int) -> ChosenRow:
    given = torch.tensor([ids]), torch.tensor([labels])
    masked = mask_thought(*given, rate, mask_id=_MASK, seed=seed)[0].tolist()
    kept = [one != _MASK for one in masked]
    values = [
        float("nan") if label < 0 else float(not one)
        for one, label in zip(kept, labels, strict=True)
    ]
    return ChosenRow(ids, labels, values, kept, {})


@torch.no_grad()
def _scored(
    encoded: Sequence[tuple[list[int], list[int]]],
    model: Any,
    history: Any,
    settings: Row,
) -> list[ChosenRow]:
    """Scores of a batch of like length, as `SSTokenSFT` takes them."""
    width = max(len(ids) for ids, _ in encoded)
    ids, labels = torch.zeros(2, len(encoded), width, dtype=torch.long, device=model.device)
    labels[:] = -100
    for row, (own, marks) in enumerate(encoded):
        ids[row, : len(own)] = torch.tensor(own)
        labels[row, : len(own)] = torch.tensor(marks)
    real = torch.zeros_like(ids)
    for row, (own, _) in enumerate(encoded):
        real[row, : len(own)] = 1
    mask = labels[:, 1:] != -100
    with watching(model) as watch:
        log_probs = _log_probs(model, ids, real)
    prompt, sink = (labels == -100) & (real != 0), settings["exclude_sink"]
    attention = watch.prompt_shares(prompt, real, exclude_sink=sink)
    past = log_probs if history is None else _log_probs(history, ids, real)
    rel = retrospective_excess_loss(log_probs, past, mask)
    scores = ss_scores(rel, attention, mask, settings["gamma"], normalize=settings["normalize"])
    kept = top_share(scores, settings["keep"], mask)
    found = []
    for row, (own, marks) in enumerate(encoded):
        learned = [label >= 0 for label in marks]

        def column(values: torch.Tensor, row: int = row, learned: list[bool] = learned) -> Any:
            given = [float("nan"), *values[row, : len(learned) - 1].tolist()]
            return [v if one else float("nan") for v, one in zip(given, learned, strict=True)]

        chosen = [True, *kept[row, : len(own) - 1].tolist()]
        more = {"rel": column(rel), "attention": column(attention)}
        found.append(
            ChosenRow(
                own,
                marks,
                column(scores),
                [not one or now for one, now in zip(learned, chosen, strict=True)],
                more,
            )
        )
    return found


def _log_probs(model: Any, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """log p of each token but the first [batch, time - 1]."""
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1]
    chosen = ids[:, 1:, None].to(logits.device)
    found: torch.Tensor = logits.float().log_softmax(-1).gather(-1, chosen)[..., 0]
    return found


def _columns(row: ChosenRow, shades: list[int]) -> tuple[list[Any], ...]:
    told = [
        ""
        if label < 0
        else ", ".join(
            f"{name} {values[at]:.4g}" for name, values in {"value": row.values, **row.more}.items()
        )
        for at, label in enumerate(row.labels)
    ]
    looks = [
        "asked" if label < 0 else f"p{shade}" if shade > 0 else f"n{-shade}" if shade else ""
        for label, shade in zip(row.labels, shades, strict=True)
    ]
    looks = [look if kept else f"{look} out" for look, kept in zip(looks, row.kept, strict=True)]
    return looks, told


def _span(piece: str, look: str, told: str) -> str:
    title = f' title="{escape(told)}"' if told else ""
    return f'<span class="{look.strip()}"{title}>{escape(piece)}</span>' if piece else ""
