"""The law of every pair of kinds: what must hold where two methods are used together.

A law gets a bench and the two parts, the one whose kind comes first in `KINDS` first. It runs the
combination inside `attempt`, so that a refusal is told from an error in the law's own runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pertoken.errors import PertokenError
from pertoken.testing._bench import NEW, STOP, Bench, best
from pertoken.testing._parts import Part, gradient
from pertoken.testing.laws import LawBroken

Law = Callable[[Bench, Part, Part], None]


class Refused(Exception):
    """A combination was refused: the line, and the forwards that had run by then."""

    def __init__(self, line: str, forwards: int) -> None:
        super().__init__(line)
        self.line, self.forwards = line, forwards


def attempt(bench: Bench, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What the combination gives; raises `Refused` where it is refused."""
    with bench.counted() as forwards:
        try:
            return run(*args, **options)
        except PertokenError as error:
            raise Refused(str(error), forwards[0]) from None


def same(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raise `LawBroken` where two results differ at all."""
    if found.shape != expected.shape or not torch.equal(found, expected):
        raise LawBroken(f"{what}: {_first_difference(found, expected)}")


def close(found: float, expected: float, what: str) -> None:
    """Raise `LawBroken` where two sums of float32 logarithms are not the same."""
    if not abs(found - expected) < 1e-3:
        raise LawBroken(f"{what}: {found:.6f} is not {expected:.6f}")


def _first_difference(found: torch.Tensor, expected: torch.Tensor) -> str:
    if found.shape != expected.shape:
        return f"shape {list(found.shape)} is not {list(expected.shape)}"
    place = (found != expected).nonzero()[0].tolist()
    return f"at {place} {found[tuple(place)]} is not {expected[tuple(place)]}"


# -------------------------------------------------------------------------- ways of decoding


def drafter_constraint(bench: Bench, drafter: Part, _: Part) -> None:
    from pertoken.decode.constrained import Constrained

    run: dict[str, Any] = {"eos_token_id": STOP}
    drafted = Constrained(drafter.make(bench), bench.constraint)
    for what, options in (
        ("Constrained", {"custom_generate": drafted}),
        ("mask", {"custom_generate": drafter.make(bench), "logits_processor": [bench.mask()]}),
    ):
        found = attempt(bench, bench.write, bench.ids, **options, **run)
        same(found, bench.masked, what)
    ids, mask = bench.batch
    expected = bench.write(ids, mask, logits_processor=[bench.mask()], **run)
    options = {"custom_generate": drafter.make(bench), "logits_processor": [bench.mask()]}
    found = attempt(bench, bench.write, ids, mask, **options, **run)
    same(found, expected, "mask, in a batch")


def drafter_logits(bench: Bench, drafter: Part, logits: Part) -> None:
    for ids, mask in ((bench.ids, None), bench.batch):
        expected = bench.write(ids, mask, logits_processor=logits.make(bench))
        options = {"custom_generate": drafter.make(bench), "logits_processor": logits.make(bench)}
        found = attempt(bench, bench.write, ids, mask, **options)
        same(found, expected, f"{len(ids)} rows")


def drafter_cache(bench: Bench, drafter: Part, cache: Part) -> None:
    """One text, the next turn of it in the same cache, and a batch."""
    read = cache.make(bench)

    def drafted(cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        options = {"past_key_values": cache, "custom_generate": drafter.make(bench)}
        found: torch.Tensor = attempt(bench, bench.write, ids, mask, **options)
        return found

    text = drafted(read, bench.ids)
    if not cache.exact:
        same(text, bench.write(bench.ids, past_key_values=cache.make(bench)), "this cache")
        return
    same(text, bench.plain, "one row")
    longer = torch.cat((text, bench.ids[:, :3]), -1)
    expected = bench.once("the next turn", lambda: bench.write(longer))
    same(drafted(read, longer), expected, "the next turn")
    ids, mask = bench.batch
    expected = bench.once("a batch", lambda: bench.write(ids, mask))
    same(drafted(cache.make(bench), ids, mask), expected, "a batch")


def drafter_archive(bench: Bench, drafter: Part, archive: Part) -> None:
    options = {"past_key_values": archive.make(bench), "custom_generate": drafter.make(bench)}
    same(attempt(bench, bench.write, bench.ids, **options), bench.plain, "restored")


def _sample(bench: Bench, sampler: Any, **options: Any) -> torch.Tensor:
    ids = bench.ids.expand(2, -1)
    torch.manual_seed(0)
    run = {"do_sample": True, "top_k": 0, "eos_token_id": STOP, "custom_generate": sampler}
    return bench.write(ids, **run, **options)


def _weighed(
    bench: Bench, part: Part, options: Callable[[], dict[str, Any]], processors: Any = ()
) -> torch.Tensor:
    """Samples, whose weights must be those of the text read by hand through the same options."""
    sampler = part.make(bench)
    found: torch.Tensor = attempt(bench, _sample, bench, sampler, **options())
    for row, weight in zip(found, sampler.log_weights, strict=True):
        new = row[bench.ids.shape[1] :].tolist()
        new = new[: new.index(STOP) + 1] if STOP in new else new
        cache = options().get("past_key_values")
        close(weight, bench.weight(new, cache, processors), "the weight of a text")
    return found


def sampler_constraint(bench: Bench, sampler: Part, _: Part) -> None:
    found = _weighed(bench, sampler, lambda: {"logits_processor": [bench.mask(2)]}, [bench.mask(2)])
    new = found[:, bench.ids.shape[1] :]
    if bool((new % 5 == 2).any()):
        raise LawBroken("a sample holds what the mask refuses")


def sampler_logits(bench: Bench, sampler: Part, logits: Part) -> None:
    _weighed(bench, sampler, lambda: {"logits_processor": logits.make(bench)}, logits.make(bench))


def sampler_cache(bench: Bench, sampler: Part, cache: Part) -> None:
    found = _weighed(bench, sampler, lambda: {"past_key_values": cache.make(bench)})
    if cache.exact:
        same(found, _sample(bench, sampler.make(bench)), "samples with a full cache")


def sampler_archive(bench: Bench, sampler: Part, archive: Part) -> None:
    cache = archive.make(bench)
    cache.batch_repeat_interleave(2)
    found = attempt(bench, _sample, bench, sampler.make(bench), past_key_values=cache)
    same(found, _sample(bench, sampler.make(bench)), "samples without the archive")


def _chosen(
    bench: Bench, part: Part, ids: torch.Tensor, mask: Any = None, **options: Any
) -> torch.Tensor:
    """What a chooser writes under one seed."""
    torch.manual_seed(0)
    run = {"do_sample": True, "top_k": 0, "eos_token_id": STOP, **options}
    return bench.write(ids, mask, custom_generate=part.make(bench), **run)


def _as_one_by_one(bench: Bench, part: Part, make: Callable[[], list[Any]]) -> None:
    """The text is that of one trial after the other, both behind these processors."""
    from pertoken.testing._trial_by_trial import trial_by_trial

    found = attempt(bench, _chosen, bench, part, bench.ids, logits_processor=make())
    torch.manual_seed(0)
    run: dict[str, Any] = {"do_sample": True, "top_k": 0, "eos_token_id": STOP}
    run |= {"max_new_tokens": NEW, "logits_processor": make()}
    expected = trial_by_trial(part.make(bench), bench.model, bench.ids, **run)
    same(found, torch.cat((bench.ids, torch.tensor([expected])), -1), "one after the other")


def chooser_constraint(bench: Bench, chooser: Part, _: Part) -> None:
    _as_one_by_one(bench, chooser, lambda: [bench.mask()])


def chooser_logits(bench: Bench, chooser: Part, logits: Part) -> None:
    _as_one_by_one(bench, chooser, lambda: logits.make(bench))


def chooser_cache(bench: Bench, chooser: Part, cache: Part) -> None:
    """One text, the next turn of it in the same cache, and a batch."""
    read = cache.make(bench)
    text = attempt(bench, _chosen, bench, chooser, bench.ids, past_key_values=read)
    same(text, _chosen(bench, chooser, bench.ids), "one row")
    longer = torch.cat((text, bench.ids[:, :3]), -1)
    again = attempt(bench, _chosen, bench, chooser, longer, past_key_values=read)
    same(again, _chosen(bench, chooser, longer), "the next turn")
    ids, mask = bench.batch
    options = {"past_key_values": cache.make(bench)}
    found = attempt(bench, _chosen, bench, chooser, ids, mask, **options)
    same(found, _chosen(bench, chooser, ids, mask), "a batch")


def chooser_archive(bench: Bench, chooser: Part, archive: Part) -> None:
    options = {"past_key_values": archive.make(bench)}
    found = attempt(bench, _chosen, bench, chooser, bench.ids, **options)
    same(found, _chosen(bench, chooser, bench.ids), "restored")


def constraint_logits(bench: Bench, _: Part, logits: Part) -> None:
    from pertoken.decode import Constrained, Plain

    drafted = Constrained(Plain(), bench.constraint)
    run: dict[str, Any] = {"eos_token_id": STOP}
    expected = bench.write(bench.ids, logits_processor=[*logits.make(bench), bench.mask()], **run)
    options = {"custom_generate": drafted, "logits_processor": logits.make(bench)}
    same(attempt(bench, bench.write, bench.ids, **options, **run), expected, "Constrained")


def constraint_cache(bench: Bench, _: Part, cache: Part) -> None:
    from pertoken.decode import Constrained, Plain

    run: dict[str, Any] = {"eos_token_id": STOP}
    options = {"past_key_values": cache.make(bench), "logits_processor": [bench.mask()]}
    masked = attempt(bench, bench.write, bench.ids, **options, **run)
    by_hand = bench.by_hand(best([bench.mask()]), cache.make(bench))
    same(masked, by_hand[:, : masked.shape[1]], "mask")
    drafted = Constrained(Plain(), bench.constraint)
    options = {"past_key_values": cache.make(bench), "custom_generate": drafted}
    try:
        found = attempt(bench, bench.write, bench.ids, **options, **run)
    except Refused as refused:
        if cache.exact or refused.forwards:
            raise
        return
    same(found, bench.masked if cache.exact else masked, "Constrained")


def constraint_archive(bench: Bench, _: Part, archive: Part) -> None:
    options = {"past_key_values": archive.make(bench), "logits_processor": [bench.mask()]}
    found = attempt(bench, bench.write, bench.ids, **options, eos_token_id=STOP)
    same(found, bench.masked, "restored")


def logits_cache(bench: Bench, logits: Part, cache: Part) -> None:
    options = {"past_key_values": cache.make(bench), "logits_processor": logits.make(bench)}
    found = attempt(bench, bench.write, bench.ids, **options)
    same(found, bench.by_hand(best(logits.make(bench)), cache.make(bench)), "by hand")


def logits_logits(bench: Bench, one: Part, other: Part) -> None:
    for first, second in ((one, other), (other, one)):
        processors = [*first.make(bench), *second.make(bench)]
        found = attempt(bench, bench.write, bench.ids, logits_processor=processors)
        by_hand = bench.by_hand(best([*first.make(bench), *second.make(bench)]))
        same(found, by_hand, f"{first.name} first")


def cache_archive(bench: Bench, cache: Part, archive: Part) -> None:
    """A conversation is read through the cache, saved and restored."""
    import tempfile
    from pathlib import Path

    from pertoken.cache import restore_cache, save_cache

    read = cache.make(bench)
    bench.write(bench.ids, past_key_values=read)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "talk.ptkv"
        attempt(bench, save_cache, path, bench.model, bench.plain, cache=read)
        back = restore_cache(path, bench.model)
    for layer, other in zip(back.cache.layers, read.layers, strict=True):
        same(layer.keys, other.keys, "keys")
        same(layer.values, other.values, "values")


# ------------------------------------------------------------------------------ side by side


def side_by_side(bench: Bench, decoding: Part, beside: Part) -> None:
    """A text is read through a cache in two halves; the other method works in between."""
    text, other = bench.plain, bench.once(beside.name, lambda: beside.make(bench))

    @torch.no_grad()
    def read(between: Callable[[], Any]) -> torch.Tensor:
        cache = decoding.make(bench)
        half = max(int(cache.get_seq_length()) + 1, text.shape[1] // 2)
        bench.model(text[:, int(cache.get_seq_length()) : half], past_key_values=cache)
        with torch.enable_grad():
            between()
        logits: torch.Tensor = bench.model(text[:, half:], past_key_values=cache).logits
        return logits

    def work() -> None:
        words, values = beside.make(bench)
        same(values, other[1], beside.name)
        if words != other[0]:
            raise LawBroken(f"{beside.name}: {words!r} is not {other[0]!r}")

    expected = read(lambda: None)
    same(attempt(bench, read, work), expected, decoding.name)


def decode_its_text(bench: Bench, decoding: Part, text: Part) -> None:
    """The text that a method gives back is decoded as if typed by hand; both stay as they are."""
    words, values = bench.once(text.name, lambda: text.make(bench))
    ids = torch.tensor([bench.tokenizer(words, add_special_tokens=False)["input_ids"]])
    shorter = Bench(bench.model, bench.tokenizer)
    shorter.ids = ids
    alone(shorter, decoding)
    again = text.make(bench)
    same(again[1], values, text.name)


def text_text(bench: Bench, one: Part, other: Part) -> None:
    """Each takes the text that the other gives, and compression an attribution's scores too."""
    from pertoken.attribute import attribute
    from pertoken.prune import compress

    if "lm-cascades" in (one.name, other.name):
        for first, second in ((one, other), (other, one)):
            behind = Bench(bench.model, bench.tokenizer)
            behind.text = first.make(bench)[0]
            found = attempt(bench, second.make, behind)
            same(second.make(behind)[1], found[1], second.name)
        return
    signal = attribute(bench.model, bench.tokenizer, bench.text, "!", "occlusion")
    kept = attempt(bench, compress, bench.text, 0.6, salience=signal)
    count = round(len(kept.words) * 0.6)
    if len(kept.words) - len(kept.dropped) != count:
        raise LawBroken(f"{count} words were to be kept, not {kept!r}")
    run: dict[str, Any] = {"probes": 1, "max_steps": 4}
    again = attempt(bench, attribute, bench.model, bench.tokenizer, kept.text, "!", **run)
    if again.text != kept.text:
        raise LawBroken(f"explained {again.text!r} instead of {kept.text!r}")


def text_bytes(bench: Bench, text: Part, byte_model: Part) -> None:
    from pertoken.decode import ByteModel

    words, values = text.make(bench)
    model = ByteModel(bench.model, bench.tokenizer)
    law = attempt(bench, model.next_byte_log_probs, words[:20])
    close(float(law.logsumexp(0)), 0.0, "the mass of the next byte")
    same(text.make(bench)[1], values, text.name)


def loss_decoding(bench: Bench, decoding: Part, loss: Part) -> None:
    """On a text just drawn the ratio is 1: the loss's gradient is the policy gradient's."""
    text = attempt(bench, _text_of, bench, decoding)
    (_, found), expected = loss.make(bench, text), gradient(bench, text)
    if not torch.allclose(found, expected, atol=1e-12, rtol=1e-9):
        raise LawBroken("the gradient of a text just drawn is not the policy gradient")


def _text_of(bench: Bench, part: Part) -> torch.Tensor:
    if part.kind == "sampler":
        return _sample(bench, part.make(bench))[:1]
    if part.kind == "chooser":
        return _chosen(bench, part, bench.ids)
    if part.kind == "drafter":
        return bench.write(bench.ids, custom_generate=part.make(bench), do_sample=True, top_k=0)
    if part.kind == "constraint":
        return bench.masked
    return bench.write(bench.ids, logits_processor=part.make(bench))


# --------------------------------------------------------------------------- other tokenizers


def other_tokenizer(bench: Bench, part: Part, tokenizer: Part) -> None:
    """A part's own law on the model and tokenizer that come of the change."""
    changed: Bench = attempt(bench, bench.once, tokenizer.name, lambda: tokenizer.make(bench))
    alone(changed, part)


def tokenizer_tokenizer(bench: Bench, one: Part, other: Part) -> None:
    """Numbers by direction and a transplant, in either order."""
    first = attempt(bench, one.make, other.make(bench))
    second = attempt(bench, other.make, one.make(bench))
    same(first.ids, second.ids, "ids in either order")
    same(first.model(first.ids).logits, second.model(second.ids).logits, "logits in either order")


def alone(bench: Bench, part: Part) -> None:
    """What a part promises by itself, on this bench."""
    if part.kind == "drafter":
        found = attempt(bench, bench.write, bench.ids, custom_generate=part.make(bench))
        same(found, bench.plain, part.name)
    elif part.kind == "sampler":
        _weighed(bench, part, dict)
    elif part.kind == "chooser":
        _as_one_by_one(bench, part, list)
    elif part.kind == "constraint":
        same(bench.masked, bench.by_hand(best([bench.mask()]))[:, : bench.masked.shape[1]], "mask")
    elif part.kind == "logits":
        found = bench.write(bench.ids, logits_processor=part.make(bench))
        same(found, bench.by_hand(best(part.make(bench))), part.name)
    elif part.kind in ("cache", "archive"):
        found = bench.write(bench.ids, past_key_values=part.make(bench))
        same(found, bench.by_hand(best(), part.make(bench)), part.name)
        if part.exact or part.kind == "archive":
            same(found, bench.plain, part.name)
    elif part.kind == "bytes":
        _, law = attempt(bench, part.make, bench)
        close(float(law.logsumexp(0)), 0.0, "the mass of the next byte")
    else:
        words, values = attempt(bench, part.make, bench)
        same(values, part.make(bench)[1], part.name)
        known = bench.text.split()
        answered = part.name == "lm-cascades" and words.startswith(bench.text)
        if part.kind == "text" and not answered and not set(words.split()) <= set(known):
            raise LawBroken(f"{part.name}: {words!r} holds words that the text has not")
