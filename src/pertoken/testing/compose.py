"""Which methods work together: every pair is tried on a tiny model, under the law it must satisfy.

A method acts at one place, and so do the kinds of `pertoken.testing._parts`; what two of them must
satisfy together follows from the places alone (`RULES`): a drafter and a cache, for example, must
write the text of plain decoding. A pair either works under its law, or is refused before the first
forward by one line that names both, or the two act at different times and have nothing to do with
each other. Anything else is a fault of a method, called "broken" here.

`python -m pertoken.testing.compose` writes the page that says it all.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

from pertoken.errors import PertokenError, nearest
from pertoken.result import Result
from pertoken.testing import _pair_laws as laws
from pertoken.testing._bench import Bench, tiny_bench
from pertoken.testing._pair_laws import Law, Refused
from pertoken.testing._parts import KINDS, Kind, Part, parts
from pertoken.testing.laws import LawBroken

__all__ = [
    "Bench",
    "Compositions",
    "Outcome",
    "PairResult",
    "check_pair",
    "compositions",
    "pairs",
    "tiny_bench",
]

Outcome = Literal["works", "refused", "one place", "apart", "broken"]
"""What became of a pair, see `PairResult`."""


@dataclass(frozen=True)
class Rule:
    """What two kinds have to do with each other: `says` is the law, or why there is none.

    outcome: where there is no law to run.
    """

    says: str
    law: Law | None = None
    outcome: Outcome = "apart"


@dataclass(frozen=True)
class PairResult:
    """What became of a pair.

    outcome: "works" under the law that `line` says; "refused" with the line of the error; "one
    place", which takes one of them, or "apart", with the reason; or "broken", with what went
    wrong. kinds: what the two act on.
    """

    a: str
    b: str
    kinds: tuple[Kind, Kind]
    outcome: Outcome
    line: str


@dataclass(frozen=True)
class Compositions(Result):
    """The results of many pairs."""

    results: tuple[PairResult, ...]
    _title: ClassVar[str] = "Methods together"

    @property
    def broken(self) -> list[PairResult]:
        """The pairs that neither work nor are refused by name."""
        return [each for each in self.results if each.outcome == "broken"]

    def rows(self) -> list[dict[str, Any]]:
        """One flat record per pair."""
        return [{**asdict(each), "kinds": " x ".join(each.kinds)} for each in self.results]

    def to_dict(self) -> dict[str, Any]:
        """The pairs as plain JSON values."""
        return {"pairs": self.rows()}

    def table(self) -> str:
        """One line per pair."""
        width = max((len(f"{each.a} + {each.b}") for each in self.results), default=0)
        return "\n".join(
            f"{f'{each.a} + {each.b}':{width}}  {each.outcome:7}  {each.line}"
            for each in self.results
        )

    def to_markdown(self) -> str:
        """The page of the documentation."""
        from pertoken.testing._compose_page import page

        return page(self.results)


def compositions(
    names: Sequence[str] | None = None,
    *,
    bench: Bench | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Compositions:
    """Try every unordered pair of these methods, by default of all that are finished.

    names: slugs of the catalogue, names of `pertoken.cache.CACHES`, "constraint",
        "logits-processor". bench: see `check_pair`. progress: called with
        (what, done, total).

    >>> compositions(["goose", "h2o", "kv-direct"]).broken
    []
    """
    chosen = pairs(names)
    found = []
    for place, (a, b) in enumerate(chosen):
        if progress is not None:
            progress(f"{a} + {b}", place, len(chosen))
        found.append(check_pair(a, b, bench))
    return Compositions(tuple(found))


def pairs(names: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """Unordered pairs of different parts, by kind. Raises PertokenError for an unknown name."""
    known = list(parts())
    chosen = known if names is None else [_known(name).name for name in names]
    return list(itertools.combinations(sorted(chosen, key=known.index), 2))


def check_pair(a: str, b: str, bench: Bench | None = None) -> PairResult:
    """Use two methods together and say whether their law holds.

    a, b: as in `compositions`. bench: what they are used on, a `tiny_bench()` if not given;
        `Bench(model, tokenizer)` for another model, in float64 if texts are to be equal.
    Raises PertokenError for an unknown name.

    >>> check_pair("kv-direct", "goose").outcome
    'works'
    >>> print(check_pair("h2o", "prompt-lookup").line.partition(":")[0])
    PromptLookup drops the rows of rejected drafts, which H2OCache cannot
    """
    order = list(KINDS)
    one, other = sorted((_known(a), _known(b)), key=lambda part: order.index(part.kind))
    kinds = (one.kind, other.kind)
    rule = RULES[kinds]

    def result(outcome: Outcome, line: str) -> PairResult:
        return PairResult(one.name, other.name, kinds, outcome, line)

    if rule.law is None:
        return result(rule.outcome, rule.says)
    try:
        rule.law(_usual() if bench is None else bench, one, other)
    except Refused as refused:
        if fault := _fault(refused, one, other):
            return result("broken", f"{fault}: {refused.line}")
        return result("refused", refused.line)
    except LawBroken as broken:
        return result("broken", f"{rule.says}: {broken}")
    except Exception as error:
        return result("broken", f"{type(error).__name__}: {error}")
    return result("works", rule.says)


def _known(name: str) -> Part:
    known = parts()
    if name not in known:
        raise PertokenError(
            f"nothing to combine is called {name!r}{nearest(name, known)}: slugs of finished "
            "methods, names of caches, constraint, logits-processor"
        )
    return known[name]


_usual = lru_cache(maxsize=1)(tiny_bench)  # for a run over many pairs


def _fault(refused: Refused, one: Part, other: Part) -> str:
    """What is wrong with a refusal; empty where it is as it must be."""
    if refused.forwards:
        return f"refused only after {refused.forwards} forwards"
    if "\n" in refused.line:
        return "refused in several lines"
    for part in (one, other):
        if not any(word in refused.line for word in part.said):
            return f"refused without naming {part.name}"
    return ""


_WAY = Rule("both are ways of decoding, and `custom_generate=` takes one", None, "one place")
_BYTES = Rule("a byte model decodes bytes by itself, and takes nothing that acts on tokens")
_BESIDE = Rule(
    "while a text is read through the cache, the other method finds what it finds without, and "
    "the text is read as without it",
    laws.side_by_side,
)
_ITS_TEXT = Rule(
    "what the method writes is decoded as if typed by hand, and it writes the same afterwards",
    laws.decode_its_text,
)
_DRAWN = Rule(
    "on a text just drawn so, the loss has the gradient of the policy gradient",
    laws.loss_decoding,
)
_CHANGED = Rule(
    "what it promises alone it keeps with the model and tokenizer that come of the change",
    laws.other_tokenizer,
)
_MEASURED = Rule("a tokenizer is measured on texts alone, before any model runs")
_ASKS = Rule("it asks in messages and reads texts, whatever the model decodes them with")
_READS = Rule("a probe reads a model by itself, with nothing else on it")
_TRAINED = Rule("a loss acts on ids in training, this before there are ids")

_DECODING: tuple[Kind, ...] = ("drafter", "sampler", "chooser", "constraint", "logits")

RULES: dict[tuple[Kind, Kind], Rule] = {
    ("drafter", "drafter"): _WAY,
    ("drafter", "sampler"): _WAY,
    ("drafter", "chooser"): _WAY,
    ("sampler", "chooser"): _WAY,
    ("drafter", "constraint"): Rule(
        "text as with the constraint's mask in plain decoding", laws.drafter_constraint
    ),
    ("drafter", "logits"): Rule(
        "text as in plain decoding with the processor", laws.drafter_logits
    ),
    ("drafter", "cache"): Rule(
        "text as in plain decoding, also in a batch and in the next turn of a cache",
        laws.drafter_cache,
    ),
    ("drafter", "archive"): Rule("text as without the archive", laws.drafter_archive),
    ("sampler", "constraint"): Rule(
        "samples obey both, weighed as the masked model says", laws.sampler_constraint
    ),
    ("sampler", "logits"): Rule(
        "samples weighed as the model says that the processor makes", laws.sampler_logits
    ),
    ("sampler", "cache"): Rule(
        "samples weighed as the text read through that cache says; if it is exact, the samples of "
        "a full cache",
        laws.sampler_cache,
    ),
    ("sampler", "archive"): Rule("samples as without the archive", laws.sampler_archive),
    ("chooser", "constraint"): Rule(
        "text as of one trial after the other, under the mask", laws.chooser_constraint
    ),
    ("chooser", "logits"): Rule(
        "text as of one trial after the other, with the processor", laws.chooser_logits
    ),
    ("chooser", "cache"): Rule(
        "text as with a full cache under the same seed, also in the next turn and in a batch",
        laws.chooser_cache,
    ),
    ("chooser", "archive"): Rule(
        "text as without the archive under the same seed", laws.chooser_archive
    ),
    ("constraint", "logits"): Rule(
        "drafted text as with the mask in plain decoding, both with the processor",
        laws.constraint_logits,
    ),
    ("constraint", "cache"): Rule(
        "text as chosen by hand, step by step, through that cache and under the mask; drafted, "
        "only through a cache that drafters go with",
        laws.constraint_cache,
    ),
    ("constraint", "archive"): Rule("text as without the archive", laws.constraint_archive),
    ("logits", "logits"): Rule(
        "text as chosen by hand behind both, in either order", laws.logits_logits
    ),
    ("logits", "cache"): Rule(
        "text as chosen by hand, step by step, through that cache and behind the processor",
        laws.logits_cache,
    ),
    ("logits", "archive"): Rule("text as without the archive", laws.logits_cache),
    ("cache", "cache"): Rule(
        "both are caches, and `past_key_values=` takes one", None, "one place"
    ),
    ("cache", "archive"): Rule(
        "what was read through the cache comes back from the file bit by bit", laws.cache_archive
    ),
    ("cache", "text"): _BESIDE,
    ("cache", "bytes"): _BESIDE,
    ("cache", "loss"): _BESIDE,
    ("archive", "text"): _BESIDE,
    ("archive", "bytes"): _BESIDE,
    ("archive", "loss"): _BESIDE,
    ("text", "text"): Rule("each takes what the other gives", laws.text_text),
    ("text", "bytes"): Rule("the bytes behind what it writes have mass 1", laws.text_bytes),
    ("text", "loss"): _TRAINED,
    ("bytes", "loss"): Rule("a byte model has no log-probabilities of tokens to train on"),
    ("measure", "tokenizer"): _CHANGED,
    ("measure", "loss"): _MEASURED,
    ("measure", "measure"): _MEASURED,
    ("tokenizer", "tokenizer"): Rule("the same in either order", laws.tokenizer_tokenizer),
    ("tokenizer", "loss"): _TRAINED,
    ("loss", "loss"): Rule(
        "both say what a token of a training step counts, and a step has one loss",
        None,
        "one place",
    ),
    **{(kind, "text"): _ITS_TEXT for kind in _DECODING},
    **{(kind, "bytes"): _BYTES for kind in _DECODING},
    **{(kind, "loss"): _DRAWN for kind in _DECODING},
    **{(kind, "chat"): _ASKS for kind in list(KINDS)[: list(KINDS).index("chat")]},
    **{("chat", kind): _ASKS for kind in list(KINDS)[list(KINDS).index("chat") :]},
    **{
        (kind, "measure"): _MEASURED
        for kind in KINDS
        if kind not in ("measure", "probe", "tokenizer", "loss", "chat")
    },
    **{(kind, "probe"): _READS for kind in list(KINDS)[: list(KINDS).index("probe")]},
    **{("probe", kind): _READS for kind in list(KINDS)[list(KINDS).index("probe") :]},
    **{
        (kind, "tokenizer"): _CHANGED
        for kind in KINDS
        if kind not in ("measure", "probe", "tokenizer", "loss", "chat")
    },
}


if __name__ == "__main__":
    sys.stdout.write(compositions().to_markdown())
