"""The loop with every drafter: the same tokens as transformers' own `generate`, however called."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from pertoken.decode import (
    Balanced,
    Drafter,
    Goose,
    Lookahead,
    Plain,
    PromptLookup,
    SpeculativeOutput,
    SuffixTree,
    TokenRecycling,
    TokenTree,
)
from pertoken.errors import PertokenError
from pertoken.testing import (
    ARCHITECTURES,
    EXTRA_ARCHITECTURES,
    ByteTokenizer,
    check_batch_invariant,
    check_distribution,
    check_leaves_no_trace,
    check_lossless,
    tiny_model,
)

DRAFTERS: dict[str, Callable[..., Drafter]] = {
    "goose": Goose,
    "goose-paper": lambda **kw: Goose(shape="paper", **kw),
    "token-recycling": TokenRecycling,
    "prompt-lookup": PromptLookup,
    "lookahead": Lookahead,
    "suffix": SuffixTree,
    "balanced-3": lambda **kw: Balanced(k=3, **kw),
    "balanced-5": lambda **kw: Balanced(k=5, **kw),
}
ALL = {**DRAFTERS, "plain": lambda **_: Plain()}
NAMES = (*ARCHITECTURES, *EXTRA_ARCHITECTURES)
# Texts that repeat themselves, so that copies are drafted, and accepted in part.
PROMPTS = [
    [5, 6, 7, 8, 5, 6, 7, 8, 5, 6],
    [3, 9],
    [1, 2, 3, 4, 9, 1, 2, 3, 4, 9, 1, 2, 3, 4, 9, 2, 2],
    [11, 4, 11, 4, 11],
]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path))  # budget="auto" keeps its costs there


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    return {name: tiny_model(name, vocab_size=16) for name in NAMES}


@pytest.fixture(scope="module")
def llama(models: dict[str, PreTrainedModel]) -> PreTrainedModel:
    return models["llama"]


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def generate(
    model: PreTrainedModel, prompts: list[list[int]], drafter: Any = None, **options: Any
) -> Any:
    run = {"max_new_tokens": 24, "do_sample": False, **options}
    return model.generate(**padded(prompts), custom_generate=drafter, **run)


def check_equal(
    model: PreTrainedModel, prompts: list[list[int]], drafter: Drafter, **options: Any
) -> torch.Tensor:
    wanted = generate(model, prompts, **options)
    found = generate(model, prompts, drafter, **options)
    assert torch.equal(found, wanted)
    return found


# Greedy: the same ids.


# All eight architectures: tests/testing/test_battery.py.
@pytest.mark.parametrize("architecture", ["llama", "gemma3", *EXTRA_ARCHITECTURES])
@pytest.mark.parametrize("name", ALL)
def test_ids_equal_plain_generate(
    name: str, architecture: str, models: dict[str, PreTrainedModel]
) -> None:
    model = models[architecture]
    for budget in (None, 1, 7, "auto"):
        drafter = ALL[name](budget=budget)
        check_equal(model, PROMPTS[:1], drafter)
        check_equal(model, PROMPTS, drafter)
        if name == "plain":
            break


@pytest.mark.parametrize("name", ALL)
def test_the_laws_hold(name: str) -> None:
    model = tiny_model("qwen3-sliding", vocab_size=24)
    check_lossless(ALL[name](), model)
    prompts = [*PROMPTS, [7], [8, 8, 8], list(range(1, 20)), [5, 4, 3, 2, 1, 5, 4, 3]]
    check_batch_invariant(ALL[name](), model, prompts, max_new_tokens=20)


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafts_are_accepted_somewhere(name: str, llama: PreTrainedModel) -> None:
    """A loop that never accepts anything would pass every test of equality."""
    drafter = DRAFTERS[name]()
    generate(llama, PROMPTS, drafter, max_new_tokens=60)
    assert drafter.stats.accepted.total() > 8
    assert drafter.stats.accepted_per_forward > 1.05


# What ends a text.


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("new_tokens", [1, 2, 3, 7])
def test_max_new_tokens_is_exact(name: str, new_tokens: int, llama: PreTrainedModel) -> None:
    found = check_equal(llama, PROMPTS, ALL[name](), max_new_tokens=new_tokens)
    assert found.shape[1] == 17 + new_tokens
    found = generate(llama, PROMPTS[:1], ALL[name](), max_new_tokens=None, max_length=12)
    assert found.shape[1] == 12


class Oracle(Drafter):
    """Drafts the very text that plain decoding will write, so that whole chains are accepted."""

    slug = "oracle"
    default_budget = 50

    def __init__(self, texts: torch.Tensor, **options: Any) -> None:
        super().__init__(**options)
        self.texts = [[token for token in row if token] for row in texts.tolist()]

    def propose(self, row: int, budget: int, room: int) -> TokenTree:
        done = len(self.contexts[row])
        tree = TokenTree(self.contexts[row][-1])
        tree.add_chain(0, self.texts[row][done : done + min(budget, room)])
        return tree


@pytest.mark.parametrize("name", [*ALL, "oracle"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_nothing_is_returned_behind_a_stop_id(
    name: str, architecture: str, models: dict[str, PreTrainedModel]
) -> None:
    model = models[architecture]
    free = generate(model, PROMPTS, max_new_tokens=40)
    # Stop ids that come up early in one row, late in another.
    stops = [int(free[0, 17 + 6]), int(free[2, 17 + 15])]
    drafter = Oracle(free) if name == "oracle" else ALL[name]()
    dropped = 0
    for prompts in (PROMPTS, PROMPTS[:1]):
        for eos in (stops[0], stops):
            check_equal(model, prompts, drafter, max_new_tokens=40, eos_token_id=eos)
            row = drafter.rows[0]
            assert len(row.sources) == sum(row.step_lengths)
            dropped += drafter.stats.dropped
    if name == "oracle":
        assert dropped > 0  # the draft went on behind the stop


def test_the_first_token_may_be_the_stop(llama: PreTrainedModel) -> None:
    first = int(generate(llama, PROMPTS[:1], max_new_tokens=1)[0, -1])
    drafter = Goose()
    found = check_equal(llama, PROMPTS[:1], drafter, eos_token_id=first)
    assert found.shape[1] == 11
    assert drafter.stats.forwards == 0
    assert drafter.stats.new_tokens == 1


def test_stop_strings_end_a_text_in_the_middle_of_a_step() -> None:
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=258)
    inputs = tokenizer("abcabcabcab", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    new = plain[0, 11:].tolist()
    # Two of the bytes that come; the pair must be new, whatever it looks like.
    place = next(i for i in range(8, 30) if max(new[i : i + 2]) < 130 and min(new[i : i + 2]) > 1)
    text = tokenizer.decode(new[place : place + 2])
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [text, "never"])])
    options = {"max_new_tokens": 40, "do_sample": False, "stopping_criteria": criteria}
    wanted = model.generate(**inputs, **options)
    assert wanted.shape[1] <= 11 + place + 2
    for drafter in (Goose(), TokenRecycling(), Oracle(plain)):
        found = model.generate(**inputs, custom_generate=drafter, **options)
        assert torch.equal(found, wanted)
    own = Goose(tokenizer=tokenizer, stop_strings=[text, "never"])
    del options["stopping_criteria"]
    assert torch.equal(model.generate(**inputs, custom_generate=own, **options), wanted)


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(PertokenError, match="pass tokenizer="):
        Goose(stop_strings=["end"])


class AfterTwice(StoppingCriteria):
    """Stops a row as soon as its last token has come twice; counts how often it was asked."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        return torch.tensor([(row[10:] == row[-1]).sum() >= 2 for row in input_ids])


@pytest.mark.parametrize("name", [*ALL, "oracle"])
def test_a_users_own_stopping_criterion(name: str, llama: PreTrainedModel) -> None:
    free = generate(llama, PROMPTS[:1], max_new_tokens=40)
    drafter = Oracle(free) if name == "oracle" else ALL[name]()
    criterion = AfterTwice()
    found = check_equal(
        llama, PROMPTS[:1], drafter, stopping_criteria=StoppingCriteriaList([criterion])
    )
    assert criterion.lengths[-1] == found.shape[1]


# Processors.


class NoneTwice(LogitsProcessor):
    """Forbids the token that stood three places before: depends on the whole prefix."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert scores.dtype == torch.float32
        return scores.scatter(1, input_ids[:, -3:-2], float("-inf"))


OPTIONS: dict[str, dict[str, Any]] = {
    "min-new-tokens": {"min_new_tokens": 9, "eos_token_id": [3, 5, 9, 12]},
    "repetition-penalty": {"repetition_penalty": 1.7},
    "no-repeat-ngram": {"no_repeat_ngram_size": 2},
    "bad-words": {"bad_words_ids": [[4], [9, 2], [5, 6]]},
    # Another rule for every row of the batch.
    "by-row": {"prefix_allowed_tokens_fn": lambda row, ids: [t for t in range(16) if t % 5 != row]},
    "own": {"logits_processor": LogitsProcessorList([NoneTwice()])},
    "several": {"repetition_penalty": 0.6, "bad_words_ids": [[1]], "suppress_tokens": [2]},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", [*ALL, "oracle"])
def test_processors_work_at_every_node(name: str, options: str, llama: PreTrainedModel) -> None:
    wanted = generate(llama, PROMPTS, **OPTIONS[options])
    drafter = Oracle(wanted) if name == "oracle" else ALL[name]()
    check_equal(llama, PROMPTS[:1], drafter, **OPTIONS[options])
    check_equal(llama, PROMPTS, drafter, **OPTIONS[options])
    if name == "oracle" and options != "min-new-tokens":
        assert drafter.stats.accepted.total() > 20


# Streamer.


class Ear(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value)

    def end(self) -> None:
        self.heard.append("end")


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_streamer_gets_the_prompt_then_exactly_the_tokens(
    name: str, llama: PreTrainedModel
) -> None:
    ear = Ear()
    found = generate(llama, PROMPTS[:1], DRAFTERS[name](streamer=ear))
    assert torch.equal(ear.heard[0], padded(PROMPTS[:1])["input_ids"])
    assert ear.heard[-1] == "end"
    assert ear.heard.count("end") == 1
    assert torch.cat(ear.heard[1:-1]).tolist() == found[0, 10:].tolist()


def test_transformers_text_streamer_shows_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=258)
    inputs = tokenizer("to be or not to be", return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    found = model.generate(
        **inputs, max_new_tokens=12, do_sample=False, custom_generate=Goose(streamer=streamer)
    )
    assert capsys.readouterr().out == tokenizer.decode(found[0, 18:]) + "\n"


# What comes back, and caches.


@pytest.mark.parametrize("architecture", NAMES)
@pytest.mark.parametrize("name", ["goose", "token-recycling", "prompt-lookup", "plain"])
def test_the_returned_cache_goes_on_exactly(
    name: str, architecture: str, models: dict[str, PreTrainedModel]
) -> None:
    model = models[architecture]
    whole = generate(model, PROMPTS[:1], max_new_tokens=30)
    drafter = ALL[name]()
    part = generate(model, PROMPTS[:1], drafter, max_new_tokens=14, return_dict_in_generate=True)
    assert isinstance(part, SpeculativeOutput)
    assert part.stats is drafter.stats
    assert torch.equal(part.sequences, whole[:, :24])
    cache = part.past_key_values
    assert int(cache.get_seq_length()) == part.sequences.shape[1] - 1
    assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
    for after in (None, ALL[name]()):  # plain first takes a copy's place below
        kept = generate(
            model, PROMPTS[:1], drafter, max_new_tokens=14, return_dict_in_generate=True
        )
        rest = model.generate(
            kept.sequences,
            attention_mask=torch.ones_like(kept.sequences),
            past_key_values=kept.past_key_values,
            max_new_tokens=16,
            do_sample=False,
            custom_generate=after,
        )
        assert torch.equal(rest, whole)


@pytest.mark.parametrize("architecture", NAMES)
@pytest.mark.parametrize("typed", [True, False])
def test_a_users_own_cache_over_several_turns(
    architecture: str, typed: bool, models: dict[str, PreTrainedModel]
) -> None:
    model = models[architecture]
    for drafter in (Goose(), Goose(shape="paper"), TokenRecycling(harvest_prompt=True)):
        cache = DynamicCache(config=model.config) if typed else DynamicCache()
        text = torch.tensor(PROMPTS[:1])
        for turn in ([4, 4], [9, 1, 2, 3], [7]):
            options = {"max_new_tokens": 9, "do_sample": False}
            ones = torch.ones_like(text)
            wanted = model.generate(text, attention_mask=ones, **options)
            found = model.generate(
                text,
                attention_mask=ones,
                past_key_values=cache,
                custom_generate=drafter,
                **options,
            )
            assert torch.equal(found, wanted)
            assert int(cache.get_seq_length()) == found.shape[1] - 1
            text = torch.cat((found, torch.tensor([turn])), -1)


def test_a_cache_that_holds_the_whole_text_is_refused(llama: PreTrainedModel) -> None:
    cache = DynamicCache()
    ids = torch.tensor(PROMPTS[:1])
    llama(ids, past_key_values=cache)
    with pytest.raises(PertokenError, match="cache holds 10 tokens but the input only 10"):
        Goose()(
            llama,
            ids,
            past_key_values=cache,
            generation_config=prepared(llama, ids),
        )


def prepared(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    caught: list[Any] = []

    def catch(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        caught.append(arguments["generation_config"])
        return input_ids

    model.generate(ids, max_new_tokens=5, do_sample=False, custom_generate=catch)
    return caught[0]


@pytest.mark.parametrize("name", ALL)
def test_a_static_cache_works_for_one_text(name: str, llama: PreTrainedModel) -> None:
    # The draft would often be greater than what is left of the cache.
    found = generate(llama, PROMPTS[:1], ALL[name](), cache_implementation="static")
    assert torch.equal(found, generate(llama, PROMPTS[:1]))


def test_a_static_cache_is_refused_where_rows_differ(
    llama: PreTrainedModel, models: dict[str, PreTrainedModel]
) -> None:
    with pytest.raises(PertokenError, match="a static cache cannot hold rows that accept"):
        generate(llama, PROMPTS, Goose(), cache_implementation="static")
    with pytest.raises(PertokenError, match="StaticSlidingWindowLayer"):
        generate(models["mistral"], PROMPTS[:1], Goose(), cache_implementation="static")


def test_a_long_prompt_is_read_in_pieces(llama: PreTrainedModel) -> None:
    """Methods that look at the prompt's logits get them chunk by chunk, padding left out."""
    model = tiny_model("llama", vocab_size=16, max_positions=2048)
    generator = torch.Generator().manual_seed(0)
    long = torch.randint(1, 16, (1100,), generator=generator).tolist()
    seen: list[tuple[int, list[int], int | None]] = []

    class Watcher(Goose):
        def observe_prompt(
            self, row: int, tokens: list[int], logits: Any, previous: int | None
        ) -> None:
            assert len(logits) == len(tokens)
            seen.append((row, tokens, previous))
            super().observe_prompt(row, tokens, logits, previous)

    check_equal(model, [long, long[:30]], Watcher())
    for row, prompt in enumerate([long, long[:30]]):
        parts = [part for part in seen if part[0] == row]
        assert [token for _, tokens, _ in parts for token in tokens] == prompt
        for before, after in pairwise(parts):
            assert after[2] == before[1][-1]
        assert parts[0][2] is None


# Sampling.


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 3}])
def test_plain_samples_what_generate_samples_under_the_same_seed(
    options: dict[str, Any], llama: PreTrainedModel
) -> None:
    for seed in range(4):
        # Rows of a batch that end early must not shift the draws of the others.
        for prompts in (PROMPTS[:1], PROMPTS):
            run = {"do_sample": True, "eos_token_id": [3, 7], **options}
            torch.manual_seed(seed)
            wanted = generate(llama, prompts, **run)
            torch.manual_seed(seed)
            assert torch.equal(generate(llama, prompts, Plain(), **run), wanted)


@pytest.mark.parametrize("name", ["goose", "token-recycling", "balanced-3"])
def test_samples_follow_the_models_distribution(name: str) -> None:
    model = tiny_model("llama", vocab_size=8, scale=0.25)
    drafter = DRAFTERS[name](keep=name == "token-recycling", budget=12)
    result = check_distribution(
        drafter, model, [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3], draws=4000, steps=4
    )
    assert result.p_value > 0.001
    assert result.drafted is not None
    assert result.drafted > 1000
    assert drafter.stats.accepted.total() > 100


def test_samples_with_temperature_top_k_and_a_penalty() -> None:
    model = tiny_model("qwen3-sliding", vocab_size=8, scale=0.25)
    result = check_distribution(
        Goose(),
        model,
        [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3],
        draws=2500,
        temperature=0.8,
        top_k=5,
        repetition_penalty=1.3,
        batch_size=250,
    )
    assert result.drafted is not None
    assert result.drafted > 1000


# Statistics.


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
@pytest.mark.parametrize("name", ALL)
def test_statistics_add_up(name: str, prompts: list[list[int]], llama: PreTrainedModel) -> None:
    drafter = ALL[name]()
    width = max(map(len, prompts))
    found = generate(llama, prompts, drafter, max_new_tokens=40, eos_token_id=9)
    stats = drafter.stats
    lengths = []
    for row, trace in zip(found[:, width:].tolist(), drafter.rows, strict=True):
        new = row[: row.index(9) + 1] if 9 in row else row
        lengths.append(len(new))
        assert len(trace.sources) == sum(trace.step_lengths) == len(new)
        assert min(trace.step_lengths) >= 1
        assert trace.step_lengths[0] == 1
        assert trace.sources[0] == "bonus"
    assert stats.new_tokens == sum(lengths)
    assert stats.prefills == 1
    assert stats.first_tokens == len(prompts)
    assert stats.new_tokens == stats.first_tokens + stats.accepted.total() + stats.bonus
    assert stats.row_steps == sum(len(trace.step_lengths) - 1 for trace in drafter.rows)
    assert stats.forwards == max(len(trace.step_lengths) - 1 for trace in drafter.rows)
    for source, count in stats.accepted.items():
        assert 0 < count <= stats.drafted[source]
        assert count == sum(trace.sources.count(source) for trace in drafter.rows)
    if name == "plain":
        assert not stats.drafted
        assert stats.accepted_per_forward == 1.0
    assert stats.seconds_total >= stats.seconds_prefill > 0
    assert stats.seconds_total >= stats.seconds_draft + stats.seconds_verify
    assert 0.0 <= stats.draft_share <= 1.0
    assert drafter.contexts == [
        prompt + row[:n]
        for prompt, row, n in zip(prompts, found[:, width:].tolist(), lengths, strict=True)
    ]


# The end of the positions.


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
@pytest.mark.parametrize("name", ALL)
def test_drafts_stop_where_the_positions_do(name: str, architecture: str) -> None:
    model = tiny_model(architecture, vocab_size=16, max_positions=24)
    for new_tokens in (13, 14, 15):  # the last token of 25 is never fed
        check_equal(model, PROMPTS[:1], ALL[name](), max_new_tokens=new_tokens)
        check_equal(model, [PROMPTS[0], PROMPTS[1]], ALL[name](), max_new_tokens=new_tokens)


def test_a_prompt_longer_than_the_model_is_refused() -> None:
    model = tiny_model("gpt2", vocab_size=16, max_positions=8)
    with pytest.raises(PertokenError, match="10 tokens but GPT2LMHeadModel reads at most 8"):
        generate(model, PROMPTS[:1], Goose(), max_new_tokens=2)


# Refusals.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "beam search (num_beams > 1)"),
        ({"prompt_lookup_num_tokens": 4}, "custom_generate=PromptLookup()"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores is not kept"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits is not kept"),
        ({"output_attentions": True}, "output_attentions is not kept"),
        ({"use_cache": False}, "drop use_cache=False"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "the prompt is empty"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, 'padding_side = "left"'),
        ({"max_new_tokens": None, "max_length": 4}, "max_length"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    options: dict[str, Any], words: str, llama: PreTrainedModel
) -> None:
    run = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "max_new_tokens": 4, **options}
    with pytest.raises((PertokenError, ValueError), match=re.escape(words)) as error:
        llama.generate(**run, custom_generate=Goose())
    assert "\n" not in str(error.value)


def test_embeddings_instead_of_ids_are_refused(llama: PreTrainedModel) -> None:
    embeds = torch.zeros(1, 3, 32, dtype=torch.float64)
    with pytest.raises(PertokenError, match="pass input_ids instead of inputs_embeds"):
        llama.generate(inputs_embeds=embeds, max_new_tokens=4, custom_generate=Goose())


def test_a_streamer_with_a_batch_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(PertokenError, match="a streamer shows one text"):
        generate(llama, PROMPTS, Goose(streamer=Ear()))


@pytest.mark.parametrize("budget", [0, -1, True, "x", 2.5])
@pytest.mark.parametrize("name", DRAFTERS)
def test_budgets_that_make_no_sense_are_refused(name: str, budget: Any) -> None:
    with pytest.raises(PertokenError, match=re.escape(repr(budget))) as error:
        DRAFTERS[name](budget=budget)
    assert "\n" not in str(error.value)


def test_no_new_tokens_are_refused_in_one_line(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="max_new_tokens") as error:
        generate(llama, PROMPTS[:1], Goose(), max_new_tokens=0)
    assert "\n" not in str(error.value)


# Traces, and what is remembered.


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("name", ["goose", "token-recycling"])
def test_the_model_is_left_as_it_was(name: str, architecture: str) -> None:
    model = tiny_model(architecture, vocab_size=16)
    for budget in (None, "auto"):
        drafter = DRAFTERS[name](budget=budget)
        check_leaves_no_trace(
            model, lambda m, d=drafter: generate(m, PROMPTS, d, max_new_tokens=8), rng=True
        )


LEARNERS = ["goose", "goose-paper", "token-recycling", "balanced-3"]


def learned(drafter: Drafter) -> Any:
    return drafter.state_dict()


@pytest.mark.parametrize("name", LEARNERS)
def test_what_was_learned_is_kept_reset_saved_and_loaded(
    name: str, llama: PreTrainedModel, tmp_path: Path
) -> None:
    forgetful, keeper = DRAFTERS[name](), DRAFTERS[name](keep=True)
    runs = {}
    for drafter in (forgetful, keeper):
        for _ in range(2):
            check_equal(llama, PROMPTS[:1], drafter)
            runs.setdefault(drafter, []).append((drafter.stats.forwards, learned(drafter)))
    assert runs[forgetful][0] == runs[forgetful][1]
    # What the first call had seen helps the second.
    assert runs[keeper][1][0] <= runs[keeper][0][0] - (name == "token-recycling")

    path = tmp_path / "state.json"
    keeper.save(path)
    other = DRAFTERS[name](keep=True)
    fresh = learned(other)
    other.load(path)
    assert plain(learned(other)) == plain(learned(keeper)) != plain(fresh)
    for drafter in (other, keeper):
        check_equal(llama, PROMPTS[2:3], drafter)
    assert other.stats.forwards == keeper.stats.forwards
    assert plain(learned(other)) == plain(learned(keeper))

    keeper.reset()
    assert plain(learned(keeper)) == plain(fresh)
    check_equal(llama, PROMPTS[:1], keeper)
    assert keeper.stats.forwards == runs[keeper][0][0]


def plain(state: Any) -> Any:
    """As it looks in the file."""
    import json

    return json.loads(json.dumps(state))


@pytest.mark.parametrize("name", LEARNERS)
def test_a_file_that_is_none_is_one_line(name: str, llama: PreTrainedModel, tmp_path: Path) -> None:
    drafter = DRAFTERS[name](keep=True)
    slug = drafter.slug
    for number, content in enumerate(
        ["", "no json", "[1, 2]", '{"slug": "other"}', "{}", f'{{"slug": "{slug}"}}', "\ufeff\0"]
    ):
        path = tmp_path / f"wrong{number}.json"
        path.write_text(content, encoding="utf-8")
        with pytest.raises(PertokenError) as error:
            drafter.load(path)
        assert "\n" not in str(error.value)
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(PertokenError, match="cannot read"):
            drafter.load(path)
    check_equal(llama, PROMPTS[:1], drafter)  # still usable


def test_goose_refuses_the_state_of_its_other_shape(tmp_path: Path) -> None:
    Goose(shape="paper").save(tmp_path / "paper.json")
    with pytest.raises(PertokenError, match="saved with shape='paper'"):
        Goose().load(tmp_path / "paper.json")


def test_a_matrix_of_another_vocabulary_is_refused(llama: PreTrainedModel) -> None:
    drafter = TokenRecycling(keep=True)
    generate(llama, PROMPTS[:1], drafter)
    with pytest.raises(PertokenError, match="vocabulary of 16 tokens, the model has 24"):
        generate(tiny_model("llama", vocab_size=24), PROMPTS[:1], drafter)


@pytest.mark.parametrize("name", LEARNERS)
def test_an_interrupt_while_saving_leaves_the_old_file(
    name: str, llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = DRAFTERS[name](keep=True)
    path = tmp_path / "state.json"
    drafter.save(path)
    before = path.read_bytes()
    generate(llama, PROMPTS[:1], drafter)
    right = Path.write_text

    def interrupted(self: Path, data: str, *args: Any, **options: Any) -> int:
        right(self, data[: len(data) // 2], *args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drafter.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]


def test_an_error_in_the_middle_leaves_an_ordinary_cache(llama: PreTrainedModel) -> None:
    class Broken(Plain):
        def commit(self, row: int, tokens: list[int]) -> None:
            super().commit(row, tokens)
            if len(self.contexts[row]) > 14:
                raise KeyboardInterrupt

    cache = DynamicCache(config=llama.config)
    with pytest.raises(KeyboardInterrupt):
        generate(llama, PROMPTS[:1], Broken(), past_key_values=cache)
    assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
