"""Bugs planted on purpose: each must be found by the laws.

The first half plants them into a brute-force tree decoder written here, straight from the
definition (no cache, one row at a time), so that the laws are judged apart from our own loop.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pertoken.decode import _choose, speculative
from pertoken.decode.drafter import Drafter
from pertoken.decode.forward import TreeForward
from pertoken.decode.tree import TokenTree, ancestor_mask
from pertoken.testing import LawBroken, check_distribution, check_lossless, tiny_model

Parents = Sequence[int]


def sees(parents: Parents, node: int, other: int) -> bool:
    """A node sees itself and its ancestors."""
    while node >= 0:
        if node == other:
            return True
        node = parents[node]
    return False


def depth(parents: Parents, node: int) -> int:
    return 0 if parents[node] < 0 else 1 + depth(parents, parents[node])


def residual(probabilities: torch.Tensor, rejected: int) -> torch.Tensor:
    """The distribution left after a deterministic draft was rejected."""
    left = probabilities.clone()
    left[rejected] = 0.0
    return left / left.sum()


class ReferenceTree:
    """Tree speculation by brute force: drafts 2 levels of 3 children each, verifies in one forward.

    The three rules that are easy to get wrong are attributes, so a test can spoil one of them.
    """

    def __init__(self) -> None:
        self.sees: Callable[[Parents, int, int], bool] = sees
        self.depth: Callable[[Parents, int], int] = depth
        self.residual: Callable[[torch.Tensor, int], torch.Tensor] = residual
        self.accepted = 0
        self._seen: dict[tuple[Any, ...], torch.Tensor] = {}

    def draft(self, model: PreTrainedModel, context: list[int]) -> tuple[list[int], list[int]]:
        """Tokens and parents; the last child of each node is the model's choice, so that wrong
        elder siblings stand before the accepted path."""
        vocab = model.config.vocab_size
        tokens, parents = [context[-1]], [-1]
        node, text = 0, context
        for _ in range(2):
            best = int(self._logits(model, text, [text[-1]], [-1])[0].argmax())
            for token in ((best + 3) % vocab, (best + 1) % vocab, best):
                tokens.append(token)
                parents.append(node)
            node, text = len(tokens) - 1, [*text, best]
        return tokens, parents

    def _logits(
        self, model: PreTrainedModel, context: list[int], tokens: list[int], parents: list[int]
    ) -> torch.Tensor:
        """Logits [nodes, vocab] of a tree whose root is the last token of the context."""
        key = (tuple(context), tuple(tokens), tuple(parents))
        if key not in self._seen:
            past, nodes = len(context) - 1, len(tokens)
            ids = torch.tensor([context[:-1] + tokens])
            mask = torch.full((past + nodes, past + nodes), -1e30, dtype=model.dtype).triu(1)
            for node in range(nodes):
                for other in range(nodes):
                    visible = self.sees(parents, node, other)
                    mask[past + node, past + other] = 0.0 if visible else -1e30
            positions = list(range(past)) + [past + self.depth(parents, n) for n in range(nodes)]
            self._seen[key] = model(
                ids, attention_mask=mask[None, None], position_ids=torch.tensor([positions])
            ).logits[0, past:]
        return self._seen[key]

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        *,
        logits_processor: Any,
        generation_config: Any,
        **arguments: Any,
    ) -> torch.Tensor:
        rows = []
        for row in input_ids:
            context = row.tolist()
            while len(context) < generation_config.max_length:
                context += self._step(model, context, logits_processor, generation_config.do_sample)
            rows.append(context[: generation_config.max_length])
        return torch.tensor(rows)

    def _step(
        self, model: PreTrainedModel, context: list[int], processor: Any, sample: bool
    ) -> list[int]:
        tokens, parents = self.draft(model, context)
        logits = self._logits(model, context, tokens, parents)
        node, new = 0, []
        while True:
            scores = processor(torch.tensor([context + new]), logits[node][None].float())[0]
            children = [n for n in range(len(tokens)) if parents[n] == node]
            token = self._choose(scores, [tokens[n] for n in children], sample)
            new.append(token)
            match = [n for n in children if tokens[n] == token]
            if not match:
                return new
            node = match[0]
            self.accepted += 1

    def _choose(self, scores: torch.Tensor, drafts: list[int], sample: bool) -> int:
        if not sample:
            return int(scores.argmax())
        probabilities = scores.double().softmax(-1)
        for token in drafts:
            if torch.rand(()) < probabilities[token]:
                return token
            probabilities = self.residual(probabilities, token)
        return int(torch.multinomial(probabilities, 1))


ARCHITECTURES = ["llama", "gpt2", "gpt-neox", "phi"]
PROMPT = [1, 5, 2, 7, 3]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_tree_is_lossless_and_accepts_drafts(architecture: str) -> None:
    tree = ReferenceTree()
    check_lossless(tree, tiny_model(architecture), max_new_tokens=16)
    assert tree.accepted > 20


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_siblings_that_see_each_other_are_found(architecture: str) -> None:
    tree = ReferenceTree()
    tree.sees = lambda parents, node, other: (
        sees(parents, node, other) or (other < node and parents[other] == parents[node])
    )
    with pytest.raises(LawBroken):
        check_lossless(tree, tiny_model(architecture), max_new_tokens=16)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_positions_off_by_one_are_found(architecture: str) -> None:
    tree = ReferenceTree()
    tree.depth = lambda parents, node: depth(parents, node) + 1
    with pytest.raises(LawBroken):
        check_lossless(tree, tiny_model(architecture), max_new_tokens=16)


def test_the_reference_tree_samples_the_models_distribution() -> None:
    tree = ReferenceTree()
    model = tiny_model("llama", vocab_size=8)
    assert check_distribution(tree, model, PROMPT, draws=6000).p_value > 0.001
    assert tree.accepted > 3000


def test_a_residual_without_renormalisation_is_found() -> None:
    def spoiled(probabilities: torch.Tensor, rejected: int) -> torch.Tensor:
        left = probabilities.clone()
        left[rejected] = 0.0
        return left

    tree = ReferenceTree()
    tree.residual = spoiled
    with pytest.raises(LawBroken, match="not the model's distribution"):
        check_distribution(tree, tiny_model("llama", vocab_size=8), PROMPT, draws=6000)


# The same three bugs, planted into the loop of this package.


class Stubborn(Drafter):
    """Drafts two levels of three children with the model's choice last, behind wrong siblings."""

    slug = "stubborn"
    default_budget = 6

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._best: dict[tuple[int, ...], int] = {}

    def best(self, text: list[int]) -> int:
        key = tuple(text)
        if key not in self._best:
            logits = self.model(torch.tensor([text]), use_cache=False).logits[0, -1]
            self._best[key] = int(logits.argmax())
        return self._best[key]

    def propose(self, row: int, budget: int, room: int) -> TokenTree:
        text = list(self.contexts[row])
        tree = TokenTree(text[-1])
        node, vocab = 0, self.model.config.vocab_size
        for _ in range(min(2, room)):
            best = self.best(text)
            tree.add(node, (best + 3) % vocab)
            tree.add(node, (best + 1) % vocab)
            node = tree.add(node, best)
            text.append(best)
        return tree


REAL = ["llama", "qwen3", "gemma3", "gpt2", "gpt-neox", "opt", "mistral", "phi", "qwen3-sliding"]


@pytest.fixture
def tried() -> Callable[[str], PreTrainedModel]:
    """Models that the loop has already found fit: its own check must not find the bug first."""

    def make(architecture: str) -> PreTrainedModel:
        model = tiny_model(architecture)
        TreeForward(model)
        return model

    return make


@pytest.mark.parametrize("architecture", REAL)
def test_the_loop_is_lossless_with_wrong_siblings_first(architecture: str) -> None:
    model = tiny_model(architecture)
    drafter = Stubborn(model)
    check_lossless(drafter, model, max_new_tokens=16)
    assert drafter.stats.accepted["draft"] > 8


@pytest.mark.parametrize("architecture", REAL)
def test_siblings_that_see_each_other_in_the_loop_are_found(
    architecture: str,
    tried: Callable[[str], PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def leaky(parents: Sequence[int], size: int | None = None) -> torch.Tensor:
        mask = ancestor_mask(parents, size)
        for node, parent in enumerate(parents):
            for other in range(node):
                mask[node, other] |= parents[other] == parent
        return mask

    model = tried(architecture)
    monkeypatch.setattr(speculative, "ancestor_mask", leaky)
    with pytest.raises(LawBroken, match="not lossless"):
        check_lossless(Stubborn(model), model, max_new_tokens=32)


@pytest.mark.parametrize("architecture", REAL)
def test_positions_off_by_one_in_the_loop_are_found(
    architecture: str,
    tried: Callable[[str], PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = TreeForward.tree

    def shifted(
        self: TreeForward, tokens: torch.Tensor, depths: torch.Tensor, *others: Any
    ) -> torch.Tensor:
        return right(self, tokens, depths + 1, *others)

    model = tried(architecture)
    monkeypatch.setattr(TreeForward, "tree", shifted)
    with pytest.raises(LawBroken, match="not lossless"):
        check_lossless(Stubborn(model), model, max_new_tokens=32)


def test_the_loop_samples_the_models_distribution() -> None:
    model = tiny_model("llama", vocab_size=8)
    result = check_distribution(Stubborn(model), model, PROMPT, draws=8000)
    assert result.drafted is not None
    assert result.drafted > 8000


def test_a_residual_without_renormalisation_in_the_loop_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unnormalised(probs: torch.Tensor, children: torch.Tensor) -> tuple[int, int]:
        left = probs.clone()
        for index, token in enumerate(children.tolist()):
            if torch.rand(()) < left[token]:
                return token, index
            left[token] = 0.0
        return int(torch.multinomial(left, 1)), -1

    model = tiny_model("llama", vocab_size=8)
    monkeypatch.setattr(_choose, "recursive_rejection", unnormalised)
    with pytest.raises(LawBroken, match="not the model's distribution"):
        check_distribution(Stubborn(model), model, PROMPT, draws=8000)
