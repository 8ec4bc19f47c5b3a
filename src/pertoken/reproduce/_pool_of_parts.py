"""A pool of documents whose parts are known, and small models that have read other mixes of them.

Target: worked answers of school mathematics. Beside it: the same with the words of each shuffled,
Python's own library, its manual, plays, and mails. Every part is cut into documents of about six
hundred characters; what models are trained on, the pool, and what they are judged on are apart.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

Rows = Sequence[Mapping[str, Any]]
Parts = dict[str, list[str]]

TARGET, SHUFFLED = "mathematics", "shuffled mathematics"
OTHERS = ("code", "manual", "plays", "mails")
CUT = 600  # characters of a document, about
POOL = {"code": 1_400_000, "manual": 350_000, "plays": 1_400_000, "mails": 1_400_000}
SHARES = (0.0, 0.03, 0.07, 0.13, 0.22, 0.35)  # of the target in what each model reads


def mathematics(rows: Rows, rest: int) -> list[str]:
    """Problems with their worked answers whose number leaves `rest` when divided by 4."""
    return [
        f"{row['question']}\n{re.sub('<<.*?>>', '', row['answer'])}"
        for number, row in enumerate(rows)
        if number % 4 == rest
    ]


def parts(rows: Mapping[str, Rows], *, pool: bool, most: int | None = None) -> Parts:
    """The documents of each part: those of the pool, or those that models are trained on.

    rows: of the data sets, by name. most: characters of a part, else those of `POOL`. Files,
    plays and mails of odd number are the pool's.
    """
    texts = {
        "code": _code(),
        "manual": _manual(),
        "plays": ["\n".join(row["speeches"]) for row in rows["shakespeare"]],
        "mails": [str(row["text"]).strip() for row in rows["spam-assassin"] if _plain(row)],
    }
    target = mathematics(rows["gsm8k"], 1 if pool else 0)
    found = {TARGET: target}
    if pool:
        draw = np.random.default_rng(0)
        found[SHUFFLED] = [" ".join(draw.permutation(text.split())) for text in target]
    for name, own in texts.items():
        mine = own[1::2] if pool else own[::2]
        found[name] = _up_to((piece for text in mine for piece in cut(text)), most or POOL[name])
    return found


def cut(text: str) -> Iterator[str]:
    """Pieces of about `CUT` characters that end where lines do; what is left over is dropped.

    >>> [len(piece) for piece in cut("a line of text\\n" * 100)]
    [600, 600]
    """
    waiting, size = [], 0
    for line in text.splitlines(keepends=True):
        waiting.append(line)
        size += len(line)
        if size >= CUT:
            yield "".join(waiting)[: 2 * CUT].strip("\n") + "\n"
            waiting, size = [], 0


def _up_to(documents: Iterator[str], most: int) -> list[str]:
    found, size = [], 0
    for one in documents:
        if size >= most:
            break
        found.append(one)
        size += len(one)
    return found


def _code() -> list[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py") if path.stat().st_size > 5000)
    return [path.read_text(encoding="utf-8", errors="replace") for path in files]


def _manual() -> list[str]:
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def _plain(row: Mapping[str, Any]) -> bool:
    return row["label"] == "ham" and not re.search(r"(?i)<html|=\d\d", str(row["text"]))


def mix(known: Parts, number: int, characters: int, seed: int) -> list[str]:
    """What model `number` reads: its share of the target, and the others as a draw divides them."""
    draw = np.random.default_rng([seed, number])
    shares = dict(zip(OTHERS, draw.dirichlet(np.ones(len(OTHERS))), strict=True))
    wanted = {name: share * (1 - SHARES[number]) for name, share in shares.items()}
    wanted[TARGET] = SHARES[number]
    found: list[str] = []
    for name, share in wanted.items():
        size = 0
        while size < share * characters:  # a part that is too small is read again
            for place in draw.permutation(len(known[name])):
                if size >= share * characters:
                    break
                found.append(known[name][place])
                size += len(known[name][place])
    return [found[place] for place in draw.permutation(len(found))]


def rows_of(tokenizer: Any, documents: Sequence[str], length: int) -> torch.Tensor:
    """Rows [pieces, length] of the documents one after the other, each behind the start token."""
    start = tokenizer.bos_token_id
    ids = [
        token
        for text in documents
        for token in (start, *tokenizer(text, add_special_tokens=False)["input_ids"])
    ]
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)
