"""What a figure was measured with: versions of the software and the kind of machine."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pertoken
from pertoken.catalog import source_tree

PACKAGE = Path(__file__).resolve().parent.parent


def versions() -> dict[str, str]:
    """Versions of python, pertoken and what it computes with, and the commit in a checkout."""
    found = {"pertoken": pertoken.__version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    commit = _commit()
    return {**found, "commit": commit} if commit else found


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, cores, threads, memory and device; nothing that names the host.

    threads: what torch computes with; cores: what this process may run on.
    """
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "device": _device_name(device),
        "system": f"{platform.system()} {platform.machine()}",
    }


@cache
def _commit() -> str:
    root = source_tree()
    if root is None:
        return ""
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "src")
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{commit} with local changes" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
    )
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _device_name(device: str) -> str:
    import torch

    if device.startswith("cuda") and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return device
