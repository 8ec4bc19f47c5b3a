"""Texts of many lengths in batches with little padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["batches", "right_padded"]

_PADDED = 1.25  # places of a batch for each real token, at most


def batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Texts of like length together, from the shortest to the longest; which are in each batch.

    A batch has at most `most` places, or one text, and no more than a fifth are padding.

    >>> batches([7, 2, 8, 2, 9], 16)
    [[1, 3], [0, 2], [4]]
    """
    found: list[list[int]] = []
    real = 0  # tokens of the last batch
    for text in sorted(range(len(lengths)), key=lengths.__getitem__):
        width = lengths[text]
        places = (len(found[-1]) + 1) * width if found else 0
        if found and places <= min(most, _PADDED * (real + width)):
            found[-1].append(text)
            real += width
        else:
            found.append([text])
            real = width
    return found


def right_padded(
    texts: Sequence[torch.Tensor], pad: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids [time] of texts as one tensor [batch, width], and which are real; None where all are.

    On the right, since the positions of an encoder count from the left.

    >>> ids, real = right_padded([torch.tensor([5, 6]), torch.tensor([7])])
    >>> ids.tolist(), real.tolist()
    ([[5, 6], [7, 0]], [[True, True], [True, False]])
    """
    ids = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(text) for text in texts], device=ids.device)
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return ids, None if bool(real.all()) else real
