"""What a style does at each strength: the four figures of arXiv 2601.16224, and two beside them.

The model continues some prompts at every strength, and its texts are read again:

- style perplexity: of the new tokens under the n-grams; lower is nearer to the corpus;
- base perplexity: of the new tokens under the frozen model, behind the prompt; a stand-in for
  fluency;
- divergence: Jensen-Shannon divergence of the model's distribution and the steered one, nats, mean
  over the steps (0 the same, 0.693 nothing in common);
- overlap: share of the different new tokens that stand in the corpus (our reading of the paper's
  token overlap).

A low base perplexity also comes of a text that repeats itself, so distinct bigrams and repeated
4-grams stand beside it (ours). Texts are drawn at temperature 1 and end at their length (ours): a
stop token is put off, so that all strengths are judged on as many tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pertoken._extras import need
from pertoken.decode.ngram_style import NGramStyle, StyleProcessor
from pertoken.errors import PertokenError
from pertoken.result import Part, Result, figure, plain
from pertoken.stats_text import repeated_4gram_share

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "OPENINGS",
    "STRENGTHS",
    "StyleRow",
    "StyleSweep",
    "StyleText",
    "jensen_shannon",
    "read_text",
    "style_sweep",
    "summary",
    "write",
]

STRENGTHS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
"""The strengths of a sweep; 0 is the frozen model."""
OPENINGS = (
    "The morning began",
    "When he came to the door,",
    "It is well known that",
    "She looked at the letter and",
    "In the middle of the town",
    "The old man told them",
    "After a long silence,",
    "There was once a",
    "We had not gone far when",
    "The question is whether",
    "On the next day",
    "My friend said that",
    "Nobody could remember",
    "At the end of the road",
    "The first thing to do is",
    "He had never seen",
)
"""Openings of no register in particular, to be continued."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StyleText:
    """One text of a sweep: its new tokens and what was read off them.

    style_loss, base_loss: nats, summed over the tokens; divergence: nats, one per step.
    """

    ids: list[int]
    style_loss: float
    base_loss: float
    divergence: list[float]


@dataclass(frozen=True)
class StyleRow:
    """The figures of one strength over all its texts, see the module."""

    strength: float
    style_perplexity: float
    base_perplexity: float
    divergence: float
    overlap: float
    distinct_2: float
    repetition: float
    tokens: int


@dataclass(frozen=True)
class StyleSweep(Result):
    """The figures over the strengths. found: a row each; samples: strength -> first text."""

    found: list[StyleRow]
    samples: dict[float, str]
    settings: dict[str, Any]

    _title = "A style over its strengths"

    def rows(self) -> list[dict[str, Any]]:
        """A record per strength."""
        return [plain(asdict(row)) for row in self.found]

    def to_dict(self) -> dict[str, Any]:
        """The rows, the first text of each strength, and the settings."""
        samples = [{"strength": key, "text": text} for key, text in self.samples.items()]
        return {"rows": self.rows(), "samples": samples, "settings": plain(self.settings)}

    def plot(self) -> Any:
        """Both perplexities over the strength: a plotly figure (extra `plot`)."""
        graph = need("plotly.graph_objects", "plot")
        x = [row.strength for row in self.found]
        curves = [
            graph.Scatter(x=x, y=[row.style_perplexity for row in self.found], name="style"),
            graph.Scatter(x=x, y=[row.base_perplexity for row in self.found], name="base model"),
        ]
        axis = {"title": "perplexity", "type": "log"}
        return figure(curves, xaxis={"title": "strength"}, yaxis=axis)

    def _parts(self) -> list[Part]:
        head = ["strength", "style PPL", "base PPL", "JS divergence", "overlap", "distinct-2"]
        lines = [[*head, "repeated 4-grams"]]
        for row in self.found:
            shares = (row.overlap, row.distinct_2, row.repetition)
            lines.append(
                [
                    f"{row.strength:g}",
                    f"{row.style_perplexity:.4g}",
                    f"{row.base_perplexity:.4g}",
                    f"{row.divergence:.3f}",
                    *(f"{share:.1%}" for share in shares),
                ]
            )
        about = self.settings
        note = (
            f"{about['prompts']} prompts, {about['max_new_tokens']} new tokens each, drawn with "
            f"seed {about['seed']}; style of {about['corpus_tokens']:,} tokens"
        )
        return [Part("", lines, [note])]

    def _page(self) -> str:
        from pertoken.decode._style_page import page

        return page(self)


def style_sweep(
    model: PreTrainedModel,
    tokenizer: Any,
    style: NGramStyle,
    prompts: Sequence[str],
    *,
    strengths: Sequence[float] = STRENGTHS,
    normalize: str | None = None,
    max_new_tokens: int = 60,
    seed: int = 0,
    progress: Progress | None = None,
) -> StyleSweep:
    """Continue prompts at every strength and measure what came of it.

    prompts: raw text, without a chat template. normalize: as of `StyleProcessor`. progress: called
    with (what, done, total). The global generator is left as it was.
    Raises PertokenError for a strength outside 0 to 1, no prompt or an empty one, and a style of
    another vocabulary.

    >>> from pertoken.testing import ByteTokenizer, tiny_model
    >>> style = NGramStyle.train(["to be or not to be"], ByteTokenizer())
    >>> found = style_sweep(
    ...     tiny_model("llama", vocab_size=258), ByteTokenizer(), style, ["to"],
    ...     strengths=(0, 0.5), max_new_tokens=5)
    >>> [row.divergence > 1e-9 for row in found.found]
    [False, True]
    """
    steered = [style(strength=one, normalize=normalize) for one in strengths]
    if not prompts or not strengths:
        raise PertokenError("a sweep needs a prompt and a strength")
    found, samples = [], {}
    for place, processor in enumerate(steered):
        if progress is not None:
            progress(f"strength {processor.strength:g}", place, len(steered))
        written = write(model, tokenizer, prompts, [processor], max_new_tokens, seed)
        texts = [read_text(model, processor, *ids) for ids in written]
        found.append(summary(processor.strength, texts, style))
        samples[processor.strength] = tokenizer.decode(texts[0].ids, skip_special_tokens=True)
    settings = {
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "normalize": normalize,
        "corpus_tokens": style.corpus.tokens,
        "weights": style.weights,
        "smoothing": style.smoothing,
    }
    return StyleSweep(found, samples, settings)


def write(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    processors: Sequence[Any],
    max_new_tokens: int,
    seed: int,
) -> list[tuple[list[int], list[int]]]:
    """(ids of the prompt, new ids) of each prompt, drawn in one batch at temperature 1."""
    from pertoken.prompts import encode_prompt

    rows = [encode_prompt(tokenizer, model, one, max_new_tokens, chat=False)[0] for one in prompts]
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :] = row
        mask[place, width - len(row) :] = 1
    run: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found = model.generate(
            ids,
            attention_mask=mask,
            logits_processor=list(processors),
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            **run,
        )
    return [(row.tolist(), new.tolist()) for row, new in zip(rows, found[:, width:], strict=True)]


@torch.no_grad()
def read_text(
    model: PreTrainedModel, processor: StyleProcessor, prompt: Sequence[int], new: Sequence[int]
) -> StyleText:
    """Read a text [time] behind its prompt once, by the frozen model and by the style."""
    start = len(prompt)
    ids = torch.tensor([[*prompt, *new]], device=model.device)
    out = model(input_ids=ids, use_cache=False, logits_to_keep=len(new) + 1)
    logits = out.logits[0, :-1].double()
    base = logits.log_softmax(-1)
    divergence = []
    for step, raw in enumerate(logits):
        other = processor(ids[:, : start + step], raw[None])[0].log_softmax(-1)
        divergence.append(jensen_shannon(base[step], other))
    surprise = -base.gather(-1, ids[0, start:, None])
    style_loss = -float(processor.style.log_probs([*prompt, *new])[start:].sum())
    return StyleText(list(new), style_loss, float(surprise.sum()), divergence)


def jensen_shannon(one: torch.Tensor, other: torch.Tensor) -> float:
    """Jensen-Shannon divergence of two log-distributions [vocab], nats: 0 to log 2.

    >>> laws = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()
    >>> round(jensen_shannon(*laws), 4), jensen_shannon(laws[0], laws[0])
    (0.6931, 0.0)
    """
    middle = torch.logaddexp(one, other) - math.log(2)
    halves = [(law.exp() * (law - middle).nan_to_num(neginf=0.0)).sum() for law in (one, other)]
    return max(0.0, float(sum(halves)) / 2)


def summary(strength: float, texts: Sequence[StyleText], style: NGramStyle) -> StyleRow:
    """The figures of all texts of one strength."""
    tokens = sum(len(text.ids) for text in texts)
    kinds = {one for text in texts for one in text.ids}
    grams = [gram for text in texts for gram in zip(text.ids, text.ids[1:], strict=False)]
    return StyleRow(
        strength=float(strength),
        style_perplexity=_perplexity([text.style_loss for text in texts], tokens),
        base_perplexity=_perplexity([text.base_loss for text in texts], tokens),
        divergence=float(np.mean([step for text in texts for step in text.divergence])),
        overlap=float(np.isin(list(kinds), style.corpus.tables[0].keys).mean()),
        distinct_2=len(set(grams)) / len(grams) if grams else 1.0,
        repetition=float(np.mean([repeated_4gram_share(text.ids) for text in texts])),
        tokens=tokens,
    )


def _perplexity(losses: Sequence[float], tokens: int) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(np.float64(sum(losses)) / tokens))
