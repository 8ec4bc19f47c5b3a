"""What a law runs: any `generate` set-up, on prompts, down to lists of new token ids."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList

from pertoken.errors import PertokenError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Setup = Callable[..., Any] | Mapping[str, Any] | None
"""A way of decoding: `None` is transformers' own plain `generate`; a mapping holds keyword
arguments of `generate` (`{"prompt_lookup_num_tokens": 10}`, `{"assistant_model": small}`);
anything callable, such as a drafter or your own function, goes in as `custom_generate=`."""


def setup_options(setup: Setup) -> dict[str, Any]:
    """The keyword arguments of `generate` that a set-up stands for.

    >>> setup_options({"prompt_lookup_num_tokens": 10})
    {'prompt_lookup_num_tokens': 10}
    """
    if setup is None:
        return {}
    return dict(setup) if isinstance(setup, Mapping) else {"custom_generate": setup}


def decode(
    model: PreTrainedModel,
    setup: Setup,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    **options: Any,
) -> list[list[int]]:
    """New token ids of each row of `input_ids` [batch, time], cut after the row's stop id.

    Greedy unless `options` (further arguments of `generate`) say otherwise.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise PertokenError(
            f"{type(model).__name__} is an encoder-decoder; the laws are for decoder-only models"
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    arguments = {"do_sample": False, **options, **setup_options(setup)}
    output = model.generate(
        input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, **arguments
    )
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    time = input_ids.shape[1]
    if sequences.shape[1] < time or not torch.equal(sequences[:, :time], input_ids):
        raise PertokenError(
            "a way of decoding must return the prompt and the new tokens behind it, "
            f"[batch, time]; got {list(sequences.shape)} for a prompt of {list(input_ids.shape)}"
        )
    stops = stop_ids(model, arguments)
    return [cut_after_stop(row, stops) for row in sequences[:, time:].tolist()]


def drafted_tokens(setup: Setup) -> int | None:
    """Tokens a set-up drafted in its last call, where it counts them (`stats.drafted`)."""
    drafted = getattr(getattr(setup, "stats", None), "drafted", None)
    return sum(drafted.values()) if isinstance(drafted, Mapping) else None


def stop_ids(model: PreTrainedModel, options: Mapping[str, Any] | None = None) -> frozenset[int]:
    """The stop ids of a call: `eos_token_id` among the options, else the model's own."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = (options or {}).get("eos_token_id", own)
    if ids is None:
        return frozenset()
    return frozenset(ids) if isinstance(ids, Iterable) else frozenset([int(ids)])


def cut_after_stop(tokens: Sequence[int], stops: frozenset[int]) -> list[int]:
    """Tokens up to and including the first stop id.

    >>> cut_after_stop([5, 2, 0, 0], frozenset([2]))
    [5, 2]
    """
    for index, token in enumerate(tokens):
        if token in stops:
            return list(tokens[: index + 1])
    return list(tokens)


def processors(
    model: PreTrainedModel, input_ids: torch.Tensor, *, max_new_tokens: int, **options: Any
) -> LogitsProcessorList:
    """The logits processors `generate` would build for these options (penalties, warpers, user's).

    Taken from `generate` itself, so defaults that surprise (top-k is 50 when sampling) are in.
    """
    caught: list[LogitsProcessorList] = []

    def catch(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        caught.append(arguments["logits_processor"])
        return input_ids

    kept = {name: value for name, value in options.items() if name not in _NOT_FOR_PROCESSORS}
    model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        custom_generate=catch,
        **{"do_sample": False, **kept},
    )
    return caught[0]


_NOT_FOR_PROCESSORS = frozenset(
    {
        "custom_generate",
        "assistant_model",
        "assistant_tokenizer",
        "prompt_lookup_num_tokens",
        "return_dict_in_generate",
        "stop_strings",
        "stopping_criteria",
        "streamer",
        "tokenizer",
    }
)


def as_prompts(model: PreTrainedModel, prompts: Any = None) -> list[torch.Tensor]:
    """Prompts as a list of [time] id tensors on the model's device; four random ones for `None`."""
    if prompts is None:
        prompts = random_prompts(model.config.get_text_config().vocab_size)
    rows = [torch.as_tensor(prompt, dtype=torch.long).reshape(-1) for prompt in prompts]
    return [row.to(model.device) for row in rows]


def random_prompts(
    vocab_size: int, lengths: Sequence[int] = (3, 9, 17, 30), seed: int = 0
) -> list[torch.Tensor]:
    """Random id rows [length] without id 0; every second one repeats itself, to please copiers."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, vocab_size, (n,), generator=generator) for n in lengths]
    return [
        row if index % 2 == 0 else row[: max(2, len(row) // 3)].repeat(3)[: len(row)]
        for index, row in enumerate(rows)
    ]


def left_pad(rows: Sequence[torch.Tensor], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of unequal length as ids and attention mask [batch, time], pads on the left.

    >>> left_pad([torch.tensor([7, 8]), torch.tensor([9])], pad=0)[0].tolist()
    [[7, 8], [0, 9]]
    """
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(r, (width - len(r), 0), value=pad) for r in rows])
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    places = torch.arange(width, device=ids.device)
    return ids, (places >= width - lengths[:, None]).long()


def pad_id(model: PreTrainedModel) -> int:
    """The pad id of a model, or 0 where it names none."""
    pad = getattr(model.generation_config, "pad_token_id", None)
    return int(pad) if pad is not None else 0


def forward_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Names that the model's forward really takes (a misspelt one would be swallowed)."""
    return frozenset(inspect.signature(model.forward).parameters)
