"""ByteModel: equal to summing over all token strings, for every kind of tokenizer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pertoken.canonical import encode
from pertoken.decode import ByteEnsemble, ByteModel
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, check_leaves_no_trace, tiny_model

VALIDITY = ("renormalize", "truncate", "off")


def byte_level(*merges: str, letters: str = "ab", added: tuple[str, ...] = ()) -> Any:
    """A tokenizer with GPT-2's rules; merges as "a b", in its alphabet."""
    vocab = {"<s>": 0} | {letter: 1 + place for place, letter in enumerate(letters)}
    for merge in merges:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = Tokenizer(models.BPE(vocab, pairs))  # type: ignore[arg-type]
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return fast(backend, added)


def sentencepiece(
    *words: str, letters: str = "▁ab", added: tuple[str, ...] = (), lead: bool = False
) -> Any:
    """A tokenizer as converted from SentencePiece: all merges of each word, byte fallback."""
    vocab = {"<unk>": 0, "<s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for piece in (*letters, *words):
        vocab[piece] = len(vocab)
    merges = [
        (word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in vocab and word[cut:] in vocab
    ]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if lead else spaces
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return fast(backend, added)


def unigram(lead: bool = False) -> Any:
    pieces = [("<unk>", 0.0), ("<s>", 0.0)] + [(f"<0x{b:02X}>", -20.0) for b in range(256)]
    pieces += [("▁", -2.0), ("a", -2.5), ("b", -2.2), ("ab", -3.1), ("▁a", -3.0), ("aab", -5.0)]
    backend = Tokenizer(models.Unigram(pieces, 0, True))
    if lead:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    return fast(backend, ())


def fast(backend: Tokenizer, added: tuple[str, ...]) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")
    tokenizer.backend_tokenizer.add_tokens([AddedToken(text, normalized=False) for text in added])
    return tokenizer


# One character for every byte that may come first, and for every one behind the first of "é".
ANY = "".join(map(chr, (*range(256), *range(0x100, 0x800, 64), *range(0x800, 0xD800, 0x800))))
ANY += "\ue000\uf000\U00010000\U00040000\U00080000\U000c0000\U00100000"

# name: (tokenizer, letters of the texts, letters that may follow, virtual leading space)
TOKENIZERS: dict[str, tuple[Any, str, str, bytes]] = {
    "six tokens": (byte_level("a b", "ab a", "b b"), "ab", "", b""),
    "blanks": (
        byte_level("Ċ Ċ", "Ġ Ġ", "Ġ a", letters="abĊĠ"),
        "a \n",
        "b",
        b"",
    ),
    "cut characters": (byte_level("Ã ©", "a Ã", "Ġ a", letters="aÃ©ªĠ"), "aé ", "ê", b""),
    "contraction": (byte_level("' a", "l l", "' l", "' ll", letters="al'"), "al'", "", b""),
    "added text": (byte_level("a b", "b a", added=("bab", "aa", "aab")), "ab", "", b""),
    "sentencepiece": (sentencepiece("▁a", "ab", "▁ab", "▁▁"), "ab ", ANY, b""),
    "fallback": (sentencepiece("▁é", "aé", letters="▁aé"), "aé À", ANY, b""),
    "leading space": (sentencepiece("▁a", "ab", "▁ab", "▁▁", lead=True), "ab ", ANY, b" "),
    "unigram": (unigram(), "ab ", ANY, b""),
    "unigram, leading space": (unigram(lead=True), "ab ", ANY, b" "),
}


class Brute:
    """The definitions, with every token string: slow, and no code of the library."""

    def __init__(self, name: str, length: int = 3, seed: int = 0) -> None:
        self.tokenizer, letters, more, self.start = TOKENIZERS[name]
        backend = self.tokenizer.backend_tokenizer
        self.model = tiny_model("llama", vocab_size=len(self.tokenizer) + 2, seed=seed)
        self.end = self.tokenizer.eos_token_id
        self.spelled = {i: spell(backend, i, self.end) for i in range(len(self.tokenizer))}
        self.complete: set[tuple[int, ...]] = set()
        # Long enough for a token that begins in the last letter and for what must follow that.
        kinds = [(letters + more, 4)] if len(more) < 9 else [(letters, 4), (more, 1)]
        for (behind, most), count in itertools.product(kinds, range(length + 1)):
            for extra in range(most + 1):
                for signs in itertools.product(*[letters] * count, *[behind] * extra):
                    ids = backend.encode("".join(signs), add_special_tokens=False).ids
                    self.complete.add(tuple(ids))
        self.valid = {ids[:n] for ids in self.complete for n in range(len(ids) + 1)}
        texts = ("".join(signs).encode() for signs in itertools.product(letters, repeat=length))
        self.prefixes = sorted({text[:n] for text in texts for n in range(len(text) + 1)})

    @cache  # noqa: B019
    def probs(self, ids: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            tokens = torch.tensor([[self.tokenizer.bos_token_id, *ids]])
            return self.model(tokens).logits[0, -1].softmax(-1)

    @cache  # noqa: B019
    def following(self, ids: tuple[int, ...], validity: str) -> dict[int, float]:
        """Weights of the next tokens (the end included) of a path."""
        probs = self.probs(ids).tolist()
        if validity == "off":
            return {
                i: probs[i] for i in (*self.spelled, self.end) if self.spelled[i] or i == self.end
            }
        kept = {i: probs[i] for i in self.spelled if self.spelled[i] and (*ids, i) in self.valid}
        if ids in self.complete:
            kept[self.end] = probs[self.end]
        total = sum(kept.values()) if validity == "renormalize" else 1.0
        return {i: p / total for i, p in kept.items()}

    def next_byte(self, prefix: bytes, validity: str) -> torch.Tensor:
        """The sum over all token strings that begin with the prefix and go beyond its end."""
        text = self.start + prefix
        mass = torch.zeros(257, dtype=torch.float64)
        stack: list[tuple[tuple[int, ...], bytes, float]] = [((), b"", 1.0)]
        while stack:
            ids, spelled, weight = stack.pop()
            if len(spelled) > len(text):
                mass[spelled[len(text)]] += weight
            elif ids in self.valid:  # in "off" a wrong last token counts, but nothing follows it
                for token, p in self.following(ids, validity).items():
                    longer = spelled + self.spelled[token]
                    shared = min(len(longer), len(text))
                    if token == self.end:
                        mass[256] += weight * p if spelled == text else 0.0
                    elif longer[:shared] == text[:shared]:
                        stack.append(((*ids, token), longer, weight * p))
        if self.start and not prefix:
            mass[256] = self.following((), validity).get(self.end, 0.0)
        return mass / mass.sum()


def spell(backend: Tokenizer, token: int, end: int) -> bytes:
    text = backend.id_to_token(token)
    if token == end or text == "<unk>":
        return b""
    if text.startswith("<0x"):
        return bytes([int(text[3:5], 16)])
    if backend.normalizer is None and not isinstance(
        backend.pre_tokenizer, pre_tokenizers.Metaspace
    ):
        return text.replace("Ġ", " ").replace("Ċ", "\n").encode("latin-1")
    return text.replace("▁", " ").encode()


@cache
def brute(name: str) -> Brute:
    return Brute(name)


@pytest.mark.parametrize("validity", VALIDITY)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_it_is_the_sum_over_all_token_strings(name: str, validity: str) -> None:
    exact = brute(name)
    bytewise = ByteModel(exact.model, exact.tokenizer, validity=validity)  # type: ignore[arg-type]
    for prefix in exact.prefixes:
        found = bytewise.next_byte_log_probs(prefix).exp()
        assert torch.allclose(found, exact.next_byte(prefix, validity), rtol=0, atol=1e-10), prefix


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_and_end_share_the_mass_of_the_text_itself(name: str) -> None:
    # With "renormalize" nothing is lost anywhere: P(x) is the sum of what can follow, unscaled.
    exact = brute(name)
    bytewise = ByteModel(exact.model, exact.tokenizer)
    for prefix in exact.prefixes[:12]:
        reader = bytewise._open(prefix)
        cover = [weight for _, weight in reader.ending()]  # type: ignore[attr-defined]
        for _, _, weights in reader.reaching():  # type: ignore[attr-defined]
            cover.extend(weights.tolist())
        settled = torch.tensor(cover, dtype=torch.float64).logsumexp(0)
        assert bytewise.next_byte_log_probs(prefix).logsumexp(0) == pytest.approx(0, abs=1e-12)
        if prefix:
            # The last factor of the chain rule, from the covers of two prefixes.
            scores = bytewise.score(prefix)
            last = bytewise.next_byte_log_probs(prefix[:-1])[prefix[-1]]
            assert float(scores[-1]) == pytest.approx(float(last), abs=1e-10)
        assert math.isfinite(float(settled))


@pytest.mark.parametrize("validity", VALIDITY)
@pytest.mark.parametrize("name", ["six tokens", "blanks", "cut characters", "leading space"])
def test_a_score_is_the_steps_one_by_one(name: str, validity: str) -> None:
    exact = brute(name)
    bytewise = ByteModel(exact.model, exact.tokenizer, validity=validity)  # type: ignore[arg-type]
    text = {
        "six tokens": b"abbabaabbbaab" * 4,
        "blanks": b"a\n\na  a\n\n\na b \n b" * 3,
        "cut characters": "aéê éaa  éé aê".encode() * 3,
        "leading space": b"ab  abba a b" * 3,
    }[name]
    steps = [bytewise.next_byte_log_probs(text[:n])[byte] for n, byte in enumerate(text)]
    assert torch.allclose(bytewise.score(text), torch.stack(steps), rtol=0, atol=1e-10)


def paths_only(bytewise: ByteModel) -> ByteModel:
    """The same without trees in one forward, as for a model that takes no such mask."""
    bytewise._source.masks_trees = False
    return bytewise


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2", "opt", "mistral"])
def test_the_cache_changes_nothing(architecture: str) -> None:
    tokenizer = TOKENIZERS["blanks"][0]
    model = tiny_model(architecture, vocab_size=len(tokenizer), sliding_window=4)
    text = b"a\n\na  a b\n\n\nb aa  \nab"
    tree = ByteModel(model, tokenizer)
    scores = tree.score(text)
    assert torch.allclose(scores, paths_only(ByteModel(model, tokenizer)).score(text), atol=1e-9)
    for whole in (tree, paths_only(ByteModel(model, tokenizer))):
        reader = whole._open(b"")
        for place, byte in enumerate(text):
            assert float(reader.log_probs()[byte]) == pytest.approx(float(scores[place]), abs=1e-9)
            assert reader.log_prob(byte) == pytest.approx(float(scores[place]), abs=1e-9)
            reader.push(byte)
    assert tree.invalid_mass is not None


def test_forgotten_rows_are_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TOKENIZERS["six tokens"][0]
    model = tiny_model("gemma3", vocab_size=len(tokenizer))
    text = b"abbabaabbbaab" * 4
    wanted = ByteModel(model, tokenizer).score(text)
    monkeypatch.setattr("pertoken.decode._branches._SPARE", 0)
    reader = ByteModel(model, tokenizer)._open(b"")
    for place, byte in enumerate(text):
        assert float(reader.log_probs()[byte]) == pytest.approx(float(wanted[place]), abs=1e-9)
        reader.push(byte)


def test_a_stream_is_draws_from_the_next_byte_distribution() -> None:
    exact = brute("blanks")
    bytewise = ByteModel(exact.model, exact.tokenizer)
    for temperature in (1.0, 0.6, 0.0):
        generator = torch.Generator().manual_seed(5)
        text = b"a "
        while len(text) < 30:
            log_probs = bytewise.next_byte_log_probs(text)
            if temperature == 0:
                byte = int(log_probs.argmax())
            else:
                probs = (log_probs / temperature).softmax(-1)
                byte = int(torch.multinomial(probs, 1, generator=generator))
            if byte == 256:
                break
            text += bytes([byte])
        drawn = bytewise.sample("a ", 28, seed=5, temperature=temperature)
        assert b"a " + drawn == text
        parts = list(bytewise.stream("a ", 28, seed=5, temperature=temperature))
        assert all(len(part) == 1 for part in parts)
        assert b"".join(parts) == drawn


def test_sampling_feeds_one_token_per_byte() -> None:
    exact = brute("six tokens")
    bytewise = ByteModel(exact.model, exact.tokenizer)
    drawn = next(
        text for seed in range(99) if len(text := bytewise.sample("ab", 40, seed=seed)) > 20
    )
    assert bytewise.forwards <= len(drawn) + 2
    assert bytewise.fed <= len(drawn) + 4


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_encoding_of_every_beginning_is_in_its_cover(name: str) -> None:
    exact = brute(name)
    bytewise = ByteModel(exact.model, exact.tokenizer)
    encode = exact.tokenizer.backend_tokenizer.encode
    for prefix in exact.prefixes:
        try:
            text = prefix.decode()
        except UnicodeDecodeError:
            continue
        cover = bytewise.cover(prefix)
        if prefix or not exact.start:
            ids = encode(text, add_special_tokens=False).ids
            assert ids in [member for member, _ in cover], (prefix, ids)
        total = math.fsum(math.exp(weight) for _, weight in cover)
        assert total == pytest.approx(1.0, abs=1e-12)


def test_an_ensemble_is_the_mean_whatever_the_tokens() -> None:
    first, second = brute("six tokens"), Brute("added text", seed=3)
    members = [ByteModel(one.model, one.tokenizer) for one in (first, second)]
    mean = ByteEnsemble(members, weights=[1, 3])
    for prefix in (b"", b"a", b"abba"):
        by_hand = 0.25 * first.next_byte(prefix, "renormalize") if len(prefix) < 4 else None
        parts = [member.next_byte_log_probs(prefix).exp() for member in members]
        found = mean.next_byte_log_probs(prefix).exp()
        assert torch.allclose(found, 0.25 * parts[0] + 0.75 * parts[1], rtol=0, atol=1e-12)
        if by_hand is not None:
            by_hand = by_hand + 0.75 * second.next_byte(prefix, "renormalize")
            assert torch.allclose(found, by_hand, rtol=0, atol=1e-10)
    text = b"abbaab"
    steps = [mean.next_byte_log_probs(text[:n])[byte] for n, byte in enumerate(text)]
    assert torch.allclose(mean.score(text), torch.stack(steps), rtol=0, atol=1e-10)
    assert mean.sample("a", 8, seed=1) == ByteEnsemble([mean]).sample("a", 8, seed=1)
    alone = ByteEnsemble(members, weights=[1, 0])
    assert torch.allclose(alone.score(text), members[0].score(text), rtol=0, atol=1e-12)


def test_infilling_puts_the_suffix_first() -> None:
    plain = brute("six tokens")
    tokenizer = byte_level("a b", "ab a", "b b")
    marks = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    model = tiny_model("llama", vocab_size=len(tokenizer))
    bytewise = ByteModel(model, tokenizer)
    first, second, third = tokenizer.convert_tokens_to_ids(marks)
    context = [first, second, *plain.tokenizer("abab")["input_ids"], third]
    wanted = bytewise.sample("ba", 12, seed=2, context=context)
    assert bytewise.infill("ba", "abab", 12, seed=2) == wanted
    template = "<fim_prefix><fim_suffix>{suffix}<fim_middle>{prefix}"
    assert bytewise.infill("ba", "abab", 12, seed=2, template=template) == wanted
    for wrong in ("{suffix}", "{prefix}{suffix}", "{prefix} {suffix} {prefix}"):
        with pytest.raises(PertokenError, match="template must hold"):
            bytewise.infill("a", "b", 3, template=wrong)
    with pytest.raises(PertokenError, match="no fill-in-the-middle tokens"):
        ByteModel(plain.model, plain.tokenizer).infill("a", "b", 3)


def test_special_tokens_are_spelled_out_in_text() -> None:
    tokenizer = byte_level(letters="ab<s>")
    bytewise = ByteModel(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer)
    assert [len(ids) for ids, _ in bytewise.cover("a<s>")] == [4]


def test_the_model_is_left_as_it_was() -> None:
    exact = brute("six tokens")
    check_leaves_no_trace(
        exact.model, lambda model: ByteModel(model, exact.tokenizer).sample("ab", 5, seed=0)
    )


def refused(make: Callable[[], object]) -> str:
    with pytest.raises(PertokenError) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_mistakes_are_one_line() -> None:
    exact = brute("cut characters")
    good = ByteModel(exact.model, exact.tokenizer)
    assert "byte 0xff at place 1" in refused(lambda: good.next_byte_log_probs(b"a\xff"))
    assert "byte 0xa9 at place 0" in refused(lambda: good.score(b"\xa9"))
    assert "byte 0x7a" in refused(lambda: good.sample("az", 3))
    assert "not valid Unicode" in refused(lambda: good.score("a\ud800"))
    assert "bytes or str" in refused(lambda: good.score(7))  # type: ignore[arg-type]
    assert "validity must be" in refused(
        lambda: ByteModel(exact.model, exact.tokenizer, validity="on")  # type: ignore[arg-type]
    )
    assert "temperature" in refused(lambda: good.sample("a", 3, temperature=-1.0))
    assert "temperature" in refused(lambda: good.sample("a", 3, temperature=math.nan))
    assert "max_bytes" in refused(lambda: good.sample("a", -1))
    assert "context is empty" in refused(lambda: good.sample("a", 1, context=[]))
    short = tiny_model("llama", vocab_size=len(exact.tokenizer), max_positions=8)
    assert "8 positions" in refused(lambda: ByteModel(short, exact.tokenizer).score(b"a" * 20))
    assert "8 positions" in refused(lambda: ByteModel(short, exact.tokenizer).sample("a" * 9, 1))
    few = tiny_model("llama", vocab_size=4)
    assert "not this model's" in refused(lambda: ByteModel(few, exact.tokenizer))
    assert "no byte view" in refused(lambda: ByteModel(exact.model, ByteTokenizer()))
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_level("a b").backend_tokenizer)
    begin = ByteModel(exact.model, bare)
    assert "no beginning-of-text token" in refused(lambda: begin.next_byte_log_probs(""))
    assert begin.next_byte_log_probs("a", context=[1]).shape == (257,)


def test_mistakes_in_ensembles_are_one_line() -> None:
    exact = brute("six tokens")
    member = ByteModel(exact.model, exact.tokenizer)
    assert "at least one member" in refused(lambda: ByteEnsemble([]))
    assert "2 members need as many weights" in refused(
        lambda: ByteEnsemble([member, member], weights=[1.0])
    )
    for weights in ([1.0, -0.5], [math.nan, 1.0], [math.inf, 1.0]):
        assert "from 0 on" in refused(
            lambda weights=weights: ByteEnsemble([member, member], weights=weights)  # type: ignore[misc]
        )
    assert "not all be 0" in refused(lambda: ByteEnsemble([member], weights=[0.0]))
    assert "must be a ByteModel" in refused(lambda: ByteEnsemble([exact.model]))
    assert "several" in refused(lambda: ByteEnsemble([member]).sample("a", 1, context=[1]))


@pytest.mark.model
def test_the_chain_rule_holds_on_the_real_model(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    bytewise = ByteModel(model, tokenizer)
    text = (
        "It was na\u00efve:\n\ndef caf\u00e9(x):\n    return \u4f60\u597d  \U0001f44b 2024".encode()
    )
    scores = bytewise.score(text)
    for cut in (0, 1, 5, 9, 10, 12, 13, 14, 20, 23, 24, 36, 39, 40, 41, 46, 47, 48, 50):
        log_probs = bytewise.next_byte_log_probs(text[:cut])
        assert float(log_probs.logsumexp(0)) == pytest.approx(0.0, abs=1e-6)
        assert float(log_probs[text[cut]]) == pytest.approx(float(scores[cut]), abs=1e-3)
        assert bytewise.invalid_mass is not None
        assert 0.0 <= bytewise.invalid_mass < 1.0
    for end in range(len(text) + 1):
        try:
            ids = tokenizer(text[:end].decode(), add_special_tokens=False)["input_ids"]
        except UnicodeDecodeError:
            continue
        reader = bytewise.canonical
        assert encode(reader, text[:end]) == ids
