"""The page of `compare`: self-contained, escaped, and complete."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from pertoken.compare_html import SOURCES, page
from pertoken.compare_report import Comparison, Decoded
from pertoken.prompts import Prompt
from pertoken.testing import Divergence, Verdict

EVIL = "</script><img src=x onerror=alert(1)> & \u2028 <!-- \ud800"
VOID = {"meta", "rect", "line", "img", "link", "input", "br"}


class Reader(HTMLParser):
    """Elements and attributes of a page; every element must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.content: dict[int, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        place = len(self.tags) - 1
        if not self.open or self.open[-1] != self.tags[place][0]:
            return  # between elements
        self.content[place] = self.content.get(place, "") + data

    def texts(self, tag: str) -> list[str]:
        return [self.content.get(i, "") for i, (name, _) in enumerate(self.tags) if name == tag]


def comparison() -> Comparison:
    traced = Decoded(
        [5, 6, 7, 8], 0.5, 2, 3, 0.1, 0.3, ["bonus", "spine", "new-kind", "bonus"], [1, 3]
    )
    traced.verdict = Verdict("identical", 4)
    plain = Decoded([5, 6, 7, 8], 1.0, 3, 3, 0.0, 0.9, ["bonus"] * 4, [1, 1, 1, 1])
    plain.verdict = Verdict("identical", 4)
    other = Decoded([5, 6, 9, 8], 1.0, 3, 3)
    other.verdict = Verdict("different", 4, Divergence(2, 7, 9))
    return Comparison(
        ("plain", "goose", "hf"),
        [Prompt(EVIL, EVIL, EVIL), Prompt("b", "y", "2")],
        [3, 3],
        [
            {"plain": plain, "goose": traced, "hf": other},
            {"plain": plain, "goose": plain, "hf": plain},
        ],
        {"model": EVIL, "dtype": "float32", "device": "cpu", "max_new_tokens": 4},
        lambda ids: [f"{token}{EVIL}" for token in ids],
    )


@pytest.fixture(scope="module")
def text() -> str:
    return page(comparison())


@pytest.fixture(scope="module")
def reader(text: str) -> Reader:
    return Reader(text)


def data(reader: Reader) -> Any:
    (found,) = [
        reader.content[i]
        for i, (_, attributes) in enumerate(reader.tags)
        if attributes.get("type") == "application/json"
    ]
    return json.loads(found)


def test_nothing_comes_from_outside(text: str, reader: Reader) -> None:
    assert not re.search(r"https?:|@import|url\(", text)
    for _, attributes in reader.tags:
        assert not attributes.keys() & {"src", "href", "style", "action"}
        assert not [name for name in attributes if name.startswith("on")]


def test_the_policy_allows_exactly_its_own_style_and_script(reader: Reader) -> None:
    (policy,) = [a["content"] for t, a in reader.tags if a.get("http-equiv")]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    style = reader.texts("style")[0]
    script = reader.texts("script")[1]
    for kind, own in (("style-src", style), ("script-src", script)):
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy


def test_texts_are_escaped_everywhere(text: str, reader: Reader) -> None:
    text.encode("utf-8")
    assert "<img" not in text
    assert not [tag for tag, _ in reader.tags if tag == "img"]
    assert reader.texts("title")[0].startswith("pertoken compare: </script><img")
    assert len(reader.texts("script")) == 2


def test_tokens_steps_and_origins_are_there(reader: Reader) -> None:
    found = data(reader)
    run = found["prompts"][0]["runs"]["goose"]
    assert run["steps"] == [1, 3]
    assert [found["sources"][i]["name"] for i in run["sources"]] == [
        "bonus (model's own)",
        "spine",
        "new-kind",
        "bonus (model's own)",
    ]
    assert [source["style"] for source in found["sources"]][:2] == ["", "s0"]
    assert found["prompts"][0]["runs"]["hf"]["sources"] is None
    assert found["start"] == {"method": "goose", "prompt": 0}


def test_a_text_that_methods_share_is_there_once(reader: Reader) -> None:
    first, second = data(reader)["prompts"]
    assert [run["text"] for run in first["runs"].values()] == [0, 0, 1]
    assert [len(prompt["texts"]) for prompt in (first, second)] == [2, 1]
    assert "leaves plain decoding at token 3: DIFFERENT" in first["runs"]["hf"]["line"]


def test_the_table_has_a_row_per_method(reader: Reader) -> None:
    heads = [a for t, a in reader.tags if t == "th" and a.get("scope") == "row"]
    assert len(heads) >= 3
    assert reader.texts("th")[8] == "plain"
    assert any("1 DIFFERENT" in cell for cell in reader.texts("td"))


def test_every_known_origin_has_a_look_of_its_own() -> None:
    assert len(SOURCES) - 1 <= 8


def test_every_class_and_id_of_the_script_is_there(text: str, reader: Reader) -> None:
    script = reader.texts("script")[1]
    ids = {a["id"] for _, a in reader.tags if "id" in a}
    assert set(re.findall(r'at\("(\w+)"\)', script)) <= ids
    style = reader.texts("style")[0]
    for name in ("step", "token", "sign", "now", *(f"s{i}" for i in range(8))):
        assert f".{name}" in style
