"""A model whose next-token distribution is a table you wrote, and a tokenizer of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import BatchEncoding, LlamaConfig, LlamaForCausalLM

from pertoken.errors import PertokenError


class MockModel(LlamaForCausalLM):
    """A causal model with P(next | text) = table[last token]: a Markov chain you can write down.

    table: [vocab, vocab], rows are probabilities and sum to 1; a zero is never drawn.
    It is a one-layer Llama whose layer adds nothing and whose embedding is one-hot, so `generate`,
    caches, masks and every decoder meet the interface they know, and the answer is exact to 1e-6.
    What it cannot show is a wrong mask or position (no token sees another): use `tiny_model`.

    >>> model = MockModel([[0.0, 1.0], [0.5, 0.5]])
    >>> model(torch.tensor([[1, 0]])).logits[0, -1].argmax().item()
    1
    """

    def __init__(self, table: Sequence[Sequence[float]] | torch.Tensor) -> None:
        probabilities = torch.as_tensor(table, dtype=torch.float32)
        size = probabilities.shape[0]
        if probabilities.shape != (size, size) or (probabilities < 0).any():
            raise PertokenError("a MockModel's table is [vocab, vocab] without negative numbers")
        if not torch.allclose(probabilities.sum(-1), torch.ones(size), atol=1e-4):
            raise PertokenError("every row of a MockModel's table must sum to 1")
        super().__init__(
            LlamaConfig(
                vocab_size=size,
                hidden_size=size,
                intermediate_size=2,
                num_hidden_layers=1,
                num_attention_heads=1,
                head_dim=4,
                rms_norm_eps=1e-12,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=0,
            )
        )
        with torch.no_grad():
            self.model.embed_tokens.weight.copy_(torch.eye(size))
            self.model.layers[0].self_attn.o_proj.weight.zero_()
            self.model.layers[0].mlp.down_proj.weight.zero_()
            # The final norm turns a one-hot vector into sqrt(vocab) times itself.
            self.lm_head.weight.copy_(probabilities.clamp(min=1e-40).log().T / size**0.5)
        self.generation_config.eos_token_id = None
        self.generation_config.pad_token_id = 0
        self.eval()


class ByteTokenizer:
    """One token per UTF-8 byte, with the few methods `generate` and its helpers ask for.

    Ids: 0 pad, 1 end of text, 2 + byte for the 256 bytes; `vocab_size` is 258. Pads on the left.
    Works with `TextStreamer`, `stop_strings=` and `StopStringCriteria`. No chat template.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.decode(tokenizer.encode("çay"))
    'çay'
    >>> tokenizer(["ab", "a"], padding=True)["input_ids"]
    [[99, 100], [0, 99]]
    """

    vocab_size = 258
    pad_token, eos_token, bos_token = "<pad>", "</s>", None
    pad_token_id, eos_token_id, bos_token_id = 0, 1, None
    all_special_ids = (0, 1)
    padding_side = "left"
    chat_template = None
    model_max_length = int(1e30)

    def __init__(self) -> None:
        names = [self.pad_token, self.eos_token, *(f"<0x{byte:02X}>" for byte in range(256))]
        self._ids = {name: index for index, name in enumerate(names)}
        self._names = names
        # StopStringCriteria and llguidance read here that "<0xNN>" tokens are bytes.
        self.backend_tokenizer = Tokenizer(models.BPE(self._ids, [], byte_fallback=True))
        self.backend_tokenizer.decoder = decoders.ByteFallback()
        self.backend_tokenizer.add_special_tokens([self.pad_token, self.eos_token])

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [2 + byte for byte in text.encode("utf-8")]

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        ids = token_ids.tolist() if isinstance(token_ids, torch.Tensor) else token_ids
        ids = [ids] if isinstance(ids, int) else ids
        kept = [self._names[i] for i in ids if not (skip_special_tokens and i < 2)]
        return self.convert_tokens_to_string(kept)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in sequences]

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool = False,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
    ) -> BatchEncoding:
        """Encode one text or several; keys `input_ids` and `attention_mask`, [batch, time]."""
        single = isinstance(text, str)
        texts = [text] if isinstance(text, str) else text
        rows = [self.encode(one) for one in texts]
        width = max((len(row) for row in rows), default=0)
        pads = [width - len(row) if padding else 0 for row in rows]
        ids: Any = [[self.pad_token_id] * n + row for n, row in zip(pads, rows, strict=True)]
        mask: Any = [[0] * n + [1] * len(row) for n, row in zip(pads, rows, strict=True)]
        if return_tensors == "pt":
            ids, mask = torch.tensor(ids), torch.tensor(mask)
        elif single:
            ids, mask = ids[0], mask[0]
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        return self._ids.get(tokens) if isinstance(tokens, str) else [self._ids[t] for t in tokens]

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        return self._names[ids] if isinstance(ids, int) else [self._names[int(i)] for i in ids]

    def _convert_id_to_token(self, index: int) -> str:
        return self._names[index]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        parts = (bytes([self._ids[t] - 2]) if self._ids[t] > 1 else t.encode() for t in tokens)
        return b"".join(parts).decode("utf-8", errors="replace")
