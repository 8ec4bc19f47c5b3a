"""Cautious decoding: its limits are the ordinary sampler, its rows are its trials, its choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StoppingCriteriaList, StopStringCriteria

from pertoken.decode import CautiousDecoding
from pertoken.decode._trials import TrialRun, _Row
from pertoken.decode.cntp import punctuation_ids, trial_counts
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, MockModel, tiny_model
from pertoken.testing._trial_by_trial import trial_by_trial
from pertoken.testing.setups import left_pad, random_prompts

MARKS = [3, 5, 9, 11]
PROMPTS = random_prompts(32, (4, 15, 7))
ENDLESS = float("inf")


def write(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    run: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": 14, **options}
    return model.generate(ids, attention_mask=mask, **run)


# ------------------------------------------------------------------------------ formulas

TABLE = {  # H in nats: trials of at most 10 between 0.01 and 1.5, worked out by hand
    0.0: (1, 1, 10),
    0.01: (1, 1, 10),
    0.17: (1, 1, 10),
    0.18: (2, 1, 9),
    0.307: (2, 1, 9),
    0.309: (2, 2, 9),
    0.755: (5, 5, 6),
    1.49: (9, 9, 2),
    1.5: (10, 10, 1),
    7.0: (10, 10, 1),
}


@pytest.mark.parametrize(("rule", "place"), [("code", 0), ("paper", 1), ("inverted", 2)])
def test_trials_by_entropy(rule: Any, place: int) -> None:
    entropies = torch.tensor(list(TABLE), dtype=torch.float64)
    assert trial_counts(entropies, rule).tolist() == [row[place] for row in TABLE.values()]
    endless = {"min_entropy": ENDLESS, "max_entropy": ENDLESS}
    assert set(trial_counts(entropies, rule, **endless).tolist()) == {10 if place == 2 else 1}
    assert set(trial_counts(entropies, rule, max_trials=1).tolist()) == {1}


def test_a_number_of_trials_is_for_every_place() -> None:
    assert CautiousDecoding(trials=6).counts(torch.tensor([0.0, 3.0])) == [6, 6]


# ------------------------------------------------------------------------------ its limits


def test_an_endless_threshold_is_one_trial_with_the_published_formulas_alone() -> None:
    rules: list[Any] = ["code", "paper", "inverted", 6]
    found = {
        trials: set(CautiousDecoding(min_entropy=ENDLESS, trials=trials).counts(torch.rand(9)))
        for trials in rules
    }
    assert found == {"code": {1}, "paper": {1}, "inverted": {10}, 6: {6}}


@pytest.mark.parametrize(
    "limit", [{"min_entropy": ENDLESS}, {"max_trials": 1}, {"trials": 1}], ids=str
)
@pytest.mark.parametrize("sample", [True, False])
def test_without_trials_it_is_generate_under_the_same_seed(
    limit: dict[str, Any], sample: bool
) -> None:
    """Also in a batch whose rows end one by one, and it leaves the generator at the same place."""
    model = tiny_model("llama", vocab_size=32)
    ids, mask = left_pad(PROMPTS, 0)
    options = {"do_sample": sample, "eos_token_id": 3, "repetition_penalty": 1.3}
    torch.manual_seed(2)
    expected = write(model, ids, mask, **options)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    method = CautiousDecoding(punctuation=MARKS, **limit)
    assert torch.equal(write(model, ids, mask, **options, custom_generate=method), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert method.stats.uncertain == 0
    assert method.stats.rows_per_token <= 1


# ------------------------------------------------------------------------------ trials as rows


def test_together_they_write_what_one_after_the_other_writes() -> None:
    """The battery has this on every architecture; here are long trials over a short window."""
    model = tiny_model("gemma3", vocab_size=32, sliding_window=5)
    for seed, prompt in enumerate(PROMPTS[:2]):
        method = CautiousDecoding(punctuation=MARKS, max_trials=6, max_entropy=4.0)
        torch.manual_seed(seed)
        found = write(model, prompt[None], custom_generate=method)[0, len(prompt) :].tolist()
        torch.manual_seed(seed)
        run: dict[str, Any] = {"do_sample": True, "top_k": 0}
        assert found == trial_by_trial(method, model, prompt[None], max_new_tokens=14, **run)
        assert 2 < method.stats.mean_trials < 6
        assert method.stats.mean_span > 1.5


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "inverted, greedy where sure": ({"trials": "inverted", "max_trials": 4}, {"do_sample": False}),
    "whole answers": ({"trials": 3, "punctuation": ()}, {"eos_token_id": 3}),
    "processed": (
        {"trials": "paper"},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    ),
    "warped": ({}, {"temperature": 1.2, "top_p": 0.9, "top_k": 12, "eos_token_id": 3}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_too(name: str) -> None:
    own, options = SETTINGS[name]
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 9, **options}
    model = tiny_model("qwen3-sliding", vocab_size=32)
    method = CautiousDecoding(**{"punctuation": MARKS, **own})
    ids = PROMPTS[1][None]
    torch.manual_seed(5)
    found = write(model, ids, custom_generate=method, **options)[0, ids.shape[1] :].tolist()
    torch.manual_seed(5)
    assert found == trial_by_trial(method, model, ids, **options)
    assert method.stats.uncertain > 0


@pytest.mark.parametrize("architecture", ["gemma3", "opt"])
def test_rows_of_a_batch_do_not_touch_each_other(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row in a batch has the logits of its text by itself, while others branch and wait."""
    model = tiny_model(architecture, vocab_size=32, sliding_window=5)
    ids, mask = left_pad(PROMPTS, 0)
    texts: list[tuple[list[int], torch.Tensor]] = []
    decide = TrialRun._decide

    def watched(run: TrialRun, logits: torch.Tensor) -> None:
        for row, own in zip(run.rows, logits, strict=True):
            if not row.ended:
                whole = run._ids(row)[0].tolist()
                texts.append(([token for token in whole if token], own))
        decide(run, logits)

    monkeypatch.setattr(TrialRun, "_decide", watched)
    torch.manual_seed(0)
    method = CautiousDecoding(punctuation=MARKS, max_trials=4)
    out = write(model, ids, mask, custom_generate=method, suppress_tokens=[0])
    assert out.shape == (3, 29)
    assert len(texts) > 60
    with torch.no_grad():
        for text, logits in texts[::3]:
            expected = model(torch.tensor([text])).logits[0, -1]
            assert torch.allclose(logits, expected, atol=1e-9), text


def test_the_cost_is_counted() -> None:
    """Forwards and rows as a hook sees them; rows that wait are read too, but not paid for."""
    model = tiny_model("llama", vocab_size=32)
    sizes: list[int] = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    method = CautiousDecoding(punctuation=MARKS)
    torch.manual_seed(1)
    out = write(model, PROMPTS[1][None], custom_generate=method)
    handle.remove()
    stats = method.stats
    assert (stats.prefills, stats.forwards) == (1, len(sizes) - 1)
    assert stats.new_tokens == out.shape[1] - 15 == 14
    assert stats.rows <= sum(sizes[1:]) <= stats.rows + stats.forwards
    # A trial's last token is not read; of tokens that several have drawn alike one is.
    assert stats.rows < stats.drawn
    assert stats.span_tokens + stats.places - stats.uncertain == stats.new_tokens
    assert stats.places == round(stats.uncertain / stats.uncertain_share)
    assert f"unsure at {stats.uncertain} of {stats.places} places" in stats.lines()[1]


def test_trials_that_draw_alike_are_read_once() -> None:
    model = MockModel(
        [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]] * 1
        + [[1.0, 0.0, 0.0, 0.0]]
    )
    method = CautiousDecoding(trials=8, punctuation=[3])
    out = write(model, torch.tensor([[0]]), custom_generate=method, max_new_tokens=6)
    assert out[0].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert (method.stats.rows, method.stats.forwards) == (5, 5)
    assert (method.stats.trials, method.stats.drawn) == (16, 48)


# ------------------------------------------------------------------------------ its choice


def test_the_trial_of_lowest_perplexity_is_kept() -> None:
    """0 goes to 1 or 2; behind 2 every path is certain, behind 1 it is not: 2 wins if drawn."""
    model = MockModel([[0, 0.6, 0.4, 0], [0, 0.5, 0, 0.5], [0, 0, 0, 1], [1, 0, 0, 0]])
    method = CautiousDecoding(trials=5, punctuation=[3])
    torch.manual_seed(0)
    draws = 400
    ids = torch.zeros(draws, 1, dtype=torch.long)
    out = write(model, ids, custom_generate=method, max_new_tokens=3)[:, 1:].tolist()
    # Mean log-probabilities: 2 3: log 0.4 / 2 = -0.458; 1 3: log 0.3 / 2 = -0.602;
    # 1 1 3: log 0.15 / 3 = -0.632; 1 1 1, cut by the length: the same.
    shares = dict.fromkeys(((2, 3), (1, 3), (1, 1)), 0)
    for row in out:
        shares[tuple(row[:2])] += 1
    chance = {(2, 3): 1 - 0.6**5, (1, 3): 0.6**5 - 0.3**5, (1, 1): 0.3**5}
    for text, count in shares.items():
        spread = (draws * chance[text] * (1 - chance[text])) ** 0.5
        assert abs(count - draws * chance[text]) < 4 * spread + 1, text


def test_ties_go_to_the_first_trial_and_no_winner_is_dropped() -> None:
    draws = torch.Generator()
    first = _Row(0, [1, 3], 1.0, [(1, draws), (4, draws)])
    as_good = _Row(0, [2, 3], 1.0, [(0, draws)])
    better = _Row(0, [2, 2, 3], 1.4, [(5, draws)])
    assert min((first, as_good, better), key=lambda row: row.rank) is better
    assert min((first, as_good), key=lambda row: row.rank) is as_good


# ------------------------------------------------------------------------------ punctuation, ends


def test_a_mark_stands_behind_a_word() -> None:
    class Lead:  # puts a blank before a text
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [1000 + ord(text[0]), *map(ord, text[1:])]

    assert punctuation_ids(Lead()) == set(map(ord, ".,\n?!:;)]}"))


def test_both_rules_of_punctuation() -> None:
    tokenizer = ByteTokenizer()
    assert punctuation_ids(tokenizer) == set(tokenizer.encode(".,\n?!:;)]}"))

    class Words:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return {".": [4], ",": [5, 6]}.get(text, [7])

        def decode(self, ids: list[int]) -> str:
            return {4: ".", 5: ",", 8: " .", 9: ".\n", 10: "a", 11: ". a"}[ids[0]]

    code = CautiousDecoding(Words()).ends_trial()
    text = CautiousDecoding(Words(), punctuation="text").ends_trial()
    ids = [4, 5, 8, 9, 10, 11]
    assert [code(one) for one in ids] == [True, True, False, False, False, False]
    assert [text(one) for one in ids] == [True, True, True, True, False, False]


def test_stop_strings_and_criteria_end_a_trial_and_the_text() -> None:
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=258)
    ids = torch.tensor([tokenizer.encode("abc abc")])
    own = CautiousDecoding(tokenizer, trials=3, cap=9, stop_strings="e")
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, ["e"])])
    runs = []
    for method, options in (
        (own, {}),
        (CautiousDecoding(tokenizer, trials=3, cap=9), {"stopping_criteria": criteria}),
    ):
        torch.manual_seed(0)
        runs.append(write(model, ids, max_new_tokens=150, custom_generate=method, **options))
    assert torch.equal(runs[0], runs[1])
    new = tokenizer.decode(runs[0][0, 7:].tolist())
    assert new.endswith("e")
    assert new.count("e") == 1


class Spans:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_committed_spans_are_streamed() -> None:
    model = tiny_model("llama", vocab_size=32)
    spans = Spans()
    method = CautiousDecoding(punctuation=MARKS, streamer=spans)
    torch.manual_seed(0)
    out = write(model, PROMPTS[0][None], custom_generate=method)
    assert [token for part in spans.parts for token in part] == out[0].tolist()
    assert spans.parts[0] == PROMPTS[0].tolist()
    assert len(spans.parts) - 1 == method.stats.places
    assert max(map(len, spans.parts[1:])) > 1
    assert spans.ended


def test_the_cache_goes_on_in_the_next_turn() -> None:
    """Of a batch whose rows end at different places too: it holds all but the last tokens."""
    model = tiny_model("gemma3", vocab_size=32, sliding_window=5)
    ids, mask = left_pad(PROMPTS, 0)
    method = CautiousDecoding(punctuation=MARKS, max_trials=4)
    cache = DynamicCache(config=model.config)
    run = {"return_dict_in_generate": True, "suppress_tokens": [0], "eos_token_id": 7}
    torch.manual_seed(0)
    out = write(model, ids, mask, past_key_values=cache, custom_generate=method, **run)
    assert out.stats is method.stats
    assert out.past_key_values is cache
    assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
    assert len({int((row == 0).sum()) for row in out.sequences}) > 1
    texts = [row[row != 0] for row in out.sequences]
    longer, mask = left_pad([torch.cat((text, text.new_tensor([8]))) for text in texts], 0)
    assert int(cache.get_seq_length()) <= longer.shape[1] - 2
    width = int(cache.get_seq_length()) + 2  # the rows are aligned as the cache has them
    longer, mask = longer[:, -width:], mask[:, -width:]
    again = write(model, longer, mask, past_key_values=cache, do_sample=False)
    assert torch.equal(again, write(model, longer, mask, do_sample=False))


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trials": "many"}, "trials must be .*'many'"),
        ({"trials": 0}, "trials must be .*0"),
        ({"trials": True}, "trials must be"),
        ({"max_trials": 0}, "max_trials must be 1 or more, got 0"),
        ({"cap": 0}, "cap must be 1 or more tokens, got 0"),
        ({"min_entropy": 2.0}, "0 <= min_entropy < max_entropy, got 2 and 1.5"),
        ({"min_entropy": float("nan")}, "got nan and 1.5"),
        ({"punctuation": "words"}, 'punctuation must be "code", "text" or ids'),
        ({"stop_strings": ["a"]}, "stop_strings need the tokenizer"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(PertokenError, match=said):
        CautiousDecoding(**settings)


def refused(model: Any, method: CautiousDecoding, **options: Any) -> str:
    handle = model.get_decoder().register_forward_pre_hook(lambda *_: pytest.fail("a forward ran"))
    try:
        with pytest.raises(PertokenError) as error:
            write(model, PROMPTS[0][None], custom_generate=method, **options)
    finally:
        handle.remove()
    return str(error.value)


def test_what_cannot_take_trials_is_named() -> None:
    from transformers import MambaConfig, MambaForCausalLM, QuantizedCache, StaticCache

    model = tiny_model("llama", vocab_size=32)
    method = CautiousDecoding(punctuation=MARKS)
    assert "needs the tokenizer" in refused(model, CautiousDecoding())
    static = StaticCache(config=model.config, max_cache_len=64)
    assert "StaticCache cannot: it has layers of type StaticLayer" in refused(
        model, method, past_key_values=static
    )
    quantized = QuantizedCache("fp8", config=model.config)
    assert "QuantizedCache cannot" in refused(model, method, past_key_values=quantized)
    assert "num_beams" in refused(model, method, num_beams=2)
    watermark = {"watermarking_config": _synthid()}
    assert "can follow only one" in refused(model, method, **watermark)
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(PertokenError, match="MambaForCausalLM keeps a recurrent state"):
        write(mamba, PROMPTS[0][None], custom_generate=method, pad_token_id=0)


def _synthid() -> Any:
    from transformers import SynthIDTextWatermarkingConfig

    return SynthIDTextWatermarkingConfig(keys=[3, 5, 7], ngram_len=3)


def test_a_batch_is_padded_on_the_left() -> None:
    model = tiny_model("llama", vocab_size=32)
    ids = torch.tensor([[1, 2, 3], [4, 0, 0]])
    with pytest.raises(PertokenError, match="padded on the right"):
        write(model, ids, (ids > 0).long(), custom_generate=CautiousDecoding(punctuation=MARKS))


def test_repr_shows_what_is_not_the_default() -> None:
    shown = repr(CautiousDecoding(ByteTokenizer(), trials=6, punctuation=()))
    assert shown == "CautiousDecoding(tokenizer=ByteTokenizer, trials=6, punctuation=())"
