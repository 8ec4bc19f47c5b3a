"""What can be combined: every finished method of the catalogue, and how it is made on a bench."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from pertoken.testing._bench import Bench, tiny_tokenizer
from pertoken.testing.models import tiny_model

Kind = Literal[
    "drafter",
    "sampler",
    "chooser",
    "constraint",
    "logits",
    "cache",
    "archive",
    "text",
    "chat",
    "bytes",
    "measure",
    "probe",
    "tokenizer",
    "loss",
]
KINDS: dict[Kind, str] = {
    "drafter": "drafts tokens, `custom_generate=`",
    "sampler": "draws texts, `custom_generate=`",
    "chooser": "draws several ways to go on and keeps one, `custom_generate=`",
    "constraint": "`Constrained(drafter, constraint)`, or `ConstraintMask` as a processor",
    "logits": "any processor in `logits_processor=[...]`",
    "cache": "keys and values, `past_key_values=`",
    "archive": "a cache from a file, `past_key_values=`",
    "text": "a function that shortens or explains a text",
    "chat": "a function that asks a model in messages",
    "bytes": "a model over bytes",
    "measure": "a measure of a tokenizer",
    "probe": "a measure of a model",
    "tokenizer": "a changed tokenizer, with its model",
    "loss": "a loss on texts; ssToken keeps all, masked thought hides nothing, cDPO at its start",
}
"""What a part acts on, in the order of the tables, with how it is used."""

BUDGET = 8


@dataclass(frozen=True)
class Part:
    """One side of a pair.

    make: a new object for a bench; of the kinds "text", "bytes", "measure", "probe" and "loss" what
    it finds there, a string and a tensor; of "tokenizer" the bench with that tokenizer. A loss
    takes a text in place of the bench's own. said: what an error may call it.
    """

    name: str
    kind: Kind
    make: Callable[..., Any]
    said: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether a cache leaves the text as it is."""
        return self.name.partition(":")[0] in ("full", "kv-direct")


@lru_cache(maxsize=1)
def parts() -> dict[str, Part]:
    """Every finished method and baseline, the caches by name, and the two things methods meet most:
    a constraint and a logits processor of transformers' own."""
    order = list(KINDS)
    found = sorted(_parts(), key=lambda part: order.index(part.kind))
    return {part.name: part for part in found}


def _parts() -> Iterator[Part]:
    from pertoken.cache.named import CACHES, make_cache
    from pertoken.catalog import baselines, methods

    for card in (*methods(), *baselines()):
        if card.status != "planned" and card.slug not in CACHES:
            yield _of_card(card.slug, card.load())
    smallest = Bench(tiny_model("llama", layers=1, vocab_size=8), None)
    for name in CACHES:

        def cache(bench: Bench, name: str = name) -> Any:
            return make_cache(name, bench.model, BUDGET)

        yield Part(name, "cache", cache, (type(cache(smallest)).__name__, name))
    yield Part("constraint", "constraint", lambda bench: bench.constraint, ("constraint",))
    yield Part("logits-processor", "logits", _processors, ("processor",))


def _of_card(slug: str, method: Any) -> Part:
    from transformers import Cache

    from pertoken.decode.drafter import Drafter

    said = (getattr(method, "__name__", slug), slug)
    if slug in _OWN:
        kind, make = _OWN[slug]
        return Part(slug, kind, make, (*said, *(("archived",) if kind == "archive" else ())))
    if isinstance(method, type) and issubclass(method, Drafter):
        return Part(slug, "drafter", lambda bench: method(), said)
    if isinstance(method, type) and issubclass(method, Cache):
        return Part(slug, "cache", lambda bench: method(bench.model, BUDGET), said)
    raise NotImplementedError(f"{slug}: say in {__name__} of which kind it is and how it is made")


def _processors(bench: Bench) -> list[Any]:
    from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    return [RepetitionPenaltyLogitsProcessor(1.3), NoRepeatNGramLogitsProcessor(3)]


def _balanced(bench: Bench) -> Any:
    from pertoken.decode import Balanced

    return Balanced(k=3)


def _awrs(bench: Bench) -> Any:
    from pertoken.decode import AWRS

    return AWRS(bench.constraint, masked=True)


def _cautious(bench: Bench) -> Any:
    from pertoken.decode import CautiousDecoding

    return CautiousDecoding(bench.tokenizer, trials=3, cap=4)


def _knn(bench: Bench) -> list[Any]:
    """A memory of the bench's own text and a few words more."""
    from pertoken.decode import KNNDatastore, KNNMemory

    with tempfile.TemporaryDirectory() as folder:
        texts = [bench.text, "the dog saw 12 cats"]
        store = KNNDatastore.build(bench.model, bench.tokenizer, texts, f"{folder}/store")
    return [KNNMemory(store, k=8, temperature=20.0)]


def _archive(bench: Bench) -> Any:
    """A cache that has read the bench's text but for its last token, from a file."""
    from pertoken.cache import restore_cache, save_cache

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "talk.ptkv"
        save_cache(path, bench.model, bench.ids)
        return restore_cache(path, bench.model).cache


def _compress(bench: Bench) -> tuple[str, torch.Tensor]:
    from pertoken.prune import compress

    found = compress(
        bench.text,
        0.6,
        salience="self-information",
        model=bench.model,
        tokenizer=bench.tokenizer,
    )
    return found.text, torch.tensor([float(word.kept) for word in found.words])


def _cascade(bench: Bench) -> tuple[str, torch.Tensor]:
    """A text and the answer to it, with the scores it was judged by."""
    from pertoken.decode import Cascade

    member = (bench.model, bench.tokenizer)
    asked = [bench.text, bench.text[:20]]
    made = Cascade(member, member, "chow-average", max_new_tokens=4, chat=False)
    run = made.fit(made.answer(asked)).generate(asked, rate=0.5)
    return bench.text + run.texts[0], torch.tensor(run.scores)


def _geometry(bench: Bench) -> tuple[str, torch.Tensor]:
    from pertoken.probe import layer_geometry

    texts = [bench.text, bench.text[::-1]]
    found = layer_geometry(bench.model, bench.tokenizer, texts, neighbours=4, tested=())
    return found.table(), torch.zeros(0)


def _sinks(bench: Bench) -> tuple[str, torch.Tensor]:
    from pertoken.probe import find_sinks

    found = find_sinks(bench.model, bench.tokenizer, bench.text)
    return found.table(), torch.tensor(found.first)


def _reagent(bench: Bench) -> tuple[str, torch.Tensor]:
    from pertoken.attribute import attribute

    signal = attribute(bench.model, bench.tokenizer, bench.text, "!", probes=1, max_steps=4)
    return signal.text, torch.tensor(signal.values).nan_to_num()


def _bytes(bench: Bench) -> tuple[str, torch.Tensor]:
    from pertoken.decode import ByteModel

    prefix = bench.text[:7]
    return prefix, ByteModel(bench.model, bench.tokenizer).next_byte_log_probs(prefix)


def _sift(bench: Bench) -> Any:
    from pertoken.decode.sift import sift

    return sift


def _style(bench: Bench) -> list[Any]:
    from pertoken.decode import NGramStyle

    return [NGramStyle.train([bench.text, "a dog saw 78 dogs"], bench.tokenizer)(strength=1.0)]


def _premiums(bench: Bench) -> tuple[str, torch.Tensor]:
    from pertoken.tokenize.premiums import token_premiums

    found = token_premiums({"eng": [bench.text], "ell": ["δύο 1234 γάτες"]}, bench.tokenizer)
    return "", torch.tensor([found.premium("ell")])


def _morphology(bench: Bench) -> tuple[str, torch.Tensor]:
    from pertoken.tokenize.morphology import morphology_report

    return "", torch.tensor([morphology_report(bench.tokenizer)["micro F1"]])


def _fiberpo(bench: Bench, text: torch.Tensor | None = None) -> tuple[str, torch.Tensor]:
    from pertoken.train.fiberpo import fiberpo_loss

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        one, mask = chosen.new_ones(1), torch.ones_like(chosen)
        found, _ = fiberpo_loss(chosen, chosen.detach(), one, mask, trajectory=(0.9, 1.1))
        return found

    return "", gradient(bench, bench.plain if text is None else text, loss)


def _masked_thought(bench: Bench, text: torch.Tensor | None = None) -> tuple[str, torch.Tensor]:
    """At the beginning of training, when nothing is hidden yet."""
    from pertoken.train.masked_thought import mask_thought

    text = bench.plain if text is None else text
    labels = text.clone()
    labels[:, : bench.ids.shape[1]] = -100
    return "", gradient(bench, text, read=mask_thought(text, labels, 0.0, mask_id=0))


def _cdpo(bench: Bench, text: torch.Tensor | None = None) -> tuple[str, torch.Tensor]:
    """The new tokens as a chosen answer where the policy is its reference: half of -β ∇ log π."""
    from pertoken.train.cdpo import token_dpo_loss

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        nothing, mask = torch.zeros_like(chosen), torch.ones_like(chosen)
        given = (chosen, nothing, chosen.detach(), nothing, mask, mask)
        return token_dpo_loss(*given, beta=1.0)[0] * 2 / chosen.numel()

    return "", gradient(bench, bench.plain if text is None else text, loss)


def _sstoken(bench: Bench, text: torch.Tensor | None = None) -> tuple[str, torch.Tensor]:
    """With all tokens kept."""
    from pertoken.train.sstoken import sstoken_loss

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        nowhere, mask = torch.zeros_like(chosen), torch.ones_like(chosen)
        return sstoken_loss(chosen, chosen.detach(), nowhere, mask, keep=1.0)[0]

    return "", gradient(bench, bench.plain if text is None else text, loss)


def gradient(
    bench: Bench,
    text: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor] | None = None,
    read: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient in the output matrix of a loss on the new tokens of a text [1, time], of their
    log-probabilities; of minus their mean, the policy gradient's, if not given. read: what the
    model reads in the text's place."""
    start = bench.ids.shape[1]
    weight = bench.model.get_output_embeddings().weight
    read = text if read is None else read
    log_probs = bench.model(read).logits.log_softmax(-1)[:, start - 1 : -1]
    chosen = log_probs.gather(-1, text[:, start:, None])[..., 0]
    return torch.autograd.grad(-chosen.mean() if loss is None else loss(chosen), weight)[0]


def _numbers(bench: Bench) -> Bench:
    from pertoken.tokenize.numbers import NumberDirection

    return Bench(bench.model, NumberDirection("r2l", group=2)(bench.tokenizer))


def _transplant(bench: Bench) -> Bench:
    from pertoken.tokenize.tokenadapt import transplant

    new = tiny_tokenizer("th", "ca", "at", "do")
    return Bench(*transplant(bench.model, bench.tokenizer, new))


def _consistency(bench: Bench) -> tuple[str, torch.Tensor]:
    from pertoken.probe import token_consistency

    found = token_consistency(bench.model, bench.tokenizer, [bench.text], max_new_tokens=4)
    return found.table(), torch.tensor(len(found.rows()))


def _characters(bench: Bench) -> tuple[str, torch.Tensor]:
    from pertoken.probe import charbench

    words = ["four", "letters", "strawberry"]
    found = charbench(bench.model, bench.tokenizer, words, each=1, max_new_tokens=2)
    return found.table(), torch.tensor(len(found.rows()))


def _preselect(bench: Bench) -> tuple[str, torch.Tensor]:
    from pertoken.train import bits_per_character

    return "", torch.tensor(bits_per_character(bench.model, bench.tokenizer, [bench.text]))


_OWN: dict[str, tuple[Kind, Callable[..., Any]]] = {
    "awrs": ("sampler", _awrs),
    "balanced": ("drafter", _balanced),
    "byte-probabilities": ("bytes", _bytes),
    "cdpo": ("loss", _cdpo),
    "charbench": ("probe", _characters),
    "cntp": ("chooser", _cautious),
    "fiberpo": ("loss", _fiberpo),
    "frugalprompt": ("text", _compress),
    "ngram-style": ("logits", _style),
    "knn-lm": ("logits", _knn),
    "layer-geometry": ("probe", _geometry),
    "lm-cascades": ("text", _cascade),
    "masked-thought": ("loss", _masked_thought),
    "number-tokenization": ("tokenizer", _numbers),
    "plt-kv": ("archive", _archive),
    "preselect": ("probe", _preselect),
    "reagent": ("text", _reagent),
    "residual-sinks": ("probe", _sinks),
    "sift": ("chat", _sift),
    "sstoken": ("loss", _sstoken),
    "token-consistency": ("probe", _consistency),
    "token-premiums": ("measure", _premiums),
    "tokenadapt": ("tokenizer", _transplant),
    "turkish-standards": ("measure", _morphology),
    "turkish-subword": ("measure", _morphology),
}
