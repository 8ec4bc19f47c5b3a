"""Next bytes of prompts cut anywhere: our byte model beside genlm-bytes, in one process.

    python bench/bytes_peer.py --out reports/bench/bytes.json

Both read the same prompts (GSM8K questions and HumanEval functions, odd numbers, cut at random
bytes, see `pertoken.reproduce._byte_texts`), then the text's own next bytes one after the other,
and give the distribution of the next byte each time. They take turns, prompt by prompt, and each
starts from scratch on every prompt: the peer's store of seen prefixes is emptied. Shown are the
share of right guesses, the bits of the byte that really follows, and seconds for the prompt and for
each byte behind it. The peer sums over a beam of `--beam` candidates, as in its own documentation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

BARS = {  # fixed before the first run
    "next byte right: ours minus genlm-bytes": ">= 0",
    "seconds per byte: genlm-bytes over ours": ">= 1",
    "seconds for the prompt: genlm-bytes over ours": ">= 1",
}
LONGEST = 120  # bytes of a prompt: the peer's time grows with its square
Walk = Iterator[Sequence[float]]
"""Probabilities of the 256 bytes (and more behind them), at the prompt's end and byte by byte."""


class Ours:
    """Our byte model; nothing is kept from prompt to prompt but tables of the vocabulary."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        from pertoken.decode import ByteModel

        self._byte_model = ByteModel(model, tokenizer)

    def walk(self, prefix: bytes, following: bytes) -> Walk:
        reader = self._byte_model.read(prefix)
        yield reader.log_probs().exp().tolist()
        for byte in following:
            reader.push(byte)
            yield reader.log_probs().exp().tolist()


class Genlm:
    """genlm-bytes on the same model object; its store of seen prefixes is emptied every time."""

    def __init__(self, model: Any, tokenizer: Any, beam: int, threshold: float) -> None:
        from genlm.backend.llm import AsyncTransformer
        from genlm.bytes import BeamParams, ByteBeamState

        # Its default waits 20 ms for more queries before each forward pass.
        self._llm = AsyncTransformer(model, tokenizer, timeout=0.0)
        self._loop = asyncio.new_event_loop()
        params = BeamParams(K=beam, prune_threshold=threshold)
        self._initial = self._now(ByteBeamState.initial(self._llm, params))

    def walk(self, prefix: bytes, following: bytes) -> Walk:
        self._llm.clear_cache()
        beam = self._now(self._initial.prefill(prefix))
        for byte in (*following, None):
            found = self._now(beam.logp_next())
            yield [math.exp(value) for value in found.ps]
            if byte is not None:
                beam = self._now(beam.prune() << byte)

    def close(self) -> None:
        """End its background task."""
        self._now(self._initial.cleanup())
        self._loop.close()

    def _now(self, coroutine: Any) -> Any:
        return self._loop.run_until_complete(coroutine)


def measure(walk: Walk, truth: bytes) -> dict[str, Any]:
    """Guesses against the bytes that really follow, with the seconds of the prompt and the rest.

    truth: one byte more than the walk is told, [bytes].

    >>> found = measure(iter([[0.0, 0.5, 0.25], [0.5, 0.25, 0.25]]), bytes([1, 2]))
    >>> found["hits"], found["bits"]
    (1, 3.0)
    """
    hits, bits, seconds = 0, 0.0, []
    for byte in truth:
        began = time.perf_counter()
        probs = next(walk)
        seconds.append(time.perf_counter() - began)
        hits += max(range(len(probs)), key=probs.__getitem__) == byte
        bits -= math.log2(max(probs[byte], 1e-30))
    return {
        "bytes": len(truth),
        "hits": hits,
        "bits": bits,
        "prompt_seconds": seconds[0],
        "byte_seconds": sum(seconds[1:]),
    }


def report(
    found: dict[str, list[dict[str, Any]]], settings: dict[str, Any], noise: dict[str, Any]
) -> dict[str, Any]:
    """Figures of both and the comparisons that have a bar, ready for JSON."""
    from pertoken._bootstrap import bootstrap, bootstrap_ratio
    from pertoken.reproduce._bars import Bar
    from pertoken.reproduce._machine import machine, versions

    def column(name: str, key: str) -> list[float]:
        return [float(row[key]) for row in found[name]]

    def points(a: Any, b: Any, n: Any) -> Any:
        return 100 * (a.sum(-1) - b.sum(-1)) / n.sum(-1)

    ours, theirs, size = column("ours", "hits"), column("genlm", "hits"), column("ours", "bytes")
    measured = {
        "next byte right: ours minus genlm-bytes": (
            100 * (sum(ours) - sum(theirs)) / sum(size),
            bootstrap(points, ours, theirs, size),
        )
    }
    for metric, key in (
        ("seconds per byte: genlm-bytes over ours", "byte_seconds"),
        ("seconds for the prompt: genlm-bytes over ours", "prompt_seconds"),
    ):
        slow, fast = column("genlm", key), column("ours", key)
        measured[metric] = (sum(slow) / sum(fast), bootstrap_ratio(slow, fast))
    return {
        "settings": settings,
        "timing": noise,
        "versions": versions(),
        "machine": machine(),
        "comparisons": [
            {
                "metric": metric,
                "here": here,
                "interval": interval,
                "bar": BARS[metric],
                "holds": Bar.parse(BARS[metric]).holds(here),
            }
            for metric, (here, interval) in measured.items()
        ],
        "figures": {name: figures(rows) for name, rows in found.items()},
    }


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Sums over all prompts of one contender, as shares and means."""
    size = sum(row["bytes"] for row in rows)
    walked = size - len(rows)
    return {
        "prompts": len(rows),
        "bytes": size,
        "percent_right": 100 * sum(row["hits"] for row in rows) / size,
        "bits_per_byte": sum(row["bits"] for row in rows) / size,
        "prompt_seconds": sum(row["prompt_seconds"] for row in rows) / len(rows),
        "seconds_per_byte": sum(row["byte_seconds"] for row in rows) / walked,
    }


def prompts(wanted: int, following: int, seed: int) -> list[tuple[bytes, bytes]]:
    """(prompt, the bytes behind it), half of them prose and half code, chosen by rule.

    following: how many bytes behind the first one. Prompts are the last `LONGEST` bytes before the
    cut, from a word on.
    """
    from pertoken.data import data
    from pertoken.reproduce._byte_texts import code, cuts, prose

    half = (wanted + 1) // 2
    texts = prose(data("gsm8k"), "report", half) + code(data("humaneval"), "report", half)
    found = []
    for text in texts[:wanted]:
        content = text.data
        places = [p for p in cuts(text, 8, seed) if p + following < len(content)]
        if places:
            place = places[text.number % len(places)]
            prefix = content[:place]
            if len(prefix) > LONGEST:
                prefix = prefix[-LONGEST:].partition(b" ")[2]
            found.append((prefix, content[place : place + following + 1]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--bytes", type=int, default=16, help="known bytes read behind each prompt")
    parser.add_argument("--beam", type=int, default=5, help="the peer's candidates")
    parser.add_argument("--threshold", type=float, default=0.05, help="the peer drops those below")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    try:
        peer = {"genlm-bytes": version("genlm-bytes"), "genlm-backend": version("genlm-backend")}
    except ImportError:
        print("genlm-bytes is not installed here (see bench/README.md)", file=sys.stderr)
        return 2
    import pertoken
    from pertoken.timing import alternate

    model, tokenizer = pertoken.load(given.model, dtype=given.dtype)
    genlm = Genlm(model, tokenizer, given.beam, given.threshold)
    contenders: dict[str, Ours | Genlm] = {"ours": Ours(model, tokenizer), "genlm": genlm}
    texts = prompts(given.prompts, given.bytes, given.seed)
    for contender in contenders.values():  # warm up
        list(contender.walk(b"Some wor", b"ds"))

    def turn(name: str) -> Any:
        def run(index: int) -> dict[str, Any]:
            prefix, truth = texts[index]
            return measure(contenders[name].walk(prefix, truth[:-1]), truth)

        return run

    run = alternate({name: turn(name) for name in contenders}, len(texts), retries=0)
    genlm.close()
    settings = {key: value for key, value in vars(given).items() if key != "out"}
    found = {name: run.values(name) for name in contenders}
    if not run.kept:
        print("all rounds were disturbed by other programs: nothing to show", file=sys.stderr)
        return 1
    written = report(found, settings | {"peers": peer}, run.noise())
    for row in written["comparisons"]:
        print(
            f"{row['metric']}: {row['here']:.3f} ({row['bar']}) {'holds' if row['holds'] else '-'}"
        )
    for name, row in written["figures"].items():
        print(name, json.dumps(row))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
