"""Fidelity: the identity scores exactly 0, a cache that drops everything scores as broken."""

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    QuantizedCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import Cache, DynamicLayer

from pertoken.cache.fidelity import Turn, cache_fidelity, compare_caches
from pertoken.cache.fidelity_report import fidelity_table
from pertoken.cache.memory import full_cache_bytes
from pertoken.errors import PertokenError
from pertoken.testing import ARCHITECTURES, EXTRA_ARCHITECTURES, ByteTokenizer, tiny_model

PROMPT = [5, 9, 13, 22, 41, 7, 30, 11]
TALK = [Turn([5, 9, 13]), Turn([22, 41]), Turn([7, 30, 11, 8])]


class ForgetfulLayer(DynamicLayer):
    """Returns the keys and values of this forward and keeps none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
        self.seen += key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self, *_: Any) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        return query_length, self.seen


def forgetful() -> Cache:
    return Cache(layers=[ForgetfulLayer() for _ in range(2)])


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


def log_probs(model: Any, ids: list[int], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), **options).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in (*ARCHITECTURES, *EXTRA_ARCHITECTURES)]
    + [("llama", torch.bfloat16), ("gemma3", torch.bfloat16)],
)
def test_the_identity_scores_exactly_zero(name: str, dtype: torch.dtype) -> None:
    model = tiny_model(name, dtype=dtype)
    for texts in ([PROMPT, PROMPT[:3]], [TALK]):  # the talk is longer than a window of 8
        found = cache_fidelity(
            model, lambda: DynamicCache(config=model.config), texts, max_new_tokens=5, chunk=3
        )
        assert set(found.kl) == {0.0}
        assert found.top1_agreement == found.token_match == found.perplexity_ratio == 1
        assert found.perplexity == found.full_perplexity
        assert found.peak_bytes == found.full_peak_bytes


def test_a_cache_that_drops_everything_is_broken_and_one_forward_would_not_show_it(
    llama: Any,
) -> None:
    text = [*PROMPT, *PROMPT[::-1], *PROMPT]
    once = log_probs(llama, text, past_key_values=forgetful(), use_cache=True)
    assert torch.equal(once, log_probs(llama, text, past_key_values=DynamicCache()))
    found = cache_fidelity(llama, forgetful, [text], continuation="text")
    assert found.mean_kl > 1
    assert found.top1_agreement < 0.5
    greedy = cache_fidelity(llama, forgetful, [text], max_new_tokens=20)
    assert greedy.token_match is not None
    assert greedy.token_match < 0.5
    assert greedy.perplexity_ratio > 1.5
    assert greedy.peak_bytes == 0


def test_kl_perplexity_and_agreement_are_those_of_brute_force(llama: Any) -> None:
    """Forgetful decoding sees one token at its position; the full cache sees all before it."""
    text = [*PROMPT, *PROMPT[::-1]]
    found = cache_fidelity(llama, forgetful, [text], continuation="text", prompt_share=0.25)
    full = log_probs(llama, text)[3:-1]  # behind the prompt of 4 tokens, up to the last but one
    own = torch.stack(
        [log_probs(llama, text[:4])[3]]
        + [
            log_probs(llama, [text[at]], position_ids=torch.tensor([[at]]))[0]
            for at in range(4, len(text) - 1)
        ]
    )
    kl = (full.exp() * (full - own)).sum(-1)
    assert torch.allclose(torch.tensor(found.kl, dtype=torch.float64), kl, atol=1e-9)
    targets = torch.tensor(text[4:])[:, None]
    assert math.isclose(found.perplexity, float((-own.gather(1, targets)).mean().exp()))
    assert math.isclose(found.full_perplexity, float((-full.gather(1, targets)).mean().exp()))
    assert found.top1_agreement == float((full.argmax(-1) == own.argmax(-1)).double().mean())
    assert found.token_match is None


def test_free_running_is_what_generate_writes(llama: Any) -> None:
    ids = torch.tensor([PROMPT])
    options = {"max_new_tokens": 20, "do_sample": False}
    full = llama.generate(ids, **options)[0, 8:].tolist()
    own = llama.generate(ids, past_key_values=forgetful(), **options)[0, 8:].tolist()
    (text,) = cache_fidelity(llama, forgetful, [PROMPT], max_new_tokens=20).texts
    assert text.answers == [full]
    assert text.free == [own]
    same = [a == b for a, b in zip(full, own, strict=True)]
    assert text.matches == same
    assert text.common_prefix == same.index(False)


def test_a_conversation_goes_on_in_one_cache(llama: Any) -> None:
    (text,) = cache_fidelity(llama, DynamicCache, [TALK], max_new_tokens=6).texts
    ids: list[int] = []
    for turn, answer in zip(TALK, text.answers, strict=True):
        ids += turn.given
        new = llama.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
        assert new[0, len(ids) :].tolist() == answer
        ids = new[0].tolist()
    assert text.full_peak_bytes == full_cache_bytes(llama, len(ids) - 1)
    assert text.speed.steps == 3 * 5
    assert text.speed.prefill_tokens == sum(len(turn.given) for turn in TALK) + 2


def test_given_and_greedy_answers_may_alternate(llama: Any) -> None:
    talk = [Turn([5, 9], [7, 7, 8]), Turn([3, 4])]
    (text,) = cache_fidelity(llama, forgetful, [talk], max_new_tokens=5).texts
    assert text.answers[0] == [7, 7, 8]
    assert text.free[0] is None
    assert len(text.kl) == 3 + 5
    assert len(text.matches) == 5


def test_a_stop_token_ends_an_answer_and_is_not_doubled() -> None:
    model = tiny_model("llama")
    greedy = model.generate(torch.tensor([PROMPT]), max_new_tokens=20, do_sample=False)
    stop = int(greedy[0, 10])
    model.generation_config.eos_token_id = [stop]
    talk = [Turn(PROMPT), Turn([stop, 9, 4])]
    (text,) = cache_fidelity(model, DynamicCache, [talk], max_new_tokens=20).texts
    assert text.answers[0] == greedy[0, 8 : greedy[0].tolist().index(stop, 8) + 1].tolist()
    assert text.answers[0][-1] == stop
    # The stop token is fed with the next turn, once.
    assert text.speed.prefill_tokens == len(PROMPT) + 3
    assert set(text.kl) == {0.0}


def test_chunks_change_what_an_evicting_cache_knows_of_the_prompt(llama: Any) -> None:
    whole = cache_fidelity(llama, forgetful, [PROMPT], max_new_tokens=3)
    pieces = cache_fidelity(llama, forgetful, [PROMPT], max_new_tokens=3, chunk=3)
    assert whole.kl[0] == 0.0
    assert pieces.kl[0] > 0.01
    assert pieces.texts[0].answers == whole.texts[0].answers


def test_transformers_own_caches(llama: Any) -> None:
    found = compare_caches(
        llama,
        {
            "static": lambda: StaticCache(config=llama.config, max_cache_len=64),
            "fp8": lambda: QuantizedCache("fp8", config=llama.config),
        },
        [PROMPT],
        max_new_tokens=12,
    )
    assert found["static"].max_kl < 1e-12
    assert found["static"].token_match == 1
    assert 1e-6 < found["fp8"].mean_kl < 1
    assert found["fp8"].peak_bytes < found["fp8"].full_peak_bytes / 7
    lines = fidelity_table(found).splitlines()
    assert [line.split()[0] for line in lines] == ["cache", "full", "static", "fp8"]


def test_compare_caches_equals_one_by_one(llama: Any) -> None:
    texts = [PROMPT, TALK]
    both = compare_caches(llama, {"a": forgetful, "b": DynamicCache}, texts, max_new_tokens=5)
    for name, factory in (("a", forgetful), ("b", DynamicCache)):
        alone = cache_fidelity(llama, factory, texts, max_new_tokens=5)
        assert both[name].kl == alone.kl
        assert [t.free for t in both[name].texts] == [t.free for t in alone.texts]


class HalfPress:
    """Works like a press of kvpress: within it, prompts lose half of their rows."""

    def __init__(self) -> None:
        self.layers = 0

    @contextlib.contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            layer = kwargs["past_key_values"].layers[module.layer_idx]
            if kwargs["hidden_states"].shape[1] > 1:
                self.layers += 1
                half = layer.keys.shape[2] // 2
                layer.keys = layer.keys[:, :, half:].clone()
                layer.values = layer.values[:, :, half:].clone()

        blocks = model.model.layers
        handles = [b.self_attn.register_forward_hook(hook, with_kwargs=True) for b in blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def test_a_press_works_on_the_candidate_only(llama: Any) -> None:
    press = HalfPress()
    found = cache_fidelity(llama, DynamicCache, [PROMPT, PROMPT], max_new_tokens=6, context=press)
    assert found.mean_kl > 1e-3
    assert found.full_peak_bytes == full_cache_bytes(llama, 13)
    assert found.peak_bytes == full_cache_bytes(llama, 4 + 5)
    runs = 4 if found.top1_agreement < 1 else 2
    assert press.layers == 2 * runs
    assert not any(block.self_attn._forward_hooks for block in llama.model.layers)
    plain = cache_fidelity(llama, DynamicCache, [PROMPT], max_new_tokens=6)
    assert set(plain.kl) == {0.0}


def test_end_turn_and_close_are_called_and_own_peaks_count(llama: Any) -> None:
    calls: list[str] = []

    class Noted(DynamicCache):
        peak_bytes = 10**6

        def end_turn(self) -> None:
            calls.append("end")

        def close(self) -> None:
            calls.append("close")

    found = cache_fidelity(llama, Noted, [TALK], max_new_tokens=2)
    assert calls == ["end", "end", "end", "close"]
    assert found.peak_bytes == 10**6
    assert found.held_bytes == found.full_peak_bytes < 10**6


def test_strings_and_tensors_are_texts_too() -> None:
    model, tokenizer = tiny_model("llama", vocab_size=258), ByteTokenizer()
    ids = tokenizer.encode("so so")
    same = [
        cache_fidelity(model, DynamicCache, [text], tokenizer=tokenizer, max_new_tokens=3)
        for text in ("so so", ids, torch.tensor(ids), torch.tensor([ids]))
    ]
    assert len({str(found.texts[0].answers) for found in same}) == 1


def test_results_as_values_frame_and_figure(llama: Any) -> None:
    found = cache_fidelity(llama, forgetful, [PROMPT, TALK], max_new_tokens=4)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["summary"]["steps"] == 4 * 4 == len(found.kl)
    assert values["summary"]["mean_kl"] == found.mean_kl
    assert values["settings"]["dtype"] == "float64"
    assert values["texts"][1]["answers"] == found.texts[1].answers
    pandas = pytest.importorskip("pandas")
    frame = found.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["kl"].tolist() == found.kl
    assert frame[frame["text"] == 1]["turn"].tolist() == [t for t in range(3) for _ in range(4)]
    pytest.importorskip("plotly")
    assert list(found.plot().data[0].y) == found.texts[0].kl


def test_an_impossible_token_is_an_infinite_kl_and_still_json(llama: Any) -> None:
    """A mask that the candidate alone runs under, so that a token of the full law is impossible."""

    @contextlib.contextmanager
    def forbid(model: Any) -> Iterator[None]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            output[..., int(output.argmax(-1)[0, -1])] = -math.inf
            return output

        handle = model.lm_head.register_forward_hook(hook)
        yield
        handle.remove()

    found = cache_fidelity(llama, DynamicCache, [PROMPT], max_new_tokens=3, context=forbid)
    assert found.mean_kl == math.inf
    assert found.top1_agreement == found.token_match == 0
    assert "inf" in found.table()
    json.dumps(found.to_dict(), allow_nan=False)


def test_impossible_tokens_of_both_laws_cost_nothing(llama: Any) -> None:
    def hook(module: Any, args: Any, output: Any) -> Any:
        output[..., 3] = -math.inf
        return output

    handle = llama.lm_head.register_forward_hook(hook)
    try:
        assert set(cache_fidelity(llama, DynamicCache, [PROMPT], max_new_tokens=3).kl) == {0.0}
    finally:
        handle.remove()


def test_a_pass_that_raises_closes_the_cache(llama: Any) -> None:
    closed = []

    class Breaks(DynamicCache):
        def update(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("broken")

        def close(self) -> None:
            closed.append(1)

    with pytest.raises(RuntimeError, match="broken"):
        cache_fidelity(llama, Breaks, [PROMPT])
    assert closed == [1]


SHARED = DynamicCache()


@pytest.mark.parametrize(
    ("factory", "texts", "options", "message"),
    [
        (DynamicCache, [], {}, "at least one text"),
        (DynamicCache, "abc", {}, "must be a list"),
        (DynamicCache, [[]], {}, "text 1 is empty"),
        (DynamicCache, [[5]], {"continuation": "text"}, "text 1 has 1 tokens; one to begin with"),
        (DynamicCache, ["abc"], {}, "give the tokenizer too"),
        (DynamicCache, [[0.5]], {}, "must be a string, ids, or a list of Turn"),
        (DynamicCache, [torch.ones(2, 3, dtype=torch.long)], {}, r"not \[2, 3\]"),
        (DynamicCache, [[Turn([5]), 7]], {}, "mixes Turn with int"),
        (DynamicCache, [[Turn([])]], {}, "nothing given"),
        (DynamicCache, [[Turn([5], [])]], {}, "empty answer"),
        (DynamicCache, [[5, 64]], {}, "the id 64; the model has 64 tokens"),
        (DynamicCache, [PROMPT, [5] * 500], {}, "text 2 with its new tokens is up to 564 tokens"),
        (DynamicCache, [PROMPT], {"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        (DynamicCache, [PROMPT], {"chunk": 0}, "chunk must be 1 or more"),
        (DynamicCache, [PROMPT], {"prompt_share": 1.0}, "prompt_share is from 0 to below 1"),
        (DynamicCache, [PROMPT], {"continuation": "best"}, "continuation is"),
        (DynamicCache(), [PROMPT], {}, "a function that makes a new cache each time"),
        (list, [PROMPT], {}, "must return a Cache, not a list"),
        (lambda: SHARED, [PROMPT, PROMPT], {}, "same cache twice"),
    ],
)
def test_bad_input_is_one_line(
    llama: Any, factory: Any, texts: Any, options: dict[str, Any], message: str
) -> None:
    SHARED.reset()
    with pytest.raises(PertokenError, match=message) as error:
        cache_fidelity(llama, factory, texts, **options)
    assert "\n" not in str(error.value)


def test_used_caches_nan_and_unfit_models_are_named(llama: Any) -> None:
    used = DynamicCache()
    log_probs(llama, PROMPT, past_key_values=used, use_cache=True)
    with pytest.raises(PertokenError, match=r"a used cache \(8 tokens\)"):
        cache_fidelity(llama, lambda: used, [PROMPT])
    broken = tiny_model("llama")
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    with pytest.raises(PertokenError, match="with the full cache are NaN or infinite behind 8"):
        cache_fidelity(broken, DynamicCache, [PROMPT])
    with pytest.raises(PertokenError, match=r"training mode .*model\.eval"):
        cache_fidelity(tiny_model("llama").train(), DynamicCache, [PROMPT])
    mamba = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(PertokenError, match="recurrent state"):
        cache_fidelity(MambaForCausalLM(mamba).eval(), DynamicCache, [PROMPT])
    t5 = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(PertokenError, match="encoder-decoder"):
        cache_fidelity(T5ForConditionalGeneration(t5).eval(), DynamicCache, [PROMPT])
    with pytest.raises(PertokenError, match="at least one cache"):
        compare_caches(llama, {}, [PROMPT])


def test_progress_is_told_for_every_pass(llama: Any) -> None:
    told: list[tuple[str, int, int]] = []
    cache_fidelity(
        llama, forgetful, [PROMPT], max_new_tokens=3, progress=lambda *state: told.append(state)
    )
    assert [what for what, _, _ in told] == ["full cache"] * 3 + ["cache"] * 3 + [
        "cache, free running"
    ] * 3
    assert told[2][1:] == (3, 3)
