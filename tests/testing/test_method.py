"""check_method finds the plug, runs its laws, and tells a refusal from a broken law."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, RepetitionPenaltyLogitsProcessor

from pertoken.attribute import attribute
from pertoken.cache import KVDirectCache
from pertoken.decode import Goose, Plain, PromptLookup
from pertoken.errors import PertokenError
from pertoken.prune import compress
from pertoken.testing import LawBroken, check_method, tiny_model
from pertoken.testing._case import plug_of
from pertoken.testing._law_sets import LAWS
from pertoken.tokenize import NumberDirection, token_premiums, transplant
from pertoken.train import fiberpo_loss


class Hooked:
    """A context manager that changes nothing."""

    def __init__(self, model: Any) -> None:
        self.layer = model.get_input_embeddings()

    def __enter__(self) -> None:
        self.handle = self.layer.register_forward_hook(lambda *_: None)

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


@contextmanager
def hooked(model: Any) -> Iterator[None]:
    with Hooked(model):
        yield


def own_loop(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return Plain()(model, input_ids, **kwargs)


class Doubled(Plain):
    """Its last token is another one: not lossless."""

    slug = "doubled"

    def __call__(self, model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        ids = super().__call__(model, input_ids, **kwargs)
        ids[:, -1] = (ids[:, -1] + 1) % 8
        return ids


PLUGS: list[tuple[Any, str]] = [
    (Goose, "generate"),
    (Goose(budget=3), "generate"),
    (lambda: Goose(budget=3), "generate"),
    (own_loop, "generate"),
    (RepetitionPenaltyLogitsProcessor, "logits"),
    (RepetitionPenaltyLogitsProcessor(1.2), "logits"),
    (lambda input_ids, scores: scores, "logits"),
    (KVDirectCache, "cache"),
    (DynamicCache, "cache"),
    (Hooked, "hooks"),
    (hooked, "hooks"),
    (compress, "text"),
    (attribute, "text"),
    (NumberDirection("r2l"), "tokenizer"),
    (transplant, "tokenizer"),
    (fiberpo_loss, "loss"),
    (partial(fiberpo_loss, trajectory=(0.9, 1.1)), "loss"),
    (type(tiny_model("gpt2")), "net"),
    (token_premiums, "probe"),
    (lambda model, tokenizer: None, "probe"),
]


def name_of(given: Any) -> str:
    """A name that is the same in every process of the tests."""
    return str(getattr(given, "__name__", None) or str(given).partition(" at 0x")[0])[:40]


@pytest.mark.parametrize(("method", "plug"), PLUGS, ids=name_of)
def test_the_plug_is_found(method: Any, plug: str) -> None:
    assert plug_of(method) == plug


def test_what_cannot_be_told_asks_for_the_plug() -> None:
    with pytest.raises(PertokenError, match="say plug=, one of generate, logits"):
        check_method(lambda model: DynamicCache())


PASSING: list[tuple[Any, dict[str, Any]]] = [
    (own_loop, {}),
    (PromptLookup(), {}),
    (lambda: RepetitionPenaltyLogitsProcessor(1.2), {}),
    (lambda model: DynamicCache(), {"plug": "cache"}),
    (KVDirectCache, {}),
    (hooked, {}),
    (partial(transplant, method="retok"), {}),
    (partial(fiberpo_loss, trajectory=(0.97, 1.03)), {}),
    (partial(compress, salience="stop-words"), {}),
    (tiny_model("opt"), {}),
]


@pytest.mark.parametrize(("method", "given"), PASSING, ids=name_of)
def test_what_is_right_passes_all_its_laws(method: Any, given: dict[str, Any]) -> None:
    report = check_method(method, "gpt2", **given)
    assert [each.law for each in report.laws] == list(LAWS[report.plug])
    assert len(report.holds) >= 2
    assert not report.broken
    assert [row["law"] for row in report.rows()] == [
        each["law"] for each in report.to_dict()["laws"]
    ]
    assert all(law in report.table() for law in report.holds)


def test_all_broken_laws_are_named_at_the_end() -> None:
    with pytest.raises(
        LawBroken, match=r"doubled on llama breaks lossless: .*; lossless with"
    ) as e:
        check_method(Doubled)
    report = e.value.report
    assert {"lossless", "lossless with processors"} <= {each.law for each in report.broken}
    assert "no trace" in report.holds
    assert "broken" in report.table()


def test_a_crash_is_a_broken_law() -> None:
    def crash(model: Any, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return model(input_ids).no_such_thing

    with pytest.raises(LawBroken, match=r"lossless: it raised AttributeError: .*no_such_thing"):
        check_method(crash, laws=["lossless"])


class Refuses(Plain):
    """No batches; and no text of its own behind a forward."""

    late = False

    def __call__(self, model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.late:
            model(input_ids)
        if len(input_ids) > 1:
            raise PertokenError("Refuses takes one row, not a batch")
        return super().__call__(model, input_ids, **kwargs)


def test_a_refusal_before_the_first_forward_is_a_skip_and_behind_it_a_broken_law() -> None:
    report = check_method(Refuses, laws=["lossless", "batch = single"])
    assert report.holds == ("lossless",)
    assert report.skips == {"batch = single": "refused by name: Refuses takes one row, not a batch"}
    with pytest.raises(LawBroken, match="batch = single: it raised PertokenError: Refuses takes"):
        check_method(type("Late", (Refuses,), {"late": True}), laws=["batch = single"])


def test_a_reason_skips_a_law() -> None:
    report = check_method(Doubled, skip={"lossless": "wrong on purpose"}, laws=["lossless"])
    assert report.skips == {"lossless": "wrong on purpose"}
    assert report.table().splitlines()[-1].split("  ")[-1] == "wrong on purpose"


def test_a_model_of_ones_own() -> None:
    model = tiny_model("phi", vocab_size=40)
    report = check_method("plain", model)
    assert report.model == "PhiForCausalLM"
    assert "too many tokens to count" in report.skips["distribution"]
    assert not check_method("plain", tiny_model("phi", vocab_size=8), laws=["distribution"]).skips


MISTAKES: list[tuple[Any, dict[str, Any], str]] = [
    ("gose", {}, "did you mean 'goose'"),
    ("skipdecode", {}, "planned"),
    (Goose, {"plug": "generat"}, "unknown plug 'generat' .did you mean 'generate'"),
    (Goose, {"laws": ["losless"]}, "no law 'losless' .did you mean 'lossless'"),
    (Goose, {"skip": {"turns": "no"}}, "no law 'turns' of plug generate"),
    (Goose, {"model": "lama"}, "unknown architecture 'lama'"),
    (attribute, {"model": tiny_model("gpt2")}, "needs its tokenizer"),
]


@pytest.mark.parametrize(("method", "given", "message"), MISTAKES, ids=name_of)
def test_mistakes_are_one_line(method: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(PertokenError, match=message) as error:
        check_method(method, **given)
    assert "\n" not in str(error.value)


def test_arguments_that_no_law_knows_are_named() -> None:
    with pytest.raises(PertokenError, match="needs trajectory, which no law knows: bind it first"):
        check_method(fiberpo_loss, laws=["mask"])
    with pytest.raises(PertokenError, match="a cache holds one text: give its class"):
        check_method(DynamicCache(), laws=["turns"])


class Silent(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.fill_(-torch.inf)


def test_a_processor_that_writes_into_its_input_is_found() -> None:
    with pytest.raises(LawBroken, match="changed the scores it was given in place"):
        check_method(Silent)
