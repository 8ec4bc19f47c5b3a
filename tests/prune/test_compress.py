"""Compressed prompts: what is kept, what survives, what is refused."""

from __future__ import annotations

import json
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import pertoken
from pertoken.errors import PertokenError
from pertoken.prune import compress
from pertoken.prune._text import join, words
from pertoken.select import budget_of
from pertoken.signal import TokenSignal
from pertoken.testing import tiny_model

PIECES = [
    *("word", "a", "and", "12", "3.5", "é", "e\u0301", "👩‍👩‍👧", "🇹🇷", "你好", "ひらがな", "naïve"),
    *(" ", "  ", "\n", "\n\n", "\r\n", "\t", ".", "!", ",", "(", ")"),
    *("https://a.b/c?d=e#f", "```py\nx = 1  # é\n```\n", "`f(x)`", "KEEP this  one", "- ", "# "),
]
MIXED = st.lists(st.sampled_from(PIECES), min_size=1).map("".join)
PROMPT = (MIXED | st.text(min_size=1)).filter(lambda text: bool(text.strip()))
SHARE = st.floats(0.01, 1.0)
CHEAP = st.sampled_from(["random", "stop-words"])
PROTECT = ["code", "urls", "numbers", r"KEEP[^.]{0,12}"]


def place_of(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A salience without a model: the token's id."""
    return ids.double()


@pytest.fixture(scope="module")
def encoder() -> tuple[Any, Any]:
    """A tiny BERT of 16 positions; tokens are letters, their ids in alphabetical order."""
    letters = "abcdefghijklmnopqrstuvwxyz.ABC"
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
    vocabulary |= {letter: 4 + place for place, letter in enumerate(letters)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    marks = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **marks)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return BertModel(config).eval(), tokenizer


# --- what must hold for every prompt ----------------------------------------------------------


@given(PROMPT, SHARE, CHEAP, st.booleans())
def test_the_rule_and_the_spans(text: str, keep: float, salience: str, lowest: bool) -> None:
    small = compress(text, keep, salience=salience, lowest=lowest, protect_defaults=False)
    count = len(words(text))
    assert sum(word.kept for word in small.words) == max(1, budget_of(count, keep))
    assert len(small.words) == count
    assert all(start < end for start, end in small.kept)
    assert all(before < start for (_, before), (start, _) in pairwise(small.kept))
    assert small.text == join(text, small.kept)
    assert "".join(text[start:end] for start, end in small.kept).replace(" ", "") == (
        small.text.replace(" ", "")
    )
    for word in small.words:
        assert text[word.start : word.end] == word.text
        assert bool(word.why) != word.kept
        inside = any(start <= word.start and word.end <= end for start, end in small.kept)
        assert inside == word.kept


@given(PROMPT, CHEAP, st.booleans())
def test_everything_kept_is_the_same_prompt(text: str, salience: str, defaults: bool) -> None:
    assert compress(text, 1.0, salience=salience, protect_defaults=defaults).text == text


@given(PROMPT, SHARE, CHEAP, st.integers(0, 3))
@settings(max_examples=200)
def test_protected_text_survives_byte_for_byte(
    text: str, keep: float, salience: str, seed: int
) -> None:
    assert_protected(compress(text, keep, salience=salience, protect=PROTECT, seed=seed), text)


def assert_protected(small: Any, text: str) -> None:
    """What the patterns match in a text stands in its compression, in order."""
    from pertoken.prune._protect import NAMED

    place = 0
    wanted = [NAMED.get(pattern, pattern) for pattern in PROTECT]
    found = [match for pattern in wanted for match in re.finditer(pattern, text)]
    for match in sorted(found, key=lambda match: match.span()):
        assert any(start <= match.start() and match.end() <= end for start, end in small.kept)
        place = small.text.index(match[0], max(0, place - len(match[0])))


@given(st.lists(PROMPT, min_size=1, max_size=4), SHARE, CHEAP)
def test_the_last_question_of_a_chat_survives(texts: list[str], keep: float, salience: str) -> None:
    roles = ["user", "assistant"] * 2
    chat = [{"role": r, "content": c} for r, c in zip(roles, texts, strict=False)]
    small = compress(chat, keep, salience=salience, protect=PROTECT)
    last = max(place for place, message in enumerate(chat) if message["role"] == "user")
    assert small.messages[last] == chat[last]
    assert [message["role"] for message in small.messages] == [m["role"] for m in chat]
    for message, short, part in zip(chat, small.messages, small.parts, strict=True):
        assert short["content"] == part.text
        assert part.prompt == message["content"]
        assert_protected(part, message["content"])  # in every message, not in the last alone
    assert compress(chat, 1.0, salience=salience).messages == chat


# --- what is chosen ---------------------------------------------------------------------------


def test_the_best_words_stay_in_their_order(encoder: tuple[Any, Any]) -> None:
    model, tokenizer = encoder
    given_ = {"salience": place_of, "model": model, "tokenizer": tokenizer}
    # Letters score by their place in the alphabet, brought to 0 … 1 with [CLS] at 0.
    small = compress("z a y b x c", 0.5, **given_)
    assert small.text == "z y x"
    assert [word.text for word in small.dropped] == ["a", "b", "c"]
    assert {word.why for word in small.dropped} == {"place_of too low"}
    assert compress("z a y b x c", 0.5, lowest=True, **given_).text == "a b c"
    scores = [word.score for word in small.words]
    top = 4 + 25
    assert scores == pytest.approx([(4 + "abcxyz".index(w) + 20 * (w > "c") - 1) / (top - 1)
                                    for w in "zaybxc"])  # fmt: skip


def test_tokens_of_a_word_add_up_and_ties_go_to_the_earlier(encoder: tuple[Any, Any]) -> None:
    model, tokenizer = encoder
    given_ = {"salience": place_of, "model": model, "tokenizer": tokenizer}
    assert compress("z bbbbbbbbb a", 0.34, **given_).text == "bbbbbbbbb"
    assert compress("b b b b", 0.5, **given_).text == "b b"
    assert [w.kept for w in compress("b b b b", 0.5, **given_).words] == [True, True, False, False]


def test_batches_and_padding_change_nothing(encoder: tuple[Any, Any]) -> None:
    model, tokenizer = encoder
    torch.manual_seed(0)

    def norms(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state[..., 0].detach()

    sentences = ["Abc de f.", "Bcd.", "Az by cx dw."]
    given_ = {"salience": norms, "model": model, "tokenizer": tokenizer}
    whole = compress(" ".join(sentences), 0.5, **given_)
    apart = [word.score for one in sentences for word in compress(one, 0.5, **given_).words
             if word.score is not None]  # fmt: skip
    together = [word.score for word in whole.words if word.text != "Bcd."]
    assert together == pytest.approx(apart, abs=1e-5)


def test_a_sentence_longer_than_the_encoder_is_rated_in_pieces(encoder: tuple[Any, Any]) -> None:
    model, tokenizer = encoder
    seen = []

    def watch(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.append(ids.shape[1])
        return ids.double()

    text = " ".join("abcdefghij" * 4)
    small = compress(text, 0.5, salience=watch, model=model, tokenizer=tokenizer)
    assert max(seen) == 16
    assert sum(word.kept for word in small.words) == 20
    assert "rated in 3 pieces" in " ".join(small.notes)
    text = "Ab cd. " * 5
    small = compress(text, 0.5, salience=watch, model=model, tokenizer=tokenizer)
    assert "rated sentence by sentence" in " ".join(small.notes)


@pytest.mark.parametrize("salience", ["globenc", "decompx"])
def test_longer_than_the_encoder_is_said_and_rated_as_in_pieces(
    salience: str, encoder: tuple[Any, Any]
) -> None:
    model, tokenizer = encoder
    given_ = {"salience": salience, "model": model, "tokenizer": tokenizer}
    pieces = ["abcdefghijklmn", "bdfhjlnprtvxzac", "cab"]  # 14 letters and two marks fill it
    whole = " ".join("".join(pieces[:1]) + pieces[1][:14] + "cab")
    small = compress(whole, 0.5, **given_)
    assert "longer than the 16 tokens" in " ".join(small.notes)
    assert "1 sentences were rated in 3 pieces" in " ".join(small.notes)
    for begin, letters in ((0, whole[:27]), (14, whole[28:55]), (28, whole[56:])):
        apart = compress(letters, 0.5, **given_)
        assert not any("longer than" in note for note in apart.notes)
        wanted = [word.score for word in apart.words]
        found = [word.score for word in small.words[begin : begin + len(wanted)]]
        assert found == pytest.approx(wanted, abs=1e-5)
    many = compress("Abc de. Bc. Cabd ef. Dab c. Az by.", 0.5, **given_)
    assert "rated sentence by sentence" in " ".join(many.notes)


def test_globenc_is_weighted_by_lexrank_and_others_are_not(
    encoder: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pertoken.prune import _plan
    from pertoken.prune._lexrank import lexrank

    monkeypatch.setattr(_plan, "_function", lambda name: place_of)
    model, tokenizer = encoder
    text = "Cab abc dab. Cab bad. Dab."
    plain = compress(text, 0.5, salience="decompx", model=model, tokenizer=tokenizer)
    weighted = compress(text, 0.5, salience="globenc", model=model, tokenizer=tokenizer)
    weights = lexrank(["Cab abc dab.", "Cab bad.", "Dab."])
    each = [weights[0]] * 3 + [weights[1]] * 2 + [weights[2]]
    assert weights[0] > max(weights[1:])
    wanted = [w.score * weight for w, weight in zip(plain.words, each, strict=True) if w.score]
    assert [word.score for word in weighted.words] == pytest.approx(wanted)


@pytest.mark.parametrize("salience", ["globenc", "decompx"])
def test_the_attributions_of_an_encoder(salience: str, encoder: tuple[Any, Any]) -> None:
    pytest.importorskip(f"pertoken.attribute.{salience}")
    model, tokenizer = encoder
    text = "Abc de f g. Bcd. Az by cx dw."
    small = compress(text, 0.5, salience=salience, model=model, tokenizer=tokenizer)
    assert sum(word.kept for word in small.words) == 4
    scores = [word.score for word in small.words]
    assert all(score is not None and score >= 0 for score in scores)
    assert len(set(scores)) > 4


@pytest.mark.parametrize("salience", ["globenc", "decompx", place_of])
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-neox", "gemma3"])
def test_a_decoder_rates_each_sentence_at_its_last_token(
    salience: Any, start: bool, architecture: str, encoder: tuple[Any, Any]
) -> None:
    from pertoken.prune._lexrank import lexrank
    from pertoken.prune._plan import _function

    marks = "[CLS] $A" if start else "$A"
    backend = Tokenizer.from_str(encoder[1].backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(marks, special_tokens=[("[CLS]", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="[CLS]")
    model = tiny_model(architecture)
    sentences = ["Abc de f g.", "Bcd abc.", "Az by cx dw."]
    text = " ".join(sentences)
    small = compress(text, 0.5, salience=salience, model=model, tokenizer=tokenizer)
    rate = _function(salience) if isinstance(salience, str) else salience
    weights = lexrank(sentences) if salience == "globenc" else [1.0] * 3
    wanted = []
    for sentence, weight in zip(sentences, weights, strict=True):
        own = tokenizer(sentence)["input_ids"]
        assert (own[0] == 1) == start
        ids = torch.tensor([own if start else [1, *own]])  # a start token is there in any case
        found = rate(model, ids, torch.ones_like(ids))[0]
        found = (found - found.min()) / (found.max() - found.min())
        begin = 1
        for word in sentence.split():
            wanted.append(weight * float(found[begin : begin + len(word)].sum()))
            begin += len(word)
    assert [word.score for word in small.words] == pytest.approx(wanted, rel=1e-9)
    told = [note for note in small.notes if "at the last token of each sentence" in note]
    assert len(told) == isinstance(salience, str)


@pytest.mark.parametrize("salience", ["globenc", "decompx"])
@pytest.mark.parametrize("keep", [0.8, 0.3])
def test_a_prompt_is_rated_once_for_all_shares(
    salience: str, keep: float, encoder: tuple[Any, Any]
) -> None:
    model, tokenizer = encoder
    text = "One two three four, five! A sentence with more words than that. Ende 12."
    own: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "salience": salience}
    signal = compress(text, 0.5, **own).signal
    for lowest in (False, True):
        again = compress(text, keep, salience=signal, lowest=lowest)
        assert again.text == compress(text, keep, lowest=lowest, **own).text
    with pytest.raises(PertokenError, match="random has rated no word"):
        _ = compress(text, 0.5, salience="random").signal
    for short, share in (("a b c", 0.9), ("One two. Answer with one word.", 0.5)):
        nothing_to_choose = compress(short, share, **own)
        with pytest.raises(PertokenError, match=f"{salience} has rated no word of this prompt: "):
            _ = nothing_to_choose.signal


def test_self_information_is_the_negative_log_probability(tiny_folder: str) -> None:
    model, tokenizer = pertoken.load(tiny_folder, dtype="float64")
    text = "one é two"
    small = compress(text, 0.5, salience="self-information", model=model, tokenizer=tokenizer)
    ids = [0, *tokenizer(text)["input_ids"]]  # the end token stands before the first
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    each = [-float(log_probs[place, ids[place + 1]]) for place in range(len(ids) - 1)]
    # Bytes: "one" 3, a blank, "é" 2, a blank, "two" 3.
    wanted = [sum(each[:3]), sum(each[4:6]), sum(each[7:])]
    assert [word.score for word in small.words] == pytest.approx(wanted, rel=1e-5)


def test_a_prompt_longer_than_the_decoder_is_read_in_windows(tiny_folder: str) -> None:
    model, tokenizer = pertoken.load(tiny_folder)
    text = "abcdef " * 100  # 700 tokens; 512 positions, the end token takes the first
    small = compress(text, 0.5, salience="self-information", model=model, tokenizer=tokenizer)
    assert "read in 2 windows apart" in " ".join(small.notes)
    assert sum(word.kept for word in small.words) == 50
    # The second window begins as the first does: 511 tokens are 73 words.
    assert small.words[73].score == pytest.approx(small.words[0].score)
    assert small.words[72].score != pytest.approx(small.words[0].score)


def test_stop_words_go_first_and_the_share_holds() -> None:
    text = "The cat sat on the mat and it did not move"
    assert compress(text, 5 / 11, salience="stop-words").text == "cat sat mat not move"
    assert compress(text, 2 / 11, salience="stop-words").words[1].why.startswith("no stop word")
    most = compress(text, 9 / 11, salience="stop-words")
    assert len(most.dropped) == 2
    assert {word.why for word in most.dropped} == {"stop word"}


def test_random_is_seeded() -> None:
    text = "a b c d e f g h i j"
    first = compress(text, 0.5, salience="random", seed=1)
    assert first.text == compress(text, 0.5, salience="random", seed=1).text
    assert {compress(text, 0.5, salience="random", seed=s).text for s in range(9)} > {first.text}


def test_a_signal_of_your_own() -> None:
    signal = TokenSignal("to be or", [0.5, 2.0, 1.0], [(0, 2), (2, 5), (5, 8)], "weight")
    small = compress("to be or", 2 / 3, salience=signal)
    assert small.text == "be or"
    assert small.salience == "weight"


# --- protection -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "Answer with one word.",
        "Reply only with yes or no!",
        "respond in JSON, with the keys a and b.",
        "Output only the label.",
        "Return JSON.",
        "Give your final answer as a number.",
    ],
)
def test_how_to_answer_survives_by_default(line: str) -> None:
    text = f"Some long text that nobody needs at all. {line} More text here."
    assert line in compress(text, 0.1, salience="random").text
    assert line not in compress(text, 0.1, salience="random", protect_defaults=False).text
    cue = compress("Some text that nobody needs.\nAnswer: ", 0.4, salience="random")
    assert cue.text.endswith("\nAnswer: ")


@pytest.mark.parametrize(
    "asked",
    [
        "Answer with a number rounded to 2.5 digits and the unit.",
        "Answer with exactly one of the three\nwords positive, negative or neutral.",
        "Reply in one colour, e.g. red or blue!",
        "Return only the label, yes or no.",
    ],
)
def test_the_whole_sentence_about_the_answer_stays(asked: str) -> None:
    text = f"There is much to be said of it.\n{asked}\nAnd this goes on and on."
    assert compress(text, 0.05, salience="random").text == asked


def test_code_keeps_its_lines() -> None:
    code = "```python\ndef f(x):\n    return  x\n```"
    text = f"Look at this code of mine:\n\n{code}\n\nWhat does it do, and why?"
    small = compress(text, 0.2, salience="random", protect="code")
    assert f"\n\n{code}\n\n" in small.text or small.text.startswith(code)
    for lines, fence in (("\r\n", "```"), ("\n", "````")):
        text = lines.join(["See", fence, "x = 1", "", "", fence, "and so many more words"])
        small = compress(text, 0.1, salience="random", protect="code")
        assert small.text == lines.join([fence, "x = 1", "", "", fence])
    open_ended = compress(f"Look here\n{code[:-4]}", 0.1, salience="random", protect=["code"])
    assert code[:-4] in open_ended.text


def test_more_protected_than_asked_for_is_said() -> None:
    small = compress("1 2 3 4 word", 0.2, salience="random", protect=["numbers"])
    assert small.text == "1 2 3 4"
    assert "protected words alone are 4 of 5, more than the 1 asked for" in small.notes
    assert small.dropped[0].why == "no room beside what is protected"
    assert {word.why for word in small.protected} == {"protected: numbers"}


def test_notes_about_patterns_and_numbers() -> None:
    notes = compress("a b c 1", 0.5, salience="random", protect=["url", "zzz"], seed=1).notes
    assert "protect 'url' was read as a pattern (did you mean 'urls'?)" in notes
    assert "the pattern 'zzz' matches nothing" in notes
    lost = compress("1 2 3 4", 0.5, salience="random").notes
    assert "2 of 4 words with digits were dropped" in " ".join(lost)


# --- tokens and forms -------------------------------------------------------------------------


def test_tokens_of_the_target(tiny_folder: str, encoder: tuple[Any, Any]) -> None:
    target = pertoken.loading.load_tokenizer(tiny_folder)
    text = "abc de f ghi"
    small = compress(text, 0.5, salience="random", target_tokenizer=target)
    assert (small.tokens_before, small.tokens_after) == (len(text), len(small.text))
    assert compress(text, 0.5, salience="random").tokens_before is None
    model, tokenizer = encoder
    own = compress(text, 0.5, salience=place_of, model=model, tokenizer=tokenizer)
    assert own.tokens_before == 9
    assert "counted by the salience model's tokenizer" in " ".join(own.notes)
    assert repr(small).startswith(f"CompressedPrompt({len(small.text)} of 12 tokens, 2 of 4 words")
    assert str(small) == small.text


def test_tokens_of_a_chat_are_those_of_its_template(tiny_folder: str) -> None:
    target = pertoken.loading.load_tokenizer(tiny_folder)
    chat = [{"role": "user", "content": "a b c d"}, {"role": "user", "content": "end"}]
    small = compress(chat, 0.5, salience="random", target_tokenizer=target)
    assert (small.tokens_before, small.tokens_after) == (10, 6)
    target.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    small = compress(chat, 0.5, salience="random", target_tokenizer=target)
    assert (small.tokens_before, small.tokens_after) == (14, 10)
    target.chat_template = "{{ raise_exception('one user at a time') }}"
    line = refusal(chat, 0.5, salience="random", target_tokenizer=target)
    assert line == "the chat template refuses the conversation: one user at a time"


@pytest.mark.parametrize("salience", ["globenc", "decompx", "self-information"])
def test_a_tokenizer_of_another_model_is_refused(salience: str, tiny_folder: str) -> None:
    tokenizer = pertoken.loading.load_tokenizer(tiny_folder)
    model = tiny_model("llama", vocab_size=64)
    line = refusal("a few words", 0.5, salience=salience, model=model, tokenizer=tokenizer)
    assert "the model knows 64 ids: they do not belong together" in line


def test_forms(tmp_path: Path) -> None:
    text = "<b>one</b> two three 4"
    small = compress(text, 0.5, salience="random", protect=["numbers"])
    found = json.loads(small.to_json(tmp_path / "o.json"))
    assert json.loads((tmp_path / "o.json").read_text()) == found
    assert "".join(text[start:end] for start, end in found["kept"]) == found["text"] == small.text
    page = small.to_html(tmp_path / "o.html")
    assert (tmp_path / "o.html").read_text() == page
    assert "<b>" not in page
    assert page.count("<del ") == 2
    assert page.count("<mark ") == 1
    assert "http" not in page.replace("http-equiv", "")
    assert list(small.to_dataframe()["kept"]) == [word.kept for word in small.words]
    chat = compress([{"role": "user", "content": text}], 0.5, salience="random")
    assert json.loads(chat.to_json())["messages"][0]["content"] == text
    assert "<h2>user</h2>" in chat.to_html()
    assert len(chat.to_dataframe()) == 4
    assert repr(chat) == "CompressedChat(1 messages)"
    assert "<del" in small._repr_html_()


def test_the_public_name() -> None:
    assert pertoken.compress("a b", 1.0).text == "a b"


# --- what is refused --------------------------------------------------------------------------


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(PertokenError) as caught:
        compress(*args, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("prompt", ["", " \n\t"])
def test_an_empty_prompt(prompt: str) -> None:
    assert refusal(prompt) == "the prompt is empty"


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, float("nan"), "0.5"])
def test_a_share_outside_its_range(keep: Any) -> None:
    assert "above 0 and at most 1" in refusal("text", keep)


def test_names_and_patterns() -> None:
    line = refusal("text", salience="glob-enc")
    assert "unknown salience 'glob-enc' (did you mean 'globenc'?): there are decompx" in line
    line = refusal("text", salience="random", protect=["(a"])
    assert line == (
        "the pattern '(a' does not compile: missing ), unterminated subpattern at character 1"
    )
    assert "is empty" in refusal("text", salience="random", protect=[""])
    assert "not int" in refusal("text", salience="random", protect=[3])
    assert "a broken one" in refusal("a \ud800 b", salience="random")


def test_scores_that_are_nan(encoder: tuple[Any, Any]) -> None:
    model, tokenizer = encoder
    broken = partial(torch.full_like, fill_value=float("nan"), dtype=torch.float64)
    line = refusal(
        "a b c d", salience=lambda m, ids, mask: broken(ids), model=model, tokenizer=tokenizer
    )
    assert "NaN or infinite: load it in float32" in line
    line = refusal(
        "a b c d", salience=lambda m, ids, mask: ids[0], model=model, tokenizer=tokenizer
    )
    assert "scores [6] for tokens [1, 6]" in line
    signal = TokenSignal("to be", [1.0, float("nan")], [(0, 2), (2, 5)], "w")
    assert "the score of ' be' is NaN" in refusal("to be", 0.5, salience=signal)
    assert "not of this prompt" in refusal("to be or", 0.5, salience=signal)


def test_a_model_that_nothing_asks_for() -> None:
    signal = TokenSignal("a b", [1.0, 2.0], [(0, 1), (1, 3)], "weight")
    assert "weight rates without a model" in refusal("a b", salience=signal, model="smollm2")
    line = refusal("a b", salience="random", model=Path("none"))
    assert line == "random rates without a model: leave 'none' out"


def test_the_wrong_kind_of_model(encoder: tuple[Any, Any]) -> None:
    assert "minilm is an encoder" in refusal("a b", salience="self-information", model="minilm")
    model, tokenizer = encoder
    given_ = {"model": model, "tokenizer": tokenizer}
    line = refusal("a b", salience="self-information", **given_)
    assert line.startswith("the model is an encoder (BertModel)")
    assert "needs its tokenizer" in refusal("a b", salience=place_of, model=model)
    model.train()
    assert "training mode" in refusal("a b", salience=place_of, **given_)
    model.eval()
    slow = pertoken.testing.ByteTokenizer()
    assert "a fast tokenizer is needed" in refusal(
        "a b c d", salience=place_of, model=model, tokenizer=slow
    )


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ([], "no message of the user"),
        ([{"role": "user"}], "message 1: "),
        ([{"role": "usr", "content": "x"}], "did you mean 'user'?"),
        ([{"role": "user", "content": ""}], "message 1: the message is empty"),
        ([{"role": "user", "content": ["x"]}], '"content" must hold text'),
        ([{"role": "system", "content": "x"}], "no message of the user"),
    ],
)
def test_a_broken_chat(chat: Any, words: str) -> None:
    assert words in refusal(chat, salience="random")


def test_a_signal_is_not_for_chats() -> None:
    signal = TokenSignal("x", [1.0], [(0, 1)], "w")
    assert "one by one" in refusal([{"role": "user", "content": "x"}], salience=signal)
