"""Tiny random encoders in float64, for what explains encoders."""

from __future__ import annotations

import pytest
import torch
import transformers

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 70,
    "num_labels": 3,
    "pad_token_id": 0,
}


def _tiny_encoder(kind: str, head: str = "", **config):
    """kind: "Bert", "Roberta", …; head: "", "ForSequenceClassification", …"""
    settings = getattr(transformers, f"{kind}Config")(**{**SIZES, **config})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}{head or 'Model'}")(settings).double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0.0, 0.3)
                elif name.endswith("bias"):
                    parameter.normal_(0.0, 0.2)
                else:
                    parameter.normal_(1.0, 0.2)
    return model


@pytest.fixture(scope="session")
def tiny_encoder():
    return _tiny_encoder
