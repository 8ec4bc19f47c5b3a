"""TRL's trainers on a tiny model, with mixins of ours in front."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pertoken.testing import tiny_model

WORDS = [chr(ord("a") + i) for i in range(20)]
ROWS = [
    {"prompt": "a b c ", "completion": "d e f g"},
    {"prompt": "h i ", "completion": "j"},
    {"prompt": "k ", "completion": "l m n"},
    {"prompt": "o p q r ", "completion": "s s"},
]
LEARNED = (5, 2, 4, 3)  # tokens of each answer, its end among them
PAIRS = [
    {"prompt": "a b ", "chosen": "c d", "rejected": "e f g"},
    {"prompt": "h ", "chosen": "i j k", "rejected": "l"},
]


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", "<unk>", *WORDS]
    inner = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def model(seed: int = 0) -> Any:
    found = tiny_model("llama", vocab_size=3 + len(WORDS), dtype=torch.float32, seed=seed)
    found.generation_config.eos_token_id = 1
    return found


def trainer(folder: Path, mixins: tuple[type, ...] = (), rows: Any = None, **more: Any) -> Any:
    """A `SFTTrainer` with mixins; options of `SFTConfig` as keywords, others are the mixins'."""
    from trl import SFTConfig, SFTTrainer

    return _made(folder, mixins, SFTTrainer, SFTConfig, ROWS if rows is None else rows, more)


def preference(folder: Path, mixins: tuple[type, ...] = (), rows: Any = None, **more: Any) -> Any:
    """A `DPOTrainer` with mixins."""
    from trl import DPOConfig, DPOTrainer

    more = {"ref_model": model(seed=1), **more}
    return _made(folder, mixins, DPOTrainer, DPOConfig, PAIRS if rows is None else rows, more)


def _made(
    folder: Path, mixins: tuple[type, ...], base: Any, config: Any, rows: Any, more: dict[str, Any]
) -> Any:
    from dataclasses import fields

    from datasets import Dataset

    options: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 7,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
    }
    known = {field.name for field in fields(config)}
    options |= {name: more.pop(name) for name in list(more) if name in known}
    given = {"model": model(), "processing_class": tokenizer(), **more}
    made: Any = type("Trainer", (*mixins, base), {})
    return made(
        args=config(output_dir=str(folder), **options),
        train_dataset=rows if not isinstance(rows, list) else Dataset.from_list(rows),
        **given,
    )


def losses(made: Any) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def run(made: Any, **options: Any) -> list[float]:
    """The losses of a training."""
    made.train(**options)
    return losses(made)


def same_weights(one: Any, other: Any) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def one_batch(made: Any) -> dict[str, torch.Tensor]:
    return next(iter(made.get_train_dataloader()))
