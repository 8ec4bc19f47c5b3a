"""A model and its new tokenizer as a folder that plain transformers loads, and proof that it does.

A folder is there whole and checked, or not at all.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pertoken.errors import PertokenError
from pertoken.tokenize._specials import ID_SETTINGS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_target_folder", "check_transplant", "save_transplant"]

PROMPT = "The capital of France is Paris.\nÇok güzel! 東京 🙂 x = 12345"
_NEW_TOKENS = 8


def check_target_folder(out: Path) -> None:
    """Refuse, before any work, a folder that could not be written or would replace something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PertokenError(f"{out} is there already: choose another folder")
    if not out.absolute().parent.is_dir():
        raise PertokenError(f"can't write {out}: there is no folder {out.absolute().parent}")
    try:
        with tempfile.TemporaryFile(dir=out.absolute().parent):
            pass
    except OSError as error:
        raise PertokenError(f"can't write {out}: {error.strerror or error}") from None


def save_transplant(
    model: PreTrainedModel,
    tokenizer: Any,
    out: str | Path,
    *,
    source: PreTrainedModel | None = None,
) -> list[str]:
    """Write a folder that `from_pretrained` reads, checked by `check_transplant`; what was checked.

    source: the model that it was made from.
    It is written beside `out` and moved there when every check has passed, so that whatever stops
    it leaves no half model. Raises PertokenError where `out` is not new or empty, or a check fails.
    """
    out = Path(out)
    check_target_folder(out)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.absolute().parent))
    try:
        _save(model, tokenizer, work)
        checked = check_transplant(model, tokenizer, folder=work, source=source)
        work.chmod(0o755)  # mkdtemp's own is for its owner alone
        os.replace(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return checked


def check_transplant(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    folder: str | Path | None = None,
    source: PreTrainedModel | None = None,
) -> list[str]:
    """Assert that a model and its tokenizer work together; what was checked, a line each.

    folder: where both were saved; None saves them to a temporary one. source: the model that it was
    made from; None compares with the model itself. Loaded again from there by plain transformers:
    rows of the embeddings cover every token, input and output are tied and generation is set as
    in the source, special ids are the tokenizer's in every configuration, text encodes to the same
    ids and decodes to the same text, the chat template is the same and each special token in it is
    one token, weights are equal to the bit and logits but for rounding, and greedy text is the same
    and encodes and decodes again. The model is in evaluation mode for that long.
    Raises PertokenError that names what fails first.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            _save(model, tokenizer, Path(made))
            return check_transplant(model, tokenizer, folder=made, source=source)
    _check_rows(model, tokenizer)
    again, read = _load(Path(folder), model)
    checked = ["reloads by plain transformers"]
    rows = again.get_input_embeddings().weight.shape[0]
    _check_rows(again, read)
    checked.append(f"{rows} rows for {len(read)} tokens")
    before = model if source is None else source
    _equal("whether input and output are tied", _tied(again), _tied(before))
    checked.append("input and output are tied" if _tied(again) else "input and output are apart")
    _equal("generation settings", _generation(again), _generation(before))
    checked.append("generation settings are the same but for token ids")
    _check_ids(again, read)
    checked.append("special ids are the tokenizer's in config and generation config")
    ids = tokenizer(PROMPT)["input_ids"]
    _equal("the ids of a text", read(PROMPT)["input_ids"], ids)
    _equal(
        "the text of ids",
        read.decode(ids, skip_special_tokens=True),
        tokenizer.decode(ids, skip_special_tokens=True),
    )
    checked.append("text encodes and decodes as before saving")
    prompt = _chat(tokenizer, read, checked)
    _check_weights(model, again)
    with _evaluating(model):
        exact = _same_logits(model, again, ids)
        rounding = "" if exact else ", but for rounding"
        checked.append(f"logits are equal after reloading{rounding}; weights are to the bit")
        ids = prompt if prompt is not None else ids
        checked.append(_greedy(model if exact else again, again, read, ids))
    return checked


def _save(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
    from pertoken.loading import _quiet

    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _load(folder: Path, model: PreTrainedModel) -> tuple[Any, Any]:
    """Model and tokenizer by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pertoken.loading import _quiet

    with _quiet():
        again = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return again.to(model.device).eval(), tokenizer


def _check_rows(model: PreTrainedModel, tokenizer: Any) -> None:
    """Every token has its row, and the configuration says how many there are."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise PertokenError(
            f"check failed: the tokenizer has tokens up to {highest}, and the model's embedding "
            f"has {rows} rows"
        )
    _equal("rows of the output matrix", model.get_output_embeddings().weight.shape[0], rows)
    _equal("vocab_size", model.config.get_text_config().vocab_size, rows)


def _tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _generation(model: PreTrainedModel) -> dict[str, Any]:
    """What a generation config sets, but for ids of tokens."""
    settings = model.generation_config.to_diff_dict()
    others = {*ID_SETTINGS, "transformers_version", "_from_model_config"}
    return {name: value for name, value in settings.items() if name not in others}


def _check_ids(model: PreTrainedModel, tokenizer: Any) -> None:
    config, generation = model.config.get_text_config(), model.generation_config
    for role in ("bos", "eos", "pad"):
        name = f"{role}_token_id"
        wanted = getattr(tokenizer, name)
        _equal(f"config.{name}", getattr(config, name), wanted)
        said = getattr(generation, name)
        if wanted is not None and wanted not in (said if isinstance(said, list) else [said]):
            raise PertokenError(f"check failed: generation_config.{name} is {said}, not {wanted}")


def _chat(tokenizer: Any, read: Any, checked: list[str]) -> list[int] | None:
    """Ids of a chat, where there is a template."""
    from pertoken.tokenize._token_bytes import special_tokens

    _equal("the chat template", read.chat_template, tokenizer.chat_template)
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    try:
        text = read.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template may raise whatever it likes
        raise PertokenError(f"check failed: the chat template does not render: {error}") from None
    ids: list[int] = read(text, add_special_tokens=False)["input_ids"]
    named = [(content, token) for content, token in special_tokens(read).items() if content in text]
    for content, token in named:
        if token not in ids and not any(content in other for other, _ in named if other != content):
            raise PertokenError(
                f"check failed: the chat template writes {content}, which is not one token"
            )
    checked.append(f"chat template renders, with {len(named)} special tokens of one id each")
    return ids


def _check_weights(model: PreTrainedModel, again: PreTrainedModel) -> None:
    """What was saved is what was read, number by number."""
    wanted, found = model.state_dict(), again.state_dict()
    _equal("the names of the weights", sorted(found), sorted(wanted))
    for name, values in wanted.items():
        if not torch.equal(found[name].to(values.dtype), values):
            raise PertokenError(f"check failed: the reloaded model's {name} differs")


def _same_logits(model: PreTrainedModel, again: PreTrainedModel, ids: list[int]) -> bool:
    """Whether logits are equal to the bit; PertokenError where rounding does not explain it.

    A model that was cast (`model.to(dtype)`) has rounded its buffers too, which are not saved.
    """
    row = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        said, after = (each(input_ids=row).logits for each in (model, again))
    if torch.equal(said, after):
        return True
    gap = (said.double() - after.double()).abs().max()
    if not bool(gap <= torch.finfo(said.dtype).eps ** 0.5 * said.double().abs().max()):
        raise PertokenError("check failed: the reloaded model's logits differ")
    return False


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode, each part of it as before behind it."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _greedy(model: Any, again: Any, tokenizer: Any, ids: list[int]) -> str:
    """Both write the same, and it survives decoding and encoding."""
    row = torch.tensor([ids], device=model.device)
    options: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS, "do_sample": False}
    options["attention_mask"] = torch.ones_like(row)
    before, after = (
        each.generate(row, **options)[0, len(ids) :].tolist() for each in (model, again)
    )
    _equal("greedy text", after, before)
    highest = max(after, default=0)
    if highest >= len(tokenizer):
        raise PertokenError(f"check failed: the model writes {highest}, which is no token")
    text = tokenizer.decode(after, skip_special_tokens=True)
    encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
    _equal("greedy text after a round trip", tokenizer.decode(encoded), text)
    same = "after a round trip" if model is again else "after reloading, and after a round trip"
    return f"greedy text is the same {same}: {text!r}"


def _equal(what: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        raise PertokenError(f"check failed: {what}: {found!r}, not {wanted!r}")
