"""ReAGent in chunks is the step-by-step loop, and what it promises about protected tokens."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import transformers

from pertoken.attribute import _forward, mlm
from pertoken.attribute._question import ask
from pertoken.attribute._replace import prepare
from pertoken.attribute._scores import seeded
from pertoken.attribute.quantity import QUANTITIES, contrast, find
from pertoken.attribute.reagent import reagent
from pertoken.errors import PertokenError
from pertoken.testing import ARCHITECTURES, ByteTokenizer, MockModel, tiny_model

TOKENIZER = ByteTokenizer()


def question(architecture="llama", prompt="a small text!", target="xy", seed=0, layers=2):
    model = tiny_model(architecture, vocab_size=258, seed=seed, layers=layers)
    return ask(model, TOKENIZER, prompt, target)


@torch.no_grad()
def literal(question, quantity, *, seed, probes, ratio, keep, top_k, max_steps, replacer):
    """The paper's loop as it is written: one target, one probe, one step, one row at a time."""
    draw = prepare(replacer, question)
    values = torch.full((len(question.targets), len(question.ids)), torch.nan, dtype=torch.double)
    steps = []
    for number, place in enumerate(question.places):
        ids, y = question.ids[:place], question.ids[place : place + 1]
        free = question.free[:place]
        n = max(1, min(keep, int(free.sum()) // 4))

        def p(row, y=y):
            return quantity(question.model(row[None]).logits[:, -1], y)[0].double()

        generator = seeded(seed, number)
        s = torch.rand(probes, place, generator=generator, dtype=torch.double)
        stopped = [None] * probes
        for step in range(max_steps):
            numbers = torch.rand(3, probes, place, generator=generator, dtype=torch.double)
            for probe in range(probes):
                if stopped[probe] is not None:
                    continue
                which, by, by_in_test = numbers[:, probe]
                mask = (which < ratio) & free
                delta = p(ids) - p(torch.where(mask, draw(by), ids))
                nats = quantity.unit == "nats"
                move = delta if nats else torch.logit((delta + 1) / 2, eps=5e-7)
                s[probe] += torch.where(mask, move, -move)
                order = s[probe].masked_fill(~free, -torch.inf).argsort(descending=True)
                others = free.clone()
                others[order[:n]] = False
                logits = question.model(torch.where(others, draw(by_in_test), ids)[None]).logits
                if int(y) in logits[0, -1].topk(top_k).indices.tolist():
                    stopped[probe] = step
            if None not in stopped:
                break
        importance = s.masked_fill(~free, -torch.inf).softmax(-1)
        hit = [i for i, step in enumerate(stopped) if step is not None] or list(range(probes))
        values[number, :place] = importance[hit].mean(0).masked_fill(~free, torch.nan)
        steps.append(stopped)
    return values, steps


OPTIONS = {"probes": 3, "ratio": 0.3, "keep": 3, "top_k": 20, "max_steps": 25}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma3", "qwen3-sliding"])
def test_chunks_give_what_the_step_by_step_loop_gives(architecture):
    asked = question(architecture)
    run = {"seed": 3, "replacer": "uniform", **OPTIONS}
    slow, steps = literal(asked, find("probability"), **run)
    fast = reagent(asked, find("probability"), **run)
    assert torch.allclose(fast.values, slow, rtol=0, atol=1e-9, equal_nan=True)
    # The case is worth something: probes stop late, at different steps, some perhaps never.
    assert len({step for stopped in steps for step in stopped}) > 3


@pytest.mark.parametrize("replacer", ["lm_topk", "nearest"])
@pytest.mark.parametrize("quantity", ["probability", "log-probability", "entropy"])
def test_so_they_do_for_every_quantity_and_replacer(replacer, quantity):
    asked = question("phi", target="z")
    run = {"seed": 1, "replacer": replacer, **OPTIONS, "max_steps": 12}
    slow, _ = literal(asked, find(quantity), **run)
    fast = reagent(asked, find(quantity), **run)
    assert torch.allclose(fast.values, slow, rtol=0, atol=1e-9, equal_nan=True)


def test_the_size_of_a_forward_does_not_matter(monkeypatch):
    asked = question("mistral")
    first = reagent(asked, find("probability"), replacer="uniform", **OPTIONS)
    for tokens in (1, 40, 100_000):
        monkeypatch.setattr(_forward, "most_tokens", lambda _, n=tokens: n)
        monkeypatch.setattr("pertoken.attribute.reagent.most_tokens", lambda _, n=tokens: n)
        again = reagent(asked, find("probability"), replacer="uniform", **OPTIONS)
        assert torch.allclose(again.values, first.values, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "qwen3-sliding"])
def test_a_target_is_rated_the_same_alone_and_among_others(architecture):
    """Rows of other lengths are padded; that changes nothing."""
    run = {"replacer": "uniform", **OPTIONS, "max_steps": 6}
    both = reagent(question(architecture), find("probability"), **run)
    alone = reagent(question(architecture, target="x"), find("probability"), **run)
    count = alone.values.shape[1] - 1
    assert torch.allclose(both.values[0, :count], alone.values[0, :count], atol=1e-9)


def test_importances_sum_to_one():
    scores = reagent(question(), find("probability"), **OPTIONS)
    assert torch.allclose(scores.values.nansum(1), torch.ones(2, dtype=torch.double))


def test_no_probe_stops_is_said_and_rated():
    asked = question(target="x")
    run = {"replacer": "uniform", **OPTIONS, "top_k": 1, "max_steps": 2}
    scores = reagent(asked, find("probability"), **run)
    assert not scores.values[0, : asked.prompt].isnan().any()
    (note,) = scores.notes
    assert "no probe stopped within 2 steps for 'x'" in note


def test_certain_predictions_stay_finite():
    """|d| = 1 exactly: the plain log-odds would be infinite."""
    table = torch.full((258, 258), 1e-40, dtype=torch.double)
    table[:, 99] = 1.0
    table[100] = 1e-40
    table[100, 101] = 1.0
    asked = ask(MockModel(table / table.sum(-1, keepdim=True)), TOKENIZER, "aaaab", "c")
    scores = reagent(asked, find("probability"), **{**OPTIONS, "ratio": 0.5, "max_steps": 40})
    assert not scores.values[0, : asked.prompt].isnan().any()


def test_protected_tokens_are_never_replaced(monkeypatch):
    model = tiny_model("llama", vocab_size=258)
    asked = ask(model, TOKENIZER, "ab cd ef", "x")
    asked.ids[0] = TOKENIZER.eos_token_id
    asked.free[0] = False
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"][:, 0]), with_kwargs=True
    )
    for replacer in ("uniform", "lm_topk", "nearest"):
        scores = reagent(asked, find("probability"), **OPTIONS, replacer=replacer)
        assert scores.values[0, 0].isnan()
    handle.remove()
    assert (torch.cat(seen) == TOKENIZER.eos_token_id).all()


def test_no_replacement_is_special_and_none_is_the_token_itself():
    asked = question("llama", prompt="the quick brown fox")
    grid = torch.linspace(0, 1 - 1e-9, 400, dtype=torch.double)[:, None]
    grid = grid.expand(-1, len(asked.ids))
    for replacer in ("uniform", "lm_topk", "nearest"):
        drawn = prepare(replacer, asked)(grid)
        assert drawn.shape == grid.shape
        assert not torch.isin(drawn, torch.tensor(TOKENIZER.all_special_ids)).any()
        if replacer != "uniform":
            assert (drawn[:, 1:] != asked.ids[1:]).all()
            assert all(len(column.unique()) == 10 for column in drawn[:, 1:].T)


def test_lm_topk_draws_what_the_model_would_write():
    asked = question("gpt2")
    best = asked.model(asked.ids[None]).logits[0]
    drawn = prepare("lm_topk", asked)(torch.zeros(1, len(asked.ids), dtype=torch.double))[0]
    for place in range(1, len(asked.ids)):
        logits = best[place - 1].clone()
        logits[[0, 1, int(asked.ids[place])]] = -torch.inf
        assert drawn[place] == logits.argmax()


def test_pos_draws_tokens_of_the_same_tag(monkeypatch):
    def pos_tag(words):
        return [(word, "NUM" if word.isdigit() else "X") for word in words]

    monkeypatch.setitem(sys.modules, "nltk", SimpleNamespace(pos_tag=pos_tag))
    asked = question(prompt="a1b2")
    grid = torch.linspace(0, 1 - 1e-9, 500, dtype=torch.double)[:, None]
    drawn = prepare("pos", asked)(grid.expand(-1, 5))
    digits = set(TOKENIZER.encode("0123456789"))
    assert set(drawn[:, 1].tolist()) == set(drawn[:, 3].tolist()) == digits
    assert not set(drawn[:, 0].tolist()) & digits


def test_pos_without_nltk_or_its_tagger_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(PertokenError, match=r'nltk is not installed: pip install "pertoken\[attr'):
        prepare("pos", question())

    def no_tagger(words):
        raise LookupError

    monkeypatch.setitem(sys.modules, "nltk", SimpleNamespace(pos_tag=no_tagger))
    with pytest.raises(PertokenError, match="the tagger of nltk is not there"):
        prepare("pos", question())


class _Masked:
    """A fill-mask pair: bytes, and a mask; the model likes the byte after the one before."""

    mask_token, mask_token_id = "<mask>", 258
    config = SimpleNamespace(max_position_embeddings=64)
    device = "cpu"

    def __call__(self, text=None, add_special_tokens=True, *, input_ids=None, attention_mask=None):
        if input_ids is None:
            ids = [258] if text == "<mask>" else TOKENIZER.encode(text)
            return {"input_ids": [0, *ids, 1] if add_special_tokens else ids}
        before = torch.nn.functional.pad(input_ids[:, :-1], (1, 0))
        logits = 9.0 * torch.nn.functional.one_hot((before + 1) % 258, 258)
        return SimpleNamespace(logits=logits)

    def decode(self, ids):
        return TOKENIZER.decode(ids)


def test_mlm_draws_what_the_masked_model_proposes():
    pair = _Masked()
    asked = question(prompt="hjk", target="x")
    drawn = prepare(mlm(pair, pair), asked)(torch.zeros(1, 4, dtype=torch.double))[0]
    assert TOKENIZER.decode([int(drawn[1])]) == "i"
    assert (drawn[:3] != asked.ids[:3]).all()
    run = {"seed": 2, "replacer": mlm(pair, pair), **OPTIONS, "max_steps": 5}
    scores = reagent(asked, find("probability"), **run)
    assert not scores.values[0, :3].isnan().any()
    with pytest.raises(PertokenError, match="no mask token"):
        mlm(pair, TOKENIZER)


def test_mlm_takes_a_masked_model_of_transformers(tiny_encoder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    words += [f"##{letter}" for letter in "abcdefghij"]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    model = tiny_encoder("Bert", "ForMaskedLM", vocab_size=len(words)).float()
    asked = question(prompt="a b c [MASK] d e" * 4, target="x")  # a mask of the user's is text
    draw = prepare(mlm(model, tokenizer), asked)
    drawn = draw(torch.rand(3, len(asked.ids), generator=torch.Generator().manual_seed(0)))
    assert (drawn[:, asked.free] != asked.ids[asked.free]).all()
    # The ten likeliest words at the mask of one place, run alone.
    text, at = asked.text, 13
    ids = [*tokenizer(text[:at])["input_ids"][:-1], tokenizer.mask_token_id]
    right = tokenizer(text[at + 1 :])["input_ids"][1:]
    with torch.no_grad():
        logits = model(torch.tensor([ids + right])).logits[0, len(ids) - 1]
    likely = [tokenizer.decode([int(i)]) for i in logits.argsort(descending=True)[:20]]
    wanted = {TOKENIZER.encode(word)[0] for word in likely}
    evenly = torch.linspace(0, 0.99, 9)[:, None].expand(9, len(asked.ids))
    assert {int(i) for i in draw(evenly)[:, at]} <= wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio to replace must be above 0 and below 1, got 0.0"),
        ({"probes": 0}, "probes must be 1 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"replacer": "lmtopk"}, "unknown replacer 'lmtopk' (did you mean 'lm_topk'?)"),
        ({"replacer": "mlm"}, "needs a masked language model"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(PertokenError) as error:
        reagent(question(target="x"), find("probability"), **options)
    assert message in str(error.value)


def test_quantities_are_what_they_say():
    logits = torch.randn(4, 7, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 3, 6, 2])
    p = logits.softmax(-1)
    own = p[torch.arange(4), targets]
    assert torch.allclose(QUANTITIES["probability"](logits, targets), own)
    assert torch.allclose(QUANTITIES["log-probability"](logits, targets), own.log())
    assert torch.allclose(QUANTITIES["entropy"](logits, targets), -(p * p.log()).sum(-1))
    against = contrast(5)(logits, targets)
    assert torch.allclose(against, (own / p[:, 5]).log())
    with pytest.raises(PertokenError, match="did you mean 'entropy'"):
        find("entropi")
