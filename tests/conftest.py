"""Shared fixtures: one thread per test process, and the embedded model once per session."""

from __future__ import annotations

import os
from typing import Any

# Two test processes with two threads each would fight over two cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """(model in float32, tokenizer): fetched once, shared by all test processes through the cache.

    Leave no trace in them: other tests use the same objects. Mark tests that take it `model`.
    """
    import pertoken

    try:
        return pertoken.load("smollm2")
    except pertoken.PertokenError as error:
        if "did not answer" in str(error) and not os.environ.get("CI"):
            pytest.skip(f"no embedded model: {error}")
        raise
