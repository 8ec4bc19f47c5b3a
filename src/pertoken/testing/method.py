"""All laws that apply to a method, in one call.

    print(check_method(MyDrafter, "gpt2").table())

Its plug says which laws there are (`LAWS`); each of them holds, is skipped with a reason, or is
broken. A law that a method refuses in one `PertokenError` before its first forward is skipped with
that line: what a refusal costs is for the reader of the report to judge.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from pertoken.catalog import PLUGS
from pertoken.errors import PertokenError, nearest
from pertoken.result import Result
from pertoken.testing._arguments import CannotCall
from pertoken.testing._case import Case, Refused, case_model, plug_of
from pertoken.testing._law_sets import LAWS, Law
from pertoken.testing.battery import Subject
from pertoken.testing.battery import subject as subject_of
from pertoken.testing.laws import LawBroken
from pertoken.testing.text_laws import tiny_tokenizer
from pertoken.testing.verify import setup_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LawResult", "MethodReport", "check_method"]


@dataclass(frozen=True)
class LawResult:
    """What came of one law; why: the reason of a skip, or how it is broken."""

    law: str
    outcome: Literal["holds", "skipped", "broken"]
    why: str = ""


@dataclass(frozen=True)
class MethodReport(Result):
    """What `check_method` found: a row per law.

    model: the architecture, or the class of the model; "" for a method that meets none.
    """

    method: str
    plug: str
    model: str
    laws: tuple[LawResult, ...]

    @property
    def broken(self) -> tuple[LawResult, ...]:
        """The laws that do not hold."""
        return tuple(each for each in self.laws if each.outcome == "broken")

    @property
    def skips(self) -> dict[str, str]:
        """Skipped laws, and why."""
        return {each.law: each.why for each in self.laws if each.outcome == "skipped"}

    @property
    def holds(self) -> tuple[str, ...]:
        """The laws that hold."""
        return tuple(each.law for each in self.laws if each.outcome == "holds")

    def rows(self) -> list[dict[str, Any]]:
        """One flat record per law."""
        start = {"method": self.method, "plug": self.plug, "model": self.model}
        return [
            {**start, "law": each.law, "outcome": each.outcome, "why": each.why}
            for each in self.laws
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it, as plain JSON values."""
        laws = [{"law": x.law, "outcome": x.outcome, "why": x.why} for x in self.laws]
        return {"method": self.method, "plug": self.plug, "model": self.model, "laws": laws}

    def table(self) -> str:
        """The laws as aligned text, under a line that names the method."""
        width = max(len(each.law) for each in self.laws)
        on = f" on {self.model}" if self.model else ""
        lines = [
            f"{each.law:<{width}}  {each.outcome:<7}  {each.why}".rstrip() for each in self.laws
        ]
        return "\n".join([f"{self.method} ({self.plug}){on}", *lines])


def check_method(
    method: Any,
    model: PreTrainedModel | str | None = None,
    *,
    plug: str | None = None,
    tokenizer: Any = None,
    skip: Mapping[str, str] | None = None,
    laws: Collection[str] | None = None,
    seed: int = 0,
) -> MethodReport:
    """Run a method through every law that its plug calls for.

    method: a slug of `pertoken list`, a class, a function that makes one, or an object. A cache is
        given by its class or by a function of the model (and its `budget`, if it has one), since it
        holds one text; a processor or decoder that needs arguments by ``lambda: Method(...)``;
        functions over text, probes and losses with all bound that no law knows
        (`functools.partial`).
    model: an architecture of `ARCHITECTURES`, of which a tiny model is made ("llama" if None), or
        a model of yours: then text, tokenizer and probe need its `tokenizer` too.
    plug: one of `pertoken.catalog.PLUGS`; by default the card's, or what the object's type or
        arguments tell.
    skip: laws that do not apply, with the reason; they are rows of the report.
    laws: only these.

    All laws are run; then `LawBroken` is raised if any is broken, with the report as its `report`.
    Raises PertokenError for a plug, law or slug that is unknown, and for a method that cannot be
    called.

    >>> from transformers import TopKLogitsWarper
    >>> print(check_method(lambda: TopKLogitsWarper(5), "gpt2").table())
    TopKLogitsWarper (logits) on gpt2
    scores          holds
    batch = single  holds
    no trace        holds
    """
    subject = _subject(method, plug)
    chosen = _chosen(subject, skip, laws)
    case = _case(subject, model, tokenizer, seed)
    reasons = {**subject.skip, **(skip or {})}
    results = tuple(_run(law, run, case, reasons) for law, run in chosen.items())
    on = case.architecture or ("" if case.model is None else type(case.model).__name__)
    report = MethodReport(subject.name, subject.plug, on, results)
    if report.broken:
        lines = "; ".join(f"{each.law}: {each.why}" for each in report.broken)
        broken = LawBroken(f"{report.method}{f' on {on}' if on else ''} breaks {lines}")
        broken.report = report
        raise broken
    return report


def _subject(method: Any, plug: str | None) -> Subject:
    """What is checked, and what is known of it."""
    if plug is not None and plug not in PLUGS:
        raise PertokenError(f"unknown plug {plug!r}{nearest(plug, PLUGS)}: {', '.join(PLUGS)}")
    if isinstance(method, str):
        known = subject_of(method)
        return known if plug is None else replace(known, plug=plug)
    found = plug or plug_of(method)
    return Subject(_name(method, found), found, method)


def _case(subject: Subject, model: PreTrainedModel | str | None, tokenizer: Any, seed: int) -> Case:
    """The method with a model, if it meets one, and a tokenizer."""
    own = not isinstance(model, str | None)
    given = tokenizer is not None
    tokenizer = tokenizer if given else tiny_tokenizer()
    if not subject.meets_model:
        return Case(subject.method, subject.plug, None, tokenizer, None, seed)
    if own and not given and subject.plug in ("text", "tokenizer", "probe"):
        raise PertokenError("a model given as an object needs its tokenizer: tokenizer=…")
    found, architecture = case_model(model, tokenizer, subject.plug)
    return Case(subject.method, subject.plug, found, tokenizer, architecture, seed)


def _name(method: Any, plug: str) -> str:
    name = setup_name(method)
    if name != "<lambda>" or plug not in ("generate", "logits"):
        return name
    try:
        return setup_name(method())
    except Exception:  # said again, and in full, by the laws
        return name


def _chosen(
    subject: Subject, skip: Mapping[str, str] | None, laws: Collection[str] | None
) -> dict[str, Law]:
    """The laws to run; PertokenError for a name that is none of theirs."""
    known = {**LAWS[subject.plug], **subject.laws}
    for name in (*(skip or {}), *(laws or ())):
        if name not in known:
            raise PertokenError(
                f"no law {name!r}{nearest(name, known)} of plug {subject.plug}: {', '.join(known)}"
            )
    return {name: law for name, law in known.items() if laws is None or name in laws}


def _run(name: str, law: Law, case: Case, reasons: Mapping[str, str]) -> LawResult:
    if name in reasons:
        return LawResult(name, "skipped", reasons[name])
    try:
        why = law(case)
    except Refused as refusal:
        return LawResult(name, "skipped", f"refused by name: {refusal}")
    except CannotCall:
        raise
    except LawBroken as broken:
        return LawResult(name, "broken", str(broken))
    except Exception as error:
        return LawResult(name, "broken", f"it raised {type(error).__name__}: {error}")
    return LawResult(name, "holds") if why is None else LawResult(name, "skipped", why)
