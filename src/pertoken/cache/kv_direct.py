"""KV-Direct: keys and values of the newest tokens only, those of all others made again when needed.

Keys and values of a layer are a function of the layer's input, and all of it is a function of the
token ids (arXiv 2603.19664): a cache may drop them and the output stays the same. The newest
`budget` tokens keep theirs; an evicted token keeps a checkpoint. A forward goes over the evicted
tokens in blocks: a block's keys and values are made, used by the new tokens' attention, merged by
log-sum-exp (`_paged`) and dropped.

What a checkpoint costs. The paper counts the memory of one vector per token for all layers, and the
work of one projection per token and layer (its Algorithm 1 keeps a vector per layer). Both at once
cannot be had: the input of a layer gives the keys and values of that layer, and those of the layers
above only by running the stack over all evicted tokens. So there are three checkpoints (our
reading); see `KVDirectCache`.

Where we differ: tokens are evicted a block at a time, so that borders are fixed and a block's
recomputation is bit-identical from step to step; and `rematerialize="turn"` (ours) makes the
evicted rows once and keeps them until `end_turn()`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch

from pertoken._blocks import Blocks
from pertoken._shown import Shown
from pertoken._takeover import sdpa, visible
from pertoken.cache._attention import Forward, ModelCache, mask_of_layer, opens, shows
from pertoken.cache._evicted import Evicted, token_positions
from pertoken.cache._held import Held, size_of
from pertoken.cache._paged import attend_part, merge, mixed_values
from pertoken.cache._recomputable import (
    refuse_changing,
    refuse_options,
    refuse_training,
    row_bytes,
)
from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BLOCK = 128  # tokens; a block of queries against a block of keys is what attention holds at once


class KVDirectCache(Shown, ModelCache):
    """A cache of bounded memory with the output of a full one; hand it to `generate`.

    budget: tokens whose keys and values are held, per layer and row of the batch.
    checkpoint: what is kept of a token. "residual" and "per_layer" keep it of the newest tokens
        too, since a block input can be had only when it is computed.

        | checkpoint  | bytes per token     | work of a step over n blocks of evicted tokens  |
        |-------------|---------------------|-------------------------------------------------|
        | "tokens"    | 4 (the id)          | per layer n are run; in the last n projected    |
        | "residual"  | 4 + hidden          | the same, but below `layer` n projected         |
        | "per_layer" | 4 + layers x hidden | per layer n projected                           |
        | full cache  | layers x 2 x key    | nothing: it is read                             |
        |             | heads x head size   |                                                 |

        So "residual" saves next to nothing, and "per_layer" pays where the hidden size is below
        2 x key heads x head size. In "tokens" and "residual" the block inputs of the evicted tokens
        (one vector each) are alive during a forward, and of one layer's keys and values as many as
        the budget holds in all layers; of a text with more evicted tokens than that two blocks, and
        n(n-1)/2 are projected for the n that are run. `peak_bytes` counts all of it.
    rematerialize: "step": nothing made again outlives a forward. "turn": the first forward after
        the start or after `end_turn()` makes all rows, which stay until `end_turn()`. Then a step
        costs what it costs with a full cache, and so does the memory.
    layer: the layer whose input "residual" keeps.
    block: tokens evicted and made again at a time, at most the budget. By default 128 tokens, or
        the budget, are evicted at a time, and about 128 made again. Larger blocks are run faster.

    What is exact. The output is that of a full cache up to rounding, since sums run in another
    order: the same tokens in float64; in float32 unless two choices are as good as tied; in
    bfloat16 close choices may fall otherwise. Bit by bit: all, while nothing is evicted (a model
    with sdpa); a block's keys and values, from one step to the next; and with "per_layer" those
    that the model cached, if it read that very block at once.

    A step is slower than with a full cache as soon as a token is evicted.

    Raises PertokenError for a budget below 1 or below the block, a model whose blocks cannot be
    recomputed, another model than its own, training, gradients, embeddings instead of ids,
    position ids of one's own, and masks that are neither padding, plain text nor a token tree.

    >>> from pertoken.testing import tiny_model
    >>> model, ids = tiny_model("llama"), torch.arange(1, 31)[None]
    >>> run = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    >>> with KVDirectCache(model, budget=8) as cache:
    ...     text = model.generate(ids, past_key_values=cache, **run)
    >>> torch.equal(text, model.generate(ids, **run))
    True
    >>> cache.kv_bytes < cache.full_bytes / 4
    True
    """

    slug = "kv-direct"

    def __init__(
        self,
        model: PreTrainedModel,
        budget: int = 256,
        *,
        checkpoint: Literal["tokens", "residual", "per_layer"] = "tokens",
        rematerialize: Literal["step", "turn"] = "step",
        layer: int = 0,
        block: int | None = None,
    ) -> None:
        refuse_options(budget, checkpoint, rematerialize, block)
        self.budget = budget
        self.checkpoint: Literal["tokens", "residual", "per_layer"] = checkpoint
        self.rematerialize: Literal["step", "turn"] = rematerialize
        self.block = block
        self._block = min(_BLOCK, budget) if block is None else block
        name = type(self).__name__
        refuse_changing(model, name)
        self.blocks = Blocks(model)
        count = len(self.blocks.modules)
        if not 0 <= layer < count or (layer and checkpoint != "residual"):
            raise PertokenError(
                f"layer must be 0 to {count - 1}, and only with checkpoint='residual'; got {layer} "
                f"with {checkpoint!r}"
            )
        self.layer = layer
        # As many rows as the budget has in all layers may be made again in one of them, so with a
        # small budget several blocks are run at once.
        self._spare = budget * count
        together = 1 if block else max(1, min(_BLOCK, self._spare) // self._block)
        self._run = together * self._block
        self._held = Held(count)
        super().__init__(model, self._held.layers)
        self._token_bytes = row_bytes(model, self.blocks, self.windows, name)
        self._kept = {"tokens": (), "residual": (layer,), "per_layer": range(count)}[checkpoint]
        if checkpoint == "per_layer":
            self._warn_if_larger()
        self._evicting: Evicted | None = None
        self._hooks: list[Any] = []
        self._inputs: dict[int, torch.Tensor] = {}  # block inputs of the forward that is running
        self._nodes = 0  # the newest tokens are nodes of a tree, of which some are to be dropped
        self.peak_bytes = 0

    # Accounting.

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values held right now."""
        return self._held.row_bytes

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of ids and block inputs."""
        return self._held.checkpoint_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return self.kv_bytes + self.checkpoint_bytes

    @property
    def full_bytes(self) -> int:
        """Bytes that transformers' default cache would hold for the tokens seen."""
        seen = self.get_seq_length()
        rows = [seen if window is None else min(seen, window - 1) for window in self.windows]
        per_text = sum(n * size for n, size in zip(rows, self._token_bytes, strict=True))
        return self._held.batch * per_text

    def reset_peak(self) -> None:
        """Count `peak_bytes` from now on."""
        self.peak_bytes = self.nbytes

    def _note(self, *alive: torch.Tensor) -> None:
        """Count what is held, with it the scratch of a forward and these tensors."""
        scratch = 0 if self._evicting is None else self._evicting.nbytes
        total = self.nbytes + scratch + size_of(*alive, *self._inputs.values())
        self.peak_bytes = max(self.peak_bytes, total)

    # What transformers and the speculative loop ask of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return self._held.length

    @property
    def batch_size(self) -> int:
        return self._held.batch or -1

    def reset(self) -> None:
        """Forget all tokens."""
        self._held.clear()
        self._nodes = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: a negative number, as transformers counts."""
        if tokens_to_remove > 0:
            raise PertokenError(
                "crop takes the number of tokens to drop as a negative number, got "
                f"{tokens_to_remove}"
            )
        self._nodes = max(0, self._nodes + tokens_to_remove)
        self._held.cut(max(0, self.get_seq_length() + tokens_to_remove))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Go on with these rows of the batch, in this order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch."""
        self._held.change_batch(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._held.change_batch(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def keep_nodes(self, source: torch.Tensor, mask: torch.Tensor) -> None:
        """Keep the accepted nodes of a token tree, which is what the last forward was given.

        source: [batch, length], the token (counted from 0, nodes included) that comes to each
        place; mask: [batch, length], 0 where the place becomes padding.
        """
        self._nodes = 0
        self._held.rearrange(source, mask)
        self._held.evict(self._border(self.get_seq_length()))

    def end_turn(self) -> None:
        """Drop the rows beyond the budget; `rematerialize="turn"` makes them again when needed."""
        seen = self.get_seq_length()
        self._held.evict(min(self._fitting(seen), seen - self._nodes))

    def __deepcopy__(self, memo: dict[int, Any]) -> KVDirectCache:
        """Another cache of the same model: a text that was read once may go on in several ways."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = type(self)(
                self.model,
                self.budget,
                checkpoint=self.checkpoint,
                rematerialize=self.rematerialize,
                layer=self.layer,
                block=self._block,
            )
        twin._held.copy(self._held)
        twin._nodes, twin.peak_bytes = self._nodes, self.nbytes
        return twin

    # A forward.

    def begin(self, forward: Forward) -> None:
        """Check what the forward was given, and prepare the evicted tokens."""
        name = type(self).__name__
        refuse_training(self.model, name)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            raise PertokenError(
                f"{name} gives no gradients: run the model in torch.no_grad() (generate does)"
            )
        if forward.input_ids is None:
            raise PertokenError(f"{name} keeps token ids: pass input_ids instead of inputs_embeds")
        if self._nodes:
            raise PertokenError(
                f"the last forward of this {name} had a 4-D mask: its tokens must be kept or "
                "dropped (keep_nodes, crop) before the next"
            )
        ids, held = forward.input_ids, self._held
        if held.batch not in (0, ids.shape[0]):
            raise PertokenError(
                f"this {name} holds a batch of {held.batch}, the input has {ids.shape[0]} rows: "
                "use one cache per conversation, or reset()"
            )
        self._ids = held.joined(ids.masked_fill(forward.positions < 0, -1))
        self._positions = token_positions(self._ids)
        tree = forward.tree = forward.tree if self._is_tree(forward) else None
        own = self._positions[:, held.length :] if tree is None else forward.positions
        real = own >= 0
        if not torch.equal(forward.position_ids[real], own[real]) or not torch.equal(
            forward.positions, own
        ):
            raise PertokenError(
                f"{name} recomputes tokens at their places in the text: the position_ids and the "
                "mask must number each row's tokens 0, 1, 2, ... and hide padding only"
            )
        whole = tree is not None and self.rematerialize == "step"
        self._next = held.first if whole else self._border(self._ids.shape[1])
        self._padded = bool((self._positions < 0).any())
        self._inputs = {}
        if held.first:
            kept = {layer: state[:, : held.first] for layer, state in held.states.items()}
            ids = self._ids[:, : held.first]
            self._evicting = Evicted(
                self.blocks, self.windows, ids, self._run, kept, self._spare, self._note
            )
        for layer in self._kept:
            module = self.blocks.modules[layer]
            self._hooks.append(
                module.register_forward_pre_hook(self._reader(layer), with_kwargs=True)
            )

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The new tokens' attention over evicted, held and new tokens."""
        layer = module.layer_idx
        rows, evicting, first = self.layers[layer], self._evicting, self._held.first
        pairs = [(key, value)] if rows.keys is None else [(rows.keys, rows.values), (key, value)]
        if evicting is not None and self.rematerialize == "turn":
            pairs.insert(0, evicting.rebuild(layer))
            evicting, first = None, 0
        keys, values = (torch.cat(each, 2) for each in zip(*pairs, strict=True))
        drop = self._next - first
        rows.put(keys, values)
        self._note()
        if drop > 0:  # only from the cache: this forward still sees them
            rows.change(lambda old: old[:, :, drop:].clone())
        mask = self._mask(layer, slice(first, None))
        if evicting is None:
            return sdpa(module, query, keys, values, mask, scaling=scaling)
        mixed = attend_part(query, keys, values, mask, scaling)
        masks = [self._mask(layer, part) for part in evicting.parts]

        def see(index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
            nonlocal mixed
            mixed = merge(mixed, attend_part(query, keys, values, masks[index], scaling))

        evicting.page(layer, [shows(mask) for mask in masks], see)
        return mixed_values(mixed, query.dtype), None

    def end(self, finished: bool) -> None:
        """Take the new tokens in; after a failure rather drop all rows, which can be made again."""
        for hook in self._hooks:
            hook.remove()
        self._evicting, self._hooks = None, []
        if finished:
            assert self.forward is not None
            if self.forward.tree is not None:
                self._nodes = self.forward.positions.shape[1]
            self._held.take(self._ids, self._inputs, self._next)
        else:
            self._held.drop_rows()
        self._inputs = {}
        self._note()

    # Inside.

    def _reader(self, layer: int) -> Callable[..., None]:
        """A hook that keeps the input of a block: the first, those after it are recomputation."""

        def read(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs.setdefault(layer, args[0] if args else kwargs["hidden_states"])

        return read

    def _mask(self, layer: int, where: slice) -> torch.Tensor | None:
        """What the new tokens see of a stretch of the text: [batch, 1, time, keys]."""
        forward, window = self.forward, self.windows[layer]
        assert forward is not None
        if forward.tree is not None:
            return mask_of_layer(forward.tree, window)[..., where]
        time, total = forward.positions.shape[1], self._positions.shape[1]
        near = window is None or total < window
        if where == slice(0, None) and near and time in (1, total) and not self._padded:
            return None  # where the library gives none, so that the bits are the same
        return visible(forward.positions, self._positions[:, where], window)[:, None]

    def _is_tree(self, forward: Forward) -> bool:
        """Whether a 4-D mask says something else than plain text would."""
        if forward.tree is None:
            return False
        new = self._positions[:, self.get_seq_length() :]
        return not torch.equal(forward.positions, new) or any(
            not torch.equal(
                opens(mask_of_layer(forward.tree, window)).expand(new.shape[0], -1, -1, -1)[:, 0],
                visible(new, self._positions, window),
            )
            for window in set(self.windows)
        )

    def _fitting(self, total: int) -> int:
        """The first of `total` tokens whose rows fit: the border of a block, or where it was."""
        over, first = total - self.budget, self._held.first
        return first if over <= first else -(-over // self._block) * self._block

    def _border(self, total: int) -> int:
        return self._fitting(total) if self.rematerialize == "step" else 0

    def _warn_if_larger(self) -> None:
        width = self.model.config.get_text_config(decoder=True).hidden_size
        states = len(self._token_bytes) * width * self.model.dtype.itemsize
        if states > sum(self._token_bytes):
            warnings.warn(
                f"checkpoint='per_layer' keeps {states} bytes per token of "
                f"{type(self.model).__name__}, more than its keys and values, "
                f"{sum(self._token_bytes)} bytes: a full cache is smaller and faster",
                stacklevel=3,
            )
