"""TokenAdapt against a literal reading of its formulas, and what must survive a transplant."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pertoken.errors import PertokenError
from pertoken.testing import tiny_model
from pertoken.tokenize import (
    SelfEmbedder,
    Transplant,
    check_transplant,
    save_transplant,
    transplant,
)
from pertoken.tokenize._token_bytes import Vocabulary, same_tokens
from pertoken.tokenize._weights import local_weights, nearest
from pertoken.tokenize.tokenadapt import METHODS

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level(
    merges: str = "", specials: Sequence[str] = ("</s>",), extra: int = 0, **options: Any
) -> PreTrainedTokenizerFast:
    """Byte-level BPE; merges: "a b" pairs by comma, Ġ is a space. Without a pre-tokenizer's cuts.

    extra: specials that nothing is said about, at the end.
    """
    pairs = [tuple(pair.split(" ")) for pair in merges.split(",") if pair]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    vocabulary = {piece: number for number, piece in enumerate(pieces, start=len(specials))}
    vocabulary |= {special: number for number, special in enumerate(specials)}
    backend = Tokenizer(models.BPE(vocabulary, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(special, special=True) for special in specials])
    backend.add_special_tokens([f"<extra{number}>" for number in range(extra)])
    options.setdefault("eos_token", specials[0] if specials else None)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def sentencepiece(merges: str, letters: str = " abcdehilnorstuwy") -> PreTrainedTokenizerFast:
    """BPE as SentencePiece makes it, with byte fallback; merges with spaces written ▁."""
    pairs = [tuple(pair.split(" ")) for pair in merges.split(",") if pair]
    pieces = ["<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*letters.replace(" ", "▁"), *("".join(pair) for pair in pairs)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, pairs, byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


OLD = "t h,th e,Ġ a,Ġ the,i n"
NEW = "t h,th e,Ġ the,Ġthe n,i n,in g,o f,of Ġthe,r e,re n"


def model_for(tokenizer: Any, architecture: str = "llama", rows: int = 0, **options: Any) -> Any:
    return tiny_model(architecture, vocab_size=rows or len(tokenizer), **options)


def hashed(texts: Sequence[str]) -> torch.Tensor:
    """Vectors that say nothing but which string it is."""
    rows = [np.random.default_rng(zlib.crc32(text.encode())).normal(size=5) for text in texts]
    return torch.tensor(np.array(rows), dtype=torch.float32)


def table(model: Any) -> torch.Tensor:
    return model.get_input_embeddings().weight.detach()


def literal_row(
    text: str, old: Any, matrix: torch.Tensor, tau: float, weight: float, k: int, threshold: float
) -> list[float]:
    """Equations of the paper and its code for one token, number by number."""

    def unit(string: str) -> list[float]:
        vector = hashed([string])[0].tolist()
        size = math.sqrt(sum(x * x for x in vector))
        return [x / size for x in vector]

    def dot(a: Sequence[float], b: Sequence[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    def softmax(values: Sequence[float]) -> list[float]:
        raised = [math.exp(value) for value in values]
        return [value / sum(raised) for value in raised]

    def total(weights: Sequence[float], ids: Sequence[int]) -> list[float]:
        rows = [matrix[token].tolist() for token in ids]
        return [dot(weights, column) for column in zip(*rows, strict=True)]

    phi = unit(text)
    ids = old(text, add_special_tokens=False)["input_ids"]
    pieces = [old.decode([token]) for token in ids]
    alpha = softmax([dot(phi, unit(piece)) for piece in pieces])
    average = [(a + len(p) / len(text)) / 2 for a, p in zip(alpha, pieces, strict=True)]
    local = total(softmax([c / tau for c in average]), ids)

    texts = {
        token: old.decode([token]) for token in range(len(old)) if token not in old.all_special_ids
    }
    known = {token: dot(phi, unit(t)) for token, t in texts.items() if "\ufffd" not in t}
    best = sorted(known, key=lambda token: -known[token])[:k]
    weights = softmax([known[token] / tau for token in best])
    weights = [w if known[t] >= threshold else 0.0 for w, t in zip(weights, best, strict=True)]
    if not weight or not sum(weights):
        return local
    near = total([w / sum(weights) for w in weights], best)
    return [(1 - weight) * a + weight * b for a, b in zip(local, near, strict=True)]


@pytest.mark.parametrize(
    ("tau", "weight", "k", "threshold"),
    [(0.6, 0.3, 3, 0.0), (0.3, 0.0, 3, 0.0), (1.0, 0.5, 2, 0.9), (0.2, 0.9, 7, -1.0)],
)
def test_rows_are_the_papers_formula(tau: float, weight: float, k: int, threshold: float) -> None:
    old, new = byte_level(OLD), byte_level(NEW)
    model = model_for(old)
    made, tokenizer = transplant(
        model,
        old,
        new,
        embedder=hashed,
        temperature=tau,
        global_weight=weight,
        neighbours=k,
        threshold=threshold,
    )
    checked = 0
    for piece, token in tokenizer.get_vocab().items():
        if piece not in old.get_vocab():
            text = tokenizer.decode([token])
            wanted = literal_row(text, old, table(model), tau, weight, k, threshold)
            assert table(made)[token].tolist() == pytest.approx(wanted, abs=1e-6)
            checked += 1
    assert checked == 6


def test_temperature_acts_on_the_average_of_similarity_and_length() -> None:
    row = torch.tensor([0, 0])
    share = torch.tensor([0.8, 0.2])
    found = local_weights(torch.tensor([0.0, 1.0]), share, row, 1, 0.5)
    first = 1 / (1 + math.e)
    wanted = torch.tensor([(first + 0.8) / 2, (1 - first + 0.2) / 2]).div(0.5).softmax(0)
    assert found.tolist() == pytest.approx(wanted.tolist(), abs=1e-6)


def test_neighbours_are_exact_in_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pertoken.tokenize._weights._BLOCK", 40)
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(n, 4, generator=generator) for n in (11, 13))
    similarity, places = nearest(queries, keys, 3)
    wanted = (queries @ keys.T).sort(-1, descending=True)
    assert torch.equal(places, wanted.indices[:, :3])
    torch.testing.assert_close(similarity, wanted.values[:, :3])


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt", "phi", "gpt-neox"])
def test_its_own_tokenizer_leaves_the_logits_equal(architecture: str) -> None:
    tokenizer = byte_level(OLD)
    model = model_for(tokenizer, architecture)
    made, _ = transplant(model, tokenizer, tokenizer)
    ids = torch.tensor([[5, 70, 261, 259, 9]])
    with torch.no_grad():
        assert torch.equal(made(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_given_model_and_tokenizers_are_left_as_they_were() -> None:
    old, new = byte_level(OLD, chat_template=CHATML), byte_level(NEW)
    model = model_for(old)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, vocabulary = model.config.to_dict(), new.get_vocab()
    made, tokenizer = transplant(model, old, new, method="local")
    with torch.no_grad():
        made.get_input_embeddings().weight.zero_()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model.config.to_dict() == config
    assert new.get_vocab() == vocabulary
    assert new.chat_template is None
    assert tokenizer is not new


def test_tied_stays_tied_and_untied_output_takes_the_same_weights() -> None:
    old, new = byte_level(OLD), byte_level(NEW)
    tied = model_for(old)
    tied.config.tie_word_embeddings = True
    tied.lm_head.weight = tied.model.embed_tokens.weight
    made, _ = transplant(tied, old, new, embedder=hashed)
    assert made.lm_head.weight is made.model.embed_tokens.weight

    # With an output that is a linear image of the input, the new output is the image of the new.
    model = model_for(old)
    with torch.no_grad():
        model.lm_head.weight.copy_(3 * model.model.embed_tokens.weight)
    made, _ = transplant(model, old, new, embedder=hashed)
    assert made.lm_head.weight is not made.model.embed_tokens.weight
    torch.testing.assert_close(made.lm_head.weight, 3 * made.model.embed_tokens.weight)


def test_a_bias_of_the_output_is_mixed_as_the_rows_are() -> None:
    old, new = byte_level(OLD), byte_level(NEW)
    model = model_for(old, "phi")
    with torch.no_grad():
        model.lm_head.bias.copy_(model.model.embed_tokens.weight[:, 0])
    made, _ = transplant(model, old, new, embedder=hashed)
    torch.testing.assert_close(made.lm_head.bias, made.model.embed_tokens.weight[:, 0])


def test_gemma_keeps_its_scale() -> None:
    old, new = byte_level(OLD), byte_level(NEW)
    model = model_for(old, "gemma3")
    made, _ = transplant(model, old, new, method="retok")
    before, after = model.get_input_embeddings(), made.get_input_embeddings()
    assert type(after) is type(before)
    token = new.get_vocab()["e"]
    there = after(torch.tensor([token]))
    assert torch.equal(there, before(torch.tensor([old.get_vocab()["e"]])))


@pytest.mark.parametrize(("rows", "pad_to"), [(300, 1), (263, 64), (320, 128)])
def test_padded_vocabularies(rows: int, pad_to: int) -> None:
    old, new = byte_level(OLD, extra=1), byte_level(NEW)
    model = model_for(old, rows=rows)
    made, tokenizer = transplant(model, old, new, method="local", embedder=hashed, pad_to=pad_to)
    size = table(made).shape[0]
    assert size == -(-len(tokenizer) // pad_to) * pad_to == made.config.vocab_size
    mean = table(model).mean(0)
    for row in table(made)[len(tokenizer) :]:
        torch.testing.assert_close(row, mean)


def test_specials_beyond_the_rows_are_suffered_and_text_is_not() -> None:
    old = byte_level(OLD, extra=2)  # as Gemma's image token
    model = model_for(old, rows=len(old) - 2)
    transplant(model, old, byte_level(NEW), method="mean")
    with pytest.raises(PertokenError, match="has 3 tokens beyond the model's 259 rows"):
        transplant(model_for(old, rows=259), old, byte_level(NEW))


def test_tokens_are_shared_by_bytes_whatever_their_marks() -> None:
    old, new = byte_level(OLD), sentencepiece("t h,th e,▁ the,▁ a")
    found = same_tokens(Vocabulary.of(old), Vocabulary.of(new), "bytes")
    ids, others = new.get_vocab(), old.get_vocab()
    assert found[ids["▁the"]] == others["Ġthe"]
    assert found[ids["▁a"]] == others["Ġa"]
    assert found[ids["<0x61>"]] == found[ids["a"]] == others["a"]
    assert found[ids["<0xC3>"]] == others["Ã"]
    back = same_tokens(Vocabulary.of(new), Vocabulary.of(old), "bytes")
    assert back[others["a"]] == ids["a"]  # and not <0x61>
    assert back[others["Ã"]] == ids["<0xC3>"]
    strings = same_tokens(Vocabulary.of(old), Vocabulary.of(new), "strings")
    assert ids["▁the"] not in strings
    assert strings[ids["the"]] == others["the"]


def test_part_of_a_character_is_made_of_its_bytes_without_neighbours() -> None:
    emoji = "ð Ł,ðŁ ĺ,ðŁĺ Ģ"  # the four bytes of 😀
    old, new = sentencepiece("t h"), byte_level(emoji)
    model = model_for(old)
    made, tokenizer = transplant(model, old, new, embedder=hashed, global_weight=0.9)
    ids = [old.get_vocab()[f"<0x{byte:02X}>"] for byte in "😀".encode()]
    part = table(made)[tokenizer.get_vocab()["ðŁĺ"]]
    torch.testing.assert_close(part, table(model)[ids[:3]].mean(0))
    # The whole character is text: it has neighbours, and its pieces, no text, weigh alike.
    made, _ = transplant(model, old, new, embedder=hashed, global_weight=0.0)
    whole = table(made)[tokenizer.get_vocab()["ðŁĺĢ"]]
    torch.testing.assert_close(whole, table(model)[ids].mean(0))


def test_bytes_that_the_old_tokenizer_cannot_write_are_drawn() -> None:
    old = byte_level(OLD)
    few = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    few.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    few.decoder = decoders.ByteLevel()
    few = PreTrainedTokenizerFast(tokenizer_object=few)
    prepared = Transplant(tiny_model("llama", vocab_size=2), few, old, embedder=hashed)
    prepared.apply("local")
    assert prepared.counts["drawn"] == 259  # all but a, b, </s>
    prepared.apply("tokenadapt", threshold=-1.0)
    assert prepared.counts["drawn"] == 128  # bytes above 127 have no string
    assert prepared.counts["by neighbours alone"] == 131
    assert sum(prepared.counts.values()) == len(old)


def test_baselines() -> None:
    old, new = byte_level(OLD), byte_level(NEW)
    model = model_for(old)
    prepared = Transplant(model, old, new)
    token, known = new.get_vocab()["ing"], old.get_vocab()
    rows = {method: table(prepared.apply(method)[0])[token] for method in METHODS[2:]}
    torch.testing.assert_close(rows["retok"], table(model)[[known["in"], known["g"]]].mean(0))
    torch.testing.assert_close(rows["mean"], table(model).mean(0))
    drawn = [table(prepared.apply("random", seed=seed)[0]) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0][token], drawn[2][token])
    assert torch.equal(drawn[0][new.get_vocab()["e"]], drawn[2][new.get_vocab()["e"]])


# ---------------------------------------------------------------------- special tokens and chats

CHAT = {"specials": ("<|im_end|>", "<|im_start|>", "<pad>"), "pad_token": "<pad>"}


def test_specials_by_string_then_role_then_turn() -> None:
    old = byte_level(OLD, **CHAT, bos_token="<|im_start|>", chat_template=CHATML)
    new = byte_level(
        NEW,
        specials=("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<pad>", "<other>"),
        bos_token="<bos>",
    )
    model = model_for(old)
    model.generation_config.eos_token_id = [0]
    made, tokenizer = transplant(model, old, new, embedder=hashed)
    rows, before = table(made), table(model)
    for new_id, old_id in ((0, 0), (1, 1), (2, 1), (3, 0), (4, 2)):
        assert torch.equal(rows[new_id], before[old_id])
    torch.testing.assert_close(rows[5], before.mean(0))
    assert made.config.eos_token_id == 0
    assert made.config.bos_token_id == 1
    assert made.generation_config.eos_token_id == [0, 3]  # a turn ends it as well
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<start_of_turn>user\nhi<end_of_turn>\n"
    assert len(check_transplant(made, tokenizer)) == 9


def test_a_special_that_the_template_names_is_added_where_there_is_no_like() -> None:
    old = byte_level(OLD, **CHAT, bos_token="<|im_start|>", chat_template=CHATML)
    new = byte_level(NEW, specials=(), eos_token=None)
    prepared = Transplant(model_for(old), old, new)
    made, tokenizer = prepared.apply("retok")
    assert tokenizer.chat_template == CHATML
    assert tokenizer.eos_token == "<|im_end|>"
    assert len(tokenizer) == len(new) + 2
    assert prepared.notes == [
        "<|im_end|> was added, to end a text",
        "<|im_start|> was added: the chat template names it",
    ]
    assert torch.equal(table(made)[len(new)], table(prepared._model)[0])
    check_transplant(made, tokenizer)


def test_two_specials_of_a_template_are_not_made_one() -> None:
    old = byte_level(OLD, **CHAT, chat_template="<pad><|im_end|>")
    new = byte_level(NEW, pad_token="</s>")
    _, tokenizer = transplant(model_for(old), old, new, method="mean")
    assert tokenizer.chat_template == "<pad></s>"
    assert tokenizer("<pad>")["input_ids"] == [len(new)]


def test_padding_that_ended_a_text_gives_no_row_to_a_pad_of_its_own() -> None:
    old = byte_level(OLD, pad_token="</s>")
    new = byte_level(NEW, specials=("<pad>", "<eos>"), pad_token="<pad>", eos_token="<eos>")
    made, _ = transplant(model_for(old), old, new, method="mean")
    torch.testing.assert_close(table(made)[0], table(model_for(old)).mean(0))
    assert torch.equal(table(made)[1], table(model_for(old))[0])
    assert made.generation_config.eos_token_id == 1


def test_a_token_before_every_text_stays_one() -> None:
    old, new = sentencepiece("t h"), byte_level(NEW)
    made, tokenizer = transplant(model_for(old), old, new, method="retok")
    ids = tokenizer("the")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token == "<bos>"
    assert torch.equal(table(made)[ids[0]], table(model_for(old))[0])
    assert "then" in tokenizer.decode(tokenizer("then")["input_ids"])
    check_transplant(made, tokenizer)


def test_settings_of_generation_get_new_ids_or_are_refused() -> None:
    old, new = byte_level(OLD), byte_level("", specials=("x", "</s>"), eos_token="</s>")
    model = model_for(old)
    model.generation_config.suppress_tokens = [old.get_vocab()["a"]]
    made, _ = transplant(model, old, new, method="mean")
    assert made.generation_config.suppress_tokens == [new.get_vocab()["a"]]
    model.generation_config.suppress_tokens = [old.get_vocab()["in"]]
    with pytest.raises(PertokenError, match="suppress_tokens names the old token"):
        transplant(model, old, new, method="mean")


def test_how_text_is_generated_comes_along_and_is_checked() -> None:
    old, new = byte_level(OLD), byte_level(NEW)
    model = model_for(old)
    model.generation_config.update(repetition_penalty=1.3, do_sample=True, top_k=7)
    made, tokenizer = transplant(model, old, new, method="retok")
    assert made.generation_config.repetition_penalty == 1.3
    assert any("generation settings" in line for line in check_transplant(made, tokenizer))
    made.generation_config.repetition_penalty = None
    check_transplant(made, tokenizer)  # as it is after reloading
    with pytest.raises(PertokenError, match=r"generation settings: .*, not .*repetition_penalty"):
        check_transplant(made, tokenizer, source=model)


def test_a_generation_config_that_cannot_be_saved_is_refused_before_any_work() -> None:
    old, new = byte_level(OLD), byte_level(NEW)
    model = model_for(old)
    model.generation_config.top_k = 7  # without do_sample
    with pytest.raises(PertokenError, match=r"mend its generation_config.json: .*top_k") as caught:
        Transplant(model, old, new)
    assert "\n" not in str(caught.value)


def test_a_tie_that_was_lost_is_found() -> None:
    old, new = byte_level(OLD), byte_level(NEW)
    made, tokenizer = transplant(model_for(old), old, new, method="retok")
    other = model_for(old)
    if tied := made.get_output_embeddings().weight is made.get_input_embeddings().weight:
        other.lm_head.weight = torch.nn.Parameter(other.lm_head.weight.clone())
    else:
        other.lm_head.weight = other.get_input_embeddings().weight
    with pytest.raises(PertokenError, match=f"are tied: {tied}, not {not tied}"):
        check_transplant(made, tokenizer, source=other)


# ------------------------------------------------------------------------------------ on the disk


def test_a_folder_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = byte_level(OLD), byte_level(NEW)
    made, tokenizer = transplant(model_for(old), old, new, method="retok")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_transplant(made, tokenizer, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    checked = save_transplant(made, tokenizer, tmp_path / "out")
    assert checked[0] == "reloads by plain transformers"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(PertokenError, match="is there already"):
        save_transplant(made, tokenizer, tmp_path / "out")


def test_the_check_finds_what_is_wrong() -> None:
    old, new = byte_level(OLD), byte_level(NEW, specials=("</s>", "<s>"))
    made, tokenizer = transplant(model_for(old), old, new, method="retok")
    check_transplant(made, tokenizer)
    with pytest.raises(PertokenError, match="embedding has 262 rows"):
        check_transplant(model_for(old), tokenizer)
    made.config.eos_token_id = 5
    with pytest.raises(PertokenError, match=r"config.eos_token_id: 5, not 0"):
        check_transplant(made, tokenizer)
    made.config.eos_token_id = 0
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(PertokenError, match="chat template does not render"):
        check_transplant(made, tokenizer)


@pytest.mark.parametrize("how", ["eager", "bfloat16", "training"])
def test_the_check_passes_what_is_sound(how: str) -> None:
    old, new = byte_level(OLD), byte_level(NEW)
    model = model_for(old, dtype=torch.float32)
    made, tokenizer = transplant(model, old, new, method="retok")
    if how == "eager":
        made.set_attn_implementation("eager")
    elif how == "bfloat16":
        made = made.to(torch.bfloat16)
    else:
        made.train()
        made.model.layers[0].self_attn.attention_dropout = 0.5
        made.model.layers[1].eval()
    before = [part.training for part in made.modules()]
    said = check_transplant(made, tokenizer)
    assert any(line.startswith("logits are equal after reloading") for line in said)
    assert [part.training for part in made.modules()] == before


def test_the_check_finds_another_weight_and_another_attention(tmp_path: Path) -> None:
    old, new = byte_level(OLD), byte_level(NEW)
    made, tokenizer = transplant(model_for(old), old, new, method="retok")
    save_transplant(made, tokenizer, tmp_path / "out")
    with torch.no_grad():
        made.model.norm.weight[0] += 1e-12
    with pytest.raises(PertokenError, match=r"reloaded model's model\.norm\.weight differs"):
        check_transplant(made, tokenizer, folder=tmp_path / "out")
    with torch.no_grad():
        made.model.norm.weight[0] = 1
    made.model.layers[0].self_attn.scaling *= 2
    with pytest.raises(PertokenError, match="logits differ"):
        check_transplant(made, tokenizer, folder=tmp_path / "out")


# --------------------------------------------------------------------------------------- embedders


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt"])
def test_the_models_own_states_are_what_a_plain_forward_gives(architecture: str) -> None:
    tokenizer = byte_level(OLD)
    model = model_for(tokenizer, architecture, layers=4)
    embed = SelfEmbedder(model, tokenizer)
    texts = ["the", "in", "a longer string than the others", "ç"]
    found = embed._states(tokenizer(texts)["input_ids"])
    assert not any(module._forward_hooks for module in model.modules())
    for text, row in zip(texts, found, strict=True):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(row.double(), states[0, 1:].mean(0), rtol=1e-4, atol=1e-4)
    together, alone = embed(texts), torch.cat([embed([text]) for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_bad_settings_are_one_clear_line() -> None:
    old, new = byte_level(OLD), byte_level(NEW)
    model = model_for(old)
    for options, line in (
        ({"method": "retokk"}, "unknown method 'retokk' .did you mean 'retok'"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"global_weight": 1.5}, "global_weight must be between 0 and 1"),
        ({"neighbours": 0}, "neighbours must be 1 or more"),
        ({"shared": "marks"}, "shared must be 'bytes' or 'strings'"),
        ({"embedder": "nomic"}, "unknown embedder 'nomic'"),
        ({"embedder": lambda texts: torch.zeros(1)}, "must give finite vectors"),
    ):
        with pytest.raises(PertokenError, match=line):
            transplant(model, old, new, **options)


def test_models_and_tokenizers_that_do_not_fit() -> None:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

    old, new = byte_level(OLD), byte_level(NEW)
    with pytest.raises(PertokenError, match="not a decoder"):
        transplant(BertModel(BertConfig(num_hidden_layers=1)), old, new)
    two = GPT2LMHeadModel(GPT2Config(vocab_size=262, n_positions=262, n_layer=1))
    with pytest.raises(PertokenError, match="second table by token"):
        transplant(two, old, new)
    with pytest.raises(PertokenError, match="slow tokenizer"):
        transplant(model_for(old), old, object())
