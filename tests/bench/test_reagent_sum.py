"""The bench of ReAGent's sum: its rows are ReAGent's, and what is counted is what it says."""

from __future__ import annotations

import sys

import pytest
import torch

from pertoken.attribute._question import ask
from pertoken.attribute.quantity import find
from pertoken.attribute.reagent import reagent
from pertoken.testing import ByteTokenizer, tiny_model

bench = pytest.importorskip("reagent_sum")


@pytest.fixture
def question():
    return ask(tiny_model("llama", vocab_size=258), ByteTokenizer(), "some words of a text", "x")


@pytest.mark.parametrize("steps", [1, 4])
@torch.no_grad()
def test_the_sum_is_that_of_the_method_where_no_probe_stops(question, steps):
    drawn = bench.draw(question, 0.3, steps, seed=5)
    # A rule that nothing meets: one token kept, and the target would have to be the likeliest.
    found = reagent(question, find("probability"), seed=5, keep=1, top_k=1, max_steps=steps)
    assert found.notes, "a probe stopped"
    importance = (drawn.start + bench.sums(drawn.mask, drawn.step)).softmax(-1).mean(0)
    assert torch.allclose(importance, found.values[0, : question.prompt], rtol=1e-4)


def test_a_step_that_depends_on_the_fact_alone_is_found_once_centred():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand((40, 5, 20), generator=generator) < 0.3
    fact = torch.zeros(20, dtype=torch.bool)
    fact[7] = True
    step = 3 + 0.3 * mask[..., 7].double()  # the prediction is lost whatever is replaced
    drawn = bench.Drawn(mask, step, torch.zeros(5, 20), torch.ones(20, dtype=torch.bool))
    found = bench.rated(drawn, fact)
    assert found["centred"] == 1
    assert found["drawn"] > 0.95
    assert found["step, fact replaced"] == pytest.approx(3.3)
    assert found["step, fact kept"] == pytest.approx(3)


def test_the_report_takes_differences_fact_by_fact():
    one = {f"{ratio} {name}": 1.0 for ratio in bench.RATIOS for name in ("sum", "no start")}
    one |= {f"{ratio} {name}": 1.0 for ratio in bench.RATIOS for name in ("centred", "drawn")}
    written = bench.report([one, one | {"0.3 sum": 0.0}], settings={"steps": 2})
    here = {row["metric"]: (row["here"], row["holds"]) for row in written["comparisons"]}
    assert here["fact found, steps centred"] == (1.0, True)
    assert here["fact found, steps centred minus ReAGent"] == (0.5, True)
    assert here["fact found, without the start minus ReAGent"] == (0.5, False)
    assert written["figures"]["ratio 0.3"]["sum"] == 0.5
    assert written["figures"]["ratio 0.1"]["sum"] == 1.0
    assert written["settings"] == {"steps": 2}


def test_what_it_cannot_run_is_one_line(monkeypatch, capsys, tmp_path):
    out = str(tmp_path / "r.json")
    for words, line in (
        (["--steps", "0"], "--steps must be 1 or more"),
        (["--model", str(tmp_path / "none")], "error: "),
    ):
        monkeypatch.setattr(sys, "argv", ["reagent_sum.py", "--out", out, *words])
        assert bench.main() == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith(line)
        assert "\n" not in said
