"""Tiny transformers that learn to add, each with its own way to cut numbers into tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from pertoken.probe._addition import Lengths, Problem, draw
from pertoken.tokenize.numbers import Direction, NumberDirection

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

GROUP = 2  # digits of a token, at most
LAYERS, HIDDEN, HEADS = 2, 64, 4
PERIODS = (2, 5, 10, 20, 50, 100)  # of the waves in a number's first embedding
WAVE_SCALE = 0.04  # of each of them; that of the rest is 0.02
BATCH, RATE, WARM_UP, DECAY, CLIP = 256, 3e-3, 100, 0.01, 1.0
_PAD, _END = "<pad>", "<end>"


def number_tokenizer(direction: Direction) -> PreTrainedTokenizerFast:
    """All numbers of 1 to `GROUP` digits as tokens, `+` and `=`; numbers cut by the direction."""
    from tokenizers import Regex, Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    numbers = [f"{n:0{width}}" for width in range(1, GROUP + 1) for n in range(10**width)]
    names = [_PAD, _END, "+", "=", *numbers]
    vocab = {name: place for place, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    # Groups come from NumberDirection; alone, a number is cut from the left.
    backend.pre_tokenizer = Split(Regex(f"[0-9]{{1,{GROUP}}}|[+=]"), "isolated")
    backend.decoder = decoders.Fuse()
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=_PAD, eos_token=_END)
    return NumberDirection(direction, group=GROUP)(plain)


def codes(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Addends [count, 2] as one number each."""
    return np.asarray(pairs[:, 0] * 10**9 + pairs[:, 1])


def training_problems(
    lengths: Sequence[Lengths], count: int, held_out: Sequence[Problem], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Addends [count, 2], about as many of each length, none of them held out."""
    each = 1 + count // len(lengths)
    drawn = np.concatenate([draw(one, each, rng) for one in lengths])
    tested = np.array([(one.first, one.second) for one in held_out], dtype=np.int64)
    drawn = drawn[~np.isin(codes(drawn), codes(tested.reshape(-1, 2)))]
    # Those that were left out are made up for by others drawn twice.
    return np.asarray(rng.permutation(np.resize(rng.permutation(drawn), (count, 2))))


def encode(
    tokenizer: PreTrainedTokenizerFast, pairs: NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels [batch, time] of `a+b=c` and an end; labels are of what follows the `=`."""
    backend = tokenizer.backend_tokenizer
    questions = backend.encode_batch([f"{a}+{b}=" for a, b in pairs.tolist()])
    answers = backend.encode_batch([str(a + b) for a, b in pairs.tolist()])
    end = tokenizer.eos_token_id
    rows = [
        (question.ids, [*answer.ids, end])
        for question, answer in zip(questions, answers, strict=True)
    ]
    width = max(len(front) + len(back) for front, back in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for place, (front, back) in enumerate(rows):
        ids[place, : len(front) + len(back)] = torch.tensor(front + back)
        labels[place, len(front) : len(front) + len(back)] = torch.tensor(back)
    return ids, labels


def train(
    tokenizer: PreTrainedTokenizerFast,
    lengths: Sequence[Lengths],
    held_out: Sequence[Problem],
    steps: int,
    seed: int,
) -> LlamaForCausalLM:
    """A model trained from scratch, in eval mode; the same problems for every tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=HIDDEN,
                intermediate_size=2 * HIDDEN,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                max_position_embeddings=64,
                tie_word_embeddings=True,
                bos_token_id=None,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        _tell_values(model, tokenizer)
    rng = np.random.default_rng([seed, 2])
    problems = training_problems(lengths, steps * BATCH, held_out, rng)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=DECAY
    )
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * _schedule(step, steps)
        ids, labels = encode(tokenizer, problems[step * BATCH : (step + 1) * BATCH])
        asked = labels[:, 1:] != -100
        # Logits of the answers alone: the rest is not learned.
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][asked]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), labels[:, 1:][asked])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    model.eval()
    trained: LlamaForCausalLM = model
    return trained


@torch.no_grad()
def _tell_values(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Add to each number's embedding its value: waves of some periods, its size, its width.

    Models that have read much text have such embeddings of numbers; here it would take most of the
    training to make them. They are alike in every direction.
    """
    numbers = [name for name in tokenizer.get_vocab() if name.isdigit()]
    values = torch.tensor([float(name) for name in numbers])[:, None]
    angles = 2 * math.pi * values / torch.tensor(PERIODS)
    width = torch.tensor([len(name) for name in numbers])[:, None] == torch.arange(1, GROUP + 1)
    features = torch.cat([angles.cos(), angles.sin(), values / 50 - 1, width], -1)
    told = features @ (WAVE_SCALE * torch.randn(features.shape[1], HIDDEN))
    embeddings: Any = model.get_input_embeddings()
    embeddings.weight[tokenizer.convert_tokens_to_ids(numbers)] += told


def _schedule(step: int, steps: int) -> float:
    """Share of the learning rate: a linear rise, a cosine down to 0.

    >>> round(_schedule(0, 1000), 3), round(_schedule(999, 1000), 3)
    (0.01, 0.0)
    """
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
