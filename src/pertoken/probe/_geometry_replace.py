"""The stream of a model over several texts, and what follows when one layer gives something else.

Works for every model whose blocks hand on one stream: a forward pass in which the blocks up to a
layer answer with given vectors is the model with that layer's output replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pertoken._blocks import replaced
from pertoken.errors import PertokenError
from pertoken.probe._geometry_result import PerToken
from pertoken.probe._stream import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def effects(
    model: PreTrainedModel,
    blocks: Sequence[torch.nn.Module],
    reading: Reading,
    mapped: Mapping[tuple[str, int], torch.Tensor],
    with_first: bool,
    tell: Progress,
) -> list[PerToken]:
    """The size of the residual and the change of the output, by token, for each map in turn.

    mapped: T(x) [tokens, hidden] of a class at a layer. with_first: whether first tokens count.
    The model reads each text anew for each map, so that its logits are held for one text at once.
    """
    changes: dict[tuple[str, int], list[torch.Tensor]] = {key: [] for key in mapped}
    lengths = [one.shape[1] for one in reading.ids]
    pieces = {key: vectors.split(lengths) for key, vectors in mapped.items()}
    for number, one in enumerate(reading.ids if mapped else []):
        true = _logits(model, one)
        for done, key in enumerate(mapped):
            tell(f"replacing, text {number + 1} of {len(lengths)}", done, len(mapped))
            other = _with_output(model, blocks, reading, one, key[1], pieces[key][number])
            changes[key].append(_change(true, other))
    counted = reading.first.new_ones(()) if with_first else ~reading.first
    keep = counted.expand_as(reading.first)
    found = []
    for (name, layer), vectors in mapped.items():
        y = reading.stream(layer + 1)
        error = (y - vectors).norm(dim=-1)
        columns = torch.stack((error, error / y.norm(dim=-1), *torch.cat(changes[name, layer], -1)))
        documents = reading.documents[keep].cpu().numpy()
        found.append(PerToken(layer, name, documents, *columns[:, keep].double().cpu().numpy()))
    return found


def refuse_other_paths(
    model: PreTrainedModel, blocks: Sequence[torch.nn.Module], reading: Reading
) -> None:
    """Raise PertokenError where a layer's own output in its place changes the model's answer."""
    one, layer = reading.ids[0], (len(blocks) - 1) // 2
    true = _logits(model, one)
    again = _with_output(
        model, blocks, reading, one, layer, reading.stream(layer + 1)[: one.shape[1]]
    )
    if float((true - again).abs().max()) > 1e-3 * float(true.abs().max()):
        raise PertokenError(
            f"the later blocks of {type(model).__name__} read more than the stream, so a layer's "
            "output cannot be replaced: use tested=[]"
        )


def _with_output(
    model: PreTrainedModel,
    blocks: Sequence[torch.nn.Module],
    reading: Reading,
    ids: torch.Tensor,
    layer: int,
    vectors: torch.Tensor,
) -> torch.Tensor:
    """Logits [time, vocab] where block `layer` gives vectors [time, hidden]."""
    value = vectors[None].to(reading.states[layer + 1].dtype)

    def given(_: torch.nn.Module) -> Callable[..., Any]:
        return lambda *args, **kwargs: (value,) if reading.as_tuple else value

    # The blocks in front are not needed: nothing reads what they give.
    with replaced(list(blocks[: layer + 1]), given):
        return _logits(model, ids)


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _change(true: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(true || other) in nats and the mean absolute change of a logit, [2, time]."""
    apart = true - other
    expected = (true.softmax(-1) * apart).sum(-1)
    kl = expected + other.logsumexp(-1) - true.logsumexp(-1)
    return torch.stack((kl.clamp(min=0), apart.abs().mean(-1)))
