"""Goose (arXiv 2604.02047): one tree from two training-free sources of unequal trust.

Copies of earlier text are accepted several times as often as the model's own recycled guesses, so
the best tree is not balanced: a deep *spine* of the copy, with short *branches* of recycled guesses
at its nodes and at the root.

``shape="paper"`` builds the tree by the published recipe: the share of the spine follows a
confidence and an average of past acceptance, branch widths fall along the spine as 1/i, branches
grow breadth-first. ``shape="optimal"`` (ours) estimates for every candidate the probability that it
is accepted, learned online by what speaks for it (length of the match, agreement of earlier
occurrences, score and context of the recycled guess), and takes the nodes with the greatest product
along their path: for a given set of candidates no tree of that size has a greater expected number
of accepted tokens (section 4.4 of the paper gives the same objective; it does not estimate).

The paper is greedy only; here sampling is lossless too (see `accept.py`). Published: 1.9-4.3 x
plain decoding at 7B-33B, 12-33 % more accepted tokens than balanced trees of the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any, Literal

from pertoken.decode import _chances as chance
from pertoken.decode._edges import EdgeBook, bucket
from pertoken.decode.drafter import Drafter
from pertoken.decode.tables import Continuations, Places, Successors
from pertoken.decode.topk import NodeLogits
from pertoken.decode.tree import TokenTree
from pertoken.errors import PertokenError

# The published constants (official code's defaults).
NODE_BUDGET = 60  # nodes of a tree, the root among them
EXTENDED = 100  # … and of a fully confident one
K = 10  # guesses kept per context
MIN_SCORE = 0.01
SPINE_BRANCHES = 0.5  # share of the branch nodes that goes to the spine's nodes
MAX_CHAIN = 20  # tokens copied per match
LONG_MATCH = 8
EMA = 0.3
BRANCH_DEPTH = 6


class Goose(Drafter):
    """Anisotropic speculation trees: a copied spine with recycled branches.

    Args:
        shape: ``"paper"`` (the published recipe) or ``"optimal"`` (ours, see the module).
        budget: nodes below the root; 59 by default, 60 with the root as published (the paper's
            shape stretches a confident step by up to two thirds). ``"auto"`` fits it to the cost
            of a pass on this machine.
        spine, branches, consensus, bigram, harvest_prompt: parts that can be switched off, as in
            the paper's ablations; all on by default.
        keep: recycled guesses and learned probabilities survive to the next call.

    Example: ``model.generate(**inputs, max_new_tokens=64, custom_generate=Goose(budget="auto"))``
    """

    slug = "goose"
    default_budget = NODE_BUDGET - 1

    def __init__(
        self,
        *,
        shape: Literal["paper", "optimal"] = "optimal",
        budget: int | Literal["auto"] | None = None,
        spine: bool = True,
        branches: bool = True,
        consensus: bool = True,
        bigram: bool = True,
        harvest_prompt: bool = True,
        keep: bool = False,
        streamer: Any = None,
        tokenizer: Any = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        super().__init__(
            budget=budget,
            keep=keep,
            streamer=streamer,
            tokenizer=tokenizer,
            stop_strings=stop_strings,
        )
        if shape not in ("paper", "optimal"):
            raise PertokenError(f'shape must be "paper" or "optimal", not {shape!r}')
        self.shape = shape
        self.spine = spine
        self.branches = branches
        self.consensus = consensus
        self.bigram = bigram
        self.harvest_prompt = harvest_prompt
        self.wants_prompt = harvest_prompt and branches
        self.reset()

    # What is learned.

    def reset(self) -> None:
        """Forget recycled guesses and learned probabilities."""
        super().reset()
        orders = (3 if self.shape == "optimal" else 2) if self.bigram else 1
        self._table = Successors(K, orders)
        self._edges = EdgeBook()
        self._accept_rate = 0.5  # average share of a spine that is accepted

    def begin(self, vocab_size: int) -> None:
        """Index the prompts."""
        if not self.keep:
            self.reset()
        self._places = [Places() for _ in self.contexts]
        self._counts = [Continuations() for _ in self.contexts]
        self._straight = [True] * len(self.contexts)  # the row's last draft was no tree
        for row, prompt in enumerate(self.contexts):
            self._index(row, prompt)

    def commit(self, row: int, tokens: list[int]) -> None:
        """Index new text and learn which guesses were right."""
        super().commit(row, tokens)
        self._edges.settle(row, tokens)
        self._index(row, tokens)

    def observe_prompt(
        self, row: int, tokens: list[int], logits: NodeLogits, previous: int | None
    ) -> None:
        """Recycle the guesses behind the prompt's tokens."""
        self._table.write_text(tokens, logits, previous)

    def observe(self, row: int, tree: TokenTree, path: list[int], logits: NodeLogits) -> None:
        """Recycle the guesses behind all nodes, the rejected ones too."""
        if self.branches:
            # As published, the root of a tree is noted by its token alone, that of a chain or a
            # plain step by its past too; the optimal shape always knows its past.
            alone = self.shape == "paper" and tree.size > 0 and not self._straight[row]
            reach = 1 if alone else len(self._table.tiers)
            self._table.write_tree(tree, logits, self.contexts[row][-reach:])
        spine = tree.sources.count("spine")
        if spine and not self._straight[row]:
            accepted = sum(tree.sources[node] == "spine" for node in path)
            self._accept_rate += EMA * (accepted / spine - self._accept_rate)

    def state_dict(self) -> dict[str, Any]:
        """Recycled guesses, average acceptance and calibration."""
        counts = self._edges.calibrator.counts
        return {
            **super().state_dict(),
            "shape": self.shape,
            "table": self._table.state(),
            "accept_rate": self._accept_rate,
            "edges": [[list(_flat(key)), hits, seen] for key, (hits, seen) in counts.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; raises PertokenError for the other shape."""
        super().load_state_dict(state)
        if state["shape"] != self.shape:
            raise PertokenError(
                f"this state was saved with shape={state['shape']!r}, not {self.shape!r}"
            )
        self.reset()
        self._table.load(state["table"])
        self._accept_rate = state["accept_rate"]
        for key, hits, seen in state["edges"]:
            self._edges.calibrator.counts[tuple(key)] = [hits, seen]

    def propose(self, row: int, budget: int, room: int) -> TokenTree:
        """The tree of this step."""
        tree = self._edges.open(row, TokenTree(self.contexts[row][-1]))
        if self.shape == "paper":
            self._grow_paper(row, tree, budget, room)
        else:
            self._grow_optimal(row, tree, budget, room)
        return tree

    def _index(self, row: int, tokens: list[int]) -> None:
        if self.shape == "paper":
            self._places[row].extend(tokens)
        else:
            self._counts[row].extend(tokens)

    # The published recipe (sections 4.2, 4.3, Algorithm 1).

    def _chain(self, row: int, grow: bool = True) -> tuple[list[int], float]:
        """The copy to draft and the confidence in it, in [0, 1]."""
        places = self._places[row]
        if not self.spine:
            return [], 0.0
        tail = self.contexts[row][-max(places.lengths) :]
        chain, confidence = matched(places, tail, self.consensus)
        if grow and confidence > 0.6:
            # Copy on from the end of the copy while the text goes on to match.
            while len(chain) < int(EXTENDED * confidence):
                end = (tail + chain)[-max(places.lengths) :]
                more, further = matched(places, end, self.consensus)
                if not more:
                    break
                chain = chain + more
                if confidence == 1.0 and further < 1.0:
                    break
        return chain, confidence

    def _grow_paper(self, row: int, tree: TokenTree, budget: int, room: int) -> None:
        context = self.contexts[row]
        successors = self._branches_of(context[-2:])
        chain, confidence = self._chain(row, grow=bool(successors))
        chain = chain[:room]
        self._straight[row] = not successors
        if not successors:  # nothing to branch to: one copy, as it is
            self._add_spine(row, tree, chain[:budget], confidence)
            return
        # B nodes with the root, more when confident; the spine's share of them.
        nodes = stretched(budget + 1, confidence)
        rate = self._accept_rate
        share = 0.15 if rate < 0.2 else 0.30 if rate < 0.4 else 0.50
        share += confidence * (1.0 - share)
        spine = min(len(chain), int(nodes * share))
        spine_nodes = self._add_spine(row, tree, chain[:spine], confidence)
        left = nodes - 1 - spine
        branches: list[int] = []

        # Root branches.
        of_spine = max(1, int(SPINE_BRANCHES * left)) if spine and left > 0 else 0
        skip = chain[0] if spine else None
        branches += self._attach(row, tree, 0, successors, left - of_spine, skip)

        # Branches along the spine, in proportion to 1/i.
        weights = [1.0 / i for i in range(1, spine + 1)]
        total = sum(weights)
        unused = of_spine
        for i, node in enumerate(spine_nodes):
            if unused < 1 or i + 1 >= room:
                break
            width = min(unused, max(1, int(of_spine * weights[i] / total)))
            before = chain[i - 1] if i else context[-1]
            following = chain[i + 1] if i + 1 < spine else None
            guesses = self._branches_of([before, chain[i]])
            branches += self._attach(row, tree, node, guesses, width, following)
            unused -= width  # also where the table had fewer

        # Growth of all branch nodes, breadth first.
        for node in branches:  # the list grows behind the loop
            remaining = nodes - len(tree)
            depth = tree.depths[node]
            if remaining < 1:
                break
            if depth >= min(BRANCH_DEPTH, room):
                continue
            guesses = self._branches_of([tree.tokens[tree.parents[node]], tree.tokens[node]])
            # "score" is the node's own, its guess's share among the kept ones.
            score = self._scores.get(node, 0.0)
            width = max(1, min(len(guesses), -int(-remaining * score // 1)))
            width = min(width, max(1, K // depth), remaining)
            branches += self._attach(row, tree, node, guesses, width, None)

    def _add_spine(
        self, row: int, tree: TokenTree, chain: list[int], confidence: float
    ) -> list[int]:
        self._scores: dict[int, float] = {}
        node, nodes = 0, []
        for depth, token in enumerate(chain, start=1):
            key = ("spine", int(5 * confidence), bucket(depth))
            prior = 0.3 + 0.6 * confidence
            node = self._edges.add(row, node, token, "spine", key, prior)
            nodes.append(node)
        return nodes

    def _branches_of(self, tail: list[int]) -> list[tuple[int, float, int]]:
        """(token, score, tier) of the recycled guesses behind two tokens, best first."""
        if not self.branches:
            return []
        tier, ids, scores = self._table.after(tail)
        return [(token, score, tier) for token, score in zip(ids, scores, strict=True)]

    def _attach(
        self,
        row: int,
        tree: TokenTree,
        parent: int,
        guesses: list[tuple[int, float, int]],
        width: int,
        skip: int | None,
    ) -> list[int]:
        """Add up to `width` guesses below a node, best first; the nodes added."""
        added: list[int] = []
        for rank, (token, score, tier) in enumerate(guesses):
            if len(added) >= width or score < MIN_SCORE:
                break
            if token == skip or tree.child(parent, token) >= 0:
                continue
            key = ("branch", tier, rank, chance.score_kind(score))
            prior = chance.table(tier, rank, score, copies=skip is not None)
            node = self._edges.add(row, parent, token, "branch", key, prior)
            self._scores[node] = score
            added.append(node)
        return added

    # The optimal shape (ours).

    def _grow_optimal(self, row: int, tree: TokenTree, budget: int, room: int) -> None:
        """Best first: a node enters when no candidate left has a greater path probability."""
        counts = self._counts[row]
        tail = tuple(self.contexts[row][-counts.longest :])
        estimate = self._edges.calibrator.p
        # (-value, order, parent, token, source, key, prior, tail of the parent, agreement)
        heap: list[tuple[Any, ...]] = []
        order = 0
        node, value, agreed = 0, 1.0, -1
        while True:
            if tree.depths[node] < room:
                found = self._candidates(counts, tail, agreed)
                for token, source, key, prior, agreement in found:
                    reached = value * estimate(key, prior)
                    if reached > 1e-3:
                        order += 1
                        entry = (-reached, order, node, token, source, key, prior, tail, agreement)
                        heappush(heap, entry)
            if not heap or tree.size >= budget:
                return
            negative, _, parent, token, source, key, prior, above, agreed = heappop(heap)
            value = -negative
            node = self._edges.add(row, parent, token, source, key, prior)
            tail = (*above[1:], token) if len(above) == counts.longest else (*above, token)

    def _candidates(
        self, counts: Continuations, tail: tuple[int, ...], agreed: int
    ) -> list[tuple[int, str, tuple[Any, ...], float, int]]:
        """(token, source, key, prior, agreement) of what may follow a context.

        agreed: tokens over which the context agrees with an earlier place; -1 at the root.
        """
        # token -> (kind of match, kind of majority, share of the occurrences)
        copies: dict[int, tuple[int, int, float]] = {}
        agreement = 0
        if self.spine:
            length, following, position = counts.after(tail)
            if length == counts.longest:  # longer than the index: count on
                agreement = counts.agreement(position) if agreed < 0 else agreed + 1
            agreement = max(agreement, length)
            total = sum(following.values())
            for place, (token, count) in enumerate(following.items()):
                if place == 4:
                    break
                majority = 2 * (4 * count // total) + (place == 0)
                if count == total > 1 and self.consensus:
                    majority = 10 if total == 2 else 11
                copies[token] = (chance.match_kind(agreement), majority, count / total)
            if length > 1 and len(following) < 4:  # what a shorter context adds
                shorter, others, _ = counts.after(tail, max(1, length // 2))
                for place, token in enumerate(others):
                    if place == 4:
                        break
                    copies.setdefault(token, (chance.SHORTER + shorter, int(place == 0), 0.0))
        tier, ids, scores = self._table.after(tail) if self.branches else (0, [], [])
        guesses = dict(zip(ids, enumerate(scores), strict=True))
        known = bool(guesses)
        found = []
        for token, (match, majority, share) in copies.items():
            key: tuple[Any, ...]
            if known and token not in guesses:
                key = ("copy", match, majority)
                prior = chance.copy(match, share)
            else:
                score = guesses.pop(token)[1] if known else 0.5
                key = ("both", match, majority, tier, chance.score_kind(score) if known else -1)
                prior = chance.both(match, share, tier, score)
            found.append((token, "spine", key, prior, agreement))
        for token, (rank, score) in guesses.items():
            if score >= MIN_SCORE:
                key = ("table", tier, min(rank, 3), chance.score_kind(score), bool(copies))
                prior = chance.table(tier, rank, score, bool(copies))
                found.append((token, "branch", key, prior, 0))
        return found


def matched(places: Places, tail: list[int], consensus: bool = True) -> tuple[list[int], float]:
    """The copy behind the first place of the text's last n-gram, and the confidence in it, 0 to 1.

    Section 4.3: 1 where all earlier places agree on the next token, else it grows with the length.
    """
    start, agreed = places.find(tail)
    if start < 0:
        return [], 0.0
    copy = places.text[start : start + MAX_CHAIN]
    length = len(copy)
    if agreed and consensus:
        return copy, 1.0
    if length >= LONG_MATCH:
        return copy, min(0.9, 0.7 + 0.2 * (length - LONG_MATCH) / 12)
    return copy, 0.6 * length / LONG_MATCH


def stretched(nodes: int, confidence: float) -> int:
    """The budget of a step, root included: up to two thirds more than `nodes` when confident.

    >>> stretched(60, 0.0), stretched(60, 0.5), stretched(60, 1.0)
    (60, 80, 100)
    """
    return nodes + int(confidence * (nodes * (EXTENDED - NODE_BUDGET) // NODE_BUDGET))


def _flat(key: Any) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)
