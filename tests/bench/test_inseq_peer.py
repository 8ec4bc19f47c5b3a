"""The inseq bench: what it counts and compares, how it judges, what it says without the peer."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pertoken.attribute._question import ask
from pertoken.attribute._replace import uniform
from pertoken.testing import ByteTokenizer, tiny_model
from pertoken.timing import alternate

BENCH = Path(__file__).parents[2] / "bench"
if not BENCH.is_dir():
    pytest.skip("the benches are not in this copy", allow_module_level=True)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks its own module up
    spec.loader.exec_module(module)
    return module


peer = load("inseq_peer")
TOKENIZER = ByteTokenizer()
TEXT = "one two three, and so on"
SETTINGS = {"probes": 3, "ratio": 0.3, "keep": 2, "top_k": 5, "max_steps": 4}


def question(text: str = TEXT) -> Any:
    return ask(tiny_model("llama", vocab_size=TOKENIZER.vocab_size), TOKENIZER, text, 1)


def test_both_draw_from_the_same_ids() -> None:
    ids = peer.ordinary(TOKENIZER)
    every = (torch.arange(len(ids)) + 0.5) / len(ids)
    assert uniform(question())(every).tolist() == ids


@pytest.mark.parametrize("top_k", [1, 258])
def test_rows_are_two_for_a_step_of_a_probe(top_k: int) -> None:
    asked = question()
    run = peer.run_ours(asked, SETTINGS | {"top_k": top_k}, 0)
    # One for p(y | x); in the easy case every probe stops at once, in the hard one none does.
    assert run.rows == 1 + 2 * SETTINGS["probes"] * (SETTINGS["max_steps"] if top_k == 1 else 1)
    assert run.stopped == (top_k > 1)
    assert run.importance.shape == (asked.prompt,)
    assert float(run.importance.sum()) == pytest.approx(1.0)
    assert not asked.model._forward_pre_hooks


def test_only_prompts_that_both_read_alike_are_compared() -> None:
    model = question().model
    asked = ask(model, TOKENIZER, TEXT, "x")
    assert peer.whole(asked) == TEXT + "x"
    assert peer.comparable(asked, keep=6)
    assert not peer.comparable(asked, keep=7)  # 24 tokens: ours would keep fewer
    half = ask(model, TOKENIZER, TEXT, "é")
    cut = replace(half, ids=half.ids[:-1], free=half.free[:-1], targets=half.targets[:1])
    assert not peer.comparable(cut, keep=6)  # half a character is no text
    assert not peer.comparable(replace(asked, free=~asked.free), keep=6)
    assert peer.chosen(model, TOKENIZER, ["short"], 6, 1) == []


def test_faithfulness_is_of_the_same_draws() -> None:
    asked = question()
    run = peer.run_ours(asked, SETTINGS, 0)
    same = peer.faithful(asked, {"ours": run, "inseq": run}, draws=4, seed=3)
    assert same["ours"] == same["inseq"]
    assert set(same) == {"ours", "inseq", "random"}
    other = peer.Run(run.importance.flip(0), True, 1)
    assert peer.faithful(asked, {"ours": run, "inseq": other}, 4, 3)["inseq"] != same["ours"]


def test_rank_correlation_is_spearmans() -> None:
    x = torch.tensor([0.1, 0.4, 0.2, 0.3])
    assert peer.rank_correlation(x, x.exp()) == pytest.approx(1.0)
    assert peer.rank_correlation(x, -x) == pytest.approx(-1.0)


def timed(asked: Any, rounds: int) -> Any:
    """Rounds in which the peer takes four seconds to our one; no probe of it stops in the first,
    none of ours in the third."""
    now = [0.0]

    def take(seconds: float, run: Any) -> Any:
        now[0] += seconds
        return run

    ours = replace(peer.run_ours(asked, SETTINGS, 0), stopped=True)
    lost = replace(ours, stopped=False)
    nothing = peer.Run(torch.full_like(ours.importance, torch.nan), False, 100)
    theirs = peer.Run(ours.importance.flip(0), True, 100)
    return alternate(
        {
            "ours": lambda i: take(1.0, lost if i == 2 else ours),
            "inseq": lambda i: take(4.0, theirs if i else nothing),
        },
        rounds,
        watch=0,
        clock=lambda: now[0],
        counters=lambda: None,
    )


def test_the_report_judges_time_and_faithfulness() -> None:
    asked = question()
    run = timed(asked, 4)
    targets = peer.measure(run, [asked] * 4, draws=3)
    assert ["faithfulness" in target for target in targets] == [False, True, False, True]
    written = peer.report(targets, {})
    rows = {row["metric"]: row for row in written["rows"]}
    assert rows.keys() >= peer.BARS.keys()
    assert {metric for metric, row in rows.items() if "bar" in row} == peer.BARS.keys()
    fast = rows["seconds: ours over inseq"]
    assert (fast["here"], fast["quartiles"], fast["holds"]) == (0.25, [0.25] * 3, False)
    assert rows["seconds per row: inseq"]["here"] == 0.04
    assert rows["share of targets for which a probe stopped: inseq"]["here"] == 3 / 4
    assert rows["targets rated: a probe of both stopped"]["here"] == 2
    for metric in peer.METRICS:
        ratio = rows[f"{metric}: ours over inseq"]
        assert ratio["holds"] == (ratio["here"] is not None and ratio["here"] >= 1)
    json.dumps(written, allow_nan=False)


def test_without_a_quiet_round_or_a_score_there_is_no_figure() -> None:
    asked = question()
    run = timed(asked, 1)
    run.dropped.extend(run.kept)
    run.kept.clear()
    targets = peer.measure(run, [asked], draws=1)
    assert targets[0]["seconds"] is None
    assert targets[0]["rows"]["inseq"] == 100
    written = peer.report(targets, {})
    rows = {row["metric"]: row for row in written["rows"]}
    for metric in peer.BARS:
        assert rows[metric]["here"] is None
        assert not rows[metric]["holds"]
    json.dumps(written, allow_nan=False)


def test_the_peer_explains_the_same_token() -> None:
    if importlib.util.find_spec("inseq") is None:
        pytest.skip("the peer is not installed")
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate("<>abcdefgh")}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="<"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<", eos_token=">", unk_token="<"
    )
    model = tiny_model("llama", vocab_size=len(letters))
    model.config.bos_token_id, model.config.eos_token_id = 0, 1
    asked = ask(model, tokenizer, "abcdefghabcd", "e")
    assert peer.comparable(asked, keep=2)
    theirs = peer.Peer(model, tokenizer, SETTINGS | {"top_k": 10})
    easy = theirs.run(asked, 4, 0)
    assert easy.stopped
    assert easy.rows == 3 + 2 * 3
    assert float(easy.importance.sum()) == pytest.approx(1.0)
