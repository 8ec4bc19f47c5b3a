"""Prompts, chats and targets as a question; the signal over the user's own text; the price."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from pertoken._pieces import special_ids
from pertoken.attribute import attribute, contrast, estimate_cost, register
from pertoken.attribute._question import _in_order, ask
from pertoken.attribute._replace import prepare
from pertoken.attribute.quantity import QUANTITIES, probability
from pertoken.errors import PertokenError
from pertoken.signal import TokenSignal
from pertoken.testing import ByteTokenizer, tiny_model

TOKENIZER = ByteTokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=258)


@pytest.fixture(scope="module")
def chat():
    """A tokenizer of bytes with a chat template, a token before texts, and offsets."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {sign: place for place, sign in enumerate(["<s>", "</s>", *letters])}
    backend = Tokenizer(models.BPE(vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content | trim }}</s>{% endfor %}<s>bot:"
    )
    return tokenizer


def test_the_text_is_the_users(model, chat):
    asked = ask(model, chat, "a çay", "x")
    assert asked.ids[0] == 0
    assert asked.free.tolist() == [False, *[True] * 7]
    assert asked.text == "a çay"
    assert asked.spans == (None, (0, 1), (1, 2), (2, 2), (2, 3), (3, 4), (4, 5))


def test_special_tokens_a_user_wrote_stay_and_are_protected(model, chat):
    asked = ask(model, chat, "a</s>b", "x")
    assert asked.spans == (None, (0, 1), (1, 5), (5, 6))
    assert asked.free.tolist() == [False, True, False, True, True]
    values = attribute(model, chat, "a</s>b", "x", "occlusion").values
    assert np.isnan(values).tolist() == [False, True, False]


def test_a_chat_is_its_messages(model, chat):
    messages = [
        {"role": "user", "content": " hi s"},
        {"role": "bot", "content": "s: yo"},
        {"role": "user", "content": "hi"},
    ]
    asked = ask(model, chat, messages, "ok")
    assert asked.text == " hi s\ns: yo\nhi"
    signal = attribute(model, chat, messages, "ok", "occlusion")
    # The blank that the template strips, and the line ends, go to the token behind them.
    assert signal.tokens == [" h", "i", " ", "s", "\ns", ":", " ", "y", "o", "\nh", "i"]
    assert not np.isnan(signal.values).any()
    rendered = chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat.decode(asked.ids[: asked.prompt]) == rendered
    assert int(asked.free[: asked.prompt].sum()) == 11
    shown = "".join(chat.decode([int(asked.ids[place])]) for place in asked.shown)
    assert shown == "hi ss: yohi"


# As SmolLM2's: it has words of its own, and does not strip what the user wrote.
HELPFUL = (
    "<s>system\nYou are a helpful AI assistant</s>{% for m in messages %}"
    "<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}<s>assistant:"
)


@pytest.mark.parametrize("written", ["AI", "user", "a helpful AI", "assistant", "s", " AI\n"])
def test_words_of_the_template_are_not_taken_for_the_users(model, chat, written):
    helpful = chat.__class__(tokenizer_object=chat.backend_tokenizer, bos_token="<s>")
    helpful.chat_template = HELPFUL
    user = {"role": "user", "content": written}
    before = len(helpful("<s>system\nYou are a helpful AI assistant</s><s>user\n")["input_ids"]) - 1
    asked = ask(model, helpful, [user], "x")
    assert asked.shown == list(range(before, before + len(written)))
    assert asked.spans[before:][: len(written)] == tuple((i, i + 1) for i in range(len(written)))
    two = ask(model, helpful, [{"role": "assistant", "content": "user"}, user], "x")
    shown = "".join(helpful.decode([int(two.ids[place])]) for place in two.shown)
    assert shown == "user" + written
    assert helpful.decode(two.ids[two.shown[-1] + 1 : two.prompt]) == "</s><s>assistant:"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{{ 'short' if messages[0].content == 'abc' else '' }}{{ messages[0].content }}",
        "{{ messages[0].content }} {{ messages[0].content }}",
        "nothing",
    ],
)
def test_a_template_that_does_more_than_to_put_messages_in_is_refused(model, chat, template):
    odd = chat.__class__(tokenizer_object=chat.backend_tokenizer, bos_token="<s>")
    odd.chat_template = template
    with pytest.raises(PertokenError, match="rewrites the messages"):
        ask(model, odd, [{"role": "user", "content": "abc"}])


def test_special_tokens_without_a_role_are_special_too(model, chat):
    from tokenizers import AddedToken

    chat = chat.__class__(tokenizer_object=chat.backend_tokenizer, bos_token="<s>")
    chat.add_tokens([AddedToken("<tool>", special=True)])
    number = chat.convert_tokens_to_ids("<tool>")
    assert number == 258
    assert special_ids(chat) == {0, 1, number}
    assert number not in chat.all_special_ids
    asked = ask(tiny_model("llama", vocab_size=259), chat, "a<tool>b", "x")
    assert asked.free.tolist() == [False, True, False, True, True]
    for replacer in ("uniform", "lm_topk", "nearest"):
        drawn = prepare(replacer, asked)(torch.rand(3000, 5, dtype=torch.double))
        assert not torch.isin(drawn, torch.tensor([0, number])).any()


def test_offsets_that_share_a_character_or_leave_blanks_out():
    text = "ab ☕ d"
    assert _in_order([(0, 0), (0, 2), (3, 4), (3, 4), (3, 4), (5, 6)], text) == [
        (0, 0),
        (0, 2),
        (2, 3),
        (3, 3),
        (3, 4),
        (4, 6),
    ]


def test_a_character_of_several_tokens_is_the_users_where_it_comes_first(model, chat):
    for asked in (
        ask(model, TOKENIZER, "é is", "x"),
        ask(model, chat, "é is", "x"),
        ask(model, chat, [{"role": "user", "content": "é is"}], "x"),
    ):
        own = [span for span in asked.spans if span is not None]
        assert own == [(0, 0), (0, 1), (1, 2), (2, 3), (3, 4)]
        assert int(asked.free[: asked.prompt].sum()) == 5


def test_targets(model):
    assert ask(model, TOKENIZER, "ab", "xyz").targets == ("x", "y", "z")
    ids = torch.tensor([TOKENIZER.encode("ab")])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3)
    asked = ask(model, TOKENIZER, "ab", 3)
    assert asked.ids.tolist() == written[0].tolist()
    assert ask(model, TOKENIZER, "ab").ids.tolist() == written[0, :3].tolist()


def test_the_prompts_tokens_stay_where_the_tokenizer_would_join(model):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "c": 3}, merges=[("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    joining = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert ask(model, joining, "ca", "bc").ids.tolist() == [3, 0, 1, 3]
    assert ask(model, joining, "ca", "cab").ids.tolist() == [3, 0, 3, 2]


def test_columns_are_targets_given_those_before(model):
    signal = attribute(model, TOKENIZER, "abcd", "xy", "occlusion", seed=1)
    assert signal.values.shape == (4, 2)
    assert signal.targets == ("x", "y")
    first = attribute(model, TOKENIZER, "abcd", "x", "occlusion", seed=1)
    assert np.allclose(signal.values[:, 0], first.values)
    later = attribute(model, TOKENIZER, "abcdx", "y", "input-x-gradient")
    both = attribute(model, TOKENIZER, "abcd", "xy", "input-x-gradient")
    assert np.allclose(both.values[:, 1], later.values[:4])


def test_notes_travel_with_the_signal(model):
    signal = attribute(model, TOKENIZER, "abcdefgh", "x", max_steps=1, top_k=1)
    (note,) = signal.notes
    assert "no probe stopped" in note
    assert TokenSignal.from_json(signal.to_json()).notes == signal.notes
    assert "no probe stopped" in signal.to_html()
    assert TokenSignal.from_json(signal.to_json().replace('"notes"', '"other"')).notes == ()


def test_quantities_of_your_own(model):
    @register("odds", unit="nats")
    def log_odds(logits, targets):
        p = probability(logits, targets)
        return torch.log(p / (1 - p))

    try:
        signal = attribute(model, TOKENIZER, "abc", "x", "occlusion", "odds")
    finally:
        del QUANTITIES["odds"]
    assert signal.name == "occlusion of odds of 'x'"
    against = attribute(model, TOKENIZER, "abc", "x", "occlusion", contrast(70))
    same = attribute(model, TOKENIZER, "abc", "x", "occlusion", contrast(TOKENIZER.encode("x")[0]))
    assert np.abs(against.values).max() > 0
    assert np.abs(same.values).max() == 0
    with pytest.raises(PertokenError, match="unit of a quantity"):
        register("odds", unit="bits")


@pytest.mark.parametrize("foil", [-1, " Lyon", 1.5, True, None])
def test_a_foil_is_the_id_of_a_token(foil):
    with pytest.raises(PertokenError, match=f"a foil is the id of a token, .* got {foil!r}"):
        contrast(foil)


@pytest.mark.parametrize("method", ["reagent", "occlusion", "gradient-norm", "decompx"])
def test_a_foil_that_the_model_does_not_know(model, method):
    with pytest.raises(PertokenError, match=r"the foil must be in 0..257, got 999"):
        attribute(model, TOKENIZER, "abc", "x", method, contrast(999))


def test_the_cost_is_told(model):
    rows = {
        "reagent": (1 + 2 * 5, 1 + 2 * 5 * 3000),
        "attention": (1, 1),
        "integrated-gradients": (52, 52),
        "occlusion": (1 + 3 * 5, 1 + 3 * 5),
        "lime": (200, 200),
    }
    for name, wanted in rows.items():
        cost = estimate_cost(model, TOKENIZER, "abcde", "x", name)
        assert cost.rows == wanted
        assert 0 < cost.seconds[0] <= cost.seconds[1]
        assert cost.megabytes > 0
        assert "texts through the model, about" in str(cost)
    assert estimate_cost(model, TOKENIZER, "abcde", "xy", "lime", samples=3).rows == (6, 6)
    with pytest.raises(PertokenError, match="no option 'sample'"):
        estimate_cost(model, TOKENIZER, "abcde", "x", "lime", sample=3)


@pytest.mark.parametrize("name", ["reagent", "occlusion", "lime", "integrated-gradients"])
def test_the_cost_is_what_runs(model, name):
    """Rows counted where they go through the decoder; those of replacers are not counted."""
    seen = 0

    def count(_, args, given):
        nonlocal seen
        tokens = given.get("input_ids")
        seen += len(given["inputs_embeds"] if tokens is None else tokens)

    options = {"max_steps": 1} if name == "reagent" else {}
    if name != "integrated-gradients":
        options["replacer"] = "uniform"
    handle = model.model.register_forward_pre_hook(count, with_kwargs=True)
    attribute(model, TOKENIZER, "abcde", "xy", name, **options)
    handle.remove()
    assert estimate_cost(model, TOKENIZER, "abcde", "xy", name, **options).rows == (seen, seen)


@pytest.mark.parametrize(
    ("prompt", "target", "message"),
    [
        ("", None, "the prompt is empty"),
        ("  \n", None, "the prompt is empty"),
        ("a\udcff", None, "the prompt is not UTF-8 text: its character 2"),
        ("abc", "", "the target is empty"),
        ("abc", "\udcff", "the target is not UTF-8"),
        ("abc", 0, "number of target tokens must be 1 or more, got 0"),
        ("a" * 512, 1, "more than the model's 512 positions"),
        ([], None, "a chat is a list of"),
        (["hi"], None, "a chat is a list of"),
        ([{"content": "hi"}], None, "a chat is a list of"),
        ([{"role": "user", "content": " "}], None, "a message of the chat is empty"),
        ([{"role": "user", "content": "hi"}], None, "no chat template"),
        ("\x00", "x", None),
    ],
)
def test_what_cannot_be_asked(model, prompt, target, message):
    if message is None:
        assert len(ask(model, TOKENIZER, prompt, target).ids) == 2
        return
    with pytest.raises(PertokenError) as error:
        attribute(model, TOKENIZER, prompt, target)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_models_that_cannot_be_asked(model):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=258, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(PertokenError, match="encoder-decoder model"):
        ask(T5ForConditionalGeneration(config), TOKENIZER, "abc")
    with pytest.raises(PertokenError, match=r"call model.eval\(\) first"):
        ask(tiny_model("llama", vocab_size=258).train(), TOKENIZER, "abc", "x")
    with pytest.raises(PertokenError, match="the model knows 64 ids"):
        ask(tiny_model("llama"), TOKENIZER, "abc", "x")
    with pytest.raises(PertokenError, match="the model knows 64 ids"):
        ask(tiny_model("llama"), TOKENIZER, "abc")


def test_a_chat_that_the_template_refuses(model, chat):
    strict = copy.copy(chat)
    strict.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(PertokenError, match="template refuses the conversation: no system message"):
        ask(model, strict, [{"role": "system", "content": "hi"}])
