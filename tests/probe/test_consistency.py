"""Phantom edits: classes, outcomes by ids, the mask that prevents them, and what encodings do."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from pertoken import PertokenError
from pertoken._replies import written
from pertoken.byte_vocab import ByteVocab
from pertoken.cli.main import main
from pertoken.probe import SurfaceMask, encoding_sensitivity, sensitivity, token_consistency
from pertoken.probe import consistency as module
from pertoken.probe._artifacts import ARTIFACTS, OTHER, artifact
from pertoken.probe._marked import mark, slots
from pertoken.testing import tiny_model, tiny_tokenizer
from pertoken.tokenize import encodings

TOKENIZER = tiny_tokenizer()
VOCAB = ByteVocab(TOKENIZER)
TEXT = "the cat [sat] on the mat and the dog on the log"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", vocab_size=len(TOKENIZER), max_positions=1024)


# Kinds of phantom edits.


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        # The paper's examples.
        ([" February"], ["February"], "whitespace shift"),
        ([" Saturday"], [" ", " Saturday"], "whitespace detached"),
        ([" However"], ["\n", "However"], "newline"),
        ([" unbelievable"], ["un", "bel", "ievable"], "resegmentation"),
        ([" Dorm", "er"], ["D", "orm", "er"], "proper noun"),
        ([" repaid"], ["re", "paid"], "morphology"),
        ([" HIV"], ["H", "IV"], "acronym"),
        ([" rights"], ["right", "s"], "plural"),
        # The other way round, and with white space in it too.
        (["right", "s"], [" rights"], "plural"),
        ([" ", "Saturday"], [" Saturday"], "whitespace detached"),
        ([" However"], ["\n\n", "However"], "newline"),
        ([" walking"], ["\n", "walk", "ing"], "morphology"),
        ([" wal", "king"], [" walk", "ing"], "resegmentation"),
        ([" NA", "TO"], [" N", "ATO"], "acronym"),
        ([" Tom", "'s"], [" T", "om", "'s"], "proper noun"),
        ([" boxes"], [" box", "es"], "plural"),
        ([" a"], [" a"], OTHER),
    ],
)
def test_every_kind_of_artifact(before: list[str], after: list[str], kind: str) -> None:
    assert artifact(before, after) == kind
    assert kind in ARTIFACTS or kind == OTHER


def test_a_capital_at_the_start_of_a_sentence_is_no_proper_noun() -> None:
    assert artifact([" Wondrous"], ["W", "ondrous"]) == "proper noun"
    assert artifact([" Wondrous"], ["W", "ondrous"], sentence_start=True) == "resegmentation"
    assert mark('He said: "[So] what"', 1, 0).starts_sentence(0)
    assert not mark("It is [So] that", 1, 0).starts_sentence(0)
    with pytest.raises(PertokenError, match="do not write one and the same word"):
        artifact([" cat"], [" dog"])


# Marks, and places in replies.


def test_targets_have_neighbours_and_come_back_from_their_marks() -> None:
    text = "Alpha bravo, charlie delta and echo foxtrot golf hotel india juliet kilo."
    found = mark(text, 0.3, 1)
    assert mark(found.marked, 0.3, 1) == found
    words = [found.word(number) for number in range(len(found.targets))]
    assert len(words) == 3
    assert not {"Alpha", "kilo", "and"} & set(words)
    assert mark(text, 0.3, 1) == found != mark(text, 0.3, 2)
    assert len(mark(text, 0.001, 1).targets) == 1


@pytest.mark.parametrize(
    ("reply", "written", "bracketed"),
    [
        ("the cat sat on the mat and the dog on the log", "sat", False),
        ("the cat [stood] on the mat and the dog on the log", "stood", True),
        ("Sure!\nthe cat was put on a mat and the dog on the log.", "was put", False),
        ("cat\n\nsat, on", "sat", False),
        ("the cat on the mat", None, False),  # left out
        ("the dog sat on the mat", None, False),  # its neighbour is gone
        ("", None, False),
    ],
)
def test_a_place_is_what_stands_between_the_neighbours(
    reply: str, written: str | None, bracketed: bool
) -> None:
    (slot,), _ = slots(mark(TEXT, 1, 0), reply)
    assert (slot and slot.text) == written
    assert slot is None or (reply[slot.start : slot.end], slot.bracketed) == (written, bracketed)


def test_other_words_that_change_are_counted() -> None:
    assert slots(mark(TEXT, 1, 0), "the cat sat on a mat and the dog on a log")[1] == 2


# Outcomes are told by ids.


def reply_with(model: Any, monkeypatch: Any, ids: Sequence[int], text: str = TEXT) -> Any:
    def scripted(*_: Any, **__: Any) -> Iterator[Any]:
        yield [0], [list(ids)]

    monkeypatch.setattr(module, "written", scripted)
    return token_consistency(model, TOKENIZER, [text])


def ids_of(*parts: str) -> list[int]:
    """Each part encoded alone, one behind the other."""
    return [token for part in parts for token in TOKENIZER.encode(part)]


REST = " on the mat and the dog on the log"


@pytest.mark.parametrize(
    ("parts", "outcome", "kind"),
    [
        (["the cat sat" + REST], "unchanged", None),
        (["the cat dog" + REST], "replaced", None),
        (["the cat", " ", "sat", REST], "different", "whitespace detached"),
        (["the cat", "\n", "sat", REST], "different", "newline"),
        (["the cat", " s", "at", REST], "different", "resegmentation"),
        (["the cat [sat]" + REST], "unchanged", None),  # the brackets are kept
        (["the cat [", "s", "at", "]" + REST], "different", "resegmentation"),
        (['the cat "sat"' + REST], "unparsed", None),  # another mark, and so other tokens
        (["the cat (sat" + REST], "unparsed", None),
        (["the cat [sat" + REST], "unparsed", None),
        (["the cat (dog)" + REST], "replaced", None),
        (["a dog"], "unparsed", None),
        (["a dog", "\n\n", "the cat sat" + REST], "unparsed", None),  # of the next example
    ],
)
def test_outcomes_are_told_by_ids_straight_from_generation(
    model: Any, monkeypatch: Any, parts: list[str], outcome: str, kind: str | None
) -> None:
    found = reply_with(model, monkeypatch, ids_of(*parts))
    (trial,) = found.trials
    assert (trial.outcome, trial.artifact) == (outcome, kind)
    if outcome == "different":
        if kind != "newline":  # the text alone holds no trace of it
            again = reply_with(model, monkeypatch, ids_of("".join(parts)))
            assert again.trials[0].outcome == "unchanged"
        assert "".join(trial.pieces_after).strip() == "sat"
        assert trial.ids_before != trial.ids_after
        assert found.share("different") == 1
        assert found.parse_rate() == 1


def test_what_is_not_the_tokenizers_own_is_counted(model: Any, monkeypatch: Any) -> None:
    found = reply_with(model, monkeypatch, ids_of("the cat", " s", "at", REST))
    whole = ids_of("the cat", " s", "at", REST)
    assert found.noncanonical()["replies"] == 1
    assert found.noncanonical()["tokens"] == pytest.approx(
        len(ids_of(" s", "at")) / len(whole), abs=1e-9
    )
    assert found.lengths()["more"] + found.lengths()["as many"] == 1


def test_a_capital_changes_the_text(model: Any, monkeypatch: Any) -> None:
    assert reply_with(model, monkeypatch, ids_of("the cat Sat" + REST)).share("replaced") == 1


# The intervention.


def masked_by(text: str, so_far: list[int]) -> set[int]:
    mask = SurfaceMask(TOKENIZER, texts=[text], prompt_length=2)
    ids = torch.tensor([[0, 0, *so_far]])
    scores = mask(ids, torch.zeros(1, len(TOKENIZER)))[0]
    return set(scores.isneginf().nonzero().flatten().tolist())


def test_the_mask_leaves_no_encoding_of_the_target_and_all_that_goes_another_way() -> None:
    """Brute force: whatever tokens write the word, one of them is refused where it stands."""
    for blank in (" ", "\n", " [", ""):
        for other in encodings(f"{blank}sat", VOCAB, n=10**4):
            so_far, refused = ids_of("the cat"), False
            for token in other:
                refused = refused or token in masked_by(TEXT, so_far)
                so_far = [*so_far, token]
            assert refused, [TOKENIZER.decode([token]) for token in other]
    for token, spelled in enumerate(VOCAB.token_bytes):
        bare = (spelled or b"").decode("latin-1").lstrip(" \n\t.,:;!?[]()\"'%-+=")
        begins = bool(bare) and "sat".startswith(bare)
        assert (token in masked_by(TEXT, ids_of("the cat"))) == begins, spelled
    assert not masked_by(TEXT, ids_of("the cat dog"))  # released
    assert not masked_by(TEXT, ids_of("the cat stood"))
    assert not masked_by(TEXT, [])


def test_a_word_that_was_begun_cannot_be_ended() -> None:
    left = masked_by(TEXT, ids_of("the cat", " s"))
    assert {TOKENIZER.decode([token]) for token in left} >= {"a"}
    assert all(not TOKENIZER.decode([token]).startswith(" s") for token in left)


def test_the_mask_minds_each_row_and_refuses_what_does_not_fit() -> None:
    mask = SurfaceMask(TOKENIZER, texts=[TEXT, "a [dog] sat"], prompt_length=0)
    ids = torch.tensor([ids_of(" a"), ids_of(" a")])
    scores = mask(ids, torch.zeros(2, len(TOKENIZER)))
    assert not scores[0].isneginf().any()
    assert scores[1].isneginf().any()
    assert mask.of_rows([1], 0)(ids[:1], torch.zeros(1, len(TOKENIZER))).isneginf().any()
    assert (mask.texts, mask.prompt_length) == ([TEXT, "a [dog] sat"], 0)
    assert repr(mask).endswith(
        "['the cat [sat] on the mat and the dog on the log', 'a [dog] sat'], 0)"
    )
    with pytest.raises(PertokenError, match="of 2 texts does not fit 3 rows"):
        mask(ids[:1].repeat(3, 1), torch.zeros(3, len(TOKENIZER)))
    with pytest.raises(PertokenError, match="text 1 has no word in"):
        SurfaceMask(TOKENIZER, texts=["no mark"], prompt_length=0)


def test_with_the_mask_a_model_that_would_copy_replaces(model: Any) -> None:
    """A model whose scores always favour the text's own next token."""
    text = mark(TEXT, 1, 0).text
    goal = TOKENIZER.encode(text)

    class Copies(torch.nn.Module):
        def generate(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
            width = ids.shape[1]
            for step in range(len(goal)):
                scores = torch.zeros(1, len(TOKENIZER)) - torch.arange(len(TOKENIZER)) / 1e4
                scores[0, goal[step]] = 9
                for processor in options.get("logits_processor", []):
                    scores = processor(ids, scores)
                ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
            assert ids.shape[1] == width + len(goal)
            return ids

    model_like: Any = Copies()
    model_like.config, model_like.device = model.config, model.device
    model_like.generation_config = model.generation_config
    model_like.get_decoder = model.get_decoder
    found = token_consistency(model_like, TOKENIZER, [TEXT], mask=True)
    assert found.share("unchanged", masked=False) == 1
    assert found.share("replaced", masked=True) == 1


# The whole probe.


def test_sampling_is_the_papers_as_transformers_does_it() -> None:
    own, draw = module._Nucleus(), torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(20, 200, generator=draw)
    scores[0, :180] = -torch.inf
    ids = torch.zeros(20, 1, dtype=torch.long)
    theirs = TopPLogitsWarper(0.9)(ids, TopKLogitsWarper(50)(ids, scores))
    assert torch.equal(own(ids, scores), theirs)


def test_prompts_that_share_a_beginning_are_answered_as_without_it() -> None:
    draw = torch.Generator().manual_seed(0)
    head = torch.randint(1, 60, (12,), generator=draw).tolist()
    prompts = [[*head, *torch.randint(1, 60, (n,), generator=draw).tolist()] for n in (5, 2, 9, 4)]
    for name, window in (("gpt2", None), ("gemma3", 64), ("gemma3", 8)):
        model = tiny_model(name, sliding_window=window)
        found: dict[int, list[int]] = {}
        for places, new in written(model, prompts, max_new_tokens=[6, 6, 3, 6], batch=3):
            found |= dict(zip(places, new, strict=True))
        for place, row in enumerate(prompts):
            ids = torch.tensor([row])
            alone = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
            )
            wanted = alone[0, len(row) :].tolist()[: 3 if place == 2 else 6]
            assert found[place] == wanted, (name, window, place)


def test_the_report_holds_every_trial_of_both_arms(model: Any, tmp_path: Path) -> None:
    texts = [TEXT, "how many [legs] has a cat"]
    found = token_consistency(model, TOKENIZER, texts, mask=True, max_new_tokens=6)
    again = token_consistency(model, TOKENIZER, texts, mask=True, max_new_tokens=6)
    assert found.to_json() == again.to_json()
    assert [(t.text, t.target, t.masked) for t in found.trials] == [
        (0, "sat", False),
        (1, "legs", False),
        (0, "sat", True),
        (1, "legs", True),
    ]
    values = json.loads(found.to_json(tmp_path / "out.json"))
    assert [arm["parse_rate"] for arm in values["arms"]] == [0, 0]
    assert values["arms"][0]["different"] == {"share": None, "interval": None}
    assert math.isnan(found.share("different"))
    assert all(len(reply.ids) <= 6 for reply in found.replies)
    for kind in ARTIFACTS:
        assert kind in found.table()
    page = found.to_html()
    assert "The first prompt" in page
    assert "Replies without a target" in page


def test_bad_texts_and_models_are_refused_in_a_line(model: Any) -> None:
    for texts, complaint in (
        ([], "there is no text"),
        (["so it is"], "text 1 has no word to replace"),
        ([TEXT, "the [New York] times"], r"text 2: '\[New York\]' must hold one word"),
        (["[the] cat sat"], r"text 1: \[the\] must be a whole word with an unmarked"),
        (["the [cat] [sat] there"], r"\[cat\] must be a whole word with an unmarked"),
        (["the cat " * 400], "does not fit the model's 1024 positions"),
    ):
        with pytest.raises(PertokenError, match=complaint):
            token_consistency(model, TOKENIZER, texts)
    with pytest.raises(PertokenError, match="share must be above 0"):
        token_consistency(model, TOKENIZER, [TEXT], share=0)
    with pytest.raises(PertokenError, match="no byte view"):
        token_consistency(model, _WordTokenizer(), [TEXT])
    with pytest.raises(PertokenError, match="needs a causal language model"):
        token_consistency(object(), TOKENIZER, [TEXT])  # type: ignore[arg-type]


class _WordTokenizer:
    """Without a byte view."""

    chat_template = None

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(range(len(text.split())))

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}


# Sensitivity.


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_are_made_of_last_positions_only(name: str) -> None:
    model = tiny_model(name)
    rows = [[5, 6, 7, 8, 9], [5, 6, 7], [7, 5, 9], [8]]
    made = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, __, logits: made.append(logits.shape[1]))
    with torch.no_grad():
        found = sensitivity._next(model, rows)
        handle.remove()
        alone = [model(torch.tensor([row])).logits[0, -1].float() for row in rows]
    assert torch.allclose(found, torch.stack(alone).log_softmax(-1), atol=1e-5)
    assert made == [3]  # lengths 1, 3 and 5


def test_divergence_is_that_of_the_definition_and_0_for_a_model_that_reads_text(
    model: Any, monkeypatch: Any
) -> None:
    found = encoding_sensitivity(model, TOKENIZER, [TEXT], n=2, seed=3)
    own = TOKENIZER.encode("the cat sat")
    with torch.no_grad():
        first = model(torch.tensor([own])).logits[0, -1].log_softmax(-1)
        for each in found.found:
            same = len(own) - len(each.canonical)
            kept = own[:same]
            rest = next(
                ids
                for ids in encodings("the cat sat", VOCAB, n=10**6)
                if ids[: len(kept)] == kept
                and [TOKENIZER.decode([t]) for t in ids[len(kept) :]] == list(each.pieces)
            )
            other = model(torch.tensor([rest])).logits[0, -1].log_softmax(-1)
            kl = (first.exp() * (first - other)).sum()
            assert each.kl == pytest.approx(float(kl), rel=1e-5)
    assert len(found.found) == 2
    assert found.kl > 0
    rows = torch.randn(1, len(TOKENIZER)).log_softmax(-1)
    monkeypatch.setattr(
        "pertoken.probe.sensitivity._next", lambda model, ids: rows.expand(len(ids), -1)
    )
    same = encoding_sensitivity(model, TOKENIZER, [TEXT], n=2)
    assert same.kl == pytest.approx(0, abs=1e-6)
    assert same.same_best == 1
    assert "nats" in same.table()


def test_a_text_that_the_model_cannot_read_is_refused_before_any_forward() -> None:
    model = tiny_model("gpt2", vocab_size=len(TOKENIZER), max_positions=32)
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    with pytest.raises(PertokenError, match="more than the 32 positions"):
        encoding_sensitivity(model, TOKENIZER, [TEXT, "so it is " * 12 + "the [cat] sat"], n=2)
    with pytest.raises(PertokenError, match="but the model knows 16 ids"):
        encoding_sensitivity(tiny_model("gpt2", vocab_size=16), TOKENIZER, [TEXT], n=2)
    assert not forwards


def test_the_command_asks_with_and_without_the_mask(
    tiny_folder: str, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("it [sat] down\n", encoding="utf-8")
    command = ["probe", "consistency", tiny_folder, "--texts", str(file), "--max-new-tokens", "4"]
    assert main([*command, "--json", "-"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [arm["masked"] for arm in values["consistency"]["arms"]] == [False, True]
    # A tokenizer of bytes has one encoding of each word.
    assert "sensitivity" not in values
    assert values["model"] == tiny_folder
    file.write_text("it [sat] down [\n\nthe [big cat] sat\n", encoding="utf-8")
    assert main(command) == 2
    assert "text 2: '[big cat]' must hold one word of letters" in capsys.readouterr().err
