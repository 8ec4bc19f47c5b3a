"""The matrices of a model that have a row for each token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pertoken.errors import PertokenError
from pertoken.loading import is_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["input_table"]


def input_table(model: PreTrainedModel) -> torch.Tensor:
    """The input embedding's weights, of a model that this can be done with."""
    name = type(model).__name__
    if is_encoder(model.config) or getattr(model.config, "is_encoder_decoder", False):
        raise PertokenError(f"{name} is not a decoder: a model that writes text is needed")
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(inputs, torch.nn.Embedding) or not isinstance(outputs, torch.nn.Linear):
        raise PertokenError(f"{name} has no embedding and output matrix by token: can't transplant")
    if not inputs.weight.is_floating_point() or not outputs.weight.is_floating_point():
        raise PertokenError(f"{name} has quantised embeddings: load it in full precision")
    if len(outputs.weight) != len(inputs.weight):
        raise PertokenError(
            f"{name} has {len(inputs.weight)} rows of input embeddings and {len(outputs.weight)} "
            "of output: can't transplant"
        )
    others = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding)
        and module is not inputs
        and module.num_embeddings == inputs.num_embeddings
    ]
    if others:
        raise PertokenError(f"{name} has a second table by token ({others[0]}): can't transplant")
    return inputs.weight
