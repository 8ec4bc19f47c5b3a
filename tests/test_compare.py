"""`compare`: what is identical, how ratios are made, what is refused."""

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import pertoken
from pertoken.compare import compare, method_names, method_options
from pertoken.compare_report import Comparison, Decoded
from pertoken.errors import PertokenError
from pertoken.prompts import Prompt
from pertoken.samples import SAMPLE
from pertoken.testing import ByteTokenizer, Divergence, Verdict, tiny_model

PROMPTS = [Prompt("abc abc abc", "x", "one"), Prompt("xyzxyzxyz", "y", "two"), Prompt("hm", "x")]
NAMES = ["plain", "prompt-lookup", "suffix", "hf", "hf-prompt-lookup"]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return tiny_model("llama", vocab_size=258), ByteTokenizer()


@pytest.fixture(scope="module")
def result(pair: tuple[Any, Any]) -> Comparison:
    return compare(NAMES, prompts=PROMPTS, model=pair, max_new_tokens=20)


def test_every_method_gives_the_same_text(result: Comparison) -> None:
    assert result.lossless
    for row in result.method_rows:
        assert (row.identical, row.ties, row.different) == (3, 0, 0)
    for by_method in result.results:
        assert list(by_method) == NAMES
        assert all(len(d.ids) == 20 for d in by_method.values())


def test_passes_are_counted_for_ours_and_for_transformers(result: Comparison) -> None:
    rows = {row.method: row for row in result.method_rows}
    assert rows["plain"].accepted_per_forward == 1.0
    assert rows["hf"].accepted_per_forward == 1.0
    assert rows["hf"].draft_share is None
    for name in ("prompt-lookup", "hf-prompt-lookup"):
        forwards = sum(by_method[name].forwards for by_method in result.results)
        assert rows[name].accepted_per_forward == pytest.approx(3 * 19 / forwards)
    assert 0 <= (rows["prompt-lookup"].draft_share or 0) <= 1


def test_origins_cover_every_token(result: Comparison) -> None:
    for by_method in result.results:
        for name in ("plain", "prompt-lookup", "suffix"):
            done = by_method[name]
            assert done.sources is not None
            assert done.step_lengths is not None
            assert len(done.sources) == sum(done.step_lengths) == len(done.ids)
        assert set(by_method["plain"].sources or ()) == {"bonus"}
        assert by_method["hf"].sources is None


def test_the_order_rotates_and_each_prompt_is_decoded_once_per_method(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    module = import_module("pertoken.compare")
    decode = module._decode

    def watch(name: str, *rest: Any) -> Decoded:
        calls.append((name, rest[-1]))
        return decode(name, *rest)

    monkeypatch.setattr(module, "_decode", watch)
    compare(["plain", "hf"], prompts=PROMPTS, model=pair, max_new_tokens=9)
    assert calls[:2] == [("plain", 8), ("hf", 8)]  # warm-up, shorter
    assert [name for name, _ in calls[2:]] == ["plain", "hf", "hf", "plain", "plain", "hf"]


def test_a_fresh_drafter_per_prompt_unless_asked_to_keep(pair: tuple[Any, Any]) -> None:
    # The second text is the first one again: only a drafter that remembers it drafts its end.
    twice = [Prompt("hm, so", id="a"), Prompt("hm, so", id="b")]

    def forwards(keep: bool) -> list[int]:
        found = compare(["suffix"], prompts=twice, model=pair, max_new_tokens=24, keep=keep)
        return [by_method["suffix"].forwards for by_method in found.results]

    fresh, kept = forwards(False), forwards(True)
    assert fresh[0] == fresh[1] == kept[0]
    assert kept[1] < kept[0]


def test_no_hook_stays(pair: tuple[Any, Any], result: Comparison) -> None:
    assert not pair[0]._forward_pre_hooks


def test_a_different_text_is_found_and_shown(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        ids = model.generate(input_ids, max_new_tokens=6, do_sample=False)
        ids[:, -1] = 7
        return ids

    module = import_module("pertoken.testing.verify")
    real = module.as_setup
    monkeypatch.setattr(
        module, "as_setup", lambda n, **o: wrong if n == "lookahead" else real(n, **o)
    )
    found = compare(["lookahead"], prompts=PROMPTS, model=pair, max_new_tokens=6)
    assert not found.lossless
    assert found.method_rows[1].different == 3
    assert "0 of 3, 3 DIFFERENT" in found.table()
    assert "DIFFERENT text from lookahead: see `pertoken verify`" in found.table()
    assert found.results[0]["lookahead"].to_dict()["divergence"]["step"] == 5


@pytest.fixture(scope="module")
def with_lossy(pair: tuple[Any, Any]) -> Comparison:
    prompts = [Prompt("abc abc", answer="#### 7"), Prompt("xyz 1 + 1 =")]
    state = torch.get_rng_state()
    found = compare(["cntp", "hf"], prompts=prompts, model=pair, max_new_tokens=9, budget="auto")
    assert torch.equal(torch.get_rng_state(), state)
    return found


def test_a_method_that_is_not_lossless_is_marked_and_judged_by_quality(
    with_lossy: Comparison,
) -> None:
    assert with_lossy.lossless  # of those that promise it
    rows = {row.method: row for row in with_lossy.method_rows}
    assert (rows["cntp"].lossless, rows["plain"].lossless) == (False, True)
    assert (rows["cntp"].ties, rows["cntp"].different) == (0, 0)
    table = with_lossy.table()
    head = table.splitlines()[0]
    assert all(word in head for word in ("perplexity", "distinct-2", "repeated", "right"))
    assert any("not lossless" in line for line in table.splitlines() if line.startswith("cntp"))
    assert "not lossless: cntp, seed 0" in table
    assert "DIFFERENT" not in table
    assert with_lossy.to_dict()["rows"][1]["lossless"] is False
    page = with_lossy.to_html()
    assert "not lossless" in page
    assert "perplexity" in page


@torch.no_grad()
def test_quality_is_of_the_text_under_the_model(
    pair: tuple[Any, Any], with_lossy: Comparison
) -> None:
    model, tokenizer = pair
    for name in ("plain", "cntp"):
        loss = tokens = 0
        for prompt, by_method in zip(with_lossy.prompts, with_lossy.results, strict=True):
            ids = tokenizer.encode(prompt.text)
            for token in by_method[name].ids:
                logits = model(torch.tensor([ids])).logits[0, -1]
                loss -= float(logits.log_softmax(-1)[token])
                tokens += 1
                ids.append(token)
        row = with_lossy.row(name)
        assert row.perplexity == pytest.approx(math.exp(loss / tokens), rel=1e-4)
        assert 0 < row.distinct_2 <= 1
        assert row.right in (0.0, 1.0)
    assert math.isnan(made(plain=[1.0, 2.0, 3.0]).method_rows[0].perplexity)


def made(**seconds: list[float]) -> Comparison:
    """Three prompts with 10, 20 and 30 tokens, the last one looping, in given seconds."""
    lengths = [10, 20, 30]
    results = [
        {
            name: Decoded(
                ids=[7] * n if n == 30 else list(range(n)),
                seconds=times[index],
                forwards=(n - 1) if name == "plain" else n // 2,
                committed=n - 1,
                seconds_draft=0.1 if name != "hf" else None,
                seconds_verify=0.9 if name != "hf" else None,
                verdict=Verdict("identical", n),
            )
            for name, times in seconds.items()
        }
        for index, n in enumerate(lengths)
    ]
    return Comparison(
        tuple(seconds), PROMPTS, [3, 3, 3], results, dict(SETTINGS), lambda ids: ["t"] * len(ids)
    )


SETTINGS = {"model": "m", "dtype": "float32", "device": "cpu", "max_new_tokens": 30}


def test_ratios() -> None:
    found = made(plain=[1.0, 2.0, 3.0], fast=[1.0, 1.0, 0.5], hf=[1.0, 2.0, 3.0])
    plain, fast, hf = found.method_rows
    assert plain.speed_up == 1.0
    assert fast.speed_up == pytest.approx(6.0 / 2.5)  # a ratio of sums
    assert fast.spread.median == pytest.approx(2.0)
    assert fast.speed_up_not_looping == pytest.approx(3.0 / 2.0)
    assert fast.accepted_per_forward == pytest.approx(57 / 30)
    assert fast.draft_share == pytest.approx(0.1)
    assert hf.draft_share is None
    assert found.row("fast", "x").speed_up == pytest.approx(4.0 / 1.5)
    assert found.row("fast", "y").prompts == 1


def test_table_says_what_has_to_be_known() -> None:
    found = made(plain=[1.0, 2.0, 3.0], fast=[1.0, 1.0, 0.5])
    head = found.table().splitlines()[0]
    assert head.split("  ")[0] == "method"
    assert "not looping" in head
    assert "1 of the texts repeat" in found.table()
    assert "other programs" not in found.table()
    found.settings["foreign_share_max"] = 0.3
    assert "other programs used up to 30%" in found.table()
    tie = Verdict("numerical tie", 10, Divergence(3, 1, 2, 0.1, 0.1, 0.1, 0.1, 0.2))
    again = made(plain=[1.0, 2.0, 3.0], fast=[1.0, 1.0, 0.5])
    again.results[0]["fast"].verdict = tie
    assert "2 of 3, 1 tie" in again.table()
    assert again.lossless


def test_one_category_needs_no_table_of_categories() -> None:
    found = made(plain=[1.0, 2.0, 3.0], fast=[1.0, 1.0, 0.5])
    assert "x plain by category" in found.table()
    found.prompts = [Prompt("a"), Prompt("b"), Prompt("c")]
    assert "x plain by category" not in found.table()


def test_json_is_json_also_without_a_single_pass() -> None:
    found = made(plain=[1.0, 2.0, 3.0], fast=[1.0, 1.0, 0.5])
    found.results[0]["fast"].forwards = 0
    found.settings["budget"] = None
    again = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [row["method"] for row in again["rows"]] == ["plain", "fast"]
    assert again["prompts"][0]["results"]["fast"]["text"] == "t" * 10
    assert again["prompts"][2]["looping"] is True
    assert again["by_category"]["y"][1]["speed_up"] == pytest.approx(2.0)


def test_one_token_per_prompt(pair: tuple[Any, Any]) -> None:
    found = compare(["hf"], prompts=PROMPTS, model=pair, max_new_tokens=1)
    assert all(math.isnan(row.accepted_per_forward) for row in found.method_rows)
    assert found.lossless
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.table()
    assert found.to_html()


def test_names() -> None:
    assert method_names(["hf", "goose", "hf"]) == ["plain", "hf", "goose"]
    assert method_names("hf") == ["plain", "hf"]
    assert method_names(None)[0] == "plain"


def test_the_budget_reaches_everybody_who_drafts() -> None:
    assert method_options("goose", 8, keep=True) == {"budget": 8, "keep": True}
    assert method_options("goose", "auto") == {"budget": "auto"}
    assert method_options("goose", None) == {}
    assert method_options("plain", 8) == method_options("hf", 8) == {}
    assert method_options("hf-prompt-lookup", 8) == {"prompt_lookup_num_tokens": 8}
    assert method_options("hf-prompt-lookup", "auto") == {}


def test_texts_and_files_are_prompts_too(pair: tuple[Any, Any], tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("eins\nzwei\n")
    for prompts in (["eins", "zwei"], file, str(file)):
        found = compare(["hf"], prompts=prompts, model=pair, max_new_tokens=2, limit=1)
        assert [(p.text, p.id) for p in found.prompts] == [("eins", "1")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["gose"]}, "'gose'.*did you mean 'goose'"),
        ({"methods": ["skipdecode"]}, "planned"),
        ({"max_new_tokens": 0}, "1 or more, got 0"),
        ({"max_new_tokens": 9999}, "prompt 'one'.*do not fit the model's 512 positions"),
        ({"budget": 0}, "from 1 on, got 0"),
        ({"budget": -3}, "from 1 on, got -3"),
        ({"budget": True}, "from 1 on"),
        ({"budget": "lots"}, "from 1 on, got 'lots'"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["a", " "]}, "prompt '2': the prompt is empty"),
        ({"prompts": "none.txt"}, "no prompt file none.txt"),
        ({"limit": 0}, "1 or more, got 0"),
        ({"dtype": "float32"}, "loaded already"),
    ],
)
def test_refused_before_anything_is_decoded(
    pair: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    message: str,
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(type(pair[0]), "generate", never)
    given = {"methods": ["hf"], "prompts": PROMPTS, "model": pair, **arguments}
    with pytest.raises(PertokenError, match=message):
        compare(given.pop("methods"), **given)


def test_a_wrong_name_is_said_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pertoken, "load", None)
    with pytest.raises(PertokenError, match="unknown way of decoding 'x'"):
        compare(["x"])


def state_space_model() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=258, hidden_size=16, num_hidden_layers=1, state_size=4)
    return MambaForCausalLM(config).eval()


def encoder_decoder() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=258, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("model", [state_space_model, encoder_decoder])
def test_models_that_cannot_hold_a_tree_are_refused(model: Any) -> None:
    with pytest.raises(PertokenError) as caught:
        compare(["prompt-lookup"], prompts=PROMPTS, model=(model(), ByteTokenizer()))
    assert "\n" not in str(caught.value)
    assert "raised" not in str(caught.value)


def test_what_a_method_raises_is_named_as_its_own(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("boom")

    module = import_module("pertoken.testing.verify")
    monkeypatch.setattr(module, "as_setup", lambda name, **_: broken)
    with pytest.raises(PertokenError, match="plain raised RuntimeError: boom"):
        compare(["hf"], prompts=PROMPTS, model=pair, max_new_tokens=2)


def test_progress_counts_up_to_the_end(pair: tuple[Any, Any]) -> None:
    told: list[tuple[str, int, int]] = []
    compare(
        ["hf"],
        prompts=PROMPTS,
        model=pair,
        max_new_tokens=2,
        progress=lambda *what: told.append(what),
    )
    counts = [done for _, done, _ in told]
    assert counts == sorted(counts)
    assert told[-1][1:] == (6, 6)


def test_the_public_name_is_the_function() -> None:
    assert pertoken.compare is compare


def test_the_sample_covers_what_it_says() -> None:
    kinds = {prompt.category for prompt in SAMPLE}
    assert {"chat", "code edit", "summarise", "extract", "translate", "maths"} <= kinds
    assert len({prompt.id for prompt in SAMPLE}) == len(SAMPLE)
    assert all(prompt.text.strip() == prompt.text for prompt in SAMPLE)


@pytest.mark.model
def test_the_sample_is_short(smollm2: tuple[Any, Any]) -> None:
    lengths = [len(smollm2[1](prompt.text)["input_ids"]) for prompt in SAMPLE]
    assert min(lengths) >= 30
    assert max(lengths) <= 250
