"""A constraint at work: which token may follow, which drafts may stay, which token is chosen.

A stop id may follow where the text is complete; any other token where the constraint accepts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from pertoken.decode._choose import Chooser, Walk
from pertoken.decode.constraint import Constraint, ask, call, check, fit
from pertoken.decode.tree import TokenTree
from pertoken.errors import PertokenError

_FIRST = 32  # tokens ordered at once; the rest are ordered only if all of these are refused
MOST_FORCED = 64  # forced tokens drafted at once


class Rule:
    """A constraint and the stop ids. Raises PertokenError for an object that is no constraint.

    probes: sources of drafted nodes that stay although they are refused, see `Drafter.probes`.
    """

    def __init__(
        self, constraint: Constraint, stop_ids: Collection[int], probes: Collection[str] = ()
    ) -> None:
        check(constraint)
        self.constraint = constraint
        self.stop_ids = frozenset(stop_ids)
        self.probes = probes
        self.allowed: Callable[[list[int]], Any] | None = getattr(constraint, "allowed", None)
        self._each = getattr(constraint, "accepts_each", None)
        self._forced = getattr(constraint, "forced", None)

    def ended(self, ids: Sequence[int]) -> bool:
        """Whether the new tokens hold a stop id: nothing is asked behind it."""
        return not self.stop_ids.isdisjoint(ids)

    def allows(self, ids: list[int], tokens: Sequence[int]) -> list[bool]:
        """Which of some tokens may follow the new tokens `ids`."""
        ordinary = [token for token in tokens if token not in self.stop_ids]
        if self._each is None:
            found = [ask(self.constraint.accepts, [*ids, token]) for token in ordinary]
        else:
            found = list(call(self._each, ids, ordinary)) if ordinary else []
            if len(found) != len(ordinary):
                raise PertokenError(
                    f"the constraint's accepts_each(ids, tokens) gave {len(found)} answers on "
                    f"{len(ordinary)} tokens"
                )
        verdict = dict(zip(ordinary, found, strict=True))
        if len(ordinary) < len(tokens):
            verdict |= dict.fromkeys(self.stop_ids, ask(self.constraint.complete, ids))
        return [verdict[token] for token in tokens]

    def forced(self, ids: list[int]) -> list[int]:
        """The ordinary tokens that must follow, as far as the constraint says."""
        if self._forced is None:
            return []
        tokens: list[int] = call(self._forced, ids)
        ends = (place for place, token in enumerate(tokens) if token in self.stop_ids)
        return tokens[: next(ends, len(tokens))]

    def masked(self, ids: list[int], scores: torch.Tensor) -> torch.Tensor:
        """Scores [vocab] with -inf for every token that may not follow.

        Raises PertokenError if nothing is left. A token beyond the tensor that the constraint
        returns may not follow.
        """
        if self.allowed is None:
            mask = torch.tensor(self.allows(ids, range(len(scores))))
        else:
            mask = fit(call(self.allowed, ids), len(scores), "allowed(ids)")
            stops = [token for token in self.stop_ids if token < len(mask)]
            mask[stops] = ask(self.constraint.complete, ids)
        left = scores.masked_fill(~mask.to(scores.device), -math.inf)
        if not bool((left > -math.inf).any()):
            raise self.dead_end(ids, scores)
        return left

    def best(self, ids: list[int], keys: torch.Tensor) -> int:
        """The allowed token with the greatest key [vocab]; asks as few tokens as it can.

        Raises PertokenError if nothing is allowed.
        """
        for token in descending(keys):
            if self.allows(ids, [token])[0]:
                return token
            if self.allowed is not None:  # mostly the first one will do; else the list is cheaper
                return int(self.masked(ids, keys).argmax())
        raise self.dead_end(ids, keys)

    def dead_end(self, ids: list[int], scores: torch.Tensor) -> PertokenError:
        """The error for a text behind which nothing may stand."""
        where = f"behind {len(ids)} new tokens (…{ids[-8:]})" if ids else "as the first token"
        if bool((scores == -math.inf).any()):
            return PertokenError(
                f"the constraint and the other logits processors together allow nothing {where}; "
                "drop a processor or loosen the constraint"
            )
        if not self.stop_ids and ask(self.constraint.complete, ids):
            return PertokenError(
                f"the constrained text is complete {where}, but there is no stop id to end it; "
                "pass eos_token_id="
            )
        return PertokenError(
            f"the constraint allows no token {where}: a dead end that its accepts(ids) did not "
            "rule out before"
        )

    def fit_tree(self, tree: TokenTree, ids: list[int], budget: int, room: int) -> TokenTree:
        """A drafted tree without what the constraint refuses, and with what it forces.

        ids: the new tokens down to the root; budget: nodes, unless the draft had more or more are
        certain (at most `MOST_FORCED`); room: greatest depth.
        """
        children: list[list[int]] = [[] for _ in range(len(tree))]
        for node, parent in enumerate(tree.parents[1:], start=1):
            children[parent].append(node)
        fitted = TokenTree(tree.tokens[0])
        # Old node, new node, new tokens down to it (None: refused there or above).
        kept: list[tuple[int, int, list[int] | None]] = [(0, 0, ids)]
        for node, place, text in kept:  # the list grows behind the loop
            below = [tree.tokens[child] for child in children[node]]
            allowed = [False] * len(below)
            if text is not None:
                chain = self.forced(text)[: min(MOST_FORCED, room - fitted.depths[place])]
                fitted.add_chain(place, chain, source="forced")
                allowed = self.allows(text, below)
            for child, token, ok in zip(children[node], below, allowed, strict=True):
                source, above = tree.sources[child], tree.values[node]
                if not ok and source not in self.probes:
                    continue
                p = tree.values[child] / above if above else 0.0
                new = fitted.add(place, token, source=source, probability=p)
                if token not in self.stop_ids:
                    kept.append((child, new, [*text, token] if text is not None and ok else None))
        certain = min(sum(value == 1.0 for value in fitted.values[1:]), MOST_FORCED)
        return fitted.best(max(budget, tree.size, certain))


class RuledChooser(Chooser):
    """Chooses under a rule: locally constrained decoding at the nodes that the walk visits.

    The mask stands where a processor of the user's stands in `generate`: behind the penalties,
    before temperature, top-k and top-p. A draw is the best of the log-probabilities with Gumbel
    noise; a drafted token that equals it is accepted, which is the same distribution as recursive
    rejection. So the first token of that order which the constraint accepts is enough, and no
    mask is made, unless something cuts by rank or mass (top-k, top-p).

    start: place of the first new token.
    """

    def __init__(self, rule: Rule, start: int, processor: Any, *, sample: bool, rows: int) -> None:
        every = list(processor or [])
        warpers = [i for i, one in enumerate(every) if type(one).__name__.endswith("LogitsWarper")]
        split = warpers[0] if warpers else len(every)
        super().__init__(LogitsProcessorList(every[:split]), sample=sample, rows=rows)
        self.freely = False
        self.by_batch = Chooser(every, sample=sample, rows=rows).by_batch
        self.rule = rule
        self.start = start
        self.warpers = LogitsProcessorList(every[split:])
        cutting = [one for one in self.warpers if type(one) is not TemperatureLogitsWarper]
        self.cuts = bool(cutting)
        if self.cuts and rule.allowed is None:
            raise PertokenError(
                f"{type(cutting[0]).__name__} needs to know all allowed tokens, but this "
                "constraint can only be asked about one; pass top_k=0 (and top_p=1.0), or give it "
                "allowed(ids)"
            )

    def one_each(self, texts: list[torch.Tensor], logits: torch.Tensor) -> list[int]:
        """One token per row from logits [batch, vocab]; see `Chooser.one_each`."""
        root = TokenTree(0)
        return [
            self.walk(index, text, text.shape[1], root, logits[index : index + 1])[1][0]
            for index, text in enumerate(texts)
        ]

    def walk(
        self, index: int, ids: torch.Tensor, length: int, tree: TokenTree, logits: torch.Tensor
    ) -> Walk:
        """Walk down a tree, each node visited under the constraint on its own prefix."""
        node, path = 0, [0]
        tokens: list[int] = []
        while True:
            prefix = ids[:, :length]
            try:
                token = self._token(index, prefix, tree, node, logits[node])
            except PertokenError:
                # A criterion may have ended the text above; if not, the root meets it again.
                if node == 0:
                    raise
                return path[:-1], tokens
            tokens.append(token)
            node = tree.child(node, token)
            if node < 0 or length + 1 >= ids.shape[1]:
                return path, tokens
            ids[0, length] = token
            length += 1
            path.append(node)

    def _token(
        self, index: int, prefix: torch.Tensor, tree: TokenTree, node: int, logits: torch.Tensor
    ) -> int:
        """The token chosen at a node."""
        new: list[int] = prefix[0, self.start :].tolist()
        if self.rule.ended(new[-1:]):
            return new[-1]  # a drafted stop id was accepted; what stands behind it is cut
        scores = self.at(index, self.processor, prefix, logits)
        if self.cuts:
            scores = self.rule.masked(new, scores)
        scores = self.at(index, self.warpers, prefix, scores)
        keys = gumbel(scores) if self.sample else scores
        first = int(keys.argmax())
        if float(keys[first]) == -math.inf:
            raise self.rule.dead_end(new, scores)
        drafted = tree.child(node, first)
        # The method's drafts were asked when the tree was fitted; what is forced was only claimed.
        asked = drafted >= 0 and tree.sources[drafted] not in {"forced", *self.rule.probes}
        return first if self.cuts or asked else self.rule.best(new, keys)


def gumbel(scores: torch.Tensor) -> torch.Tensor:
    """Scores in float64 with Gumbel noise: the greatest is a draw from their softmax."""
    uniform = torch.rand_like(scores, dtype=torch.float64)
    return scores - torch.log(-torch.log(uniform.clamp_(min=torch.finfo(torch.float64).tiny)))


def descending(keys: torch.Tensor) -> Iterator[int]:
    """The tokens from the greatest key [vocab] down; those with -inf are left out.

    >>> list(descending(torch.tensor([0.1, 0.4, -math.inf, 0.2])))
    [1, 3, 0]
    """
    first = keys.topk(min(_FIRST, len(keys)))
    for key, token in zip(first.values.tolist(), first.indices.tolist(), strict=True):
        if key == -math.inf:
            return
        yield token
    rest = keys.sort(descending=True)
    yield from rest.indices[_FIRST : int((rest.values > -math.inf).sum())].tolist()
