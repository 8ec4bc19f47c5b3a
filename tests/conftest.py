"""Shared fixtures: one thread per test process, and the embedded model once per session."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A local folder with a tiny random Llama (float32, 512 positions) and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from pertoken.testing import tiny_model

    folder = tmp_path_factory.mktemp("model")
    letters = {
        sign: 1 + place for place, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = Tokenizer(models.BPE({"</s>": 0, **letters}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    model = tiny_model("llama", vocab_size=257, dtype=torch.float32)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def other_folder(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model with a tokenizer of as many tokens, two of which have changed places."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(tiny_folder, folder)
    rules = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocab = rules["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(rules), "utf-8")
    return str(folder)


@pytest.fixture(scope="session")
def run_module() -> Callable[..., str]:
    """`run_module(tree, "pertoken", "list")`: a module run in a copy of the source tree; its
    standard output."""

    def run(tree: Path, *command: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
