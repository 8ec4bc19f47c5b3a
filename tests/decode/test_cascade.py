"""A cascade of two models: answers, rates, files and refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pertoken.decode.answers import Answer, early_states, endpoint_answers, greedy_answers
from pertoken.decode.cascade import RULES, Cascade, Pair
from pertoken.endpoint import Endpoint, Reply
from pertoken.errors import PertokenError
from pertoken.testing import (
    ARCHITECTURES,
    ByteTokenizer,
    MockModel,
    check_leaves_no_trace,
    tiny_model,
)

TOKENIZER = ByteTokenizer()
PROMPTS = ["a", "some words", "some more words", "b", "the longest of all the prompts here"]


@pytest.fixture(scope="module")
def pair() -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    made = [tiny_model("llama", vocab_size=258, seed=seed).double() for seed in (0, 1)]
    made[0].generation_config.eos_token_id = 1
    return (made[0], TOKENIZER), (made[1], TOKENIZER)


def scripted(prompts: Sequence[str]) -> list[Answer]:
    """Prompts are "LENGTH SURE": one token of log-probability SURE, the others sure."""
    found = []
    for prompt in prompts:
        length, sure = prompt.split()
        found.append(Answer("small", (float(sure), *([-0.01] * (int(length) - 1)))))
    return found


def clever(prompts: Sequence[str]) -> list[Answer]:
    return [Answer("large", (-0.1,)) for _ in prompts]


def questions(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """The less sure the small model, the likelier the large one alone is right."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    chances = torch.rand(count, generator=generator).clamp(min=1e-3)
    right = torch.rand(count, generator=generator) < chances
    prompts = [
        f"{length} {float(chance.log()):.6f}"
        for length, chance in zip(lengths, chances, strict=True)
    ]
    return prompts, ["small" if each else "large" for each in right.tolist()]


def cascade(rule: str, **options: Any) -> Cascade:
    return Cascade(scripted, clever, rule, **options)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_batched_answers_are_those_of_generate_with_raw_log_probabilities(
    architecture: str,
) -> None:
    model = tiny_model(architecture, vocab_size=258).double()
    ids = torch.tensor([TOKENIZER.encode(PROMPTS[1])])
    free = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)
    end = int(free[0, ids.shape[1] + 4])
    model.generation_config.eos_token_id = end
    model.generation_config.repetition_penalty = 1.0
    found = greedy_answers(model, TOKENIZER, PROMPTS, max_new_tokens=9, batch=3, states=True)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([TOKENIZER.encode(prompt)])
        mask = torch.ones_like(ids)
        given = {"attention_mask": mask, "do_sample": False, "pad_token_id": 0}
        whole = model.generate(ids, max_new_tokens=9, **given)
        new = whole[0, ids.shape[1] :]
        with torch.no_grad():
            output = model(whole, output_hidden_states=True)
        places = slice(ids.shape[1] - 1, -1)
        chances = output.logits[0, places].float().log_softmax(-1).gather(-1, new[:, None])[:, 0]
        assert answer.logprobs == pytest.approx(
            chances.tolist(), abs=1e-5
        )  # the end's own included
        assert answer.text == TOKENIZER.decode(new, skip_special_tokens=True)
        state = output.hidden_states[-1][0, places].mean(0)
        assert answer.state == pytest.approx(state.tolist(), abs=1e-5)


def test_a_stop_text_ends_an_answer_and_its_token_counts() -> None:
    table = torch.full((258, 258), 0.1 / 257)
    for byte in range(256):  # the alphabet, each letter with chance 0.9
        table[2 + byte, 2 + (byte + 1) % 256] = 0.9
    model = MockModel(table / table.sum(-1, keepdim=True))
    found = greedy_answers(model, TOKENIZER, ["a", "d"], max_new_tokens=6, stop=["e", "dx"])
    assert [(each.text, len(each.logprobs)) for each in found] == [("bcd", 4), ("", 1)]
    [cut] = greedy_answers(model, TOKENIZER, ["a"], max_new_tokens=3, stop=["e"])
    assert cut.logprobs == found[0].logprobs[:3]
    assert cut.logprobs[0] == pytest.approx(float(torch.tensor(0.9 / 1.0).log()), abs=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_early_state_is_the_blocks_and_leaves_no_trace(architecture: str) -> None:
    model = tiny_model(architecture, vocab_size=258)
    found: list[Any] = []
    check_leaves_no_trace(model, lambda m: found.append(early_states(m, TOKENIZER, ["word"], 0)))
    ids = torch.tensor([TOKENIZER.encode("word")])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert found[0][0] == pytest.approx(states[1][0].double().mean(0).tolist(), abs=1e-5)


# ---------------------------------------------------------------- rules and rates


def test_chow_sum_defers_by_length_and_the_least_sure_token_by_merit() -> None:
    asked = questions(600)
    found = cascade("chow-quantile-0").fit(cascade("chow-sum").answer(["1 -1", "2 -2"]))
    curve = found.curve(found.answer(*asked))
    bias = curve.length_bias
    assert bias["chow-sum"] is not None
    assert bias["chow-average"] is not None
    assert bias["chow-sum"] > 0.15 > -0.3 > bias["chow-average"]
    areas = {rule: curve.area(rule) for rule in curve.areas}
    assert areas["oracle"] > areas["chow-quantile-0"] > areas["chow-sum"] > areas["random"]


def test_a_learned_rule_comes_near_the_best_one() -> None:
    made = cascade("post-hoc-quantile")
    made.fit(made.answer(*questions(400, seed=1)))
    curve = made.curve(made.answer(*questions(600)))
    best = cascade("chow-quantile-0").curve(made.answer(*questions(600)))
    assert curve.area("post-hoc-quantile") > 0.98 * best.area("chow-quantile-0")


def test_the_best_quantile_is_chosen_on_the_calibration_data() -> None:
    made = cascade("chow-quantile")
    assert made.alpha is None
    assert made.fit(made.answer(*questions(400))).alpha == 0.0
    assert cascade("chow-quantile-0.25").alpha == 0.25


@pytest.mark.parametrize("rule", ["chow-sum", "chow-quantile-1", "post-hoc-quantile", "random"])
def test_the_rate_is_the_one_asked_for(rule: str) -> None:
    # 600 fitted and 600 asked: one standard error of the rate is 2.9 points at most. With
    # "chow-quantile-1" nearly all scores are the same.
    made = cascade(rule)
    made.fit(made.answer(*questions(600, seed=3)))
    fresh = questions(600, seed=4)[0]
    for rate in (0.0, 0.1, 0.5, 1.0):
        run = made.generate(fresh, rate=rate)
        assert run.deferral_rate == pytest.approx(rate, abs=0.09 if 0 < rate < 1 else 0)
        assert run.texts == tuple("large" if yes else "small" for yes in run.deferred)


def test_a_prompt_is_decided_by_itself() -> None:
    made = cascade("chow-quantile-1")  # ties are drawn
    made.fit(made.answer(*questions(200)))
    fresh = questions(30, seed=9)[0]
    run = made.generate(fresh, rate=0.5)
    assert 0 < sum(run.deferred) < 30
    assert [made.generate([each], rate=0.5).deferred[0] for each in fresh] == list(run.deferred)


def test_equal_scores_share_the_rate() -> None:
    made = cascade("chow-sum").fit([Pair("p", Answer("", (-float(n // 4),))) for n in range(8)])
    assert made.threshold(0.25) == (-1.0, 0.5)
    assert made.threshold(0.5) == (0.0, 0.0)
    assert made.threshold(0.75) == (0.0, 0.5)
    assert made.threshold(0.0)[0] == -float("inf")
    assert made.threshold(1.0)[0] == float("inf")


@pytest.mark.parametrize("rule", ["post-hoc-embed-1", "post-hoc-embed-1+2"])
def test_embeddings_are_read_and_charged(rule: str, pair: Any, tmp_path: Path) -> None:
    made = Cascade(*pair, rule, max_new_tokens=4, layer=0 if "2" in rule else None)
    prompts = [f"{number} words" for number in range(30)]
    kept = made.answer(prompts, [""] * 30, quality=lambda text, _: float(text[0] < "r"))
    made.fit(kept[:22])
    curve = made.curve(kept[22:])
    tokens = sum(len(each) for each in prompts[22:])
    blocks = pair[1][0].config.num_hidden_layers
    paid = tokens / blocks / (tokens + 8 * 3) if "2" in rule else 0
    assert curve.overhead[rule] == pytest.approx(paid)
    made.save(tmp_path / "rule.json")
    again = Cascade.load(tmp_path / "rule.json", *pair)
    run = again.generate(prompts[22:], rate=0.4)
    assert list(run.scores) == pytest.approx(made.scores(kept[22:]))
    assert (
        run.texts
        == tuple(
            (one.large if yes else one.small).text  # type: ignore[union-attr]
            for one, yes in zip(kept[22:], run.deferred, strict=True)
        )
    )


# ---------------------------------------------------------------- files


def test_answers_are_kept_and_not_asked_for_again(tmp_path: Path) -> None:
    file, asked = tmp_path / "answers.jsonl", list[str]()

    def counted(prompts: Sequence[str]) -> list[Answer]:
        if len(asked) + len(prompts) > 9:
            raise PertokenError("the endpoint is down")
        asked.extend(prompts)
        return scripted(prompts)

    prompts, references = questions(12)
    made = Cascade(counted, clever, "chow-sum", batch=2)
    with pytest.raises(PertokenError, match=r"is down; 8 questions are in .*run it again to go on"):
        made.answer(prompts, references, path=file)
    assert asked == prompts[:8]
    with file.open("a") as open_file:
        open_file.write('{"prompt": "cut sho')  # as a crash leaves it
    asked.clear()
    found = made.answer(prompts, references, path=file)
    assert asked == prompts[8:]
    assert found == cascade("chow-sum").answer(prompts, references)
    with pytest.raises(PertokenError, match="were given with max_new_tokens 64, not 5"):
        Cascade(counted, clever, "chow-sum", max_new_tokens=5).answer(prompts, [""] * 12, path=file)
    other = tmp_path / "other.txt"
    head = file.read_text().partition("\n")[0]
    for notes in ("my notes", f'{head}\n{{"prompt": "mine"}}\n'):
        other.write_text(notes)
        with pytest.raises(PertokenError, match="is no file of answers"):
            made.answer(prompts, references, path=other)
        assert other.read_text() == notes


def test_generate_loses_nothing_when_the_large_model_fails(tmp_path: Path) -> None:
    asked: list[str] = []
    down = True

    def unsteady(prompts: Sequence[str]) -> list[Answer]:
        if down and len(asked) >= 8:
            raise PertokenError("the endpoint is down")
        asked.extend(prompts)
        return clever(prompts)

    def once(prompts: Sequence[str]) -> list[Answer]:
        assert down, "the small model is asked again"
        return scripted(prompts)

    made = Cascade(once, unsteady, "chow-sum", batch=2)
    prompts = questions(40)[0]
    made.fit(made.answer(prompts))
    fresh = questions(30, seed=5)[0]
    whole = cascade("chow-sum").fit(made.answer(prompts)).generate(fresh, rate=0.5)
    lost = "30 questions are lost: give a file"
    with pytest.raises(PertokenError, match=f"is down; {lost}"):
        made.generate(fresh, rate=0.5)
    asked.clear()
    file = tmp_path / "answers.jsonl"
    with pytest.raises(PertokenError, match=r"is down; 30 questions are in .*: run it again"):
        made.generate(fresh, rate=0.5, path=file)
    down = False
    assert made.generate([*fresh, fresh[0]], rate=0.5, path=file).texts[:-1] == whole.texts
    assert len(asked) == sum(whole.deferred)
    # What was deferred alone has the large model's answer; asked for both, the others get theirs.
    found = made.answer(fresh, ["large"] * 30, path=file)
    assert all(pair.large_quality == 1.0 for pair in found)
    assert len(asked) == 30


def test_a_saved_rule_is_for_the_models_it_was_fitted_with(tmp_path: Path, pair: Any) -> None:
    made = cascade("post-hoc-quantile", stop=["\n"])
    kept = made.answer(*questions(60))
    path = tmp_path / "rule.json"
    with pytest.raises(PertokenError, match="call fit first"):
        made.save(path)
    made.fit(kept[:40]).save(path)
    again = Cascade.load(path, scripted, clever)
    assert again.scores(kept) == made.scores(kept)
    assert again.stop == ("\n",)
    assert again.threshold(0.3) == made.threshold(0.3)
    with pytest.raises(PertokenError, match="5 of 25 questions were used to fit the rule"):
        again.curve(kept[35:])
    with pytest.raises(PertokenError, match="fitted with another large model"):
        Cascade.load(path, scripted, pair[0])
    path.write_text(json.dumps({"rule": "chow-sum"}))
    with pytest.raises(PertokenError, match="holds no rule of this version"):
        Cascade.load(path, scripted, clever)


# ---------------------------------------------------------------- endpoints and refusals


def test_an_endpoint_gives_log_probabilities_where_the_rule_needs_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, Any]] = []

    def replies(self: Endpoint, talks: Any, **options: Any) -> list[Reply]:
        seen.append(options)
        return [Reply("word\nmore", ("w",), (-0.5,)) for _ in talks]

    monkeypatch.setattr(Endpoint, "replies", replies)
    made = Endpoint("http://localhost/v1", model="m")
    [answer] = endpoint_answers(made, ["hello"], max_new_tokens=3, stop=["\n"])
    assert answer == Answer("word", (-0.5,))
    Cascade(made, made, "chow-sum").answer(["hello"], ["word"])
    assert [each["logprobs"] for each in seen] == [True, True, False]
    assert seen[0]["stop"] == ["\n"]


def test_what_cannot_be_done_is_refused(pair: Any) -> None:
    behind = Endpoint("http://localhost/v1", model="m")

    def refuses(message: str, call: Any) -> None:
        with pytest.raises(PertokenError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)

    refuses(r"unknown rule 'chow-sums' \(did you mean 'chow-sum'", lambda: cascade("chow-sums"))
    refuses("from 0 to 1, as in", lambda: cascade("chow-quantile-2"))
    refuses("'logistic' or 'mlp', not 'cnn'", lambda: cascade("chow-sum", net="cnn"))
    refuses("an endpoint shows none", lambda: Cascade(behind, pair[1], "post-hoc-embed-1"))
    refuses("give it as a model", lambda: Cascade(pair[0], behind, "post-hoc-embed-1+2"))
    refuses("has blocks 0 to", lambda: Cascade(*pair, "post-hoc-embed-1+2", layer=9))
    made = cascade("post-hoc-quantile")
    pairs = made.answer(*questions(40))
    refuses("no calibration data", lambda: made.fit([]))
    refuses("takes 20 questions or more, got 9", lambda: made.fit(pairs[:9]))
    refuses("ask with references", lambda: made.fit(made.answer(questions(40)[0])))
    prompts = questions(40)[0]
    refuses("of one class: .* never better", lambda: made.fit(made.answer(prompts, ["small"] * 40)))
    refuses(
        "of one class: .* always better", lambda: made.fit(made.answer(prompts, ["large"] * 40))
    )
    best = cascade("chow-quantile")
    refuses("of one class", lambda: best.fit(best.answer(prompts, ["small"] * 40)))
    refuses("a number from 0 to 1, got 7", lambda: made.answer(*questions(4), quality=lambda *_: 7))
    refuses("call fit first", lambda: made.generate(prompts, rate=0.5))
    made.fit(pairs)
    refuses("a share from 0 to 1, got 2", lambda: made.generate(prompts, rate=2))
    refuses("at least one", lambda: made.generate([], rate=0.5))
    refuses("the prompt is empty", lambda: made.generate([" "], rate=0.5))
    refuses("3 prompts have 2 references", lambda: made.answer(prompts[:3], ["", ""]))
    silent = Cascade(lambda _: [], clever, "chow-sum")
    refuses("gave 0 of 32 answers", lambda: silent.answer(prompts))
    long = Cascade(*pair, "chow-sum", max_new_tokens=4)
    refuses("do not fit the model's", lambda: long.answer(["a", "b" * 5000], ["", ""]))
    unread = Cascade(scripted, clever, "post-hoc-embed-1")
    refuses("of which its answers have none", lambda: unread.fit(pairs))


def test_it_shows_its_models_by_their_class(pair: Any) -> None:
    shown = repr(Cascade(*pair, "chow-sum", stop=["\n"]))
    assert shown == "Cascade(LlamaForCausalLM, LlamaForCausalLM, 'chow-sum', stop=('\\n',))"
    assert {"chow-sum", "post-hoc-quantile"} < set(RULES)
