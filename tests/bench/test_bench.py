"""The replay counts what verification by the model would have accepted."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCH = Path(__file__).parents[2] / "bench"
peer = pytest.importorskip("suffix_peer")


def chain(tokens: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
    return tokens, list(range(-1, len(tokens) - 1))


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_a_chain_is_accepted_up_to_its_first_wrong_token(
    draft: list[int], truth: list[int]
) -> None:
    expected = 0
    while expected < min(len(draft), len(truth)) and draft[expected] == truth[expected]:
        expected += 1
    assert peer.accepted(*chain(draft), truth) == expected


def test_a_tree_is_accepted_along_its_best_path_only() -> None:
    #  root ─ 1 ─ 2      and a token that would fit, hung under a wrong one
    #       └ 9 ─ 1
    assert peer.accepted([9, 1, 1, 2], [-1, 0, -1, 2], [1, 2, 3]) == 2
    assert peer.accepted([9, 1], [-1, 0], [1]) == 0


def test_a_drafter_that_knows_nothing_costs_a_forward_a_token() -> None:
    committed: list[int] = []
    found = peer.replay([1], [5, 6, 7, 8], lambda context: ((), ()), committed.extend)
    assert found == {"tokens": 3, "forwards": 3, "drafted": 0, "hit": 0}
    assert committed == [5, 6, 7, 8]


def test_a_drafter_that_knows_all_gets_one_more_token_a_forward() -> None:
    output = list(range(1, 12))  # prefill gives 1; then 4 + 4 + 2
    seen: list[list[int]] = []

    def oracle(context: list[int]) -> tuple[Sequence[int], Sequence[int]]:
        seen.append(context)
        return chain([context[-1] + i for i in (1, 2, 3)])

    committed: list[int] = []
    found = peer.replay([0], output, oracle, committed.extend)
    assert (found["tokens"], found["forwards"]) == (10, 3)
    assert committed == output
    assert [context[-1] for context in seen] == [1, 5, 9]


@pytest.mark.parametrize("mode", ["path", "tree"])
def test_our_suffix_drafter_replayed_is_the_one_that_decodes(mode: str) -> None:
    import torch

    from pertoken.decode import SuffixTree
    from pertoken.testing import tiny_model

    model = tiny_model("llama", vocab_size=8)
    texts = []
    for number, prompt in enumerate([[1, 2, 3, 1, 2], [5, 6, 5, 6, 7, 5, 6]]):
        plain = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
        output = plain[0, len(prompt) :].tolist()
        about = {"question_id": number, "category": "qa"}
        texts.append({**about, "prompt_ids": prompt, "output_ids": output})
    for keep in (False, True):
        real = peer.run_ours(texts, model, SuffixTree(mode=mode, budget=6, keep=keep))
        again = peer.replay_ours(texts, SuffixTree(mode=mode, budget=6, keep=keep), 6)
        assert all(row["identical"] for row in real)
        figures = ("tokens", "forwards", "drafted", "hit")
        assert [[r[f] for f in figures] for r in real] == [[r[f] for f in figures] for r in again]
    assert sum(row["hit"] for row in again) > 0


def test_the_table_counts_common_prompts_and_splits_off_loops() -> None:
    def row(question: int, tokens: int, looping: bool = False) -> dict[str, object]:
        return {
            "question_id": question,
            "category": "qa",
            "looping": looping,
            "tokens": tokens,
            "forwards": 10,
        }

    text = peer.table(
        {"a": [row(1, 20), row(2, 60, True), row(3, 90)], "b": [row(1, 10), row(2, 10)]}
    )
    assert "| a | 4.000 | 2.000 | 4.000 | 2/2 |" in text
    assert "| b | 1.000 | 1.000 | 1.000 | 2/2 |" in text


def test_the_report_has_ratios_with_their_bars() -> None:
    def rows(tokens: int) -> list[dict[str, object]]:
        return [
            {"question_id": n, "category": "qa", "looping": False, "tokens": tokens, "forwards": 10}
            for n in range(3)
        ]

    found = {
        "suffix path cold": rows(19),
        "arctic path cold": rows(20),
        "goose optimal cold": rows(40),
    }
    written = peer.report(found, {"budget": 60})
    by_metric = {row["metric"]: row for row in written["ratios"]}
    own = by_metric["tokens per forward: suffix path cold over arctic path cold"]
    assert (own["here"], own["bar"], own["holds"]) == (0.95, ">= 0.98", False)
    assert by_metric["tokens per forward: goose optimal cold over arctic path cold"]["holds"]
    assert len(by_metric) == 2
    assert written["tokens_per_forward"]["goose optimal cold"]["all"] == 4.0
    json.dumps(written)


def test_its_share_of_repeats_is_the_librarys() -> None:
    from pertoken.stats_text import repeated_4gram_share

    ids = random.Random(0).choices(range(3), k=60)
    assert peer._repeats(ids) == repeated_4gram_share(ids)


def test_without_the_peer_it_says_so_in_one_line(tmp_path: Path) -> None:
    if importlib.util.find_spec("arctic_inference") is not None:
        pytest.skip("the peer is installed")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("")
    arguments = ["arctic", "--texts", str(texts), "--out", str(tmp_path / "out.json")]
    done = subprocess.run(
        [sys.executable, str(BENCH / "suffix_peer.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "not installed" in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_greedy_texts_are_generates_own_and_resume(tmp_path: Path) -> None:
    import torch

    from pertoken.testing import tiny_model

    texts = pytest.importorskip("greedy_texts")
    model = tiny_model("llama")
    prompts = [(1, "qa", [5, 6, 7]), (3, "rag", [8, 9])]
    out = tmp_path / "texts.jsonl"
    assert texts.write_texts(out, model, prompts[:1], 6) == 1
    assert texts.write_texts(out, model, prompts, 6) == 1
    assert texts.write_texts(out, model, prompts, 6) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [1, 3]
    plain = model.generate(torch.tensor([[8, 9]]), max_new_tokens=6, do_sample=False)
    assert lines[1]["output_ids"] == plain[0, 2:].tolist()


def test_texts_of_a_split_a_file_or_the_sample(tmp_path: Path) -> None:
    from argparse import Namespace

    from pertoken.samples import SAMPLE

    texts = pytest.importorskip("greedy_texts")
    mine = tmp_path / "mine.txt"
    mine.write_text("one\ntwo\n")
    assert texts.choose(Namespace(prompts=str(mine))) == [(0, "", "one"), (1, "", "two")]
    found = texts.choose(Namespace(prompts="sample"))
    assert [text for _, _, text in found] == [prompt.text for prompt in SAMPLE]


def test_a_missing_prompt_file_is_one_line(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path / "texts.jsonl"), "--prompts", str(tmp_path / "none.txt")]
    done = subprocess.run(
        [sys.executable, str(BENCH / "greedy_texts.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "none.txt" in done.stderr
    assert not (tmp_path / "texts.jsonl").exists()


def test_run_reads_contenders_and_counts_per_kept_round() -> None:
    from pertoken.timing import AlternatingRun, Round, Timed

    run = pytest.importorskip("run")
    assert run.arguments("budget=auto,keep=True,shape=paper") == [
        ("budget", "auto"),
        ("keep", True),
        ("shape", "paper"),
    ]
    rounds = [
        Round(
            index,
            0.0,
            {
                "hf": Timed(2.0, {"ids": [1, 2, 3, 4]}),
                "goose": Timed(1.0, {"ids": [1, 2, 3, last], "per_forward": 2.0}),
            },
        )
        for index, last in enumerate([4, 4, 5])
    ]
    figures = run.summarise(AlternatingRun(("hf", "goose"), kept=rounds), "hf", 8.0, range(3))
    assert figures["goose"]["times_baseline"] == 2.0
    assert figures["goose"]["tokens_per_second"] == 4.0
    assert figures["goose"]["share_of_bandwidth_limit"] == 0.5
    assert figures["goose"]["identical"] == 2
    assert figures["hf"]["tokens_per_forward"] is None
    calm = run.summarise(AlternatingRun(("hf", "goose"), kept=rounds), "hf", 8.0, [0, 1])
    assert calm["goose"]["identical"] == calm["goose"]["prompts"] == 2
