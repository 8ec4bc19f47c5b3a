"""The stream of a model over several texts, and what follows when one layer gives something else.

Works for every model whose blocks hand on one stream: a forward pass in which the blocks up to a
layer answer with given vectors is the model with that layer's output replaced.

A token is replaced alone: its answer is read at its own position, behind the true vectors of the
tokens in front. With attention that is one pass for all tokens of a text: a token reads the true
keys and values of those in front, and its own new ones. Elsewhere it takes a copy of the text for
each token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pertoken._blocks import replaced
from pertoken._takeover import Takeover, layer_windows, refuse_unfit, sdpa, visible
from pertoken.errors import PertokenError
from pertoken.probe._geometry_result import PerToken
from pertoken.probe._stream import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOGITS = 2**24  # entries held at once where a text is copied for each of its tokens
_COPIES = 16  # read at once, as far as the last of their tokens


@dataclass(frozen=True)
class Reading:
    """What the blocks read and gave: the stream in front of each block, and behind the last.

    ids: [1, time] of each document. documents: [tokens], each token's document. first: [tokens],
    whether it is its document's first. states: layers + 1 tensors [tokens, hidden].
    """

    ids: Sequence[torch.Tensor]
    documents: torch.Tensor
    first: torch.Tensor
    states: Sequence[torch.Tensor]
    as_tuple: bool
    """Whether the blocks give tuples."""

    def stream(self, layer: int) -> torch.Tensor:
        """The input of a block [tokens, hidden], in float32 at least."""
        state = self.states[layer]
        return state.to(torch.promote_types(state.dtype, torch.float32))


def read(
    model: PreTrainedModel,
    blocks: Sequence[torch.nn.Module],
    ids: Sequence[torch.Tensor],
    tell: Progress,
) -> Reading:
    """Run the model over each text.

    Raises PertokenError, with the layer's number, where a block gives NaN or infinity.
    """
    streams: list[list[torch.Tensor]] = [[] for _ in range(len(blocks) + 1)]
    as_tuple = False
    for number, one in enumerate(ids):
        tell("reading", number, len(ids))
        with _watched(blocks) as seen:
            model(input_ids=one, use_cache=False)
        for layer, output in enumerate(seen):
            as_tuple = as_tuple or isinstance(output, tuple)
            state = (output[0] if isinstance(output, tuple) else output)[0]
            if not state.isfinite().all():
                where = f"layer {layer - 1} gives" if layer else "the embeddings give"
                raise PertokenError(
                    f"{where} NaN or infinity for text {number + 1}: load the model in a wider "
                    "dtype, or mend its weights"
                )
            streams[layer].append(state)
    lengths = torch.tensor([one.shape[1] for one in ids])
    documents = torch.arange(len(ids)).repeat_interleave(lengths)
    first = documents.diff(prepend=torch.tensor([-1])) != 0
    device = ids[0].device
    states = [torch.cat(stream) for stream in streams]
    return Reading(ids, documents.to(device), first.to(device), states, as_tuple)


@contextmanager
def _watched(blocks: Sequence[torch.nn.Module]) -> Iterator[list[Any]]:
    """The input of the first block and the outputs of all, of the forward within the `with`."""
    seen: list[Any] = []

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [
        block.register_forward_hook(lambda _, args, output: seen.append(output)) for block in blocks
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class AtOnce:
    """All tokens of a text are replaced in one pass, but for the first, which stays true."""

    def __init__(
        self, model: PreTrainedModel, blocks: Sequence[torch.nn.Module], reading: Reading
    ) -> None:
        self.model, self.blocks, self.reading = model, blocks, reading
        self.number = 0

    @property
    def ids(self) -> torch.Tensor:
        """Of the text [1, time]."""
        return self.reading.ids[self.number]

    def start(self, number: int) -> torch.Tensor:
        """Turn to a text; the model's own logits [time, vocab]."""
        self.number = number
        return _logits(self.model, self.ids)[0]

    def true(self, layer: int) -> torch.Tensor:
        """What block `layer` gives for the text, [time, hidden]."""
        lengths = [one.shape[1] for one in self.reading.ids]
        return self.reading.states[layer + 1].split(lengths)[self.number]

    def replaced(self, layer: int, vectors: torch.Tensor) -> torch.Tensor:
        """Logits [time, vocab] where block `layer` gives vectors [time, hidden]."""
        value = torch.cat((self.true(layer)[:1].to(vectors), vectors[1:]))
        return self._run(layer, value[None], self.ids)[0]

    def _run(self, layer: int, value: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, time, vocab] where block `layer` gives value [batch, time, hidden]."""
        value = value.to(self.reading.states[layer + 1].dtype)

        def given(_: torch.nn.Module) -> Callable[..., Any]:
            return lambda *args, **kwargs: (value,) if self.reading.as_tuple else value

        # The blocks in front are not needed: nothing reads what they give.
        with replaced(list(self.blocks[: layer + 1]), given):
            return _logits(self.model, ids)


class AloneByCopies(AtOnce):
    """Each token alone, in a copy of its text: for every model."""

    def replaced(self, layer: int, vectors: torch.Tensor) -> torch.Tensor:
        """Logits [time, vocab]: each row where only its own vector is replaced."""
        true, time = self.true(layer), len(vectors)
        most = _LOGITS // (time * self.model.config.get_text_config().vocab_size)
        found = []
        for some in torch.arange(time, device=vectors.device).split(min(max(most, 1), _COPIES)):
            # A token's answer needs nothing of what stands behind it.
            end, row = int(some[-1]) + 1, torch.arange(len(some), device=some.device)
            value = true[:end].to(vectors).expand(len(some), -1, -1).clone()
            value[row, some] = vectors[some]
            ids = self.ids[:, :end].expand(len(some), -1)
            found.append(self._run(layer, value, ids)[row, some])
        return torch.cat(found)


class AloneByKeys(AtOnce):
    """Each token alone, in one pass: for models whose attention can be answered from outside."""

    def __init__(
        self, model: PreTrainedModel, blocks: Sequence[torch.nn.Module], reading: Reading
    ) -> None:
        super().__init__(model, blocks, reading)
        self.takeover, self.windows = Takeover(model), layer_windows(model)
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def start(self, number: int) -> torch.Tensor:
        """Turn to a text, and keep its keys and values."""
        self.number, self.kept = number, []
        layers = iter(range(len(self.blocks)))

        def attend(module: Any, query: Any, key: Any, value: Any, *_: Any, **kwargs: Any) -> Any:
            self.kept.append((key, value))
            return sdpa(module, query, key, value, self._before(next(layers), 0), **kwargs)

        with self.takeover(attend):
            return _logits(self.model, self.ids)[0]

    def replaced(self, layer: int, vectors: torch.Tensor) -> torch.Tensor:
        """Logits [time, vocab]: each row where only its own vector is replaced."""
        layers = iter(range(layer + 1, len(self.blocks)))

        def attend(module: Any, query: Any, key: Any, value: Any, *_: Any, **kwargs: Any) -> Any:
            at = next(layers)
            before = self._before(at, 1)
            own = torch.eye(key.shape[2], dtype=torch.bool, device=key.device)
            keys, values = (
                torch.cat(pair, 2) for pair in zip(self.kept[at], (key, value), strict=True)
            )
            return sdpa(module, query, keys, values, torch.cat((before, own), -1), **kwargs)

        with self.takeover(attend):
            return self._run(layer, vectors[None], self.ids)[0]

    def _before(self, layer: int, least: int) -> torch.Tensor:
        """Which tokens at least so far in front each token sees: bool [time, time]."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        return visible(places, places, self.windows[layer]).tril(-least)


def replacing(
    model: PreTrainedModel, blocks: Sequence[torch.nn.Module], reading: Reading, alone: bool
) -> AtOnce:
    """How this model's layers are replaced."""
    if not alone:
        return AtOnce(model, blocks, reading)
    try:
        refuse_unfit(model, "attention")
    except PertokenError:
        return AloneByCopies(model, blocks, reading)
    return AloneByKeys(model, blocks, reading)


def effects(
    how: AtOnce, mapped: Mapping[tuple[str, int], torch.Tensor], tell: Progress
) -> list[PerToken]:
    """The size of the residual and the change of the output, by token, for each map in turn.

    mapped: T(x) [tokens, hidden] of a class at a layer. First tokens are left out.
    The model reads each text anew for each map, so that its logits are held for one text at once.
    """
    reading = how.reading
    changes: dict[tuple[str, int], list[torch.Tensor]] = {key: [] for key in mapped}
    lengths = [one.shape[1] for one in reading.ids]
    pieces = {key: vectors.split(lengths) for key, vectors in mapped.items()}
    for number in range(len(lengths) if mapped else 0):
        true = how.start(number)
        known = true, true.softmax(-1), true.logsumexp(-1)
        for done, key in enumerate(mapped):
            tell(f"replacing, text {number + 1} of {len(lengths)}", done, len(mapped))
            changes[key].append(_change(*known, how.replaced(key[1], pieces[key][number])))
    found = []
    for (name, layer), vectors in mapped.items():
        y = reading.stream(layer + 1)
        error = (y - vectors).norm(dim=-1)
        columns = torch.stack((error, error / y.norm(dim=-1), *torch.cat(changes[name, layer], -1)))
        counted = columns[:, ~reading.first].double().cpu().numpy()
        documents = reading.documents[~reading.first].cpu().numpy()
        found.append(PerToken(layer, name, documents, *counted))
    return found


def refuse_other_paths(how: AtOnce) -> None:
    """Raise PertokenError where a layer's own output in its place changes the model's answer."""
    # All at once, which adds up in the model's own order: other ways differ by their rounding.
    plain = AtOnce(how.model, how.blocks, how.reading)
    true, layer = plain.start(0), (len(how.blocks) - 1) // 2
    again = plain.replaced(layer, plain.true(layer))
    if float((true - again).abs().max()) > 1e-3 * float(true.abs().max()):
        raise PertokenError(
            f"the later blocks of {type(how.model).__name__} read more than the stream, so a "
            "layer's output cannot be replaced: use tested=[]"
        )


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """[batch, time, vocab], in float32 at least."""
    logits = model(input_ids=ids, use_cache=False).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _change(
    true: torch.Tensor, chances: torch.Tensor, total: torch.Tensor, other: torch.Tensor
) -> torch.Tensor:
    """KL(true || other) in nats and the mean absolute change of a logit, [2, time].

    true, other: logits [time, vocab]; chances, total: softmax and logsumexp of the true ones.
    """
    apart = true - other
    kl = (chances * apart).sum(-1) + other.logsumexp(-1) - total
    return torch.stack((kl.clamp(min=0), apart.abs().mean(-1)))
