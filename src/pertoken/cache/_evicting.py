"""What all evicting caches share: rows with their positions, and a limit that always holds.

Every forward goes in three steps, layer by layer. The queries attend to the rows that are held and
to the new ones, so a prompt's own attention is complete. Then the method gives every row a
priority. Then the rows with the highest priorities stay, `budget` of them per batch row, and the
others are gone for good. This is done after the prompt, after each further piece of text, and after
each decoded token alike.

A forward that fails leaves the cache as it was, so until a forward is over the old rows are held
beside the new ones; `peak_bytes` counts both.

Rows stand in the order of their positions, padding first. Padding (position -1) has no priority and
no vote, so a padded row keeps what it would keep alone. In a layer with a sliding window a row that
no later token can see goes before any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch

from pertoken._shown import Shown
from pertoken._takeover import refuse_unfit, sdpa, visible
from pertoken.cache._attention import Forward, ModelCache
from pertoken.cache._kept_rows import KeptRows
from pertoken.cache._weights import causal, mix, weigh
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EvictingCache(Shown, ModelCache):
    """Base of the caches that hold at most `budget` rows per layer and batch row.

    A method is one function, `_priority`; `_answer` may be replaced by one that watches attention.
    """

    per_head = False  # whether every key head keeps its own rows
    keeps_no_drafts = "evicts tokens for good"  # what the speculative loop says of it
    peak_bytes: int
    _padded: bool
    _newest: torch.Tensor  # [batch, 1], the newest place of each row, -1 before the first

    def __init__(self, model: PreTrainedModel, budget: int) -> None:
        name = type(self).__name__
        if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
            raise PertokenError(
                f"{name}: budget is the number of tokens to keep per layer, at least 1; "
                f"got {budget!r}"
            )
        refuse_unfit(model, name)
        super().__init__(model, [])
        self.budget = budget
        self.layers: list[KeptRows] = []
        # Windows beyond which a row is dead; a method may take them away.
        self._dead_beyond = list(self.windows)
        self.reset()

    # ---------------------------------------------------------------- what a method writes

    def _priority(self, layer: int, rows: KeptRows) -> torch.Tensor:
        """[batch, groups, rows], floating; of equal rows the older stays."""
        raise NotImplementedError

    def _answer(
        self,
        module: Any,
        query: torch.Tensor,
        rows: KeptRows,
        allowed: torch.Tensor | None,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention [batch, time, heads, dim], and the new notes.

        allowed: bool [batch, 1 or key heads, time, rows], or None as `sdpa` takes it.
        """
        return self._plain(module, query, rows, allowed, scaling), None

    def _looked_at(self, layer: int, rows: KeptRows) -> KeptRows:
        """The rows as queries are to see them; `rows` itself is what is kept."""
        return rows

    # ------------------------------------------------------------------------- a forward

    def begin(self, forward: Forward) -> None:
        name = type(self).__name__
        if forward.tree is not None:
            raise PertokenError(
                f"{name} evicts tokens for good, so it cannot take back a rejected draft: use "
                "DynamicCache or KVDirectCache for speculative decoding"
            )
        positions = forward.positions
        if self._seen and len(positions) != len(self._newest):
            raise PertokenError(
                f"{name} holds {len(self._newest)} batch rows, but {len(positions)} came: call "
                "reset() before another batch"
            )
        if not self._seen:
            self._newest = positions.new_full((len(positions), 1), -1)
        self._newest_then = torch.maximum(self._newest, positions.amax(1, keepdim=True))
        self._padded = self._padded or bool((positions < 0).any())
        # Padding behind text, as in a batch of unequal turns: rows must be sorted again.
        self._unsorted = self._padded and bool(
            (torch.cat((self._newest, positions), 1).diff(dim=1) < 0).any()
        )
        self._staged.clear()
        self._alive = self.nbytes

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *_: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer = module.layer_idx
        groups = key.shape[1] if self.per_head else 1
        new = self._now.positions.unsqueeze(1).expand(-1, groups, -1)
        rows = self.layers[layer].extended(key, value, new)
        if self._unsorted:
            rows = rows.take(rows.positions.argsort(dim=-1, stable=True))
        seen = self._looked_at(layer, rows)
        allowed = self._allowed(layer, seen)
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        out, notes = self._answer(module, query, seen, allowed, scaling)
        rows = replace(rows, notes=notes)
        # A layer's rows are alive until it has evicted; what it held before, until the end.
        self.peak_bytes = max(self.peak_bytes, self._alive + rows.kv_bytes + rows.note_bytes)
        with torch.no_grad():
            kept = self._evicted(layer, rows)
        self._staged[layer] = kept
        self._alive += kept.kv_bytes + kept.note_bytes
        return out, None

    def _watch_last(
        self,
        count: int,
        module: Any,
        query: torch.Tensor,
        rows: KeptRows,
        allowed: torch.Tensor | None,
        scaling: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention, and the weights of each batch row's last queries; arguments as in `_answer`.

        The weights are [batch, key heads, group, count or fewer, rows], 0 for queries of padding.
        """
        positions = self._now.positions
        time = query.shape[2]
        count = min(count, time)
        last, mask = query[:, :, -count:], allowed
        if self._unsorted and allowed is not None:
            pick = positions.argsort(dim=1, stable=True)[:, -count:]
            positions = positions.gather(1, pick)
            where = pick[:, None, :, None]
            last = query.gather(2, where.expand(-1, query.shape[1], -1, query.shape[3]))
            mask = allowed.gather(2, where.expand(-1, allowed.shape[1], -1, rows.count))
        elif allowed is not None:
            mask = allowed[:, :, -count:]
        elif count > 1:
            mask = causal(count, rows.count, query.device)
        weights = weigh(last, rows.keys, mask, scaling)
        if count == time and not self._unsorted:
            out = mix(weights, rows.values)
        else:
            out = self._plain(module, query, rows, allowed, scaling)
        weights = weights.detach()
        if allowed is not None:
            weights = weights * (positions[:, -count:] >= 0)[:, None, None, :, None]
        return out, weights

    def _allowed(self, layer: int, rows: KeptRows) -> torch.Tensor | None:
        """Who sees whom, bool [batch, groups, time, rows]; None where no mask is needed."""
        positions = self._now.positions
        time = positions.shape[1]
        window = self.windows[layer]
        alone = rows.count == time and (window is None or time <= window)
        # What one query cannot see was evicted before it came, or counts as padding since.
        clean = not self._padded and (window is None or bool((rows.positions >= 0).all()))
        if clean and (time == 1 or alone):
            return None
        return visible(positions.unsqueeze(1), rows.positions, window)

    def _evicted(self, layer: int, rows: KeptRows) -> KeptRows:
        """At most `budget` of the rows."""
        window = self._dead_beyond[layer]
        limit = self.budget if window is None else min(self.budget, window - 1)
        if rows.count <= limit:
            return rows.map(torch.Tensor.contiguous)  # a view would hold on to what it is cut from
        dead = rows.positions < 0
        if window is not None:
            dead = dead | (rows.positions <= self._newest_then.unsqueeze(-1) + 1 - window)
            rows = rows.silenced(dead)
        priority = self._priority(layer, rows).masked_fill(dead, -torch.inf)
        index = priority.argsort(dim=-1, descending=True, stable=True)[..., :limit].sort(-1).values
        kept = rows.take(index)
        # A dead row may stay where nothing else is there to be kept; it is padding from now on.
        return replace(kept, positions=kept.positions.masked_fill(dead.gather(2, index), -1))

    def end(self, finished: bool) -> None:
        if finished:
            for layer, rows in self._staged.items():
                self.layers[layer] = rows
            self._seen += self._now.positions.shape[1]
            self._newest = self._newest_then
        self._staged.clear()
        self.peak_bytes = max(self.peak_bytes, self.nbytes)

    @property
    def _now(self) -> Forward:
        assert self.forward is not None
        return self.forward

    def _plain(
        self,
        module: Any,
        query: torch.Tensor,
        rows: KeptRows,
        allowed: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """Attention through sdpa."""
        if allowed is not None and allowed.shape[1] > 1:  # one mask per key head: one per head
            allowed = allowed.repeat_interleave(query.shape[1] // allowed.shape[1], 1)
        # Some libraries replace the function by one that insists on `dropout`.
        out, _ = sdpa(module, query, rows.keys, rows.values, allowed, scaling=scaling, dropout=0.0)
        return out

    # --------------------------------------------------------------------- being a cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, evicted ones and padding included."""
        return self._seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys of a full cache, and the first one's place; only another model asks."""
        return self._seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: texts may be of any length."""
        return -1

    def reset(self) -> None:
        """Forget everything; hooks and budget stay."""
        self.layers[:] = [KeptRows.none() for _ in self.windows]
        self._staged: dict[int, KeptRows] = {}  # what the layers hold once the forward is over
        self._seen = 0
        self._newest = torch.empty(0, 1, dtype=torch.long)
        self._newest_then = self._newest
        self._padded = self._unsorted = False
        self._alive = 0
        self.peak_bytes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Another cache of the same model: a text that was read once may go on in several ways."""
        twin = type(self)(
            **{name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        )
        twin.layers[:] = [rows.map(torch.clone) for rows in self.layers]
        twin._seen, twin._padded = self._seen, self._padded
        twin._newest, twin.peak_bytes = self._newest.clone(), self.nbytes
        return twin

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Batch rows in another order, as beam search asks for it."""
        self._on_batch(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every batch row `repeats` times."""
        self._on_batch(lambda state: state.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only some of the batch rows."""
        self._on_batch(lambda state: state[indices.to(state.device)])

    def _on_batch(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self._seen:
            self.layers[:] = [rows.map(change) for rows in self.layers]
            self._newest = change(self._newest)
            self.peak_bytes = max(self.peak_bytes, self.nbytes)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, given as a negative number, as transformers does.

        Raises PertokenError where evicted tokens, or votes of the removed ones, would be needed.
        """
        name, count = type(self).__name__, -tokens_to_remove
        if not 0 <= count <= self._seen:
            raise PertokenError(
                f"{name}.crop takes minus the number of tokens to remove, at most {self._seen} "
                f"here; got {tokens_to_remove}"
            )
        if count == self._seen:
            self.reset()
        if not count or not self._seen:
            return
        if any(rows.count < self._seen or rows.notes is not None for rows in self.layers):
            raise PertokenError(
                f"{name} cannot take back {count} tokens: what they pushed out, or voted for, is "
                "gone; use DynamicCache or KVDirectCache where tokens are taken back"
            )
        if bool((self.layers[0].positions.diff(dim=-1) < 0).any()):
            raise PertokenError(f"{name} cannot take back tokens of a text with padding inside")
        left = self._seen - count
        for layer, rows in enumerate(self.layers):
            kept = KeptRows(
                rows.keys[:, :, :left], rows.values[:, :, :left], rows.positions[:, :, :left]
            )
            self.layers[layer] = kept.map(torch.Tensor.clone)
        self._seen = left
        self._newest = self.layers[0].positions[:, 0].amax(1, keepdim=True)

    def activate_past_recording(self) -> None:
        """Asked for by assisted decoding, which takes tokens back."""
        raise PertokenError(
            f"{type(self).__name__} evicts tokens for good, so it cannot serve assisted decoding: "
            "use DynamicCache or KVDirectCache there"
        )

    # ------------------------------------------------------------------------ what it holds

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values held now; during a forward of old and new ones."""
        return sum(rows.kv_bytes for rows in (*self.layers, *self._staged.values()))

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes kept beside: positions and votes of the rows. Of evicted tokens nothing is kept."""
        return sum(rows.note_bytes for rows in (*self.layers, *self._staged.values()))

    @property
    def nbytes(self) -> int:
        """`kv_bytes` and `checkpoint_bytes` together."""
        return self.kv_bytes + self.checkpoint_bytes

    @property
    def full_bytes(self) -> int:
        """Bytes that the keys and values of a full cache would take for the tokens seen."""
        total = 0
        for rows, window in zip(self.layers, self.windows, strict=True):
            kept = self._seen if window is None else min(self._seen, window - 1)
            total += rows.kv_bytes // rows.count * kept if rows.count else 0
        return total

    def reset_peak(self) -> None:
        """Let `peak_bytes`, the greatest `nbytes` so far, start again from now."""
        self.peak_bytes = self.nbytes
