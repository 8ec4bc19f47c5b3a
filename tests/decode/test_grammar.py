"""Grammars: what they answer is the language, by enumeration and by Python's regex."""

from __future__ import annotations

import functools
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llguidance")

from pertoken.decode import grammar as module
from pertoken.decode.constraint import RegexConstraint
from pertoken.decode.grammar import (
    GrammarConstraint,
    GrammarRegexConstraint,
    JSONSchemaConstraint,
    LarkConstraint,
)
from pertoken.decode.particles import smc
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, tiny_model

BYTES = ByteTokenizer()
encode = BYTES.encode


def bpe() -> Any:
    """Bytes, some longer tokens, and two tokens that are not text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("n", "a"), ("m", "e"), ("na", "me"), ("a", "b"), ("b", "c"), ("ab", "c"), ('"', ":")]
    names = ["</s>", *letters, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<|tool|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


BPE = bpe()
TOKENIZERS = {"bytes": BYTES, "bpe": BPE}

# Grammars of few texts, all of which can be written down.
LANGUAGES: dict[str, tuple[Callable[[Any], GrammarConstraint], list[str]]] = {
    "lark": (
        lambda t: LarkConstraint('start: ("a" | "ab") ("c" | "bc")', tokenizer=t),
        ["ac", "abc", "abbc"],
    ),
    "recursive": (
        lambda t: LarkConstraint(
            'start: "(" start ")" | "ab"\n// a comment without an end', tokenizer=t
        ),
        ["(" * n + "ab" + ")" * n for n in range(30)],
    ),
    "stop": (  # llguidance cannot roll these back
        lambda t: LarkConstraint('start: a "x"\na[stop="c"]: /[ab]?/', tokenizer=t),
        ["cx", "acx", "bcx"],
    ),
    "schema": (
        lambda t: JSONSchemaConstraint({"enum": ["name", "namely", 12, "ça"]}, tokenizer=t),
        ['"name"', '"namely"', "12", '"ça"'],
    ),
    "object": (
        lambda t: JSONSchemaConstraint(
            {
                "type": "object",
                "properties": {"name": {"type": "boolean"}, "abc": {"const": None}},
                "required": ["name"],
                "additionalProperties": False,
                "x-guidance": {"whitespace_flexible": False},
            },
            tokenizer=t,
        ),
        [
            '{"name":true}',
            '{"name":false}',
            '{"name":true,"abc":null}',
            '{"name":false,"abc":null}',
        ],
    ),
    "regex": (
        lambda t: GrammarRegexConstraint("na(me|ab)c?|é/", tokenizer=t),
        ["name", "namec", "naab", "naabc", "é/"],
    ),
}


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes of each token, None for those that are no text."""
    if tokenizer is BYTES:
        return [None, None, *(bytes([b]) for b in range(256))]
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    back = {sign: byte for byte, sign in bytes_to_unicode().items()}
    special = {*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("<|tool|>")}
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [None if i in special else bytes(map(back.get, n)) for i, n in enumerate(names)]


PIECES = {name: token_bytes(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def walks(texts: list[bytes], pieces: list[bytes | None], seed: int) -> Iterator[list[int]]:
    """Prefixes of allowed texts, cut into tokens at random, some with one wrong token behind."""
    draw = random.Random(seed)
    for _ in range(25):
        text, ids = draw.choice(texts[:4]), list[int]()
        while text and draw.random() > 0.1:
            fits = [t for t, piece in enumerate(pieces) if piece and text.startswith(piece)]
            ids.append(draw.choice(fits))
            text = text[len(pieces[ids[-1]] or b"") :]
            yield list(ids)
        yield [*ids, draw.randrange(len(pieces))]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_answer_is_that_of_the_enumerated_language(language: str, tokenizer: str) -> None:
    make, written = LANGUAGES[language]
    constraint, pieces = make(TOKENIZERS[tokenizer]), PIECES[tokenizer]
    texts = [text.encode() for text in written]

    def begins(ids: Sequence[int], more: bytes = b"") -> bool:
        parts = [pieces[token] for token in ids]
        if None in parts:
            return False
        start = b"".join(part or b"" for part in parts) + more
        return any(text.startswith(start) for text in texts)

    for ids in [[], *walks(texts, pieces, seed=len(language))]:
        follows = [begins(ids, piece) if piece else False for piece in pieces]
        assert constraint.allowed(ids).tolist() == follows
        assert constraint.accepts_each(ids, range(len(pieces))) == follows
        few = random.Random(0).sample(range(len(pieces)), 20)
        assert constraint.accepts_each(ids, few) == [follows[token] for token in few]
        assert [constraint.accepts([*ids, token]) for token in few] == [follows[t] for t in few]
        assert constraint.accepts(ids) == begins(ids)
        whole = begins(ids) and b"".join(pieces[t] or b"" for t in ids) in texts
        assert constraint.complete(ids) == whole


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_forced_text_is_what_all_allowed_texts_go_on_with(language: str, tokenizer: str) -> None:
    make, written = LANGUAGES[language]
    constraint, pieces = make(TOKENIZERS[tokenizer]), PIECES[tokenizer]
    texts = [text.encode() for text in written]
    seen = 0
    for ids in walks(texts, pieces, seed=3):
        forced = constraint.forced(ids)
        if not constraint.accepts(ids):
            assert forced == []
            continue
        before = b"".join(pieces[token] or b"" for token in ids)
        sure = b"".join(pieces[token] or b"" for token in forced)
        going = [text for text in texts if text.startswith(before)]
        assert all(text.startswith(before + sure) for text in going)
        seen += len(forced)
        if tokenizer == "bytes":  # one way to cut a text: the forced token is the only one
            for place, token in enumerate(forced):
                behind = [*ids, *forced[:place]]
                assert constraint.allowed(behind).nonzero().flatten().tolist() == [token]
                assert not constraint.complete(behind)
            if not forced and not constraint.complete(ids) and language != "stop":
                assert constraint.allowed(ids).sum() > 1
    assert seen or language == "stop"


@pytest.mark.parametrize(
    "pattern",
    [
        r"[ab]*c?",
        r"(a|b)*a(a|b){3}",
        r"(?i)abc?|cab",
        r"a{2,3}(b|ca)+",
        r"[^a]b.",
        r"(a+b?|c){0,3}",
        r"a\.b|\w\d",
        r"",
    ],
)
def test_regexes_mean_what_python_means(pattern: str) -> None:
    ours = GrammarRegexConstraint(pattern, tokenizer=BYTES)
    asked = RegexConstraint(pattern, tokenizer=BYTES)
    compiled = regex.compile(pattern)
    draw = random.Random(len(pattern))
    for _ in range(300):
        text = "".join(draw.choices("abcA.1", k=draw.randrange(7)))
        whole = compiled.fullmatch(text) is not None
        start = compiled.fullmatch(text, partial=True) is not None
        for constraint in (ours, asked):
            assert constraint.complete(encode(text)) == whole, text
            assert constraint.accepts(encode(text)) == start, text


@pytest.mark.model
@pytest.mark.parametrize("start", ["", "caf", "la mer est", "é. ", "la mer."])
def test_masks_over_a_real_vocabulary_are_what_python_answers(
    start: str, smollm2: tuple[Any, Any]
) -> None:
    _, tokenizer = smollm2
    pattern = r"[a-zé]+( [a-zé]+)*[.!]"
    ours = GrammarRegexConstraint(pattern, tokenizer=tokenizer)
    asked = RegexConstraint(pattern, tokenizer=tokenizer)
    ids = tokenizer.encode(start)
    mask = ours.allowed(ids)
    tokens = random.Random(0).sample(range(len(tokenizer)), 2000)
    answers = [bool(mask[token]) for token in tokens]
    assert ours.accepts_each(ids, tokens) == answers
    assert [ours.accepts([*ids, token]) for token in tokens] == answers
    for token, answer in zip(tokens, answers, strict=True):
        # Half a character, of which RegexConstraint does not know what it may become.
        if not tokenizer.decode([token]).endswith("\N{REPLACEMENT CHARACTER}"):
            assert asked.accepts([*ids, token]) == answer


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "size": {"type": "integer", "minimum": -3, "maximum": 12},
        "kinds": {"type": "array", "items": {"enum": ["x", "yy"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "size", "kinds"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def test_samples_of_a_schema_satisfy_it() -> None:
    constraint = JSONSchemaConstraint(json.dumps(SCHEMA), tokenizer=BYTES)
    model = tiny_model("llama", vocab_size=BYTES.vocab_size, scale=0.05)
    model.generation_config.eos_token_id = BYTES.eos_token_id
    found = smc(model, constraint, torch.tensor([[70, 71]]), particles=30, seed=0)
    texts = {BYTES.decode(ids) for ids in found.posterior()}
    assert len(texts) > 1
    for text in texts:
        value = json.loads(text)
        assert value.keys() == {"name", "size", "kinds"}
        assert len(value["name"]) <= 4
        assert -3 <= value["size"] <= 12
        assert 1 <= len(value["kinds"]) <= 2
        assert set(value["kinds"]) <= {"x", "yy"}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_order_of_questions_changes_no_answer(data: st.DataObject) -> None:
    pattern = r"(a|bb)*c(a|b){0,40}"
    compiled = regex.compile(pattern)
    constraint = GrammarRegexConstraint(pattern, tokenizer=BYTES)
    kept, back = module._KEPT, module._BACK
    module._KEPT, module._BACK = data.draw(st.sampled_from([(1, 1), (2, 40), (64, 3)]))
    try:
        texts = data.draw(st.lists(st.text("abc", max_size=9), min_size=1, max_size=12))
        for text in texts:
            kind = data.draw(st.sampled_from(["accepts", "complete", "allowed", "forced"]))
            start = compiled.fullmatch(text, partial=True) is not None
            if kind == "accepts":
                assert constraint.accepts(encode(text)) == start
            elif kind == "complete":
                assert constraint.complete(encode(text)) == (compiled.fullmatch(text) is not None)
            elif kind == "allowed":
                goes = [compiled.fullmatch(text + sign, partial=True) is not None for sign in "abc"]
                mask = constraint.allowed(encode(text))
                assert [bool(mask[token]) for token in encode("abc")] == goes
                assert int(mask.sum()) == sum(goes)
            else:
                odd = start and "c" not in text and text.replace("bb", "").count("b") == 1
                assert constraint.forced(encode(text)) == (encode("b") if odd else [])
            assert len(constraint._free._kept) <= module._KEPT
    finally:
        module._KEPT, module._BACK = kept, back


def test_special_tokens_and_ids_out_of_range_are_never_allowed() -> None:
    tool = BPE.convert_tokens_to_ids("<|tool|>")
    anything = GrammarRegexConstraint(r"(?s:.*)", tokenizer=BPE)
    named = LarkConstraint('start: "a" (<|tool|> | "b")', tokenizer=BPE)
    a = BPE.encode("a")
    for token in (tool, BPE.eos_token_id, len(BPE), 10**6, -1):
        for constraint in (anything, named):
            assert not constraint.accepts([*a, token])
            assert not constraint.complete([*a, token])
            assert not constraint.allowed([token]).any()
            assert constraint.accepts_each(a, [token, *a]) == [False, constraint is anything]
            assert constraint.forced([token]) == []
    assert anything.complete(a)
    assert not anything.allowed(a)[BPE.eos_token_id]
    assert len(anything.allowed(a)) == len(BPE)


def test_a_text_that_cannot_go_on_allows_nothing() -> None:
    date = GrammarRegexConstraint(r"\d\d", tokenizer=BYTES)
    assert date.complete(encode("12"))
    assert not date.allowed(encode("12")).any()
    stuck = LarkConstraint('start: "a" b\nb: /[^\\s\\S]/', tokenizer=BYTES)
    assert stuck.accepts(encode("a"))
    for _ in range(2):
        assert not stuck.allowed(encode("a")).any()
        assert not stuck.complete(encode("a"))
        assert stuck.accepts_each(encode("a"), encode("ab")) == [False, False]


def test_tokens_added_later_are_known() -> None:
    tokenizer = bpe()
    pattern = "namename"
    assert len(GrammarRegexConstraint(pattern, tokenizer=tokenizer).allowed([])) == len(tokenizer)
    tokenizer.add_tokens("namenam")
    longer = GrammarRegexConstraint(pattern, tokenizer=tokenizer)
    assert len(longer.allowed([])) == len(tokenizer)
    assert longer.allowed([])[tokenizer.convert_tokens_to_ids("namenam")]


REFUSED: list[tuple[Callable[[], object], str]] = [
    (
        lambda: LarkConstraint("start: foo", tokenizer=BYTES),
        'llguidance refuses the grammar: line 1, column 8: unknown name: "foo"',
    ),
    (
        lambda: LarkConstraint('start: "a"\nb: "c', tokenizer=BYTES),
        "llguidance refuses the grammar: line 2, column 6: lexer error",
    ),
    (
        lambda: LarkConstraint("start: A\nA: /b(/", tokenizer=BYTES),
        'llguidance refuses the grammar: line 2, column 4: invalid regex "b(" (in regex): '
        "unclosed group at position 1",
    ),
    (lambda: LarkConstraint("", tokenizer=BYTES), "llguidance refuses the grammar: "),
    (lambda: LarkConstraint("{}", tokenizer=BYTES), "llguidance refuses the grammar: line 1, "),
    (
        lambda: LarkConstraint("start: /[^\\s\\S]/", tokenizer=BYTES),
        "llguidance refuses the grammar: no text satisfies it",
    ),
    (
        lambda: GrammarRegexConstraint("ab(?=c)", tokenizer=BYTES),
        "not a regular expression of llguidance: 'ab(?=c)': look-around, including look-ahead and "
        "look-behind, is not supported at position 2",
    ),
    (
        lambda: GrammarRegexConstraint("a{3,1}", tokenizer=BYTES),
        "not a regular expression of llguidance: 'a{3,1}': invalid repetition count range, the "
        "start must be <= the end at position 1",
    ),
    (
        lambda: JSONSchemaConstraint('{"type":\n "string"', tokenizer=BYTES),
        "the schema is not JSON: line 2, column 10: Expecting ',' delimiter",
    ),
    (
        lambda: JSONSchemaConstraint({"enum": {1, 2}}, tokenizer=BYTES),  # type: ignore[dict-item]
        "the schema is not JSON: Object of type set is not JSON serializable",
    ),
    (
        lambda: JSONSchemaConstraint("[1]", tokenizer=BYTES),
        "llguidance refuses the JSON schema: schema must be an object or boolean",
    ),
    (
        lambda: JSONSchemaConstraint(False, tokenizer=BYTES),
        "llguidance refuses the JSON schema: Unsatisfiable schema: schema is false",
    ),
    (
        lambda: JSONSchemaConstraint(
            {"type": "object", "properties": {"a": {"items": {"type": "strin"}}}}, tokenizer=BYTES
        ),
        "llguidance refuses the JSON schema at #/properties/a/items: Invalid type: strin",
    ),
    (
        lambda: JSONSchemaConstraint(
            {"anyOf": [{"type": "null"}, {"type": "array", "uniqueItems": True}]}, tokenizer=BYTES
        ),
        'llguidance refuses the JSON schema at #/anyOf/1: Unimplemented keys: ["uniqueItems"]',
    ),
    (
        lambda: JSONSchemaConstraint({"type": "string", "pattern": "(a"}, tokenizer=BYTES),
        "llguidance refuses the JSON schema: unclosed group at position 0",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_is_refused_names_the_reason_and_the_place(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(PertokenError) as error:
        make()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("question", ["accepts", "complete", "allowed"])
def test_limits_of_work_are_an_error_and_no_answer(
    question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llguidance

    tight = functools.partial(llguidance.LLParserLimits, max_items_in_row=3)
    monkeypatch.setattr(llguidance, "LLParserLimits", tight)
    ambiguous = LarkConstraint('start: a\na: "x" a "x" | a a a | "x"', tokenizer=BYTES)
    for _ in range(2):
        with pytest.raises(PertokenError, match=r"llguidance gave up behind 3 tokens: .*max is 3"):
            getattr(ambiguous, question)(encode("xxx" if question != "accepts" else "xxxx"))
    assert ambiguous.forced(encode("xxx")) == []
    assert ambiguous.accepts(encode("x"))  # it can still be asked


def test_what_llguidance_panics_on_is_not_forced() -> None:
    make, _ = LANGUAGES["stop"]
    constraint = make(BYTES)
    assert constraint.forced(encode("a")) == []
    assert constraint.forced(encode("ac")) == []  # not any more: its lock is poisoned
    assert constraint.accepts(encode("acx"))


def test_tokenizers_that_llguidance_cannot_read() -> None:
    class Slow:
        all_special_ids = ()

        def __len__(self) -> int:
            return 3

    with pytest.raises(PertokenError, match=r"needs a fast tokenizer, .* not Slow"):
        LarkConstraint('start: "a"', tokenizer=Slow())
    endless = bpe()
    endless.eos_token = None
    with pytest.raises(PertokenError, match=r"no stop token: set tokenizer\.eos_token"):
        LarkConstraint('start: "a"', tokenizer=endless)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    with pytest.raises(PertokenError, match=r"cannot read the tokenizer .*decoder"):
        LarkConstraint(
            'start: "a"',
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"),
        )


def test_without_llguidance_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make in (LarkConstraint, GrammarRegexConstraint, JSONSchemaConstraint):
        with pytest.raises(PertokenError, match=r'pip install "pertoken\[constrained\]"'):
            make("{}", tokenizer=bpe())
