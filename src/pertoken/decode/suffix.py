"""SuffixDecoding (arXiv 2411.04975): draft the continuation that was most frequent so far.

Two suffix trees of at most 64 tokens' depth count what followed every context: one of this
request's prompt and output, one of the outputs of all requests. For every number of last tokens
that is found in a tree the most frequent continuation is followed, at most as many tokens as
matched; the draft with the greatest expected length wins. Drafts equal those of the official
implementation (github.com/snowflakedb/ArcticInference) token by token in path mode, and up to the
order of equally probable nodes in tree mode.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal

from pertoken.decode._edges import EdgeBook, bucket
from pertoken.decode._suffix_index import IndexedSequence, SuffixDraft, SuffixIndex
from pertoken.decode.drafter import Drafter
from pertoken.decode.tree import TokenTree
from pertoken.errors import PertokenError


class SuffixTree(Drafter):
    """Drafts the most frequent continuation of the longest useful context (SuffixDecoding).

    Args:
        mode: ``"path"`` follows the most frequent child; ``"tree"`` also drafts alternatives.
        max_depth: longest text counted, in tokens.
        max_spec_factor, max_spec_offset: at most factor x matched tokens + offset are drafted.
        min_token_prob: less probable paths are not drafted.
        max_cached_requests: outputs kept in the tree of all requests, oldest dropped first;
            -1 keeps all, 0 keeps none (this request's own tree still counts).
        budget: most tokens drafted (64, the depth), or ``"auto"``.
        keep: remember outputs for the next call. Repeating a prompt is then nearly free, so
            never time a prompt twice with it.

    Example: ``model.generate(**inputs, max_new_tokens=64, custom_generate=SuffixTree(keep=True))``
    """

    slug = "suffix"
    default_budget = 64

    def __init__(
        self,
        *,
        mode: Literal["path", "tree"] = "path",
        max_depth: int = 64,
        max_spec_factor: float = 1.0,
        max_spec_offset: float = 0.0,
        min_token_prob: float = 0.1,
        max_cached_requests: int = -1,
        budget: int | Literal["auto"] | None = None,
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
        if mode not in ("path", "tree"):
            raise PertokenError(f'mode must be "path" or "tree", not {mode!r}')
        if max_depth < 2:
            raise PertokenError(f"max_depth must be at least 2, not {max_depth}")
        if max_spec_factor < 0:
            raise PertokenError(f"max_spec_factor must not be negative, got {max_spec_factor}")
        if not 0 <= min_token_prob <= 1:
            raise PertokenError(f"min_token_prob is a probability, not {min_token_prob}")
        if max_cached_requests < -1:
            raise PertokenError("max_cached_requests counts outputs; -1 keeps all of them")
        self.mode = mode
        self.max_depth = max_depth
        self.max_spec_factor = max_spec_factor
        self.max_spec_offset = max_spec_offset
        self.min_token_prob = min_token_prob
        self.max_cached_requests = max_cached_requests
        self._forget()

    def begin(self, vocab_size: int) -> None:
        """Index the prompts and make place for this call's outputs."""
        super().begin(vocab_size)
        if not self.keep:
            self._forget()
        self._end_call()
        for prompt in self.contexts:
            index = SuffixIndex(self.max_depth)
            text = index.new_sequence()
            index.extend(text, prompt)
            self._local.append((index, text))
            output = self._global.new_sequence()
            self._outputs.append(output)
            self._cache(output)

    def commit(self, row: int, tokens: list[int]) -> None:
        """Count the new tokens in both trees."""
        super().commit(row, tokens)
        self._edges.settle(row, tokens)
        index, text = self._local[row]
        index.extend(text, tokens)
        if self._outputs[row].growing:  # not dropped already to make place for a later one
            self._global.extend(self._outputs[row], tokens)

    def propose(self, row: int, budget: int, room: int) -> TokenTree:
        """The better draft of the two trees; the root alone when nothing matches."""
        tree = self._edges.open(row, TokenTree(self.contexts[row][-1]))
        origin, draft = self._draft(row, budget, room)
        nodes = [0]  # nodes[i + 1] is the tree's node of draft token i
        depths = [0]
        for token, parent, probability in zip(
            draft.tokens, draft.parents, draft.probabilities, strict=True
        ):
            above = 1.0 if parent < 0 else draft.probabilities[parent]
            share = probability / above
            depth = depths[parent + 1] + 1
            key: Hashable = (
                origin,
                bucket(draft.match_length),
                bucket(depth),
                # The end of the text counts as an occurrence without a continuation, so the
                # first token after a single earlier occurrence has a share of one half.
                round(4 * share),
            )
            prior = _prior(draft.match_length, depth, share)
            nodes.append(self._edges.add(row, nodes[parent + 1], token, "suffix", key, prior))
            depths.append(depth)
        return tree

    def reset(self) -> None:
        """Forget all outputs."""
        super().reset()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """The cached outputs, oldest first."""
        state = super().state_dict()
        state["outputs"] = [list(output.tokens) for output in self._cached if output.tokens]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Count outputs saved before, in the same order."""
        super().load_state_dict(state)
        self._forget()
        for tokens in state["outputs"]:
            output = self._global.new_sequence()
            self._global.extend(output, tokens)
            self._global.finish(output)
            self._cache(output)

    def _draft(self, row: int, budget: int, room: int) -> tuple[str, SuffixDraft]:
        def best(index: SuffixIndex, sequence: IndexedSequence, beat: float) -> SuffixDraft:
            return index.draft(
                self.contexts[row][-self.max_depth :],
                budget,
                self.max_spec_factor,
                self.max_spec_offset,
                self.min_token_prob,
                tree=self.mode == "tree",
                max_depth=room,
                beat=beat,
                sequence=sequence,
            )

        own = best(*self._local[row], 0.0)
        shared = best(
            self._global, self._outputs[row], own.score
        )  # the request's own text wins ties
        return ("shared", shared) if shared.tokens else ("own", own)

    def _cache(self, output: IndexedSequence) -> None:
        if self.max_cached_requests == 0:
            output.growing = False
            return
        self._cached.append(output)
        while 0 < self.max_cached_requests < len(self._cached):
            self._global.remove(self._cached.pop(0))

    def _end_call(self) -> None:
        """The last call's outputs are complete; its prompts are not needed any more."""
        for output in self._outputs:
            self._global.finish(output)
        self._outputs: list[IndexedSequence] = []
        self._local: list[tuple[SuffixIndex, IndexedSequence]] = []

    def _forget(self) -> None:
        self._edges = EdgeBook()
        self._global = SuffixIndex(self.max_depth)
        self._cached: list[IndexedSequence] = []
        self._outputs = []
        self._local = []


def _prior(match_length: int, depth: int, share: float) -> float:
    """Acceptance of a drafted token before anything is learned; its share alone is too hopeful.

    Set by eye on a dozen texts of a small model: a match of one token says little.
    """
    if match_length == 1:
        return share**2 if depth == 1 else 0.3 + 0.4 * share
    return 0.45 + 0.3 * share if depth == 1 else 0.4 + 0.45 * share
