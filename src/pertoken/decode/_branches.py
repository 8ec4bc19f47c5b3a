"""Next-token logits behind many token paths that share their beginnings, each token fed once.

Every fed token has a row in one cache; a mask shows each new token the rows of its own path. So a
text that forks costs one token per fork, and forks that died cost nothing but their rows, which are
dropped now and then. A model that takes no such mask gets one path after the other: what differs
from the path before is dropped from the cache and fed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import DynamicCache

from pertoken._forward import text_logits
from pertoken.decode.forward import TreeForward, refuse_unfit, rotation_switch
from pertoken.errors import PertokenError
from pertoken.prompts import positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPARE = 256  # dead rows kept before the cache is packed
_PREFILL = 512  # tokens of plain text fed at once


class Branch:
    """A fed token: its row, and the rows of its path as the bits of one integer."""

    __slots__ = ("parent", "row", "rows", "token")

    def __init__(self, parent: Branch | None, token: int) -> None:
        self.parent, self.token = parent, token
        self.row, self.rows = -1, 0


class Branches:
    """A model's cache as a tree of fed tokens.

    `forwards` and `fed` count forward passes and tokens fed, those of `start` left out.

    Raises PertokenError for encoder-decoder models and those with a recurrent state.
    """

    def __init__(self, model: PreTrainedModel, *, mask_trees: bool = True) -> None:
        self.model = model
        self._tree: TreeForward | None = None
        name = type(model).__name__
        if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
            raise PertokenError(
                f"byte probabilities need a decoder-only model with a key-value cache, not {name}"
            )
        if mask_trees:
            try:
                refuse_unfit(model)
                self._tree = TreeForward(model)
            except PertokenError:
                self._tree = None
        # Learned positions end there; with rotary ones the model is out of its depth.
        ends = (positions(model), rotation_switch(model))
        self._most: int | None = min((end for end in ends if end is not None), default=None)
        self.forwards = self.fed = 0
        # Without the config every layer keeps all rows, sliding ones too: their window is masked.
        self._cache = DynamicCache()
        self._seen = 0
        self._path: list[int] = []  # the path that the cache holds, where trees are not masked

    @property
    def masks_trees(self) -> bool:
        """Whether many paths go through one forward."""
        return self._tree is not None

    @torch.no_grad()
    def start(self, ids: Sequence[int]) -> tuple[Branch, torch.Tensor]:
        """Feed plain text; returns its last token's branch and the logits [vocab] behind it."""
        self._refuse_long(len(ids))
        branch: Branch | None = None
        for place in range(0, len(ids), _PREFILL):
            part = torch.tensor([list(ids[place : place + _PREFILL])], device=self.model.device)
            mask = torch.ones(1, place + part.shape[1], dtype=torch.long, device=part.device)
            logits = text_logits(self.model, part, mask, self._cache)[0, -1]
        for row, token in enumerate(ids):
            branch = Branch(branch, token)
            branch.row, branch.rows = row, (1 << (row + 1)) - 1
        assert branch is not None
        self._seen = len(ids)
        self._path = list(ids)
        return branch, logits

    @torch.no_grad()
    def feed(self, branches: Sequence[Branch]) -> torch.Tensor:
        """Logits [branches, vocab] behind each; parents come before children or are fed already."""
        if self._tree is None:
            return torch.stack([self._feed_path(branch) for branch in branches])
        seen, count = self._seen, len(branches)
        for place, branch in enumerate(branches):
            assert branch.parent is not None
            branch.row = seen + place
            branch.rows = branch.parent.rows | 1 << branch.row
        self._refuse_long(max(branch.rows.bit_count() for branch in branches))
        width = (seen + count + 7) // 8
        packed = b"".join(branch.rows.to_bytes(width, "little") for branch in branches)
        bits = np.unpackbits(
            np.frombuffer(packed, np.uint8).reshape(count, width), -1, bitorder="little"
        )
        shown = torch.from_numpy(bits[None, :, : seen + count]).to(self.model.device)
        visible = shown[..., seen:].bool()
        tokens = torch.tensor([[branch.token for branch in branches]], device=shown.device)
        depths = visible.sum(-1) - 1
        logits = self._tree.tree(tokens, depths, visible, shown[..., :seen].long(), self._cache)
        self._seen += count
        self.forwards += 1
        self.fed += count
        return logits[0]

    def keep(self, branches: Iterable[Branch]) -> None:
        """Forget every path but these, if there is enough to forget."""
        if self._tree is None:
            return
        live = list(branches)
        rows = 0
        for branch in live:
            rows |= branch.rows
        if self._seen - rows.bit_count() <= max(_SPARE, rows.bit_count()):
            return
        width = (self._seen + 7) // 8
        packed = np.frombuffer(rows.to_bytes(width, "little"), np.uint8)
        kept = np.flatnonzero(np.unpackbits(packed, bitorder="little"))
        index = torch.from_numpy(kept).to(self.model.device)
        for layer in self._cache.layers:
            own = index.to(layer.keys.device)
            layer.keys = layer.keys.index_select(2, own)
            layer.values = layer.values.index_select(2, own)
        place = {row: new for new, row in enumerate(kept.tolist())}
        moved: set[int] = set()
        for branch in live:
            chain: list[Branch] = []
            at: Branch | None = branch
            while at is not None and id(at) not in moved:
                moved.add(id(at))
                chain.append(at)
                at = at.parent
            for at in reversed(chain):
                at.row = place[at.row]
                at.rows = 1 << at.row | (at.parent.rows if at.parent is not None else 0)
        self._seen = len(kept)

    def _feed_path(self, branch: Branch) -> torch.Tensor:
        """The logits behind one path, by what differs from the path before."""
        path: list[int] = []
        at: Branch | None = branch
        while at is not None:
            path.append(at.token)
            at = at.parent
        path.reverse()
        self._refuse_long(len(path))
        same = 0
        while same < min(len(path) - 1, len(self._path)) and path[same] == self._path[same]:
            same += 1
        if same < len(self._path):
            self._cache.crop(same - len(self._path))
        part = torch.tensor([path[same:]], device=self.model.device)
        mask = torch.ones(1, len(path), dtype=torch.long, device=part.device)
        logits = text_logits(self.model, part, mask, self._cache)[0, -1]
        self._path = path
        self.forwards += 1
        self.fed += len(path) - same
        return logits

    def _refuse_long(self, count: int) -> None:
        if self._most is not None and count > self._most:
            raise PertokenError(
                f"the text is {count} tokens long, but {type(self.model).__name__} has "
                f"{self._most} positions: shorten it"
            )
