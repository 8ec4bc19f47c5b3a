"""Reads the Turkish treebanks: rows of inflectional groups, joined into words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["parse_treebanks"]


def parse_treebanks(members: dict[str, bytes]) -> Iterator[dict[str, Any]]:
    """One sentence a row. A word is its inflectional groups; all but the last have the relation ig.

    >>> lines = ["1 ev ev NOUN NN Case=Bare 2 ig _ _", "2 siz _ ADJ JJ Derivation=Wout 0 root _ _"]
    >>> text = "".join(line.replace(" ", chr(9)) + chr(10) for line in lines)
    >>> row = next(parse_treebanks({"data/web.conllu": text.encode()}))
    >>> row["words"], row["features"], row["tags"]
    ([['ev', 'siz']], [['Case=Bare', 'Derivation=Wout']], ['ADJ'])
    """
    for name, content in sorted(members.items()):
        for block in content.decode("utf-8").replace("\r\n", "\n").split("\n\n"):
            notes: dict[str, str] = {}
            rows = []
            for line in block.splitlines():
                key, equals, value = line.removeprefix("#").partition(" = ")
                if line.startswith("#") and equals:
                    notes[key.strip()] = value
                elif len(fields := line.split("\t")) == 10:
                    rows.append(fields)
            if rows:
                source = Path(name).stem
                yield {
                    "id": notes.get("sent_id", ""),
                    "source": source,
                    "text": notes.get("text", ""),
                    **_words(rows),
                }


def _words(rows: list[list[str]]) -> dict[str, list[Any]]:
    words: list[list[str]] = []
    features: list[list[str]] = []
    lemmas: list[str] = []
    tags: list[str] = []
    goes_on = False
    for _, form, lemma, tag, _, marks, _, relation, _, _ in rows:
        if not goes_on:
            words.append([])
            features.append([])
            lemmas.append(lemma)
            tags.append(tag)
        words[-1].append(form)
        features[-1] += [mark for mark in marks.split("|") if mark != "_"]
        tags[-1] = tag  # a word is what its last group makes of it
        goes_on = relation == "ig"
    return {"words": words, "lemmas": lemmas, "tags": tags, "features": features}
