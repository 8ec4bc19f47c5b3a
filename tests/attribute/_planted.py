"""A model whose answer hangs on one token, for tests: everybody who looks must find it."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from pertoken.testing import ByteTokenizer

KEY, ANSWER = ord("K") + 2, ord("A") + 2
TOKENIZER = ByteTokenizer()


def planted_model() -> GPT2LMHeadModel:
    """Writes A where there is a K before, wherever it stands, and else any letter.

    A one-layer GPT-2 in float64 without positions: embeddings are nearly one-hot, attention looks
    at K much more than at anything else, and what it copies from K raises the logit of A.
    """
    vocab, hidden = 258, 264
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab,
            n_positions=128,
            n_embd=hidden,
            n_layer=1,
            n_head=1,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).to(torch.float64)
    block = model.transformer.h[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (block.ln_1, block.ln_2, model.transformer.ln_f):
            norm.weight.fill_(1.0)
        model.transformer.wte.weight[:, :vocab] = torch.eye(vocab)
        # What all tokens share: without it a norm would hide what makes a token this one.
        model.transformer.wte.weight[:, vocab + 2 :] = torch.tensor([1.0, -1.0, 1.0, -1.0])
        # Columns of the fused projection: query, key, value.
        block.attn.c_attn.bias[0] = 1.0  # every query asks along one direction
        block.attn.c_attn.weight[KEY, hidden] = 6.0  # in which the key of K is large
        block.attn.c_attn.weight[KEY, 2 * hidden] = 0.5  # the value of K
        block.attn.c_proj.weight[0, vocab] = 1.0  # is written into a free dimension
        model.lm_head.weight[ANSWER, vocab] = 0.6  # that A reads
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()
