"""Every pair of methods works under its law or refuses by naming both; and the laws can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from pertoken.catalog import baselines, methods, source_tree
from pertoken.decode import Drafter, PromptLookup
from pertoken.errors import PertokenError
from pertoken.testing import check_pair, compositions
from pertoken.testing._parts import KINDS, Part, parts
from pertoken.testing.compose import RULES, Compositions, PairResult, pairs, tiny_bench


def test_every_pair_works_or_is_refused_by_name_and_the_page_says_so() -> None:
    found = compositions()
    assert not found.broken, "\n".join(f"{one.a} + {one.b}: {one.line}" for one in found.broken)
    tree = source_tree()
    if tree is None:
        pytest.skip("the page needs the source tree")
    page = (tree / "docs" / "composition.md").read_text(encoding="utf-8")
    assert page == found.to_markdown(), (
        "run python -m pertoken.testing.compose > docs/composition.md"
    )


def test_every_finished_method_takes_part() -> None:
    finished = {card.slug for card in (*methods(), *baselines()) if card.status != "planned"}
    assert finished <= set(parts())


def test_every_two_kinds_have_a_rule() -> None:
    order = list(KINDS)
    for a, b in pairs():
        kinds = (parts()[a].kind, parts()[b].kind)
        assert order.index(kinds[0]) <= order.index(kinds[1])
        assert RULES[kinds].says


@pytest.mark.parametrize("architecture", ["gemma3", "gpt2", "qwen3-sliding"])
@pytest.mark.parametrize(
    "names", [("goose", "kv-direct"), ("goose", "plt-kv"), ("awrs", "h2o"), ("constraint", "tova")]
)
def test_other_models_keep_the_laws(architecture: str, names: tuple[str, str]) -> None:
    result = check_pair(*names, tiny_bench(architecture))
    assert result.outcome == "works", result.line


def test_drafts_are_made_and_taken_back_on_the_bench() -> None:
    bench = tiny_bench()
    for part in parts().values():
        if part.kind == "drafter" and part.name != "plain":
            drafter = part.make(bench)
            bench.write(bench.ids, custom_generate=drafter)
            drafted, accepted = drafter.stats.drafted, drafter.stats.accepted
            assert 0 < accepted.total() < drafted.total(), part.name


# Laws that can tell: wrong methods are called broken.


class _Believes(PromptLookup):
    """Writes another last token."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = super().__call__(*args, **kwargs)
        found[:, -1] = 5
        return found


class _Forgets(DynamicCache):
    """Loses its keys."""

    def update(self, key: Any, value: Any, layer: int, *rest: Any, **kw: Any) -> Any:
        keys, values = super().update(key, value, layer, *rest, **kw)
        return torch.zeros_like(keys), values


class _Late(Drafter):
    """Refuses after a forward."""

    def __call__(self, model: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        model(input_ids)
        raise PertokenError("_Late does not go with late, DynamicCache, full, KVDirectCache")


class _Vague(Drafter):
    """Refuses without a name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise PertokenError("this does not work")


class _Crashes(Drafter):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise KeyError("state")


@pytest.mark.parametrize(
    ("kind", "make", "other", "line"),
    [
        ("drafter", lambda _: _Believes(), "full", "one row: at"),
        ("drafter", lambda _: _Believes(), "constraint", "plain decoding: mask"),
        ("drafter", lambda _: _Believes(), "logits-processor", "1 rows"),
        ("drafter", lambda _: _Late(), "full", "refused only after 1 forwards"),
        ("drafter", lambda _: _Vague(), "full", "refused without naming wrong"),
        ("drafter", lambda _: _Crashes(), "full", "KeyError"),
        ("cache", lambda _: _Forgets(), "goose", "one row"),
        ("logits", lambda _: [lambda ids, scores: scores + torch.rand(())], "full", None),
        ("text", lambda _: ("a cat", torch.rand(3)), "kv-direct", "wrong"),
        ("loss", lambda _: ("", torch.rand(3)), "kv-direct", "wrong"),
        ("bytes", lambda _: ("", torch.rand(257)), "full", "wrong"),
    ],
)
def test_a_wrong_method_is_called_broken(
    kind: Any,
    make: Callable[[Any], Any],
    other: str,
    line: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A cache named like an exact one is held to the text of plain decoding.
    name = "full:wrong" if kind == "cache" else "wrong"
    wrong = Part(name, kind, make, ("nothing",) if line and "naming" in line else ("",))
    known = {**parts(), name: wrong}
    monkeypatch.setattr("pertoken.testing.compose.parts", lambda: known)
    result = check_pair(name, other, tiny_bench())
    if line is None:  # adding one number to all scores changes no choice
        assert result.outcome == "works"
        return
    assert result.outcome == "broken"
    assert line in result.line


# The result.


def test_a_run_over_some_names_gives_their_pairs_in_all_forms() -> None:
    seen: list[Any] = []
    found = compositions(["h2o", "goose", "token-premiums"], progress=lambda *at: seen.append(at))
    assert seen == [
        ("goose + h2o", 0, 3),
        ("goose + token-premiums", 1, 3),
        ("h2o + token-premiums", 2, 3),
    ]
    assert [each.outcome for each in found.results] == ["refused", "apart", "apart"]
    assert found.broken == []
    assert found.rows()[0]["kinds"] == "drafter x cache"
    assert found.to_dict()["pairs"] == found.rows()
    assert found.table().splitlines()[0].startswith("goose + h2o  ")
    assert "| **drafter** |" in found.to_markdown()


def test_the_page_says_what_is_broken() -> None:
    result = PairResult("goose", "full", ("drafter", "cache"), "broken", "the line")
    text = Compositions((result,)).to_markdown()
    assert "broken (1)" in text
    assert "the line" in text


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(PertokenError, match="did you mean 'goose'"):
        check_pair("gose", "full")
    with pytest.raises(PertokenError, match="'h20'"):
        compositions(["h20", "goose"])
