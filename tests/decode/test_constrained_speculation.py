"""Constraints under speculation: the text of masked plain decoding, with fewer passes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from pertoken.decode import (
    AWRS,
    Balanced,
    Constrained,
    ConstraintMask,
    Drafter,
    Goose,
    Lookahead,
    Plain,
    PromptLookup,
    SuffixTree,
    TokenRecycling,
    TokenTree,
    _rule,
)
from pertoken.decode._rule import Rule, RuledChooser
from pertoken.errors import PertokenError
from pertoken.testing import ByteTokenizer, check_leaves_no_trace, tiny_model
from pertoken.testing.distribution import compare_counts, enumerate_texts

DRAFTERS: dict[str, Callable[..., Drafter]] = {
    "goose": Goose,
    "goose-paper": lambda **kw: Goose(shape="paper", **kw),
    "token-recycling": TokenRecycling,
    "prompt-lookup": PromptLookup,
    "lookahead": Lookahead,
    "suffix": SuffixTree,
    "balanced": lambda **kw: Balanced(k=3, **kw),
    "plain": lambda **_: Plain(),
}
STOP = 15
PROMPTS = [
    [1, 2, 3, 5, 6, 10, 2, 3, 5, 6, 10, 2, 3, 5],
    [3, 9],
    [1, 2, 3, 4, 9, 1, 2, 3, 4, 9],
]


class Asked:
    """Records ``1 2 3 value+ (10 2 3 value+)* 11`` with values 5 to 9; can only be asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def state(self, ids: Sequence[int]) -> int | None:
        """0 open, 1 key, 2 colon, 3 first value, 4 more, 5 closed; None: refused."""
        assert STOP not in ids[:-1]  # nothing is asked behind a stop id
        state: int | None = 0
        for token in ids:
            state = self.after(state).get(token) if state is not None else None
        return state

    @staticmethod
    def after(state: int) -> dict[int, int]:
        values = dict.fromkeys(range(5, 10), 4)
        steps = [{1: 1}, {2: 2}, {3: 3}, values, {**values, 10: 1, 11: 5}, {}]
        return steps[state]

    def accepts(self, ids: Sequence[int]) -> bool:
        self.asked.append(tuple(ids))
        return self.state(ids) is not None

    def complete(self, ids: Sequence[int]) -> bool:
        return self.state(ids) == 5


class Listed(Asked):
    """The same with masks, of fewer entries than the model has tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.listed: list[tuple[int, ...]] = []

    def allowed(self, ids: Sequence[int]) -> torch.Tensor:
        self.listed.append(tuple(ids))
        mask = torch.zeros(12, dtype=torch.bool)
        state = self.state(ids)
        mask[list(self.after(state)) if state is not None else []] = True
        return mask


class Forcing(Listed):
    """The same with forced tokens, and tokens asked about together."""

    def accepts_each(self, ids: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        return [self.accepts([*ids, token]) for token in tokens]

    def forced(self, ids: Sequence[int]) -> list[int]:
        chain: list[int] = []
        state = self.state(ids)
        while state is not None and len(self.after(state)) == 1:
            ((token, state),) = self.after(state).items()
            chain.append(token)
        return chain


class Misled(Forcing):
    """Claims that a value is always followed by 7 10, which it need not be."""

    def forced(self, ids: Sequence[int]) -> list[int]:
        return [7, 10] if self.state(ids) == 4 else super().forced(ids)


class Wanted(Listed):
    """Claims that what the model wants without a constraint is forced; most of it is refused."""

    def __init__(self, wanted: Sequence[int]) -> None:
        super().__init__()
        self.wanted = list(wanted)

    def forced(self, ids: Sequence[int]) -> list[int]:
        return self.wanted[len(ids) :]


KINDS = {"asked": Asked, "listed": Listed, "forcing": Forcing, "misled": Misled}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERTOKEN_HOME", str(tmp_path))  # budget="auto" keeps its costs there


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=16)


@pytest.fixture(scope="module")
def wanted(llama: PreTrainedModel) -> list[tuple[list[list[int]], torch.Tensor]]:
    """Prompts, one and three, with what plain decoding writes under the mask."""
    return [(prompts, masked(llama, prompts)) for prompts in (PROMPTS[2:], PROMPTS)]


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def generate(model: PreTrainedModel, prompts: list[list[int]], **options: Any) -> torch.Tensor:
    run = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": STOP, **options}
    found: torch.Tensor = model.generate(**padded(prompts), **run)
    return found


def masked(
    model: PreTrainedModel, prompts: list[list[int]], constraint: Any = None, **options: Any
) -> torch.Tensor:
    """What transformers' own loop writes under the mask."""
    mask = ConstraintMask(constraint or Listed(), options.get("eos_token_id", STOP))
    own = options.pop("logits_processor", [])
    cuts = [one for one in own if isinstance(one, TopKLogitsWarper)]
    before = [one for one in own if one not in cuts]
    return generate(model, prompts, logits_processor=[*before, mask, *cuts], **options)


def check_equal(
    model: PreTrainedModel,
    prompts: list[list[int]],
    drafter: Drafter,
    constraint: Any,
    **options: Any,
) -> torch.Tensor:
    wanted = masked(model, prompts, **options)
    found = generate(model, prompts, custom_generate=Constrained(drafter, constraint), **options)
    assert torch.equal(found, wanted)
    return found


# Greedy: the same ids.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DRAFTERS)
def test_ids_equal_masked_plain_decoding(
    name: str,
    kind: str,
    llama: PreTrainedModel,
    wanted: list[tuple[list[list[int]], torch.Tensor]],
) -> None:
    for budget in (None, 1, "auto") if name != "plain" else (None,):
        for prompts, ids in wanted:
            setup = Constrained(DRAFTERS[name](budget=budget), KINDS[kind]())
            assert torch.equal(generate(llama, prompts, custom_generate=setup), ids)


@pytest.mark.parametrize(
    "architecture", ["qwen3", "gemma3", "gpt2", "gpt-neox", "opt", "mistral", "phi"]
)
@pytest.mark.parametrize("name", ["goose", "lookahead", "plain"])
def test_ids_equal_masked_plain_decoding_on_every_architecture(
    name: str, architecture: str
) -> None:
    model = tiny_model(architecture, vocab_size=16)
    wanted = masked(model, PROMPTS)
    for kind in ("asked", "forcing"):
        setup = Constrained(DRAFTERS[name](), KINDS[kind]())
        assert torch.equal(generate(model, PROMPTS, custom_generate=setup), wanted)


def test_texts_end_where_nothing_but_the_stop_may_follow() -> None:
    ended = 0
    for seed in range(3):
        model = tiny_model("llama", vocab_size=16, seed=seed)
        found = check_equal(model, PROMPTS, Goose(), Forcing(), max_new_tokens=60)
        for row in found[:, 14:].tolist():
            text = row[: row.index(STOP)] if STOP in row else row
            state = Asked().state([token for token in text if token])
            assert state is not None
            assert (STOP in row) == (state == 5)
            ended += STOP in row
    assert ended >= 3


@pytest.mark.parametrize("name", ["goose", "prompt-lookup", "token-recycling", "lookahead"])
def test_drafts_of_the_method_are_accepted_too(name: str, llama: PreTrainedModel) -> None:
    drafter = DRAFTERS[name]()
    generate(llama, PROMPTS, custom_generate=Constrained(drafter, Forcing()))
    assert drafter.stats.accepted.total() - drafter.stats.accepted["forced"] >= 3


# What is drafted, and what is asked.


class Watcher(Goose):
    """Keeps what was proposed and what was verified: texts down to every node."""

    def begin(self, vocab_size: int) -> None:
        super().begin(vocab_size)
        self.prompt = len(self.contexts[0])
        self.proposed: list[list[int]] = []
        self.verified: list[list[int]] = []

    def texts(self, tree: TokenTree) -> list[list[int]]:
        new = self.contexts[0][self.prompt :]
        paths = [tree.path(node)[1:] for node in range(1, len(tree))]
        return [[*new, *(tree.tokens[node] for node in path)] for path in paths]

    def propose(self, row: int, budget: int, room: int) -> TokenTree:
        tree = super().propose(row, budget, room)
        self.proposed += self.texts(tree)
        return tree

    def observe(self, row: int, tree: TokenTree, path: list[int], logits: Any) -> None:
        self.verified += self.texts(tree)
        super().observe(row, tree, path, logits)


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_that_the_constraint_refuses_are_not_verified(
    kind: str, llama: PreTrainedModel
) -> None:
    def refused(texts: list[list[int]]) -> int:
        rule = Rule(Asked(), [STOP])
        return sum(STOP in ids[:-1] or not rule.allows(ids[:-1], ids[-1:])[0] for ids in texts)

    watcher = Watcher()
    generate(llama, PROMPTS[2:], custom_generate=Constrained(watcher, KINDS[kind]()))
    assert refused(watcher.proposed) > 5
    assert len(watcher.verified) > 10
    assert refused(watcher.verified) == 0


def test_forced_tokens_are_drafted_for_free(llama: PreTrainedModel) -> None:
    plain = Constrained(Plain(), Listed())
    forcing = Constrained(Plain(), Forcing())
    found = [generate(llama, PROMPTS[2:], custom_generate=setup) for setup in (plain, forcing)]
    assert torch.equal(*found)
    assert not plain.stats.drafted
    assert set(forcing.stats.drafted) == {"forced"}
    assert forcing.stats.accepted == forcing.stats.drafted  # they cannot be rejected
    text = found[0][0, 10:].tolist()
    assert text.count(10) == 3
    assert text[-1] == STOP
    # The key and the colon behind the first token and behind every separator.
    assert forcing.stats.accepted["forced"] == 2 * 4
    assert forcing.stats.forwards == plain.stats.forwards - 2 * 4


def test_forced_chains_hang_below_drafts_too(llama: PreTrainedModel) -> None:
    rule = Rule(Forcing(), [STOP])
    tree = TokenTree(5)
    tree.add(0, 6, probability=0.5)
    tree.add(0, 10, probability=0.25)
    tree.add(0, 4, probability=0.2)  # refused
    fitted = rule.fit_tree(tree, [1, 2, 3, 5], budget=9, room=9)
    assert fitted.tokens == [5, 6, 10, 2, 3]
    assert fitted.sources == ["root", "draft", "draft", "forced", "forced"]
    assert fitted.values == [1.0, 0.5, 0.25, 0.25, 0.25]
    assert rule.fit_tree(tree, [1, 2, 3, 5], budget=9, room=2).tokens == [5, 6, 10, 2]
    assert rule.fit_tree(tree, [1, 2, 3, 5], budget=3, room=9).size == 3
    # A certain chain needs no budget: nothing drafted, three forced.
    assert rule.fit_tree(TokenTree(4), [], budget=0, room=9).tokens == [4, 1, 2, 3]


def test_a_forced_token_is_not_believed(llama: PreTrainedModel) -> None:
    for prompt in PROMPTS:
        free = generate(llama, [prompt])[0, len(prompt) :].tolist()
        setup = Constrained(Plain(), Wanted([1, *free[1:]]))
        found = generate(llama, [prompt], custom_generate=setup)
        assert torch.equal(found, masked(llama, [prompt]))
        assert setup.stats.drafted["forced"] > 0


def test_a_stop_id_is_drafted_where_the_text_is_complete() -> None:
    rule = Rule(Forcing(), [STOP])
    tree = TokenTree(11)
    tree.add_chain(0, [STOP, 1])
    assert rule.fit_tree(tree, [1, 2, 3, 5, 11], budget=9, room=9).tokens == [11, STOP]
    assert rule.fit_tree(tree, [1, 2, 3, 5], budget=9, room=9).tokens == [11]


def test_one_mask_at_most_per_token_and_few_questions(llama: PreTrainedModel) -> None:
    listed, asked = Listed(), Asked()
    for constraint in (listed, asked):
        setup = Constrained(Plain(), constraint)
        found = generate(llama, PROMPTS[2:], custom_generate=setup)
    tokens = found.shape[1] - 10
    assert 0 < len(listed.listed) <= tokens
    assert len(set(listed.listed)) == len(listed.listed)
    assert len(asked.asked) < tokens * 16 / 2


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
@pytest.mark.parametrize("name", DRAFTERS)
def test_statistics_add_up(name: str, prompts: list[list[int]], llama: PreTrainedModel) -> None:
    setup = Constrained(DRAFTERS[name](), Misled())
    width = max(map(len, prompts))
    found = generate(llama, prompts, custom_generate=setup, max_new_tokens=40)
    stats = setup.stats
    lengths = []
    for row, trace in zip(found[:, width:].tolist(), setup.rows, strict=True):
        new = row[: row.index(STOP) + 1] if STOP in row else row
        lengths.append(len(new))
        assert len(trace.sources) == sum(trace.step_lengths) == len(new)
    assert stats.new_tokens == sum(lengths)
    assert stats.new_tokens == stats.first_tokens + stats.accepted.total() + stats.bonus
    assert stats.row_steps == sum(len(trace.step_lengths) - 1 for trace in setup.rows)
    assert stats.accepted["forced"] > 0
    for source, count in stats.accepted.items():
        assert 0 < count <= stats.drafted[source]
        assert count == sum(trace.sources.count(source) for trace in setup.rows)


# What else `generate` does.


class NoneTwice(LogitsProcessor):
    """Forbids the token that stood three places before: depends on the whole prefix."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([0]), 3.0).scatter(
            1, input_ids[:, -3:-2], scores.amin(1, keepdim=True)
        )


OPTIONS: dict[str, dict[str, Any]] = {
    "repetition-penalty": {"repetition_penalty": 1.7},
    "bad-words": {"bad_words_ids": [[5], [9, 6]]},
    "by-row": {"prefix_allowed_tokens_fn": lambda row, ids: [t for t in range(16) if t != 5 + row]},
    "own": {"logits_processor": [NoneTwice()]},
    "own-warper": {"logits_processor": [TopKLogitsWarper(3)]},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["goose", "lookahead"])
def test_other_processors_come_before_the_mask(
    name: str, options: str, llama: PreTrainedModel
) -> None:
    for kind in ("listed", "misled", *(() if options == "own-warper" else ("asked",))):
        check_equal(llama, PROMPTS[:1], DRAFTERS[name](), KINDS[kind](), **OPTIONS[options])
        check_equal(llama, PROMPTS, DRAFTERS[name](), KINDS[kind](), **OPTIONS[options])


class AfterEleven(StoppingCriteria):
    """Ends a text behind token 11, where the constraint allows nothing but the stop id."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids[:, -1] == 11


@pytest.mark.parametrize("kind", KINDS)
def test_a_criterion_may_end_the_text_before_the_constraint_does(kind: str) -> None:
    criteria = StoppingCriteriaList([AfterEleven()])
    options = {"stopping_criteria": criteria, "eos_token_id": None, "max_new_tokens": 60}
    ended = 0
    for seed in range(3):
        model = tiny_model("llama", vocab_size=16, seed=seed)
        for drafter in (Goose(), Plain()):
            found = check_equal(model, PROMPTS[:1], drafter, KINDS[kind](), **options)
        ended += int(found[0, -1]) == 11
    assert ended > 0


class Ear(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value)

    def end(self) -> None:
        self.heard.append(torch.tensor([], dtype=torch.long))


def test_a_streamer_gets_exactly_the_tokens(llama: PreTrainedModel) -> None:
    ear = Ear()
    found = check_equal(llama, PROMPTS[:1], Goose(streamer=ear), Forcing())
    assert torch.cat(ear.heard[1:]).tolist() == found[0, 14:].tolist()


def test_stop_strings_end_a_constrained_text() -> None:
    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=258)
    inputs = tokenizer("ab ab ab", return_tensors="pt")

    class Letters:
        def accepts(self, ids: Sequence[int]) -> bool:
            return all(99 <= token <= 104 for token in ids)

        def complete(self, ids: Sequence[int]) -> bool:
            return False

    options = {"max_new_tokens": 30, "do_sample": False}
    free = model.generate(**inputs, custom_generate=Constrained(Plain(), Letters()), **options)
    text = tokenizer.decode(free[0, 8 + 5 : 8 + 7])
    drafter = Goose(tokenizer=tokenizer, stop_strings=[text])
    found = model.generate(**inputs, custom_generate=Constrained(drafter, Letters()), **options)
    new = tokenizer.decode(found[0, 8:])
    assert new.endswith(text)
    assert new.index(text) == len(new) - 2
    assert torch.equal(found, free[:, : found.shape[1]])


def test_the_model_is_left_as_it_was(llama: PreTrainedModel) -> None:
    setup = Constrained(Goose(budget="auto"), Forcing())
    check_leaves_no_trace(
        llama, lambda model: generate(model, PROMPTS, custom_generate=setup), rng=True
    )


def test_lookahead_goes_on_making_ngrams(llama: PreTrainedModel) -> None:
    """Its window asks the model; a constraint that cut the window would stop it for good."""
    drafter = Lookahead(pool_from_prompt=False)
    generate(llama, PROMPTS[:1], custom_generate=Constrained(drafter, Asked()), max_new_tokens=60)
    assert drafter.stats.drafted["guess"] > 0


# A JSON schema.


@pytest.mark.parametrize("name", ["goose", "suffix", "plain"])
def test_a_schema_under_speculation_writes_what_the_mask_does(name: str) -> None:
    pytest.importorskip("llguidance")
    from pertoken.decode.grammar import JSONSchemaConstraint

    tokenizer = ByteTokenizer()
    model = tiny_model("llama", vocab_size=258)
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer"}},
        "required": ["colour", "count"],
        "x-guidance": {"whitespace_flexible": False},
    }
    prompts = [tokenizer.encode(text) for text in ("red 1 red 2", "{}", "green, 33333, green")]
    run = {"max_new_tokens": 40, "eos_token_id": 1}
    wanted = masked(model, prompts, JSONSchemaConstraint(schema, tokenizer=tokenizer), **run)
    for budget in (None, "auto"):
        setup = Constrained(
            DRAFTERS[name](budget=budget), JSONSchemaConstraint(schema, tokenizer=tokenizer)
        )
        assert torch.equal(generate(model, prompts, custom_generate=setup, **run), wanted)
        # {"colour":"   ","count":    of which the first token comes from the prompt's pass
        assert setup.stats.accepted["forced"] >= 3 * 18
    assert '{"colour":"' in tokenizer.decode(wanted[0])


# Sampling: the same distribution.


def small_model() -> PreTrainedModel:
    return tiny_model("llama", vocab_size=8, scale=0.25)


class Sums:
    """Digits 1 to 4 with a 5 between them; 7 is the stop, right behind a digit. No dead ends."""

    def accepts(self, ids: Sequence[int]) -> bool:
        kinds = [0 < token < 5 for token in ids]
        signs = all(digit or token == 5 for digit, token in zip(kinds, ids, strict=True))
        return signs and all(digit == (i % 2 == 0) for i, digit in enumerate(kinds))

    def complete(self, ids: Sequence[int]) -> bool:
        return len(ids) % 2 == 1


class ListedSums(Sums):
    def allowed(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([self.accepts([*ids, token]) for token in range(8)])

    def forced(self, ids: Sequence[int]) -> list[int]:
        return [5] if len(ids) % 2 else []  # of the ordinary tokens


SAMPLED = {
    "asked": (Sums, {"top_k": 0}),
    "listed": (ListedSums, {"top_k": 0}),
    "top-k": (ListedSums, {"top_k": 3}),
    "all": (
        ListedSums,
        {"top_k": 4, "top_p": 0.9, "temperature": 1.5, "bad_words_ids": [[5, 1]]},
    ),
}


@pytest.mark.parametrize(
    ("name", "how"), [*(("goose", how) for how in SAMPLED), ("lookahead", "asked")]
)
def test_samples_follow_the_masked_models_distribution(name: str, how: str) -> None:
    model, (make, options) = small_model(), SAMPLED[how]
    prompt = torch.tensor([1, 5, 2, 5, 1, 5, 2, 5])
    mask = ConstraintMask(ListedSums(), 7, prompt_length=8)
    wanted = enumerate_texts(
        model, prompt, 4, eos_token_id=7, logits_processor=LogitsProcessorList([mask]), **options
    )
    drafter = DRAFTERS[name]()
    setup = Constrained(drafter, make())
    seen: Counter[tuple[int, ...]] = Counter()
    drafted = 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(4):
            found = generate(
                model,
                [prompt.tolist()] * 400,
                custom_generate=setup,
                do_sample=True,
                max_new_tokens=4,
                eos_token_id=7,
                **options,
            )
            for row in found[:, 8:].tolist():
                seen[tuple(row[: row.index(7) + 1] if 7 in row else row)] += 1
            drafted += setup.stats.accepted.total()
    result = compare_counts(wanted, seen)
    assert not result.impossible
    assert result.p_value > 0.001
    assert drafted > 50


def orders(scores: torch.Tensor) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every order in which a draw without replacement gives the tokens, with its probability."""
    probs = scores.double().softmax(-1)
    for order in permutations(range(len(scores))):
        left, p = 1.0, 1.0
        for token in order:
            p *= float(probs[token]) / left if left > 1e-12 else 1.0
            left -= float(probs[token])
        yield order, p


class Walked(Sums):
    """On four tokens: 0 anywhere but first, 1 and 2 always, 3 never."""

    def accepts(self, ids: Sequence[int]) -> bool:
        return 3 not in ids and ids[:1] != [0]

    def complete(self, ids: Sequence[int]) -> bool:
        return False


@pytest.mark.parametrize("kind", ["asked", "listed"])
def test_all_random_choices_of_a_walk_sum_to_the_masked_distribution(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every outcome of every draw is walked; siblings, children and tokens off the tree."""

    class WithList(Walked):
        def allowed(self, ids: Sequence[int]) -> torch.Tensor:
            return torch.tensor([self.accepts([*ids, token]) for token in range(4)])

    constraint = Walked() if kind == "asked" else WithList()
    rule = Rule(constraint, [])
    draft = TokenTree(1)
    for parent, token in ((0, 1), (0, 3), (0, 2), (1, 0), (3, 3)):
        draft.add(parent, token)
    tree = rule.fit_tree(draft, [], budget=9, room=3)
    assert tree.tokens == [1, 1, 2, 0]
    torch.manual_seed(0)
    logits = torch.randn(len(tree), 4)
    draws = {tuple(row.tolist()): dict(orders(row)) for row in logits}
    chooser = RuledChooser(rule, 2, None, sample=True, rows=1)
    script: list[tuple[int, ...]] = []
    chances: list[dict[tuple[int, ...], float]] = []

    def scripted(scores: torch.Tensor) -> torch.Tensor:
        place = len(chances)
        chances.append(draws[tuple(scores.tolist())])
        order = script[place] if place < len(script) else next(iter(chances[-1]))
        keys = torch.empty(4, dtype=torch.float64)
        keys[list(order)] = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
        return keys

    monkeypatch.setattr(_rule, "gumbel", scripted)
    found: Counter[tuple[int, ...]] = Counter()
    every = list(permutations(range(4)))
    open_scripts: list[list[tuple[int, ...]]] = [[order] for order in every]
    while open_scripts:
        script = open_scripts.pop()
        chances.clear()
        ids = torch.tensor([[0, 1, 0, 0, 0, 0]])
        _, tokens = chooser.walk(0, ids, 2, tree, logits)
        if len(chances) > len(script):
            open_scripts += [[*script, order] for order in every]
            continue
        chance = math.prod(one[order] for one, order in zip(chances, script, strict=True))
        found[tuple(tokens)] += chance  # type: ignore[assignment]
    wanted: dict[tuple[int, ...], float] = {}
    open_texts = [((), 0, 1.0)]
    while open_texts:
        text, node, p = open_texts.pop()
        mask = torch.tensor([constraint.accepts([*text, token]) for token in range(4)])
        probs = logits[node].double().masked_fill(~mask, -math.inf).softmax(-1).tolist()
        for token in range(4):
            child = tree.child(node, token)
            if probs[token] and child >= 0:
                open_texts.append(((*text, token), child, p * probs[token]))
            elif probs[token]:
                wanted[(*text, token)] = p * probs[token]
    assert set(found) == set(wanted)
    for text, p in wanted.items():
        assert found[text] == pytest.approx(p, abs=1e-6)


# The mask by itself.


def test_a_mask_serves_call_after_call(llama: PreTrainedModel) -> None:
    mask = ConstraintMask(Listed(), STOP)
    for prompts in (PROMPTS[:1], PROMPTS, PROMPTS[1:2], PROMPTS[1:2]):
        found = generate(llama, prompts, logits_processor=[mask])
        assert torch.equal(found, masked(llama, prompts))


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_mask_serves_a_drafter_with_a_batch(name: str, llama: PreTrainedModel) -> None:
    """A drafter shows the rows one by one, at different lengths."""
    mask = ConstraintMask(Listed(), STOP)
    options: dict[str, Any] = {"max_new_tokens": 20, "logits_processor": [mask]}
    found = generate(llama, PROMPTS, custom_generate=DRAFTERS[name](), **options)
    assert torch.equal(found, masked(llama, PROMPTS, max_new_tokens=20))


def test_a_mask_serves_the_drafter_of_transformers(llama: PreTrainedModel) -> None:
    """It shows drafts behind drafts that the constraint refuses, and then shorter texts again."""
    options = {"logits_processor": [ConstraintMask(Listed(), STOP)], "prompt_lookup_num_tokens": 3}
    found = generate(llama, PROMPTS[:1], max_new_tokens=20, **options)
    assert torch.equal(found, masked(llama, PROMPTS[:1], max_new_tokens=20))


def test_a_mask_that_cannot_know_where_the_text_began_says_so() -> None:
    mask = ConstraintMask(Listed(), STOP)
    mask(torch.tensor([[7, 8]]), torch.zeros(1, 16))
    with pytest.raises(PertokenError, match="pass prompt_length="):
        mask(torch.tensor([[7, 8, 1, 2, 3]]), torch.zeros(1, 16))


def test_beams_stay_inside_the_constraint(llama: PreTrainedModel) -> None:
    found = masked(llama, PROMPTS, num_beams=3, max_new_tokens=8)
    for row in found[:, 14:].tolist():
        text = row[: row.index(STOP)] if STOP in row else row
        assert Asked().accepts([token for token in text if token])


# Refusals.


class Raising(Asked):
    def accepts(self, ids: Sequence[int]) -> bool:
        if len(ids) > 3:
            raise ValueError("no such thing")
        return super().accepts(ids)


class Nothing(Listed):
    def after(self, state: int) -> dict[int, int]:  # type: ignore[override]
        return {} if state == 2 else super().after(state)


class Wrong(Listed):
    def allowed(self, ids: Sequence[int]) -> Any:
        return [0, 1]


class Vague(Asked):
    def accepts(self, ids: Sequence[int]) -> Any:
        return "yes"


class Short(Forcing):
    def accepts_each(self, ids: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        return []


class RaisingForced(Forcing):
    def forced(self, ids: Sequence[int]) -> list[int]:
        raise RuntimeError("out of order")


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (Raising(), "the constraint raised ValueError (no such thing)"),
        (RaisingForced(), "the constraint raised RuntimeError (out of order) on"),
        (Short(), "accepts_each(ids, tokens) gave 0 answers on"),
        (Nothing(), "the constraint allows no token behind 2 new tokens"),
        (Wrong(), "allowed(ids) must be a bool tensor [vocab], got list"),
        (Vague(), "must answer True or False, got str"),
    ],
)
def test_constraints_that_fail_are_named_in_one_line(
    constraint: Any, words: str, llama: PreTrainedModel
) -> None:
    for drafter in (Goose(), Plain()):
        with pytest.raises(PertokenError) as error:
            generate(llama, PROMPTS, custom_generate=Constrained(drafter, constraint))
        assert words in str(error.value)
        assert "\n" not in str(error.value)


def test_a_text_without_a_way_on_says_what_is_missing(llama: PreTrainedModel) -> None:
    class Two(Listed):
        def after(self, state: int) -> dict[int, int]:  # type: ignore[override]
            return {1: 5} if state == 0 else {}

    for kind, words in (
        ({"eos_token_id": None}, "complete behind 1 new tokens (…[1]), but there is no stop id"),
        ({"min_new_tokens": 5}, "the constraint and the other logits processors together"),
    ):
        with pytest.raises(PertokenError) as error:
            generate(llama, PROMPTS, custom_generate=Constrained(Goose(), Two()), **kind)
        assert words in str(error.value)
        with pytest.raises(PertokenError) as error:
            masked(llama, PROMPTS, Two(), **kind)
        assert words in str(error.value)


def test_what_is_no_constraint_or_no_drafter_is_refused() -> None:
    for thing in (object(), None, "[0-9]+", {"type": "object"}):
        with pytest.raises(PertokenError, match=r"accepts\(ids\) and complete\(ids\)"):
            Constrained(Goose(), thing)  # type: ignore[arg-type]
    with pytest.raises(PertokenError, match=r"such as Goose\(\) or Plain\(\), not AWRS"):
        Constrained(AWRS(Asked()), Asked())  # type: ignore[arg-type]
    with pytest.raises(PertokenError, match="not type"):
        Constrained(Goose, Asked())  # type: ignore[arg-type]


def test_cutting_by_rank_needs_a_list(llama: PreTrainedModel) -> None:
    with pytest.raises(PertokenError, match=r"TopKLogitsWarper needs .* pass top_k=0"):
        generate(
            llama, PROMPTS, custom_generate=Constrained(Goose(), Asked()), do_sample=True, top_k=5
        )
