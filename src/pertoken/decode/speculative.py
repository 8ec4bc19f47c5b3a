"""The speculative loop: draft a token tree, verify it in one forward, keep what the model chooses.

One round: (1) the drafter proposes a tree below each row's last token; (2) one forward over all
trees, every node seeing the text, its ancestors and itself; (3) a walk from the root, where the
model's own choice at a node (argmax, or a draw by recursive rejection) selects the child to go to;
(4) the accepted rows stay in the cache; (5) the model's choice at the last accepted node is the
bonus token and the next root. The output is that of plain decoding, token by token when greedy and
in distribution when sampling.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from pertoken.decode._choose import Chooser, Walk, walk_greedy
from pertoken.decode._rule import Rule, RuledChooser
from pertoken.decode._settings import (
    cache_and_mask,
    refuse_inputs,
    refuse_processors,
    refuse_settings,
    stops,
)
from pertoken.decode.budget import Planner, measure_costs
from pertoken.decode.forward import TreeForward
from pertoken.decode.rows import keep_rows, start_recording, static_slots, stop_recording
from pertoken.decode.stats import DecodeStats, RowTrace
from pertoken.decode.topk import NodeLogits
from pertoken.decode.tree import TokenTree, ancestor_mask

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers.cache_utils import Cache

    from pertoken.decode.constraint import Constraint
    from pertoken.decode.drafter import Drafter

_PREFILL_CHUNK = 512  # prompt tokens whose logits are held at once


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """What `generate(..., return_dict_in_generate=True)` returns: with `stats` of the run."""

    stats: DecodeStats | None = None


@dataclass
class _Row:
    """One row of the batch: its text so far, and what ends it."""

    ids: torch.Tensor  # [1, max_length] buffer: padding and prompt, then the new tokens
    length: int
    prompt: int
    done: bool = False
    trace: RowTrace = field(default_factory=RowTrace)

    @property
    def text(self) -> torch.Tensor:
        return self.ids[:, : self.length]


def speculate(
    drafter: Drafter,
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    constraint: Constraint | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | SpeculativeOutput:
    """Decode with a drafter; called through ``generate(custom_generate=drafter)``.

    input_ids: [batch, time], left-padded; constraint: see `Constrained`. Returns ids [batch,
    longest], or a `SpeculativeOutput` if the generation config asks for a dict. Raises
    PertokenError, before any work, for a model, cache or setting that the loop cannot serve.
    """
    started = time.perf_counter()
    refuse_inputs(drafter, model, generation_config, model_kwargs)
    refuse_settings(generation_config, input_ids, drafter, drafter.streamer)
    refuse_processors(logits_processor, drafter, len(input_ids))
    drafter.fit(model.get_input_embeddings().weight.shape[0])
    cache, mask = cache_and_mask(drafter, model, input_ids, model_kwargs)
    run = _Run(
        drafter,
        model,
        cache,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        constraint,
    )
    try:
        mask = run.prefill(cache, mask)
        start_recording(cache)
        while not all(row.done for row in run.rows):
            mask = run.step(cache, mask)
    finally:
        stop_recording(cache)
        drafter.stats.seconds_total = time.perf_counter() - started
    if drafter.streamer is not None:
        drafter.streamer.end()
    sequences = run.sequences()
    if not generation_config.return_dict_in_generate:
        return sequences
    return SpeculativeOutput(sequences=sequences, past_key_values=cache, stats=drafter.stats)


class _Run:
    """State of one `generate` call."""

    def __init__(
        self,
        drafter: Drafter,
        model: PreTrainedModel,
        cache: Cache,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        config: GenerationConfig,
        constraint: Constraint | None,
    ) -> None:
        self.drafter = drafter
        self.input_ids = input_ids
        self.max_length: int = config.max_length
        self.stop_ids, self.criteria = stops(stopping_criteria, drafter)
        rows, length = input_ids.shape
        sample = bool(config.do_sample)
        self.rule: Rule | None = None
        self.chooser = Chooser(logits_processor, sample=sample, rows=rows)
        if constraint is not None:
            self.rule = rule = Rule(constraint, self.stop_ids, drafter.probes)
            self.chooser = RuledChooser(rule, length, logits_processor, sample=sample, rows=rows)
        pad = config._pad_token_tensor
        self.pad = int(pad) if pad is not None else 0
        self.device = input_ids.device
        self.stats = drafter.stats = DecodeStats()
        # A static cache has no room for drafts beyond its end, even such as would be rejected.
        self.slots = min(static_slots(cache), default=None)
        width = max(self.max_length, length)
        self.rows = []
        for ids in input_ids:
            buffer = ids.new_full((1, width), self.pad)
            buffer[0, :length] = ids
            self.rows.append(_Row(buffer, length, length))
        drafter.rows = [row.trace for row in self.rows]
        self.forward = TreeForward(model)  # may run the model: all is refused before
        self.planner = Planner(measure_costs(self.forward)) if drafter.budget == "auto" else None

    def prefill(self, cache: Any, mask: torch.Tensor) -> torch.Tensor:
        """Feed the prompt (less what the cache holds) and commit the first token of every row."""
        drafter = self.drafter
        seen = int(cache.get_seq_length())
        length = self.input_ids.shape[1]
        started = time.perf_counter()
        valid = mask.bool()
        drafter.contexts = [
            ids[row].tolist() for ids, row in zip(self.input_ids, valid, strict=True)
        ]
        drafter.begin(self.forward.model.get_input_embeddings().weight.shape[0])
        if drafter.streamer is not None:
            drafter.streamer.put(self.input_ids.cpu())
        chunk = _PREFILL_CHUNK if drafter.wants_prompt else length
        for start in range(seen, length, chunk):
            end = min(start + chunk, length)
            logits = self.forward.text(
                self.input_ids[:, start:end], mask[:, :end], cache, all_logits=drafter.wants_prompt
            )
            if drafter.wants_prompt:
                self._show_prompt(logits, mask, start, end)
        self.stats.prefills += 1
        last = logits[:, -1:]
        self._commit_plain(last)
        self.stats.first_tokens += sum(1 for row in self.rows if row.length > row.prompt)
        self.stats.seconds_prefill = time.perf_counter() - started
        return mask

    def step(self, cache: Any, mask: torch.Tensor) -> torch.Tensor:
        """One round for all rows; returns the mask of the text that the cache then holds."""
        started = time.perf_counter()
        trees = self._draft(None if self.slots is None else self.slots - mask.shape[1] - 1)
        sizes = [len(tree) for tree in trees]
        nodes = max(sizes)
        tokens = torch.tensor(
            [tree.tokens + [self.pad] * (nodes - len(tree)) for tree in trees], device=self.device
        )
        if nodes > 1:
            # A row that is done stays where its text ends: the model may have no further position.
            depths = torch.tensor(
                [
                    [-1] * nodes if row.done else tree.depths + [0] * (nodes - len(tree))
                    for row, tree in zip(self.rows, trees, strict=True)
                ],
                device=self.device,
            )
            visible = torch.stack([ancestor_mask(tree.parents, nodes) for tree in trees])
            visible = visible.to(self.device)
        before = time.perf_counter()
        if nodes == 1:
            alive = torch.tensor([[not row.done] for row in self.rows], device=self.device)
            whole = torch.cat((mask, alive.to(mask.dtype)), -1)
            logits = self.forward.text(tokens, whole, cache)
        else:
            logits = self.forward.tree(tokens, depths, visible, mask, cache)
        self._synchronize()
        verified = time.perf_counter()
        self.stats.forwards += 1
        paths = self._walk(trees, logits)
        mask = keep_rows(cache, mask, nodes, paths)
        if self.planner is not None:
            gained = sum(row.trace.step_lengths[-1] for row in self.rows if not row.done)
            self.planner.record(gained or 1, nodes * len(self.rows))
        self.stats.seconds_verify += verified - before
        self.stats.seconds_draft += time.perf_counter() - started - (verified - before)
        return mask

    def sequences(self) -> torch.Tensor:
        """Ids [batch, longest], padded on the right with the pad id."""
        longest = max(row.length for row in self.rows)
        return torch.cat([row.ids[:, :longest] for row in self.rows])

    # Drafting.

    def _draft(self, most: int | None) -> list[TokenTree]:
        """One tree per row, of at most `most` nodes; a row that is done has a single dummy node."""
        drafter, planner = self.drafter, self.planner
        trees = []
        for index, row in enumerate(self.rows):
            if row.done:
                trees.append(TokenTree(self.pad))
                continue
            # The bonus token takes one place; positions end where the model's table ends.
            room = self.max_length - row.length - 1
            if self.forward.max_positions is not None:
                room = min(room, self.forward.max_positions - len(drafter.contexts[index]))
            budget = (
                planner.most
                if planner is not None
                else drafter.default_budget
                if drafter.budget is None
                else int(drafter.budget)
            )
            tree = TokenTree(drafter.contexts[index][-1])
            if room >= 1 and budget >= 1:
                tree = drafter.propose(index, budget, room)
            if room >= 1 and self.rule is not None:
                new = row.ids[0, row.prompt : row.length].tolist()
                tree = self.rule.fit_tree(tree, new, budget, room)
            trees.append(tree)
        if planner is not None:
            values: list[float] = []
            for tree in trees:
                for rank, value in enumerate(sorted(tree.values[1:], reverse=True)):
                    if rank == len(values):
                        values.append(0.0)
                    values[rank] += value
            size = planner.nodes(values, len(trees))
            trees = [tree.best(size) for tree in trees]
        if most is not None:
            trees = [tree.best(most) for tree in trees]
        for row, tree in zip(self.rows, trees, strict=True):
            if not row.done:
                self.stats.drafted.update(tree.sources[1:])
        return trees

    def _show_prompt(self, logits: torch.Tensor, mask: torch.Tensor, start: int, end: int) -> None:
        for index, row in enumerate(self.input_ids):
            valid = mask[index, start:end].bool()
            tokens = row[start:end][valid].tolist()
            if tokens:
                known = start > 0 and bool(mask[index, start - 1])
                previous = int(row[start - 1]) if known else None
                rows = logits[index] if len(tokens) == end - start else logits[index][valid]
                self.drafter.observe_prompt(index, tokens, NodeLogits(rows), previous)

    # Verifying.

    def _walk(self, trees: list[TokenTree], logits: torch.Tensor) -> list[list[int]]:
        """Accept, commit and report for every row; the nodes whose cache rows stay."""
        seen = [NodeLogits(logits[index, : len(tree)]) for index, tree in enumerate(trees)]
        alive = {row.length for row in self.rows if not row.done}
        if logits.shape[1] == 1 and len(alive) == 1 and self.rule is None:
            tokens = self._choose_plain(logits[:, -1])
            chosen: list[Walk] = [([0], [token]) for token in tokens]
        else:
            chosen = []
            for index, (row, tree) in enumerate(zip(self.rows, trees, strict=True)):
                if row.done:
                    chosen.append(([0], [self.pad]))
                elif self.chooser.freely:
                    chosen.append(walk_greedy(tree, seen[index].greedy()))
                else:
                    chosen.append(
                        self.chooser.walk(index, row.ids, row.length, tree, logits[index])
                    )
        kept = []
        for index, (row, tree) in enumerate(zip(self.rows, trees, strict=True)):
            if row.done:
                kept.append([0] if len(trees) == 1 else [])
                continue
            path, tokens = chosen[index]
            sources = [tree.sources[node] for node in path[1:]] + ["bonus"]
            self.stats.row_steps += 1
            count = self._commit(index, tokens, sources, tree, path, seen[index])
            # The last committed token is never in the cache: it is the next root.
            kept.append(path[:count])
        return kept

    def _choose_plain(self, logits: torch.Tensor) -> list[int]:
        """One token per row from logits [batch, vocab]; all rows that go on are of one length."""
        # Rows that are done are drawn for too: so does generate, and seeds mean the same.
        length = next(row.length for row in self.rows if not row.done)
        return self.chooser.one_each([row.ids[:, :length] for row in self.rows], logits)

    # Committing.

    def _commit_plain(self, logits: torch.Tensor) -> None:
        """The first token of every row, from the prefill's logits [batch, 1, vocab]."""
        for index, token in enumerate(self._choose_plain(logits[:, -1])):
            self._commit(index, [token], ["bonus"])

    def _commit(
        self,
        index: int,
        tokens: list[int],
        sources: list[str],
        tree: TokenTree | None = None,
        path: list[int] | None = None,
        logits: NodeLogits | None = None,
    ) -> int:
        """Append tokens up to the first stop; tell drafter and streamer; the number appended."""
        row = self.rows[index]
        count = self._until_stop(row, tokens)
        tokens, sources = tokens[:count], sources[:count]
        if tree is not None and path is not None and logits is not None:
            if not row.done or self.drafter.keep:
                self.drafter.observe(index, tree, path[:count], logits)
            drafted = [source for source in sources if source != "bonus"]
            self.stats.accepted.update(drafted)
            self.stats.dropped += len(path) - 1 - len(drafted)
            self.stats.bonus += sources[-1] == "bonus"
        self.drafter.commit(index, tokens)
        row.trace.sources += sources
        row.trace.step_lengths.append(count)
        self.stats.new_tokens += count
        if self.drafter.streamer is not None:
            self.drafter.streamer.put(torch.tensor(tokens))
        return count

    def _until_stop(self, row: _Row, tokens: list[int]) -> int:
        """Write tokens into the row until one ends it; the number written."""
        for count, token in enumerate(tokens, start=1):
            row.ids[0, row.length] = token
            row.length += 1
            row.done = (
                row.length >= self.max_length
                or token in self.stop_ids
                or bool(self.criteria and self.criteria(row.text, None).all())
            )
            if row.done:
                # The walk may have written drafts behind it.
                row.ids[0, row.length :] = self.pad
                return count
        return len(tokens)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
